"""The commands of an installed copy. Each runs one of the four scripts, as `python SCRIPT` in a checkout.

A checkout has the scripts at its root; pyproject.toml installs them into the package `dreambooth.scripts`.
"""

import runpy


def train() -> None:
    """dreambooth-train."""
    _run("train_dreambooth_lora")


def class_images() -> None:
    """dreambooth-class-images."""
    _run("generate_class_images")


def infer() -> None:
    """dreambooth-infer."""
    _run("infer")


def convert() -> None:
    """dreambooth-convert."""
    _run("convert_adapter")


def _run(script: str) -> None:
    # not imported: as __main__ a script parses its options before it imports torch
    runpy.run_module(f"dreambooth.scripts.{script}", run_name="__main__")
