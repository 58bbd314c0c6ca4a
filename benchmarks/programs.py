"""What the benchmarks of whole programs share: running one, photos of noise, the flags that both trainers
have, a reference that cannot run, and tables in pages. Imports no torch."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "diffusers", "peft", "transformers", "accelerate")
NOISE_IMAGES = 8  # class images of noise that exist before training


class Failed(Exception):
    """A run that failed. The message ends with the tail of its output."""


@dataclasses.dataclass(frozen=True)
class Folders:
    """The folders that a program writes."""

    work: Path

    @property
    def output(self) -> Path:
        """Output folder of a program. It is removed before and after it."""
        return self.work / "output"

    @property
    def drawn(self) -> Path:
        """Class images that a program draws. They are removed before and after it."""
        return self.work / "class_images"


def training_words(
    base: Path, photos: Path, output: Path, *, side: int, batch: int, steps: int, tracker: str
) -> list[str]:
    """Flags that both trainers have, without those of the adapter."""
    return [
        *("--pretrained_model_name_or_path", str(base)),
        *("--instance_data_dir", str(photos), "--instance_prompt", "a photo of a sks dog"),
        *("--output_dir", str(output), "--resolution", str(side), "--train_batch_size", str(batch)),
        *("--max_train_steps", str(steps), "--seed", "0", "--report_to", tracker),
    ]


def end_all(process: subprocess.Popen) -> None:
    """End a run and its launcher's workers.

    SIGTERM goes first: a launcher ends its workers on it, and SIGKILL does not reach their sessions."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def running(
    words: Sequence[str], log: Path, *, cwd: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    """Start Python with `words`. At the end of the block the process and its workers are ended. What it
    prints goes to `log`."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                end_all(process)


def make_photos(folder: Path, side: int, count: int) -> None:
    """Write `count` pictures of smooth noise, as JPEG if they are many. Pictures that exist are kept."""
    if len(list(folder.glob("photo-*"))) == count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)  # photos and class images differ: a class image may be no photo
    suffix = "png" if count <= NOISE_IMAGES else "jpg"
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"photo-{number:05d}.{suffix}")


def versions() -> dict[str, str]:
    """The versions of the packages that figures depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def sha256_of(reference: Path | None) -> str | None:
    """SHA-256 of diffusers' script; None without it."""
    return hashlib.sha256(reference.read_bytes()).hexdigest() if reference else None


def mistakes_of_reference(reference: Path | None, reference_path: Path | None) -> list[str]:
    """One message for each package that diffusers' script lacks."""
    messages = []
    if reference_path and not (reference_path / "torchvision").is_dir():
        messages.append(f"--reference_path: {reference_path} has no torchvision")
    if reference and not (reference_path or importlib.util.find_spec("torchvision")):
        messages.append(
            "--reference needs torchvision: pip install --no-deps --target FOLDER torchvision==0.28.0, "
            "and --reference_path FOLDER"
        )
    if reference and not importlib.util.find_spec("tensorboard"):
        messages.append("--reference needs tensorboard: pip install '.[tensorboard]'")
    return messages


def rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def write_page(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put `text` between two marks of a page. Raises RuntimeError unless the marks are there once."""
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    before = page.read_text(encoding="utf-8")
    content, count = pattern.subn(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", before)
    if count != 1:
        raise RuntimeError(f"{page.name} must have the marks of the table once, has them {count} times")
    page.write_text(content, encoding="utf-8")
