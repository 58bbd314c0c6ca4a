"""What the modules of faults under whole runs share: words of a run, processes that run it, what they did.

A trainer takes seconds to import what it needs, so runs of one process are forked from this one, which has
imported it.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import stops
from tests import tiny
from tests.faults import inject
from tests.running import free_port, on_processes

ROOT = Path(__file__).parent.parent.parent
SCRIPT = str(ROOT / "train_dreambooth_lora.py")
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LIMIT = 120.0  # seconds that anything here may take


class World:
    """A tiny base, photos, class images, and the words that train on them. All that could make runs differ is
    on."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self.folder = folder
        self.base = tiny.build_pipeline(folder / "base")
        self.photos = tiny.make_photos(folder / "photos", 5, (90, 64))  # not square: crops are drawn

    def words(self, out: Path, *, steps: int, world: int = 1, every: int = 2) -> list[str]:
        """One step takes four micro-batches, on however many processes."""
        words = f"""--pretrained_model_name_or_path {self.base} --instance_data_dir {self.photos}
            --output_dir {out} --resolution 64 --seed 1 --train_batch_size 1
            --gradient_accumulation_steps {4 // world} --max_train_steps {steps}
            --checkpointing_steps {every} --train_text_encoder --lora_dropout 0.1
            --with_prior_preservation --class_data_dir {self.folder / "class"} --num_class_images 3
            --class_inference_steps 2 --lr_scheduler linear --lr_warmup_steps 2 --report_to none
            --num_threads 1 --peer_timeout 10"""
        return [*words.split(), "--instance_prompt", "a photo of sks dog", "--class_prompt", "a photo of dog"]

    def command(
        self, words: Sequence[str], *, launcher: str, world: int = 1, faults: dict[str, Any] | None = None
    ) -> list[str]:
        """A command line for `launcher`: torchrun or accelerate."""
        script = ["-m", "tests.faults.inject", json.dumps(faults), SCRIPT] if faults else [SCRIPT]
        if launcher == "torchrun":
            front = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                str(world),
                "--master_port",
                str(free_port()),
            ]
        else:
            config = "cpu.yaml" if world == 1 else "cpu_processes.yaml"
            front = [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                str(ROOT / "configs/accelerate" / config),
            ]
            front += ["--num_processes", str(world), "--main_process_port", str(free_port())]
        return [*front, *script, *words]

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen:
        with log.open("a") as file:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def run(
        self, words: Sequence[str], *, launcher: str, world: int = 1, faults: dict[str, Any] | None = None
    ) -> tuple[int, str, float]:
        """(exit status, all that was printed, seconds)."""
        log = self.folder / f"log-{time.monotonic_ns()}"
        started = time.monotonic()
        process = self.start(self.command(words, launcher=launcher, world=world, faults=faults), log)
        try:
            code = process.wait(LIMIT)
        finally:
            end_all(process)
        return code, log.read_text(), time.monotonic() - started


def end_all(process: subprocess.Popen) -> None:
    """Kill the remaining processes of a launcher, and its workers, which have sessions of their own."""
    for pid in [*children(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def children(pid: int) -> list[int]:
    """The descendants of a process, deepest last."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *children(int(child))]
    return found


def workers(pid: int) -> list[int]:
    """The training processes under a launcher, by rank: those that run the script and are no launcher."""
    found = []
    for child in [pid, *children(pid)]:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            environment = dict(
                line.partition("=")[::2] for line in Path(f"/proc/{child}/environ").read_text().split("\0")
            )
            if (
                SCRIPT in words
                and "torch.distributed.run" not in words
                and "accelerate.commands.launch" not in words
            ):
                found.append((int(environment.get("RANK", "0")), child))
    return [child for _, child in sorted(found)]


def forked(work: Callable[[], object], log: Path) -> int:
    """Fork a child that does `work` as a script would. Returns its process id. Its SystemExit is its exit
    status."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update(ENVIRONMENT)
        for number in (
            stops.SIGNALS
        ):  # a shell ignores SIGINT for what it runs in the background, and a trainer respects that
            signal.signal(number, signal.SIG_DFL)
        print_to(log)
        AcceleratorState._reset_state(reset_partial_state=True)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def print_to(log: Path) -> None:
    """From now on this process prints to the end of `log`."""
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)  # pytest has put others there


def train_on_forked_processes(words: list[str], log: Path, count: int) -> int:
    """0 if all processes of one job have trained, else 1."""

    def work() -> bool:
        print_to(log)
        train.main(parse(TrainOptions, "", words))
        return True

    return 0 if on_processes(work, count) == [True] * count else 1


def train_forked(words: Sequence[str], log: Path, faults: dict[str, Any] | None = None) -> int:
    def work() -> None:
        inject.install(faults or {}, train.Training)
        train.main(parse(TrainOptions, "", words))

    return forked(work, log)


def ended(child: int, limit: float = LIMIT) -> int:
    """Exit status of a forked child. After `limit` seconds the child is killed and TimeoutError raised."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a run did not end within {limit} s")


def steps_done(out: Path) -> int:
    """Steps in metrics.jsonl."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"loss":') if path.exists() else 0


def wait_for_step(out: Path, step: int, *, alive: Callable[[], bool]) -> None:
    """Return once `step` is recorded, or the run has ended."""
    end = time.monotonic() + LIMIT
    while steps_done(out) < step and alive() and time.monotonic() < end:
        time.sleep(0.005)


def hashes(out: Path, step: int) -> str:
    """One hash of a run's adapter and of the optimizer in its checkpoint."""
    digest = hashlib.sha256((out / native.ADAPTER_NAME).read_bytes())
    digest.update((out / f"checkpoint-{step}" / "optimizer.safetensors").read_bytes())
    return digest.hexdigest()


def is_running(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
    return Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()
