"""Measures speed and memory of training and of drawing class images, and compares them with diffusers'
example and a bare step.

    python -m benchmarks.speed [--reference train_dreambooth_lora.py] [--rounds 3] [--only NAME ...]
        [--resume]

Every run is a process of its own, which `speed_probe.py` watches from inside. The programs run in turn, and
figures are medians over the rounds. Bases have random weights and the shapes in `speed_bases.py`; photos are
noise that needs no resizing. Both programs get the same flags and have their own defaults for the rest.

The reference needs torchvision's transforms: `pip install --no-deps --target FOLDER torchvision==0.28.0`,
then `--reference_path FOLDER`. The compiled part of that wheel does not load beside a torch for CPUs;
`speed_probe.py` declares the operators in its place.

Writes `benchmarks/results/speed.json` and the tables in docs/speed.md. Ends with status 1 if a run failed.
Takes hours on two cores.
"""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks import machine

# This module does not import torch, so that the process beside the measured one stays small.

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
MARKS = ("<!-- speed: written by python -m benchmarks.speed -->", "<!-- speed end -->")
NOT_MEASURED = "Not measured yet."  # stands between the marks while there is no RESULTS
PROBE, BARE = ROOT / "benchmarks" / "speed_probe.py", ROOT / "benchmarks" / "speed_bare.py"
PACKAGES = ("torch", "diffusers", "peft", "transformers", "accelerate")
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TRACKER = "tensorboard"  # the reference cannot run without a tracker
NOISE_IMAGES = 8  # class images of noise that exist before training
AT_ONCE = 4  # class images in one batch
DRAWING_FLAGS = (
    "--class_prompt dog --class_data_dir {drawn} --num_class_images {count} "
    f"--sample_batch_size {AT_ONCE}"
)
Figures = dict[str, float]  # names of seconds end in _s, names of MiB in _mib


@dataclass
class Options:
    """Measure speed and memory, side by side with diffusers' example script if there is a copy of it."""

    reference: Path | None = None
    """diffusers' examples/dreambooth/train_dreambooth_lora.py. Without it, this program and the bare step
    alone are measured."""
    reference_path: Path | None = None
    """Folder with the reference's torchvision, if torchvision is not installed."""
    rounds: int = 3
    """Runs of each program in each case."""
    only: tuple[str, ...] = ()
    """Cases to run. Without it, all cases run."""
    resume: bool = False
    """Keep the cases in --output, and run those that it lacks, or those of --only again."""
    output: Path = RESULTS
    """JSON file of the results; docs/speed.md gets the tables only if it is the one beside this script."""
    work: Path = ROOT / "runs" / "speed"
    """Folder of bases and photos, which are kept for the next time, and of the runs' output."""
    threads: int = machine.cores()
    """CPU threads of a run, divided among its processes."""


@dataclass(frozen=True)
class Case:
    """One comparison: the programs, their flags, and the steps or pictures that are measured."""

    title: str
    base: str
    """Name of a shape; `embedded` is picturebook/model."""
    side: int
    """Pixels."""
    programs: Mapping[str, Callable[["Case", "Place"], list[str]]]
    """Command lines, by the name of the program, in the order in which they run."""
    steps: int = 1
    batch: int = 1
    warm_up: int = 1
    """Steps after the first that are not measured."""
    flags: str = ""
    """Flags for every program."""
    own_flags: str = ""
    """Flags for this program alone."""
    processes: int = 1
    photos: int = 4
    drawn: int = 0
    """Class images to draw. If not 0, pictures are measured in place of steps."""
    limit: int = 900
    """Seconds after which a run is ended as failed."""


@dataclass(frozen=True)
class Place:
    """The folders that one run reads and writes."""

    work: Path
    reference: Path | None

    def base(self, name: str) -> Path:
        return ROOT / "picturebook" / "model" if name == "embedded" else self.work / name

    def photos(self, side: int, count: int) -> Path:
        return self.work / f"photos-{side}-{count}"

    def fill(self, flags: str, case: "Case") -> list[str]:
        """The words of `flags`, with folders and numbers filled into the braces."""
        names = {
            "own": self.photos(case.side, NOISE_IMAGES),
            "drawn": self.drawn,
            "encoded": self.encoded,
            "count": case.drawn,
        }
        return [word.format_map(names) for word in flags.split()]

    @property
    def output(self) -> Path:
        """Output folder of a run. It is removed before and after the run."""
        return self.work / "output"

    @property
    def drawn(self) -> Path:
        """Class images drawn by a run. They are removed before and after it."""
        return self.work / "class_images"

    @property
    def encoded(self) -> Path:
        """The --encoded_dir that the two runs of a round share. It is removed before a round."""
        return self.work / "encoded"


def _training(case: Case, place: Place) -> list[str]:
    """The flags that both trainers have."""
    return [
        *(
            "--pretrained_model_name_or_path",
            str(place.base(case.base)),
            "--instance_data_dir",
            str(place.photos(case.side, case.photos)),
        ),
        *("--instance_prompt", "a photo of a sks dog", "--output_dir", str(place.output)),
        *f"--resolution {case.side} --train_batch_size {case.batch} --max_train_steps {case.steps}".split(),
        *f"--seed 0 --rank 4 --learning_rate 1e-4 --lr_warmup_steps 0 --report_to {TRACKER}".split(),
        *place.fill(case.flags, case),
    ]


def train_here(case: Case, place: Place) -> list[str]:
    """The command line of this project's trainer."""
    return [
        str(ROOT / "train_dreambooth_lora.py"),
        *_training(case, place),
        *place.fill(case.own_flags, case),
    ]


def train_reference(case: Case, place: Place) -> list[str]:
    """The command line of diffusers' example."""
    return [str(place.reference), *_training(case, place)]


def train_bare(case: Case, place: Place) -> list[str]:
    """The command line of speed_bare.py."""
    precision = "bf16" if "bf16" in case.flags else "fp32"
    return [
        str(BARE),
        str(place.base(case.base)),
        str(case.side),
        str(case.batch),
        precision,
        str(case.steps),
    ]


def draw_here(case: Case, place: Place) -> list[str]:
    """The command line of generate_class_images.py."""
    script = [
        str(ROOT / "generate_class_images.py"),
        "--pretrained_model_name_or_path",
        str(place.base(case.base)),
    ]
    return [*script, *place.fill(f"{DRAWING_FLAGS} {case.own_flags}", case)]


def draw_reference(case: Case, place: Place) -> list[str]:
    """The reference draws class images before it trains. It trains one step, which is not measured."""
    return [*train_reference(case, place), *place.fill(f"--with_prior_preservation {DRAWING_FLAGS}", case)]


TRAINING = {"here": train_here, "reference": train_reference}
WITH_BARE = {**TRAINING, "bare": train_bare}
DRAWING = {"here": draw_here, "reference": draw_reference}
TWICE = {"here": train_here, "again": train_here}  # the second run reads the first one's encodings

BF16, TEXT = "--mixed_precision bf16", "--train_text_encoder"
PRIOR = (
    f"--with_prior_preservation --class_prompt dog --class_data_dir {{own}} --num_class_images {NOISE_IMAGES}"
)
KEPT = "--cache_latents disk --encoded_dir {encoded}"
M35, SD15 = "35 M UNet, 256 px", "Stable Diffusion 1.5's shape, 512 px"
# the settings that the reference always draws class images with
EQUAL_STEPS = "--class_scheduler base --class_inference_steps 50 --prior_generation_precision fp32"

CASES: dict[str, Case] = {
    "tiny": Case("embedded base, 64 px, batch 1, fp32", "embedded", 64, TRAINING, steps=60, warm_up=4),
    "m35": Case(f"{M35}, batch 1, fp32", "m35", 256, WITH_BARE, steps=16, warm_up=2),
    "m35-bf16": Case(f"{M35}, batch 1, bf16", "m35", 256, WITH_BARE, steps=16, warm_up=2, flags=BF16),
    "m35-prior": Case(
        f"{M35}, batch 1, prior preservation, fp32", "m35", 256, TRAINING, steps=16, warm_up=2, flags=PRIOR
    ),
    "m35-text": Case(
        f"{M35}, batch 4, text encoder, fp32", "m35", 256, TRAINING, steps=12, batch=4, flags=TEXT
    ),
    "m35-text-bf16": Case(
        f"{M35}, batch 4, text encoder, bf16", "m35", 256, TRAINING, steps=12, batch=4, flags=f"{TEXT} {BF16}"
    ),
    "m35-processes": Case(
        f"{M35}, batch 1 on each of 2 processes, fp32", "m35", 256, TRAINING, steps=16, warm_up=2, processes=2
    ),
    "sd15": Case(f"{SD15}, batch 1, fp32", "sd15", 512, WITH_BARE, steps=5, limit=1800),
    "sd15-bf16": Case(f"{SD15}, batch 1, bf16", "sd15", 512, WITH_BARE, steps=5, flags=BF16, limit=1800),
    "sd15-checkpointing": Case(
        f"{SD15}, batch 1, fp32, gradient checkpointing",
        "sd15",
        512,
        TRAINING,
        steps=5,
        flags="--gradient_checkpointing",
        limit=1800,
    ),
    "class-images-equal": Case(
        f"{M35}, 50 steps of the base's sampler", "m35", 256, DRAWING, drawn=12, own_flags=EQUAL_STEPS
    ),
    "class-images": Case(f"{M35}, each program's defaults", "m35", 256, DRAWING, drawn=12),
    **{
        f"pictures-{count}": Case(
            f"{count:,} pictures",
            "embedded",
            64,
            TWICE,
            steps=24,
            batch=4,
            warm_up=4,
            photos=count,
            own_flags=KEPT,
            limit=3600,
        )
        for count in (10, 100, 10_000)
    },
}


class Failed(Exception):
    """A run that failed. The message ends with the tail of its output."""


def figures(reports: Sequence[dict[str, Any]], started: float, case: Case) -> Figures:
    """The figures of one run from the reports of its processes, by rank.

    `started` is the moment of the start on the reports' clock. Memory is that of the largest process. Raises
    Failed if steps or pictures are missing.
    """
    what, count = ("pictures", case.drawn) if case.drawn else ("steps", case.steps)
    if any(len(report[what]) != count for report in reports):
        raise Failed(
            f"{count} {what} were expected, got {', '.join(str(len(report[what])) for report in reports)}"
        )
    run = {
        "peak_mib": max(report[what][-1][1] for report in reports),
        # the reference loads the whole base again after its last step
        "peak_to_end_mib": max(report["end"][1] for report in reports),
    }
    times = [seconds for seconds, _ in reports[0][what]]
    if case.drawn:  # the time of the first batch includes loading
        run["picture_s"] = (times[-1] - times[AT_ONCE - 1]) / (case.drawn - AT_ONCE)
    else:
        run["first_step_s"] = max(report["steps"][0][0] for report in reports) - started
        run["step_s"] = statistics.median(
            [after - before for before, after in itertools.pairwise(times)][case.warm_up :]
        )
    return run


def medians(runs: Sequence[Figures]) -> Figures:
    """The median of every figure over the runs, to four digits."""
    return {name: rounded(statistics.median(run[name] for run in runs)) for name in runs[0]}


def ratios(of: Figures, to: Figures) -> Figures:
    """Each figure of `of` divided by that of `to`, for the figures that both have."""
    return {name: rounded(value / to[name]) for name, value in of.items() if name in to}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def end_all(process: subprocess.Popen) -> None:
    """End a run and its launcher's workers.

    SIGTERM goes first: a launcher ends its workers on it, and SIGKILL does not reach their sessions."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def launch(
    words: Sequence[str], work: Path, environment: Mapping[str, str], limit: float, processes: int = 1
) -> tuple[list[dict[str, Any]], float]:
    """Run a script with its flags under the probe. Returns (the report of each process, the starting moment).

    Raises Failed with the tail of the output."""
    report, log = work / "report.json", work / "log.txt"
    for old in work.glob("report.json.*"):
        old.unlink()
    front = [sys.executable]
    if processes > 1:
        config = ROOT / "configs" / "accelerate" / "cpu_processes.yaml"
        front += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(config),
            "--num_processes",
            str(processes),
            "--main_process_port",
            "0",
        ]
    with log.open("w") as file:
        started = time.monotonic()
        command = [*front, str(PROBE), str(report), *words]
        process = subprocess.Popen(
            command,
            cwd=work,
            env={**os.environ, **environment},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            ended = f"exit status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ended = f"not done after {limit:g} s"
        finally:
            if process.poll() is None:
                end_all(process)
    reports = sorted(work.glob("report.json.*"), key=lambda path: int(path.suffix[1:]))
    if process.returncode != 0 or len(reports) != processes:
        tail = log.read_text(errors="replace")[-3000:]
        raise Failed(f"{ended}, {len(reports)} of {processes} reports\n{tail}")
    return [json.loads(path.read_text()) for path in reports], started


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


def prepare(case: Case, place: Place) -> None:
    """Make the base and the photos of the case."""
    if not place.base(case.base).exists():
        subprocess.run(
            [sys.executable, "-m", "benchmarks.speed_bases", case.base, str(place.base(case.base))],
            cwd=ROOT,
            check=True,
        )
    for count in (case.photos, NOISE_IMAGES):
        make_photos(place.photos(case.side, count), case.side, count)


def read_all(folder: Path) -> None:
    """Read a base's files into the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def clear(place: Place) -> None:
    """Remove the output of runs."""
    for folder in (place.output, place.drawn):
        shutil.rmtree(folder, ignore_errors=True)


def measure(case: Case, place: Place, options: Options) -> dict[str, Any]:
    """The case's record: the runs of every program, their medians, and the ratios to this program's.

    Raises Failed at the first run that fails."""
    prepare(case, place)
    programs = {
        name: words for name, words in case.programs.items() if name != "reference" or place.reference
    }
    runs: dict[str, list[Figures]] = {name: [] for name in programs}
    load = []
    for _ in range(options.rounds):
        shutil.rmtree(place.encoded, ignore_errors=True)
        read_all(place.base(case.base))
        load.append(load_of_others())
        for name, words in programs.items():
            environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(max(1, options.threads // case.processes))}
            if name == "reference" and options.reference_path:
                environment["PYTHONPATH"] = str(options.reference_path.resolve())
            clear(place)
            try:
                reports, started = launch(
                    words(case, place), place.work, environment, case.limit, case.processes
                )
                runs[name].append(figures(reports, started, case))
            except Failed as failure:
                raise Failed(f"{name}: {failure}") from None
            finally:
                clear(place)
    shutil.rmtree(place.encoded, ignore_errors=True)
    record: dict[str, Any] = {
        "title": case.title,
        "rounds": options.rounds,
        "steps": case.steps,
        "batch": case.batch,
        "warm_up": case.warm_up,
    }
    if case.drawn:
        record = {"title": case.title, "rounds": options.rounds, "pictures": case.drawn}
    by_program = {name: medians(program_runs) for name, program_runs in runs.items()}
    record |= {"flags": case.flags, "own_flags": case.own_flags, "medians": by_program}
    # other programs are divided by this one, and this one by the bare step
    pairs = [("here", "bare") if name == "bare" else (name, "here") for name in by_program if name != "here"]
    record["ratios"] = {f"{of}/{to}": ratios(by_program[of], by_program[to]) for of, to in pairs}
    shown = {
        name: [{figure: rounded(value) for figure, value in run.items()} for run in program_runs]
        for name, program_runs in runs.items()
    }
    return record | {"runs": shown, "others_busy_cores": load}


def load_of_others() -> float:
    """Cores that other processes keep busy, measured over one second of sleep."""

    def busy() -> float:
        user, nice, system, _, _, *others = (
            int(ticks) for ticks in Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
        )
        return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(1)
    return round(busy() - before, 2)


def setting(options: Options) -> dict[str, Any]:
    """Machine, versions and reference. Figures are comparable only if these are equal."""
    reference = hashlib.sha256(options.reference.read_bytes()).hexdigest() if options.reference else None
    return {
        "machine": {
            "processor": machine.processor(),
            "cores": machine.cores(),
            "threads": options.threads,
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "reference_sha256": reference,
    }


HEAD = "| training | seconds a step | seconds to the first step | peak memory, MiB | bare step, seconds |"
DRAWING_HEAD = "| class images | pictures a second | peak memory, MiB |"
TWICE_HEAD = (
    "| photos kept encoded on disk | seconds to the first step | the same, second run "
    "| seconds a step | peak memory, MiB |"
)


def table(report: dict[str, Any]) -> str:
    """The tables of docs/speed.md and the paragraph on how they were measured.

    There is a table each for training, class images and numbers of photos, if the report has cases of it."""
    tables: dict[str, list[str]] = {HEAD: [], DRAWING_HEAD: [], TWICE_HEAD: []}
    for name, record in report["cases"].items():
        case = CASES[name]
        head = DRAWING_HEAD if case.drawn else TWICE_HEAD if case.programs is TWICE else HEAD
        width = head.count("|") - 2
        cells = ["failed", *[""] * (width - 1)] if "failed" in record else _cells(record["medians"], head)
        tables[head].append(f"| {case.title} | {' | '.join(cells)} |")
    lines: list[str] = []
    for head, rows in tables.items():
        if rows:
            lines += [head, "|---" * (head.count("|") - 1) + "|", *rows, ""]
    computer = report["machine"]
    rounds = sorted({record["rounds"] for record in report["cases"].values() if "rounds" in record})
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines.append(
        f"Medians of {' or '.join(map(str, rounds))} runs of each program in turn, every one a process of "
        f"its own (two where it says so), with {computer['threads']} threads on {computer['cores']} cores of "
        f"an {computer['processor']}; {versions}. The same flags for both programs; the larger bases have "
        "random weights. In brackets: diffusers' example, and how many times as much it is (of pictures a "
        "second, as little). Memory is the most that one process had resident until its last step or "
        "picture, pages of mapped files counted. The bare step is forward, backward and AdamW of the UNet "
        "with peft's LoRA in channels_last, and nothing else; in brackets, how many times as long the step "
        "here is."
    )
    return "\n".join(lines)


def seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def per_second(value: float) -> str:
    return f"{1 / value:.3g}"


def mib(value: float) -> str:
    return f"{value:,.0f}"


def _cells(by_program: dict[str, Figures], head: str) -> list[str]:
    """The cells of a case's row after its title, in the table with this head."""
    here, reference = by_program["here"], by_program.get("reference")

    def against(name: str, show: Callable[[float], str]) -> str:
        in_brackets = f" ({show(reference[name])}, {reference[name] / here[name]:.2f} x)" if reference else ""
        return show(here[name]) + in_brackets

    if head is DRAWING_HEAD:
        return [against("picture_s", per_second), against("peak_mib", mib)]
    if head is TWICE_HEAD:
        return [
            seconds(here["first_step_s"]),
            seconds(by_program["again"]["first_step_s"]),
            seconds(here["step_s"]),
            mib(here["peak_mib"]),
        ]
    bare = ""
    if "bare" in by_program:
        bare_step = by_program["bare"]["step_s"]
        bare = f"{seconds(bare_step)} ({here['step_s'] / bare_step:.2f} x)"
    return [against("step_s", seconds), against("first_step_s", seconds), against("peak_mib", mib), bare]


def write_page(text: str) -> None:
    """Put `text` between the marks in docs/speed.md. Raises RuntimeError unless the marks are there once."""
    pattern = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    content, count = pattern.subn(
        lambda _: f"{MARKS[0]}\n{text}\n{MARKS[1]}", PAGE.read_text(encoding="utf-8")
    )
    if count != 1:
        raise RuntimeError(f"{PAGE.name} must have the marks of the table once, has them {count} times")
    PAGE.write_text(content, encoding="utf-8")


def mistakes(options: Options, held: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """One message for each wrong flag. `held` are the results that --resume adds to, `now` is the setting."""
    messages = [
        f"--only: no case {name!r}; there are: {', '.join(CASES)}"
        for name in options.only
        if name not in CASES
    ]
    messages += [
        f"--{name} must be at least 1" for name in ("rounds", "threads") if getattr(options, name) < 1
    ]
    if options.reference_path and not (options.reference_path / "torchvision").is_dir():
        messages.append(f"--reference_path: {options.reference_path} has no torchvision")
    if options.reference:
        if not (options.reference_path or importlib.util.find_spec("torchvision")):
            messages.append(
                "--reference needs torchvision: pip install --no-deps --target FOLDER torchvision==0.28.0, "
                "and --reference_path FOLDER"
            )
        if not importlib.util.find_spec("tensorboard"):
            messages.append("--reference needs tensorboard: pip install '.[tensorboard]'")
    for key, value in now.items():
        if held is not None and held[key] != value:
            messages.append(
                f"--resume: {options.output} is of another {key.replace('_', ' ')}: {held[key]}, not {value}"
            )
    return messages


def main(options: Options) -> int:
    """Run the cases. Returns 0, or 1 if a run failed, or 2 if a flag is wrong."""
    if options.reference and not options.reference.is_file():
        print(f"error: --reference: there is no file {options.reference}", file=sys.stderr)
        return 2
    now = setting(options)
    held = json.loads(options.output.read_text()) if options.resume and options.output.exists() else None
    if wrong := mistakes(options, held, now):
        print("\n".join(f"error: {line}" for line in wrong), file=sys.stderr)
        return 2
    place = Place(options.work.resolve(), options.reference.resolve() if options.reference else None)
    place.work.mkdir(parents=True, exist_ok=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    cases: dict[str, Any] = dict(held["cases"]) if held else {}

    def write() -> dict[str, Any]:
        report = {**now, "cases": {name: cases[name] for name in CASES if name in cases}}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        if options.output.resolve() == RESULTS:
            write_page(table(report))
        return report

    for name in options.only or [name for name in CASES if "medians" not in cases.get(name, {})]:
        print(f"{name}: {CASES[name].title}", flush=True)
        try:
            cases[name] = measure(CASES[name], place, options)
            print(json.dumps(cases[name]["medians"]), flush=True)
        except Failed as failure:
            cases[name] = {"title": CASES[name].title, "failed": str(failure).split("\n", 1)[0]}
            print(f"failed: {failure}", flush=True)
        write()
    print(table(write()))
    failed = [name for name, record in cases.items() if "failed" in record]
    print(f"failed: {', '.join(failed)}" if failed else "every run succeeded")
    return bool(failed)


if __name__ == "__main__":
    # SystemExit runs the `finally` blocks, which end the current run
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main(tyro.cli(Options, use_underscores=True)))
