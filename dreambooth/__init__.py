"""What the six scripts share, and the settings of the libraries they import."""

import logging
import os

# The libraries read these when they are imported; values that the user has set win. At import the libraries
# warn about packages that nothing here needs (torchvision), and tokenizers about forked processes: that would
# hide the run's own messages. Code that comes with a base is never run.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
# peft imports torchao wherever it is installed. torchao then warns about kernels that this torch cannot load.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
