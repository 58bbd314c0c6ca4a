"""Runs with the words of diffusers' own tests."""

import json
import os
from pathlib import Path
from typing import Any

import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions

ROOT = Path(__file__).parent.parent.parent


COMMON = "--instance_prompt photo --resolution 64 --train_batch_size 1 --gradient_accumulation_steps 1"


TWO_STEPS = (
    "--max_train_steps 2 --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0"
)


def run(base: Path, data: Path, out: Path, words: str, photos_flag: str = "--instance_data_dir") -> Path:
    """Train in this process with the words of a command line, and return the adapter file."""
    line = f"--pretrained_model_name_or_path {base} {photos_flag} {data} --output_dir {out} {COMMON} {words}"
    train.main(parse(TrainOptions, "", line.split()))
    return out / native.ADAPTER_NAME


def checkpoints_in(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if "checkpoint" in name}


def records(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "loss" in record]


def spy(monkeypatch, owner: Any, name: str, see: Any) -> None:
    """Call `see` with what `owner.name` is called with, and its result, each time."""
    real = getattr(owner, name)

    def watched(*args: Any, **others: Any) -> Any:
        result = real(*args, **others)
        see(result, *args, **others)
        return result

    monkeypatch.setattr(owner, name, watched)
