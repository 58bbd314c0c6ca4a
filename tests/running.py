"""What tests share that start a script: its words, a run in this process, and what the run wrote."""

import hashlib
import json
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import processes
from dreambooth.runtime.stops import Stop, Watch

ROOT = Path(__file__).parent.parent


def train_words(base: Path, photos: Path, out: Path, *more: str) -> list[str]:
    words = f"--pretrained_model_name_or_path {base} --instance_data_dir {photos} --output_dir {out} --resolution 64 --train_batch_size 1"
    return [
        *words.split(),
        "--instance_prompt",
        "a photo of sks dog",
        "--seed",
        "1",
        "--report_to",
        "none",
        "--lr_warmup_steps",
        "0",
        *more,
    ]


def run_train(base: Path, photos: Path, out: Path, *more: str) -> Path:
    """Train in process and return the adapter file."""
    train.main(parse(TrainOptions, "", train_words(base, photos, out, *more)))
    return out / native.ADAPTER_NAME


def prior_words(folder: Path, *more: str) -> list[str]:
    words = f"--with_prior_preservation --class_data_dir {folder} --num_class_images 3 --class_inference_steps 2 --sample_batch_size 2"
    return [*words.split(), "--class_prompt", "a photo of dog", *more]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(out: Path) -> list[dict]:
    """The records of steps."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "memory" not in record]


def together(work: Callable[[processes.Peers], Any], count: int = 2) -> list[Any]:
    """What `work` gives on each of so many processes; `Stop: ...` or `UserError: ...` if it raises one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                try:
                    settings = {
                        "RANK": rank,
                        "LOCAL_RANK": rank,
                        "WORLD_SIZE": count,
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port,
                    }
                    os.environ.update(
                        {name: str(value) for name, value in settings.items()}, ACCELERATE_USE_CPU="true"
                    )
                    AcceleratorState._reset_state(reset_partial_state=True)
                    try:
                        result = work(processes.join(Watch(), peer_timeout=4))
                    except (Stop, UserError) as error:
                        result = f"{type(error).__name__}: {error}"
                    Path(folder, str(rank)).write_text(json.dumps(result))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        paths = [Path(folder, str(rank)) for rank in range(count)]
        return [json.loads(path.read_text()) if path.exists() else None for path in paths]
