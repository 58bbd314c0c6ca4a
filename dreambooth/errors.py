"""The one exception for what a user can put right. The scripts print its message and exit with status 2."""


class UserError(Exception):
    """The message names the flag or file, the rule, what was found, and what to do. Several problems come as several lines."""
