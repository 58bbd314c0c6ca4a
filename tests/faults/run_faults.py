"""Counts of faults under whole runs: processes killed, stopped, hung and lost, alone and under the real
launchers.

Every result is compared with an unbroken run of the same program on the same machine; no hash is stored.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dreambooth.adapter_files import native
from dreambooth.files import checkpoint_folders
from tests.faults.jobs import (
    ENVIRONMENT,
    LIMIT,
    ROOT,
    SCRIPT,
    World,
    end_all,
    ended,
    hashes,
    is_running,
    steps_done,
    train_forked,
    train_on_forked_processes,
    wait_for_step,
    workers,
)
from tests.running import free_port


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


# what `make faults` counts
WORKS = (
    *(exact_worlds, chaos, seconds_to_stop, launcher_stopped, launcher_killed, peers_lost),
    *(not_a_number_on_one, one_process_where_two_were_asked_for),
)
