"""Odd things in place of every file that the scripts read or write, and odd values of every flag.

    python -m tests.faults.odd_inputs [--cases N] [--seed S] [--show WORD]

Each case is a command on tiny files, in a process forked from one that has imported everything. It has to
be refused (status 2 and a message), be stopped (status 1 or 75 and a message), or succeed: without a
traceback, within 5 seconds of processor time, and without a change to a byte that belongs to the user.
Prints the counts, and every violation; the exit status is 1 if there was one.
"""

import argparse
import collections
import functools
import gc
import inspect
import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # the libraries below read it when they are imported

import torch
from accelerate.state import AcceleratorState

import convert_adapter
import generate_class_images
import infer
import train_dreambooth_lora as train
from dreambooth.bases import loading, pipelines
from dreambooth.io import reader
from dreambooth.options.command_line import fields_of, parse
from dreambooth.options.conversion import COMMANDS
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import startup, stops
from tests import tiny
from tests.running import prior_words, train_words

SECONDS = 5  # of processor time that a case may take
PATIENCE = 60.0  # seconds until a case that waits is ended
MEMORY = 4 * 2**30  # bytes that a case may take beside what is imported

# --- odd things


def _text(content: bytes) -> Callable[[Path, Path], object]:
    return lambda path, users: path.write_bytes(content)


def _socket(path: Path, users: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the address of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(before)


def _folder(path: Path, users: Path) -> None:
    path.mkdir()
    (path / "holiday.txt").write_text("a user's")


def _sparse(path: Path, users: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


# Each puts something at a free path. The second argument is a folder with files of the user.
ODD: dict[str, Callable[[Path, Path], object]] = {
    "FIFO": lambda path, users: os.mkfifo(path),
    "folder": _folder,
    "empty folder": lambda path, users: path.mkdir(),
    "link to a user's file": lambda path, users: path.symlink_to(users / "precious.txt"),
    "dangling link": lambda path, users: path.symlink_to(users / "nowhere" / "file"),
    "link loop": lambda path, users: path.symlink_to(path.name),
    "link to a device": lambda path, users: path.symlink_to("/dev/zero"),
    "socket": _socket,
    "empty file": _text(b""),
    "deep JSON": _text(b"[" * 100_000 + b"]" * 100_000),
    "torn text": _text(b'{"a": 1, "step": ' + b"9" * 400 + b"\n\xff\xfe{"),
    "sparse file of a terabyte": _sparse,
}

# --- odd values

VALUES: dict[str, str] = {
    "empty": "",
    "blank": " \t",
    "negative": "-1",
    "zero": "0",
    "negative zero": "-0.0",
    "past a float": "1e400",
    "no number": "nan",
    "infinite": "-inf",
    "large": "1e15",
    "400 digits": "9" * 400,
    "underscores": "1_0_0_0_0_0",
    "digits of another script": "\u0661\u0662",
    "hexadecimal": "0x10",
    "byte that is no UTF-8": "a\udcffb",
    "NUL": "a\0b",
    "path of 5000 characters": "x/" * 2500,
    "a million characters": "dog " * 250_000,
    "escape": "\x1b[2J\r\n",
    "parent": "../..",
    "device": "/dev/zero",
    "home of nobody": "~nobody-of-that-name/$x${y",
}

# --- the commands and their files

BASE = (
    *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"),
    *("tokenizer/tokenizer_config.json", "tokenizer", "vae"),
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
    "text_encoder/model.safetensors",
)
OUT = (
    *(".lock", ".written.jsonl", "run.json", "run.yaml", "status.json", "metrics.jsonl", "README.md"),
    *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "validation"),
    *("validation/image_0.png", "checkpoint-2", "checkpoint-1", "checkpoint-2/manifest.json"),
    *("checkpoint-2/state.json", "checkpoint-2/pytorch_lora_weights.safetensors"),
    *("checkpoint-2/optimizer.safetensors", "logs", "encoded"),
)
CLASS = (".lock", "manifest.json", "class-000000.png", ".class-000000.png.sha256", ".class-000001.png.sha256")
PHOTOS = ("photo-0.png", "photo-0.txt", "metadata.jsonl", "photo-9.png")
PICTURES = (".lock", ".written.jsonl", "images.json", "contact_sheet.png", "00000_0.png")


def _in(folder: str, names: Iterable[str]) -> list[str]:
    return [f"{folder}/{name}" for name in names]


class Command(NamedTuple):
    """`words` begin with the script's name. `files` are those that it reads or writes by name, relative to a
    place; `uses` are the folders and files that the place needs."""

    words: tuple[str, ...]
    files: tuple[str, ...]
    uses: tuple[str, ...]


class Case(NamedTuple):
    """A command with an odd thing at `target`, or with the words `more`."""

    name: str
    command: str
    target: str = ""
    odd: str = ""
    more: tuple[str, ...] = ()


def commands() -> dict[str, Command]:
    """By name. Paths are relative to the place, which is the working folder."""
    here = Path()
    quick = ("--max_train_steps", "1", "--checkpointing_steps", "1", "--num_threads", "1")
    prior = prior_words(here / "class", "--output_kohya_format")
    words = ("train", *train_words(here / "base", here / "photos", here / "out", *quick, *prior))
    base = ("--pretrained_model_name_or_path", "base")
    generate: tuple[str, ...] = ("generate", *base, "--class_data_dir", "class", "--num_class_images", "4")
    generate += ("--class_prompt", "a photo of dog", "--class_inference_steps", "2", "--seed", "1")
    draw = ("infer", *base, "--output_dir", "pictures", "--num_inference_steps", "1", "--num_threads", "1")
    adapter = "adapter.safetensors"
    new = ("--output", "new/adapter.safetensors")
    of_train = ("base", "photos", "class")
    table = {
        "train": Command(words, (*_in("class", CLASS), *_in("photos", PHOTOS), *_in("base", BASE)), of_train),
        "train on captions": Command(
            (*words, "--caption_column", "text"), tuple(_in("photos", PHOTOS)), (*of_train, "captions")
        ),
        "train into": Command(words, tuple(_in("out", OUT)), (*of_train, "out/")),
        "resume": Command(
            (*words, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"),
            tuple(_in("out", OUT)),
            (*of_train, "out"),
        ),
        "overwrite": Command((*words, "--overwrite"), tuple(_in("out", OUT)), (*of_train, "out")),
        "train from": Command(
            (*words, "--init_adapter", "peft"),
            ("peft/unet/adapter_config.json", "peft/unet/adapter_model.safetensors", "peft/unet"),
            (*of_train, "peft"),
        ),
        "train by a file": Command((*words, "--config", "flags.yaml"), ("flags.yaml",), of_train),
        "generate": Command(generate, (*_in("class", CLASS), *_in("base", BASE)), ("base", "class")),
        "draw": Command(
            (*draw, "--prompts_file", "prompts.txt", "--adapter", adapter),
            (*_in("pictures", PICTURES), adapter, "prompts.txt", *_in("base", BASE)),
            ("base", "pictures", adapter),
        ),
        "draw sets": Command(
            (*draw, "--prompt", "a dog", "--adapters_file", "sets.yaml"), ("sets.yaml",), ("base", adapter)
        ),
        "draw a run": Command(
            (*draw, "--prompt", "a dog", "--adapter", "out"),
            ("out/pytorch_lora_weights.safetensors", "out/run.json", "out/checkpoint-2"),
            ("base", "out"),
        ),
    }
    for name, more, needs in (
        ("inspect", (adapter,), ("peft",)),
        ("convert", (adapter, "--to", "kohya", *base, *new), ("peft", "base")),
        ("merge", (adapter, "copy.safetensors", *new), ()),
        ("resize", (adapter, "--rank", "1", *new), ()),
        ("extract", ("tuned", *base, "--rank", "1", *new), ("base", "tuned")),
        ("bake", (adapter, *base, "--merge_to", "new/base"), ("base",)),
    ):
        files = (adapter, *(_in("base", BASE) if name in ("convert", "extract", "bake") else ()), "new")
        table[name] = Command(("convert", name, *more), files, (adapter, "copy.safetensors", *needs))
    peft = ("peft/unet/adapter_config.json", "peft/unet/adapter_model.safetensors", "peft/unet")
    table["inspect peft"] = Command(("convert", "inspect", "peft"), peft, ("peft",))
    return table


COMMANDS_OF_FLAGS: dict[str, type] = {
    "train": TrainOptions,
    "generate": ClassImageOptions,
    "draw": InferOptions,
    **{name: kind for name, (kind, _, _) in COMMANDS.items()},
}


def folder_cases() -> Iterator[Case]:
    for command, (_, files, _) in commands().items():
        for target in files:
            for odd in ODD:
                yield Case(f"{command}: {odd} at {target}", command, target, odd)


def flag_cases() -> Iterator[Case]:
    for command, kind in COMMANDS_OF_FLAGS.items():
        for number, flag in enumerate(fields_of(kind)):
            for name, value in VALUES.items():
                # joined, so that a value may begin with a dash, or apart
                joined = value.startswith("-") or number % 2
                more = (f"--{flag}={value}",) if joined else (f"--{flag}", value)
                yield Case(f"{command}: --{flag} {name}", command, more=more)
            yield Case(f"{command}: --{flag} without a value", command, more=(f"--{flag}",))
            yield Case(f"{command}: --{flag} twice", command, more=(f"--{flag}=1", f"--{flag}=-x"))


# --- one case


class DoorPassed(BaseException):
    """Models are about to be loaded: the flags were accepted."""


def run_command(words: tuple[str, ...], *, to_the_door: bool) -> None:
    """Run a script as from the command line. With `to_the_door`, DoorPassed is raised where it would load
    models."""
    script, *rest = words
    if to_the_door:

        def stop(*_: Any, **__: Any) -> Any:
            raise DoorPassed

        for name in ("load_encoders", "load_vae", "load_unet"):
            setattr(loading, name, stop)
        pipelines.load_pipeline = stop
    mains: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {
        "train": (train.main, lambda: parse(TrainOptions, "", rest)),
        "generate": (generate_class_images.main, lambda: parse(ClassImageOptions, "", rest)),
        "infer": (infer.main, lambda: parse(InferOptions, "", rest)),
        "convert": (convert_adapter.main, lambda: convert_adapter.parse_command(rest)),
    }
    main, options = mains[script]
    startup.run(main, options())


def in_child(work: Callable[[], None], log: Path, home: Path) -> tuple[int, str]:
    """(exit status, what was printed) of the work in a forked process; 99 after a traceback, a negative
    number after a signal: SIGXCPU after too much processor time, SIGALRM after too long a wait."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(
                descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1
            )
            os.environ["HOME"] = str(home)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            AcceleratorState._reset_state(reset_partial_state=True)
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except DoorPassed:
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + PATIENCE
    pause = 0.002
    while not (reaped := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end or is_waiting(child):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM, log.read_text()
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)
    return os.waitstatus_to_exitcode(reaped[1]), log.read_text()


_ASLEEP: dict[int, tuple[float, int]] = {}


def is_waiting(pid: int) -> bool:
    """Whether a process has slept for SECONDS, and used no processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    state, used = fields[0], int(fields[11]) + int(fields[12])
    since, before = _ASLEEP.get(pid, (time.monotonic(), -1))
    if state not in "SD" or used != before:
        since = time.monotonic()
    _ASLEEP[pid] = (since, used)
    return time.monotonic() - since > SECONDS


def snapshot(folder: Path) -> dict[str, str]:
    """What every entry of a folder is, by relative path: any write changes the time of a file."""
    table = {}
    for path in sorted(folder.rglob("*")):
        entry = path.lstat()
        content = stat.filemode(entry.st_mode)
        if stat.S_ISREG(entry.st_mode):
            content += f" {entry.st_size} bytes, {entry.st_mtime_ns}, {entry.st_ino}"
        elif stat.S_ISLNK(entry.st_mode):
            content += f" -> {os.readlink(path)}"
        table[str(path.relative_to(folder))] = content
    return table


class World:
    """What every place is copied from."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self.folder = folder
        self.commands = commands()
        template = self.template = folder / "template"
        self.log = folder / "log"
        self.clean = ""
        (template / "users").mkdir(parents=True)
        (template / "users" / "precious.txt").write_text("a user's\n")
        tiny.build_pipeline(template / "base")
        tiny.make_photos(template / "photos")
        (template / "prompts.txt").write_text("a dog\n")
        (template / "sets.yaml").write_text("dog: [adapter.safetensors]\n")
        (template / "flags.yaml").write_text("rank: 2\n")
        shutil.copytree(template / "base", template / "tuned")
        for words in (
            (*self.commands["train"].words, "--max_train_steps", "2"),
            (*self.commands["draw"].words[:-2],),
        ):
            code, said = self._run(template, words)
            if code:
                raise RuntimeError(f"{' '.join(words)}: {said}")
        for name in ("adapter", "copy"):
            shutil.copy(
                template / "out" / "pytorch_lora_weights.safetensors", template / f"{name}.safetensors"
            )
        words = ("convert", "convert", "adapter.safetensors", "--to", "peft", "--output", "peft")
        code, said = self._run(template, words)
        if code:
            raise RuntimeError(said)

    def _run(self, place: Path, words: tuple[str, ...], *, to_the_door: bool = False) -> tuple[int, str]:
        def work() -> None:
            os.chdir(place)
            run_command(words, to_the_door=to_the_door)

        return in_child(work, self.log, place / "users")

    def place(self, name: str, uses: Iterable[str]) -> Path:
        """A new folder with what a command needs."""
        place = self.folder / name
        shutil.copytree(self.template / "users", place / "users")
        for file in ("prompts.txt", "sets.yaml", "flags.yaml"):
            shutil.copy(self.template / file, place)
        for part in uses:
            if part == "captions":
                (place / "photos" / "photo-0.txt").write_text("a dog\n")
                lines = [f'{{"file_name": "photo-{n}.png", "text": "a dog"}}\n' for n in range(3)]
                (place / "photos" / "metadata.jsonl").write_text("".join(lines))
            elif part.endswith("/"):
                (place / part).mkdir()
            elif (self.template / part).is_dir():
                shutil.copytree(self.template / part, place / part)
            else:
                shutil.copy(self.template / part, place)
        return place

    def result(self, case: Case) -> tuple[str, list[str], str]:
        """(how the case ended, what is wrong, what was printed)."""
        command = self.commands[case.command]
        place = self.folder / "place"
        if self.clean != case.command:
            shutil.rmtree(place, ignore_errors=True)
            self.place("place", command.uses)
        if case.target:
            target = place / case.target
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            ODD[case.odd](target, place / "users")
        before = snapshot(place)
        to_the_door = not case.target and command.words[0] != "convert"
        code, said = self._run(place, (*command.words, *case.more), to_the_door=to_the_door)
        after = snapshot(place)
        # a place in which nothing has changed serves the next case of the command
        self.clean = case.command if not case.target and before == after else ""
        wrong = [f"{name} has changed" for name in changed(case, before, after)]
        ended = {0: "passed", 1: "stopped", 2: "refused", stops.EXIT_TIME: "stopped"}.get(code, "traceback")
        if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
            ended = "hang"
        if "Traceback (most recent call last)" in said:
            ended = "traceback"
        if ended in ("traceback", "hang"):
            wrong.append(f"{ended} ({code})")
        elif code and not said.strip():
            wrong.append(f"status {code} without a message")
        return ended, wrong, said


def changed(case: Case, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The entries of the user that have changed: what was put at the target, and all that lies outside of the
    folders that the program writes to."""
    theirs = ("out/", "class/", "pictures/", "new/")
    moved = {value for name, value in after.items() if name.startswith("out/.bad-step-")}
    return [
        name
        for name, value in before.items()
        if after.get(name) != value
        and (not name.startswith(theirs) or (case.target and (name + "/").startswith(case.target + "/")))
        and not (name.startswith("out/checkpoint-") and value in moved)
    ]


# --- all cases


def drawn(cases: int | None, seed: int) -> list[Case]:
    """Every case, or so many of them, half with odd things and half with odd values."""
    draw = random.Random(seed)
    groups = [list(folder_cases()), list(flag_cases())]
    if cases is None:
        return [case for group in groups for case in group]
    chosen = [case for group in groups for case in draw.sample(group, min(len(group), cases // 2))]
    return sorted(chosen, key=lambda case: (case.command, case.name))


def results(folder: Path, cases: list[Case], workers: int) -> Iterator[tuple[Case, str, list[str], str]]:
    """(case, how it ended, what is wrong, what was printed) for each case."""
    world = World(folder)
    # tyro looks for the help texts at every parse
    inspect.getsource = functools.cache(inspect.getsource)  # type: ignore[assignment]
    gc.freeze()
    children = []
    for rank in range(workers):
        if child := os.fork():
            children.append(child)
            continue
        try:
            world.folder = folder / f"worker-{rank}"
            world.folder.mkdir()
            world.log = world.folder / "log"
            with (world.folder / "results").open("w") as file:
                for number in range(rank, len(cases), workers):
                    print(json.dumps([number, *world.result(cases[number])]), file=file, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    count = 0
    for rank in range(workers):
        for line in (folder / f"worker-{rank}" / "results").read_text().splitlines():
            number, ended, wrong, said = json.loads(line)
            count += 1
            yield cases[number], ended, wrong, said
    if count != len(cases):
        raise RuntimeError(f"{count} of {len(cases)} cases were run")


def sees_a_fault(world: World) -> bool:
    """Whether a fault that is made on purpose is seen as one: JSON that is read without a limit of depth."""
    careful = reader.read_json_table
    reader.read_json_table = lambda path, *_: json.loads(path.read_text())
    try:
        case = Case("control", "generate", "base/unet/config.json", "deep JSON")
        return world.result(case)[0] == "traceback"
    finally:
        reader.read_json_table = careful


def count_all(cases: int | None = 2400, seed: int = 0, *, show: str = "") -> dict[str, Any]:
    """The counts of `make faults`. Violations are printed."""
    ends: collections.Counter[str] = collections.Counter()
    counts = {"odd_inputs": 0, "odd_tracebacks": 0, "odd_hangs": 0, "odd_changes": 0}
    with tempfile.TemporaryDirectory() as folder:
        seen = sees_a_fault(World(Path(folder) / "control"))
        chosen = [case for case in drawn(cases, seed) if show in case.name]
        for case, ended, wrong, said in results(Path(folder) / "cases", chosen, os.cpu_count() or 1):
            ends[ended] += 1
            counts["odd_inputs"] += 1
            counts["odd_tracebacks"] += ended == "traceback"
            counts["odd_hangs"] += ended == "hang"
            counts["odd_changes"] += any("changed" in phrase for phrase in wrong)
            if wrong or show:
                print(f"{case.name}: {ended}: {'; '.join(wrong)}\n    {said.strip()[-1500:]!r}", flush=True)
    return {**counts, "odd_control_seen": seen, "odd_ends": dict(sorted(ends.items()))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", default="", help="only cases with this in their name")
    options = parser.parse_args()
    started = time.monotonic()
    total = count_all(None if options.show else options.cases, options.seed, show=options.show)
    print(json.dumps(total), f"{time.monotonic() - started:.0f} s")
    sys.exit(any(total[name] for name in ("odd_tracebacks", "odd_hangs", "odd_changes")))
