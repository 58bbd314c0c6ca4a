"""Counts of faults under whole runs: processes killed, stopped, hung and lost, alone and under the real
launchers.

Every result is compared with an unbroken run of the same program on the same machine; no hash is stored. A
trainer takes seconds to import what it needs, so runs of one process are forked from this one, which has
imported it.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.state import AcceleratorState

import generate_class_images
import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.data import class_images
from dreambooth.files import checkpoint_folders
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import stops
from tests import tiny
from tests.faults import inject
from tests.running import as_main, free_port, on_processes

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


# --- what is tried


def exact_worlds(
    world: World,
    *,
    sizes: Sequence[int] = (1, 2, 4),
    resumes: Sequence[tuple[int, int]] = ((1, 2), (2, 4), (4, 1)),
    launchers: Mapping[int, str] = MappingProxyType({2: "torchrun", 4: "accelerate"}),
) -> dict[str, Any]:
    """The same run on 1, 2 and 4 processes, and resumed on another number of them. A control has another
    seed. Processes without a launcher of their number are forked from this one."""
    steps, found = 4, {}

    def go(name: str, size: int, *more: str) -> str:
        words = [*world.words(world.folder / name, steps=steps, world=size), *more]
        file = world.folder / f"{name}.log"
        if size in launchers:
            code, log, _ = world.run(words, launcher=launchers[size], world=size)
        elif size == 1:
            code = ended(train_forked(words, file))
            log = file.read_text()
        else:
            code = train_on_forked_processes(words, file, size)
            log = file.read_text()
        if code:
            raise RuntimeError(f"{name} ended with {code}:\n{log[-3000:]}")
        if f"training on {size} process" not in log:
            raise RuntimeError(f"{name} was not on {size} processes:\n{log[-3000:]}")
        return hashes(world.folder / name, steps)

    for size in sizes:
        found[f"on {size}"] = go(f"world-{size}", size)
    for before, after in resumes:
        name = f"world-{before}-to-{after}"
        out = world.folder / name
        shutil.copytree(world.folder / f"world-{before}", out)
        shutil.rmtree(out / "checkpoint-4")
        (out / native.ADAPTER_NAME).unlink()
        found[f"{before} to {after}"] = go(name, after, "--resume_from_checkpoint", "latest")
    control = go("world-control", 1, "--seed", "2", "--class_seed", "1")
    equal = len(set(found.values())) == 1
    return {"worlds": list(found), "worlds_equal": equal, "control_differs": control not in found.values()}


def chaos(world: World, *, faults: int = 40, seed: int = 0, share_of_two: float = 0.3) -> dict[str, Any]:
    """Faults at random moments of one long run, on one process or two at random, each followed by a
    restart."""
    draw, every, steps = random.Random(seed), 3, 5 * faults
    whole, out = world.folder / "chaos-whole", world.folder / "chaos"
    if code := ended(
        train_forked(world.words(whole, steps=steps, every=every), world.folder / "chaos-whole.log")
    ):
        raise RuntimeError(f"the unbroken run ended with {code}")
    log = world.folder / "chaos.log"
    injected, recovered = 0, 0
    lost: list[int] = []
    kinds: dict[str, int] = {}
    while True:
        size = 2 if draw.random() < share_of_two else 1
        words = [
            *world.words(out, steps=steps, every=every, world=size),
            "--resume_from_checkpoint",
            "latest",
        ]
        there = checkpoint_folders.choose("latest", out).folder if out.exists() else None
        started_at = int(there.name.rpartition("-")[2]) if there else 0
        if injected == faults:
            final = train_forked(
                world.words(out, steps=steps, every=every) + ["--resume_from_checkpoint", "latest"], log
            )
            code = ended(final)
            recovered += code == 0
            break
        reach = started_at + draw.randrange(1, 6)
        if size == 1:
            pid = train_forked(words, log, {"slow": 0.005})
            launcher = None
        else:
            launcher = world.start(
                world.command(words, launcher="torchrun", world=2, faults={"slow": 0.005}), log
            )
            pid = launcher.pid
        before = steps_done(out)
        end = time.monotonic() + LIMIT
        while steps_done(out) > started_at and is_running(pid) and time.monotonic() < end:
            time.sleep(0.002)  # until the run has cut the records of steps that the last fault undid
        wait_for_step(out, reach, alive=lambda pid=pid: is_running(pid))  # type: ignore[misc]
        time.sleep(draw.random() * 0.05)
        kind = draw.choice(["kill all", "terminate"] if size == 1 else ["kill all", "kill one", "terminate"])
        ranks = workers(pid) if launcher else [pid]
        if len(ranks) != size or steps_done(out) < reach:
            raise RuntimeError(
                f"the run ended before its fault: {ranks}, steps {before}, {steps_done(out)}, {reach}\n"
                f"{log.read_text()[-3000:]}"
            )
        for victim in {"kill all": ranks, "kill one": [draw.choice(ranks)], "terminate": [pid]}[kind]:
            os.kill(victim, signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM)
        done = steps_done(out)
        if launcher:
            launcher.wait(LIMIT)
            end_all(launcher)
        else:
            ended(pid)
        injected += 1
        kinds[f"{kind}, {size}"] = kinds.get(f"{kind}, {size}", 0) + 1
        newest = checkpoint_folders.choose("latest", out).folder
        lost.append(max(0, done - (int(newest.name.rpartition("-")[2]) if newest else 0)))
        recovered += injected > 1  # the restart that this fault struck had gone on from the one before
    equal = hashes(out, steps - steps % every) == hashes(whole, steps - steps % every) and adapter(
        out
    ) == adapter(whole)
    mean = sum(lost) / len(lost)
    return {
        "faults_injected": injected,
        "faults_recovered": recovered,
        "fault_kinds": dict(sorted(kinds.items())),
        "final_hash_equal": equal,
        "steps_lost_max": max(lost),
        "steps_lost_mean": round(mean, 2),
        "checkpoint_interval": every,
    }


def adapter(out: Path) -> bytes:
    return (out / native.ADAPTER_NAME).read_bytes()


def seconds_to_stop(world: World, *, times: int = 5) -> dict[str, Any]:
    """SIGTERM, SIGINT and SIGUSR1 to a run of one process: seconds until it has ended.

    A stop is right if the last step is saved and the exit status is the documented one."""
    seconds, right = [], 0
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    for turn in range(times):
        for number in numbers:
            out = world.folder / f"stop-{turn}-{number}"
            pid = train_forked(
                world.words(out, steps=500, every=500), world.folder / "stop.log", {"slow": 0.05}
            )
            wait_for_step(out, 2, alive=lambda pid=pid: is_running(pid))  # type: ignore[misc]
            started = time.monotonic()
            os.kill(pid, number)
            code = ended(pid, 30)
            seconds.append(time.monotonic() - started)
            status = json.loads((out / "status.json").read_text())
            saved = checkpoint_folders.choose("latest", out).folder
            right += (
                code == 128 + number
                and status["state"] == "stopped"
                and saved is not None
                and saved.name == f"checkpoint-{status['step']}"
            )
    return {
        "stops": len(seconds),
        "stops_right": right,
        "seconds_to_stop_median": round(sorted(seconds)[len(seconds) // 2], 2),
        "seconds_to_stop_max": round(max(seconds), 2),
    }


def launcher_stopped(world: World) -> dict[str, Any]:
    """SIGTERM to torchrun with two processes: both end, and the last completed step is there."""
    out = world.folder / "launcher-stopped"
    command = world.command(
        world.words(out, steps=500, every=500, world=2), launcher="torchrun", world=2, faults={"slow": 0.05}
    )
    process = world.start(command, world.folder / "launcher-stopped.log")
    wait_for_step(out, 2, alive=lambda: process.poll() is None)
    ranks = workers(process.pid)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    seconds = time.monotonic() - started
    gone = not any(is_running(pid) for pid in ranks)
    end_all(process)
    status = json.loads((out / "status.json").read_text())
    saved = checkpoint_folders.choose("latest", out).folder
    right = code != 0 and gone and len(ranks) == 2 and status["reason"] == "stopped by SIGTERM"
    return {
        "launcher_stopped": right and saved is not None and saved.name == f"checkpoint-{status['step']}",
        "launcher_stop_seconds": round(seconds, 1),
    }


def launcher_killed(world: World) -> dict[str, Any]:
    """SIGKILL to `accelerate launch` with one process, which gets no signal. The process must save and
    end."""
    out = world.folder / "launcher-killed"
    command = world.command(
        world.words(out, steps=500, every=500), launcher="accelerate", faults={"slow": 0.05}
    )
    process = world.start(command, world.folder / "launcher-killed.log")
    wait_for_step(out, 2, alive=lambda: process.poll() is None)
    (trainer,) = workers(process.pid)
    started = time.monotonic()
    process.kill()
    process.wait()
    while is_running(trainer) and time.monotonic() - started < 30:
        time.sleep(0.05)
    seconds, gone = time.monotonic() - started, not is_running(trainer)
    with contextlib.suppress(ProcessLookupError):
        os.kill(trainer, signal.SIGKILL)
    status = json.loads((out / "status.json").read_text())
    saved = checkpoint_folders.choose("latest", out).folder
    right = (
        gone
        and status["reason"] == "the launcher died"
        and saved is not None
        and saved.name == f"checkpoint-{status['step']}"
    )
    return {"launcher_killed": right, "launcher_killed_seconds": round(seconds, 1)}


def peers_lost(world: World, kinds: Sequence[str] = ("kill", "raise", "leave", "hang")) -> dict[str, Any]:
    """One process of two is killed, raises, exits with 0, or hangs.

    The job must end and name the process, and the other one's last step must be saved."""
    found = {}
    for kind in kinds:
        out = world.folder / f"peer-{kind}"
        words = world.words(out, steps=6, every=50, world=2)
        code, log, seconds = world.run(words, launcher="torchrun", world=2, faults={kind: [4, 1]})
        saved = checkpoint_folders.choose("latest", out).folder
        named = "process 1 of 2 (counted from 0) died or hangs" in log
        found[kind] = {
            "right": code != 0 and named and saved is not None and saved.name == "checkpoint-3",
            "seconds": round(seconds, 1),
        }
    return {"peers_lost": found}


def not_a_number_on_one(world: World) -> dict[str, Any]:
    """A loss that is not a number on one process of two. Both must stop before the step, and name the
    picture."""
    out = world.folder / "nan"
    code, log, _ = world.run(
        world.words(out, steps=6, every=50, world=2), launcher="torchrun", world=2, faults={"nan": [4, 1]}
    )
    saved = checkpoint_folders.choose("latest", out).folder
    right = (
        code != 0
        and "the loss of step 4 is not finite" in log
        and "photo-" in log
        and saved is not None
        and saved.name == "checkpoint-3"
    )
    return {"not_a_number_stopped": right}


def disk_full(world: World) -> dict[str, Any]:
    """Files may not grow past 20 kB, as on a full disk.

    A failed checkpoint is a message, and the run goes on. A failed adapter ends it with status 1."""
    out, log = world.folder / "full", world.folder / "full.log"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        train.main(parse(TrainOptions, "", world.words(out, steps=4)))

    code = ended(forked(work, log))
    said, status = log.read_text(), json.loads((out / "status.json").read_text())
    right = (
        code == 1
        and steps_done(out) == 4
        and "checkpoint-2 could not be saved: File too large" in said
        and status["state"] == "failed"
    )
    return {
        "disk_full": right and not any(path.name.startswith((".tmp", "checkpoint")) for path in out.iterdir())
    }


def two_runs(world: World) -> dict[str, Any]:
    """A second run in the folder of one that is at work is refused; the first one goes on unharmed."""
    out, log = world.folder / "two", world.folder / "two.log"
    words = world.words(out, steps=20, every=20)
    first = train_forked(words, log, {"slow": 0.05})
    wait_for_step(out, 2, alive=lambda: is_running(first))
    code, said = as_main("train_dreambooth_lora.py", *words)
    unharmed = ended(first) == 0 and steps_done(out) == 20
    return {
        "second_run_refused": code == 2
        and f"another run is at work in {out}: process {first}" in said
        and unharmed
    }


def class_images_killed(world: World, *, times: int = 3) -> dict[str, Any]:
    """Class images killed at random pictures and made to the end: the set of an unbroken run."""
    draw = random.Random(0)

    def words(folder: Path) -> list[str]:
        line = f"""--pretrained_model_name_or_path {world.base} --class_data_dir {folder}
            --num_class_images 12 --sample_batch_size 2 --num_threads 1"""
        return [*line.split(), "--class_prompt", "a photo of dog", "--class_inference_steps", "2"]

    def make(folder: Path, die_after: int | None) -> int:
        def work() -> None:
            real, made = class_images._save, []

            def save(*arguments: Any) -> None:
                real(*arguments)
                made.append(1)
                if len(made) == die_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            class_images._save = save  # type: ignore[assignment]
            generate_class_images.main(parse(ClassImageOptions, "", words(folder)))

        return ended(forked(work, world.folder / "class.log"))

    def pictures(folder: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}

    make(world.folder / "class-whole", None)
    for _ in range(times):
        if make(world.folder / "class-killed", draw.randrange(1, 4)) != -signal.SIGKILL:
            raise RuntimeError("the run that was to be killed was not")
    code = make(world.folder / "class-killed", None)
    equal = pictures(world.folder / "class-whole") == pictures(world.folder / "class-killed")
    return {
        "class_image_kills": times,
        "class_images_equal": code == 0 and equal and len(pictures(world.folder / "class-whole")) == 12,
    }


def one_process_where_two_were_asked_for(world: World) -> dict[str, Any]:
    """`accelerate launch --cpu --num_processes 2` starts one process; the run says so."""
    words = world.words(world.folder / "trap", steps=1)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
        str(free_port()),
        SCRIPT,
    ]
    result = subprocess.run(
        [*command, *words],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    return {
        "one_process_said": result.returncode == 0
        and "should start 2 processes and started 1" in result.stdout
    }


def everything(folder: Path, done: Container[str] = ()) -> Iterator[tuple[str, dict[str, Any], float]]:
    """(name, counts, seconds) of each of the above that is not in `done`."""
    world = World(folder)
    works = (
        exact_worlds,
        chaos,
        seconds_to_stop,
        launcher_stopped,
        launcher_killed,
        peers_lost,
        not_a_number_on_one,
        disk_full,
        two_runs,
        class_images_killed,
        one_process_where_two_were_asked_for,
    )
    for work in works:
        if work.__name__ in done:
            continue
        started = time.monotonic()
        counts = work(world)  # type: ignore[operator]
        yield work.__name__, counts, time.monotonic() - started
