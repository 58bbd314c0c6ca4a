"""What the DreamBooth scripts share."""

import os

# Set before the libraries are imported, and only where the user has not: their import-time remarks (about a missing torchvision, which
# nothing here needs) and forks of the tokenizers would drown what a run has to say; code that comes with a base is never run.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
