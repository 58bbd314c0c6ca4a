"""YAML files that a flag names: flags (--config) and sets of adapters (--adapters_file)."""

from pathlib import Path
from typing import Any

from dreambooth.errors import UserError, reason_of

_LARGEST = 2**20  # bytes


def load(path: Path, where: str, content: str) -> tuple[Any, Any]:
    """(the file's content, its tree of YAML nodes; None for an empty file).

    Messages begin with `where`; `content` names what the file should hold. Raises UserError if the file
    cannot be read, is larger than a megabyte, or is not YAML.
    """
    import yaml

    try:
        # Reading a pipe would wait for ever.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{where}: not a regular file")
        if path.is_file() and path.stat().st_size > _LARGEST:
            raise UserError(f"{where}: {path.stat().st_size:,} bytes are no table of {content}")
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    # ValueError: a date such as 2026-02-31, or bytes that are not UTF-8. TypeError: a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: not a YAML file: {reason_of(error)}") from None
