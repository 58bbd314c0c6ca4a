"""The commands of an installed copy. Each runs one of the six scripts, as `python SCRIPT` in a checkout. A
checkout has the scripts at its root; pyproject.toml installs them into the package `dreambooth.scripts`."""

import functools
import runpy


def _run(script: str) -> None:
    # not imported: as __main__ a script parses its options before it imports torch
    runpy.run_module(f"dreambooth.scripts.{script}", run_name="__main__")


train = functools.partial(_run, "train_dreambooth_lora")
class_images = functools.partial(_run, "generate_class_images")
infer = functools.partial(_run, "infer")
evaluate = functools.partial(_run, "evaluate")
check_photos = functools.partial(_run, "check_photos")
convert = functools.partial(_run, "convert_adapter")
