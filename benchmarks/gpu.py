"""Measures training and drawing on a GPU: this program, a bare step and diffusers' example.

    python -m benchmarks.gpu [--core] [--reference train_dreambooth_lora.py] [--photos FOLDER]

It needs a CUDA GPU, and 12 GiB of disk for --work. A program that the GPU has no memory for is shown as
failed. The bases have their full size and random weights, which are made on the GPU once. Every program
is a process of its own, and they run in turn with the same flags. Figures are printed and written as each
program ends. What the results have already is not measured again, so that an interrupted benchmark goes
on where it was; --only measures its cases anew.

--core is planned to end within 5 minutes on an H100. With --reference, diffusers' example is measured in
turn; it needs torchvision and tensorboard. Its sibling train_dreambooth_lora_sdxl.py is taken from the
same folder.

Writes `benchmarks/results/gpu.json`, and the tables of README.md and docs/speed.md. Ends with status 1 if
a program failed, and with 2 for a wrong flag or where there is no GPU. `--device cpu --tiny` runs the
same programs on tiny bases without a GPU, to try the benchmark itself.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from PIL import Image

from benchmarks import gpu_cases, gpu_tables, machine, programs
from benchmarks.gpu_cases import CASES, EXAMPLE, PHOTOS, RESULTS, Case, Place
from benchmarks.programs import NOISE_IMAGES, ROOT, Failed, rounded

# This module does not import torch, so that the process beside the measured one takes no memory of the GPU.

LIMIT = 900  # seconds after which a program is ended as failed
TICK = 0.02  # seconds between two looks at a running program
ADAPTER = "pytorch_lora_weights.safetensors"
Figures = dict[str, Any]


@dataclasses.dataclass
class Options:
    """Measure training and drawing on a GPU. See the head of benchmarks/gpu.py."""

    core: bool = False
    """Only the core: Stable Diffusion 1.5 and XL at batch 1, this program and the bare step."""
    reference: Path | None = None
    """diffusers' examples/dreambooth/train_dreambooth_lora.py. Without it, the example is not measured."""
    reference_path: Path | None = None
    """Folder with the reference's torchvision, if torchvision is not installed."""
    photos: Path | None = None
    """Folder of photos, of which the first 4 are trained on. Default: smooth noise."""
    only: tuple[str, ...] = ()
    """Cases to measure anew. Without it, all that the results lack are measured."""
    device: Literal["cuda", "cpu"] = "cuda"
    """The device. On a CPU give --tiny."""
    tiny: bool = False
    """Tiny bases and few steps, to try the benchmark itself."""
    output: Path | None = None
    """JSON file of the results. README.md and docs/speed.md get the tables only if it is the default,
    benchmarks/results/gpu.json (with --tiny: gpu.json in --work)."""
    work: Path = ROOT / "runs" / "gpu"
    """Folder of bases and photos, which are kept for the next time, and of the programs' output."""

    def results(self) -> Path:
        return self.output or (self.work / "gpu.json" if self.tiny else RESULTS)


def card_name() -> str:
    """The name of the GPU; "" without one. torch is asked in a process of its own."""
    script = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    words = [sys.executable, "-c", script]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


# ---- programs


def run(
    words: Sequence[str],
    place: Place,
    environment: Mapping[str, str],
    look: Callable[[], bool] = lambda: False,
) -> tuple[float, float]:
    """Run a program to its end. Returns the moments of its start and end, on the monotonic clock.

    `look` is called every 0.02 seconds; where it returns True the program is killed, which is no failure.
    Raises Failed with the tail of the output if the program fails or takes over 15 minutes."""
    log = place.work / "log.txt"
    started = time.monotonic()
    with programs.running(words, log, cwd=ROOT, environment=environment) as process:
        while process.poll() is None and time.monotonic() < started + LIMIT:
            if look():
                os.killpg(process.pid, signal.SIGKILL)
                return started, time.monotonic()
            time.sleep(TICK)
        ended, status = time.monotonic(), process.poll()
    if status != 0:
        reason = f"not done after {LIMIT} s" if status is None else f"exit status {status}"
        raise Failed(f"{reason}\n{log.read_text(errors='replace')[-3000:]}")
    return started, ended


def records_of(output: Path) -> list[dict[str, Any]]:
    """The complete records of metrics.jsonl; [] before it exists."""
    path = output / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def train_here(case: Case, program: str, place: Place, environment: Mapping[str, str]) -> Figures:
    """The figures of this project's trainer, from its own records."""
    first_step: list[float] = []

    def look() -> bool:
        if not first_step and any("images_per_second" in record for record in records_of(place.output)):
            first_step.append(time.monotonic())
        return False

    started, ended = run(gpu_cases.train_words(case, program, place), place, environment, look)
    records = records_of(place.output)
    phases = [record["memory"] for record in records if "memory" in record]
    # each record has the rate since the last reading of losses, at which the GPU was waited for
    pictures = case.batch * (2 if "--with_prior_preservation" in case.flags else 1)
    seconds = {
        record["step"]: pictures / record["images_per_second"]
        for record in records
        if "images_per_second" in record
    }
    warm_up = place.warm_up(case)
    figures: Figures = {
        "step_s": statistics.mean(value for step, value in seconds.items() if step > warm_up),
        "warm_up_s": sum(value for step, value in seconds.items() if 1 < step <= warm_up),
        "seconds": ended - started,
        "phases": {phase["phase"]: phase["seconds"] for phase in phases if "seconds" in phase},
    }
    if first_step:  # a short run of a tiny base may end before the first look
        figures["first_step_s"] = first_step[0] - started
    for name, key in (("peak_gib", "peak_device_gib"), ("reserved_gib", "peak_reserved_device_gib")):
        if peaks := [phase[key] for phase in phases if key in phase]:
            figures[name] = max(peaks)
    figures["graph"] = json.loads((place.output / "status.json").read_text())["cuda_graph"]
    return figures


def train_example(case: Case, place: Place, environment: Mapping[str, str]) -> Figures:
    """The figures of diffusers' example, from the probe."""
    started, _ = run(gpu_cases.example_words(case, place), place, environment)
    figures = json.loads(place.report.read_text())
    figures["first_step_s"] = figures.pop("first_step_at") - started
    return figures


def hashes(case: Case, program: str, place: Place, environment: Mapping[str, str]) -> Figures:
    """SHA-256 of the adapter and of the last checkpoint's optimizer. The run that is resumed is killed first,
    after its first checkpoint. Raises Failed if it ended before."""
    words = gpu_cases.train_words(case, program, place)
    if program == gpu_cases.RESUMED:
        checkpoint = place.output / f"checkpoint-{place.first_checkpoint(case)}"
        run(words, place, environment, checkpoint.exists)
        if (place.output / ADAPTER).exists():
            raise Failed("the run ended before it was killed")
        words += ["--resume_from_checkpoint", "latest"]
    run(words, place, environment)
    files = {"adapter": ADAPTER, "optimizer": f"checkpoint-{place.steps(case)}/optimizer.safetensors"}
    figures: Figures = {
        name: hashlib.sha256((place.output / file).read_bytes()).hexdigest() for name, file in files.items()
    }
    figures["graph"] = json.loads((place.output / "status.json").read_text())["cuda_graph"]
    return figures


def draw(case: Case, program: str, place: Place, environment: Mapping[str, str]) -> Figures:
    """Seconds a picture from the times of the files, without the first batch, and a hash of all pixels."""
    run(gpu_cases.draw_words(case, program, place), place, environment)
    paths = sorted(path for path in place.output.glob("*.png") if path.name != "contact_sheet.png")
    times = sorted(path.stat().st_mtime_ns / 1e9 for path in paths)
    expected = place.pictures(case)
    if len(paths) != expected:
        raise Failed(f"{expected} pictures were expected, got {len(paths)}")
    pixels = hashlib.sha256()
    for path in paths:
        with Image.open(path) as image:
            pixels.update(image.convert("RGB").tobytes())
    figures: Figures = {
        "picture_s": (times[-1] - times[case.batch - 1]) / (len(times) - case.batch),
        "pixels": pixels.hexdigest(),
    }
    if program == gpu_cases.REPLAYED:
        lines = (place.work / "log.txt").read_text(errors="replace").splitlines()
        reasons = [line for line in lines if "launched kernel by kernel" in line]
        reasons += ["only CUDA GPUs have graphs"] if place.device == "cpu" else []
        figures["graph"] = f"launched: {reasons[0]}" if reasons else "replayed"
    return figures


def measure(case: Case, program: str, place: Place, environment: Mapping[str, str]) -> dict[str, Figures]:
    """The figures of a program, by name; those of the bare step come together. Raises Failed."""
    if case.measures == "pictures":
        return {program: draw(case, program, place, environment)}
    if case.measures == "hashes":
        return {program: hashes(case, program, place, environment)}
    if program == EXAMPLE:
        return {program: train_example(case, place, environment)}
    if program in gpu_cases.BARE:
        run(gpu_cases.bare_words(case, place), place, environment)
        report = json.loads(place.report.read_text())
        return {name: report[key] for name, key in gpu_cases.BARE.items()}
    return {program: train_here(case, program, place, environment)}


# ---- what a program needs


def prepare(case: Case, place: Place, environment: Mapping[str, str]) -> None:
    """Make the base and the photos of the case, if they do not exist."""
    base = place.base(case)
    if not base.exists():
        dtype = "bfloat16" if place.device == "cuda" else "float32"
        words = ["-m", "benchmarks.speed_bases", place.base_name(case), str(base), place.device, dtype]
        started, ended = run(words, place, environment)
        print(f"made {base} in {ended - started:.0f} s", flush=True)
    programs.make_photos(place.class_images(case), place.side(case), NOISE_IMAGES)
    folder = place.photos(case)
    if place.user_photos is None:
        programs.make_photos(folder, place.side(case), PHOTOS)
    elif not folder.exists():
        folder.mkdir(parents=True)
        for path in gpu_cases.pictures_in(place.user_photos):
            shutil.copy(path, folder)


def clear(place: Place) -> None:
    """Remove what an earlier program wrote."""
    for folder in (place.output, place.drawn):
        shutil.rmtree(folder, ignore_errors=True)
    place.report.unlink(missing_ok=True)


def setting(options: Options, card: str) -> dict[str, Any]:
    """Card, versions, photos and reference. Figures are comparable only if these are equal."""
    return {
        "card": card,
        "cores": machine.cores(),
        "versions": programs.versions(),
        "photos": str(options.photos.name) if options.photos else "noise",
        "is_tiny": options.tiny,
        "reference_sha256": programs.sha256_of(options.reference),
    }


def mistakes(
    options: Options, card: str, held: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> list[str]:
    """One message for each wrong flag. `held` are the results that exist, `now` is the setting."""
    messages = []
    if not card:
        messages.append("no CUDA GPU; --device cpu --tiny tries the benchmark itself without one")
    if options.device == "cpu" and not options.tiny:
        messages.append("--device cpu: bases of full size take hours on a CPU; give --tiny too")
    messages += [
        f"--only: no case {name!r}; the cases are: {', '.join(CASES)}"
        for name in options.only
        if name not in CASES
    ]
    messages += programs.mistakes_of_reference(options.reference, options.reference_path)
    if options.photos and not options.photos.is_dir():
        messages.append(f"--photos: {options.photos} is not a folder")
    elif options.photos and len(gpu_cases.pictures_in(options.photos)) < PHOTOS:
        messages.append(
            f"--photos: {options.photos} must have {PHOTOS} files {', '.join(gpu_cases.SUFFIXES)}"
        )
    for key, value in now.items():
        earlier = (held or now)[key]
        # results with the example are also continued without --reference
        is_continued = key == "reference_sha256" and None in (earlier, value)
        if earlier != value and not is_continued:
            messages.append(
                f"{options.results()} has results of another {key}: {earlier}, not {value}; "
                "give another --output, or remove it"
            )
    return messages


def plan(options: Options, place: Place, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(case, program) for all that is to be measured, in order: the core first."""
    names = options.only or (gpu_cases.CORE_CASES if options.core else tuple(CASES))
    core = [(name, program) for name in gpu_cases.CORE_CASES for program in gpu_cases.CORE if name in names]
    rest = [] if options.core else [(name, program) for name in names for program in CASES[name].programs]
    return [
        (name, program)
        for name, program in dict.fromkeys(core + rest)
        if (program != EXAMPLE or place.example(CASES[name]))
        and (options.only or "failed" in results.get(name, {}).get(program, {"failed": ""}))
    ]


def write(options: Options, report: dict[str, Any]) -> None:
    """Write the results, and the tables of the pages if they are the ones of this repository."""
    ordered = {name: report["cases"][name] for name in CASES if name in report["cases"]}
    report = {**report, "cases": ordered}
    path = options.results()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)
    if path.resolve() == RESULTS:
        gpu_tables.write_pages(report)


def rounded_and_dated(figures: Figures) -> Figures:
    """Figures of four digits, and the day."""
    numbers = {name: rounded(value) if isinstance(value, float) else value for name, value in figures.items()}
    return {**numbers, "date": datetime.date.today().isoformat()}


def measure_all(options: Options, place: Place, report: dict[str, Any]) -> list[str]:
    """Measure what `report` lacks, and add it. Returns the programs that failed."""
    environment = gpu_cases.environment(options.device, options.reference_path)
    measured: set[tuple[str, str]] = set()
    failed = []
    for name, program in plan(options, place, report["cases"]):
        if (name, program) in measured:  # the bare step, launched and replayed, is one program
            continue
        try:
            prepare(CASES[name], place, environment)
            clear(place)
            figures = measure(CASES[name], program, place, environment)
        except Failed as failure:
            names = gpu_cases.BARE if program in gpu_cases.BARE else [program]
            figures = {key: {"failed": str(failure).split("\n", 1)[0]} for key in names}
            failed.append(f"{name}, {program}")
            print(f"failed: {failure}", flush=True)
        finally:
            clear(place)
        rows = report["cases"].setdefault(name, {})
        rows.update({key: rounded_and_dated(value) for key, value in figures.items()})
        measured |= {(name, key) for key in figures}
        for key in figures:
            print(f"{name}, {key}: {json.dumps(rows[key])}", flush=True)
        write(options, report)
    return failed


def main(options: Options) -> int:
    """Measure what is missing. Returns 0; 1 if a program failed; 2 if a flag is wrong or there is no GPU."""
    if options.reference and not options.reference.is_file():
        print(f"error: --reference: there is no file {options.reference}", file=sys.stderr)
        return 2
    card = card_name() if options.device == "cuda" else machine.processor()
    now = setting(options, card)
    path = options.results()
    held = json.loads(path.read_text()) if path.exists() else None
    if wrong := mistakes(options, card, held, now):
        print("\n".join(f"error: {line}" for line in wrong), file=sys.stderr)
        return 2
    if held and now["reference_sha256"] is None:
        now["reference_sha256"] = held["reference_sha256"]
    reference = options.reference.resolve() if options.reference else None
    place = Place(options.work.resolve(), options.device, options.tiny, reference, options.photos)
    place.work.mkdir(parents=True, exist_ok=True)
    report = {**now, "cases": held["cases"] if held else {}}
    started = time.monotonic()
    failed = measure_all(options, place, report)
    print(gpu_tables.tables(report))
    print(f"measured in {time.monotonic() - started:.0f} s")
    print(f"failed: {'; '.join(failed)}" if failed else "every program succeeded")
    return bool(failed)


if __name__ == "__main__":
    # SystemExit runs the `finally` blocks, which end the current program
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main(tyro.cli(Options, use_underscores=True)))
