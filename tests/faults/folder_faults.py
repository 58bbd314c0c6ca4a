"""Counts of faults in the folders that a run writes to: the disk full, two runs in one folder, class images
killed.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import generate_class_images
import train_dreambooth_lora as train
from dreambooth.data import class_images
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions
from dreambooth.options.training import TrainOptions
from tests.faults.jobs import World, ended, forked, is_running, steps_done, train_forked, wait_for_step
from tests.faults.ownership_faults import snapshot
from tests.running import as_main


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


def _moved(out: Path) -> None:
    out.rename(out.with_name(f"{out.name}-moved"))


def _replaced(out: Path) -> None:
    """Another run begins in the folder's place."""
    _moved(out)
    shutil.copytree(out.with_name(f"{out.name}-moved"), out)


def _lock_removed(out: Path) -> None:
    (out / ".lock").unlink()


def _lock_taken(out: Path) -> None:
    _lock_removed(out)
    (out / ".lock").write_text('{"pid": 1, "host": "elsewhere", "since": "today"}')


# what happens to the folder of a run that trains, and what the run then says; "" where it goes on
CHANGES: dict[Callable[[Path], None], str] = {
    _moved: "was moved or removed while this run was at work there",
    shutil.rmtree: "was moved or removed while",
    _replaced: "was moved or removed, and another folder has its name",
    _lock_taken: "was locked by process 1 on elsewhere, since today",
    _lock_removed: "",
}


def folder_lost(world: World, changes: Iterable[Callable[[Path], None]] = tuple(CHANGES)) -> dict[str, Any]:
    """The folder of a run that trains is moved, removed or given to another run: the run writes nothing
    there, and ends with one message and status 1. Control: a lock that alone was removed is made again."""
    right = 0
    for change in changes:
        out = world.folder / f"lost-{change.__name__}"
        log = out.with_suffix(".log")
        run = train_forked(world.words(out, steps=8, every=2), log, {"slow": 0.03})
        wait_for_step(out, 2, alive=lambda run=run: is_running(run))  # type: ignore[misc]
        change(out)
        before = snapshot(out)
        code, said = ended(run), log.read_text()
        if message := CHANGES[change]:
            ends = [line for line in said.splitlines() if line.startswith("error: ")]
            is_right = code == 1 and len(ends) == 1 and message in ends[0] and snapshot(out) == before
        else:
            is_right = code == 0 and steps_done(out) == 8 and (out / ".lock").is_file()
        right += is_right and "Traceback" not in said
    return {"folders_lost": len(list(changes)), "folders_lost_right": right}


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


# what `make faults` counts
WORKS = (disk_full, two_runs, folder_lost, class_images_killed)
