"""What tests share that start a script: its words, a run in this process, and what the run wrote."""

import hashlib
import json
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import processes
from dreambooth.runtime.stops import Stop, Watch

ROOT = Path(__file__).parent.parent


def train_words(base: Path, photos: Path, out: Path, *more: str) -> list[str]:
    words = (
        f"--pretrained_model_name_or_path {base} --instance_data_dir {photos} --output_dir {out} "
        "--resolution 64 --train_batch_size 1"
    )
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


def adapter_after(run: Path, step: int) -> Path:
    """The adapter file in a run's checkpoint."""
    return run / f"checkpoint-{step}" / native.ADAPTER_NAME


def prior_words(folder: Path, *more: str) -> list[str]:
    words = (
        f"--with_prior_preservation --class_data_dir {folder} --num_class_images 3 "
        "--class_inference_steps 2 --sample_batch_size 2"
    )
    return [*words.split(), "--class_prompt", "a photo of dog", *more]


def how_steps_were_taken(adapter: Path) -> str:
    """Whether the steps of a finished run were replayed, or launched and why, by its status.json."""
    return str(json.loads((adapter.parent / "status.json").read_text())["cuda_graph"])


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two adapter files have the same values. The files also hold flags, which may differ."""
    tensors, others = load_file(one), load_file(other)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in others)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(out: Path) -> list[dict]:
    """The records of steps."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def meter_records(out: Path) -> list[dict]:
    """The records of measurements, without the seconds that they took."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if "meter" in record]
    for record in measured:
        del record["meter"]["seconds"]
    return measured


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def on_processes(work: Callable[[], Any], count: int = 2) -> list[Any]:
    """What `work` returns in each of `count` processes of one job, by rank; None where it raised.

    The processes are forked from this one, which has imported what they need. The real launchers are tried in
    tests/faults.
    """
    port = free_port()
    at_work, ended = os.pipe()  # every process but the first holds one end open for as long as it lives
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                os.close(at_work if rank else ended)
                try:
                    job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in job.items()})
                    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
                    AcceleratorState._reset_state(reset_partial_state=True)
                    Path(folder, str(rank)).write_text(json.dumps(work()))
                except BaseException:
                    traceback.print_exc()
                finally:
                    if rank == 0:
                        os.read(at_work, 1)  # the others meet here, some of them perhaps only now
                    os._exit(0)
            children.append(child)
        os.close(at_work)
        os.close(ended)
        for child in children:
            os.waitpid(child, 0)
        paths = [Path(folder, str(rank)) for rank in range(count)]
        return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def together(work: Callable[[processes.Peers], Any], count: int = 2) -> list[Any]:
    """As `on_processes`, for work that takes the peers; `Stop: ...` or `UserError: ...` where it raised
    one."""

    def joined() -> Any:
        try:
            peers = processes.join(Watch(), peer_timeout=4)
            peers.barrier()  # else a process that ends early may be lost before the others have joined
            return work(peers)
        except (Stop, UserError) as error:
            return f"{type(error).__name__}: {error}"

    return on_processes(joined, count)


def main_on_two_processes(main: Callable[[Any], None], options: Any) -> None:
    """Run a script's `main` on two processes of one job. Both must succeed."""

    def work() -> bool:
        main(options)
        return True

    assert on_processes(work) == [True, True]


def as_main(script: str, *words: str) -> tuple[int, str]:
    """(exit status, standard error) of a script run as `python SCRIPT words...`, in a process forked from
    this one."""
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(errors.fileno(), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                sys.argv = [script, *words]
                AcceleratorState._reset_state(reset_partial_state=True)
                runpy.run_path(str(ROOT / script), run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return code, errors.read().decode()
