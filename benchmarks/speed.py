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

import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import machine, programs, speed_tables
from benchmarks.programs import NOISE_IMAGES, ROOT, Failed, rounded
from benchmarks.speed_cases import AT_ONCE, CASES, Case, Place
from benchmarks.speed_tables import Figures

# This module does not import torch, so that the process beside the measured one stays small.

RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PROBE = ROOT / "benchmarks" / "speed_probe.py"
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


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


def launch(
    words: Sequence[str], work: Path, environment: Mapping[str, str], limit: float, processes: int = 1
) -> tuple[list[dict[str, Any]], float]:
    """Run a script with its flags under the probe. Returns (the report of each process, the starting moment).

    Raises Failed with the tail of the output."""
    report, log = work / "report.json", work / "log.txt"
    for old in work.glob("report.json.*"):
        old.unlink()
    front = []
    if processes > 1:
        config = ROOT / "configs" / "accelerate" / "cpu_processes.yaml"
        front = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        front += ["--num_processes", str(processes), "--main_process_port", "0"]
    started = time.monotonic()
    command = [*front, str(PROBE), str(report), *words]
    with programs.running(command, log, cwd=work, environment=environment) as process:
        try:
            ended = f"exit status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ended = f"not done after {limit:g} s"
    reports = sorted(work.glob("report.json.*"), key=lambda path: int(path.suffix[1:]))
    if process.returncode != 0 or len(reports) != processes:
        tail = log.read_text(errors="replace")[-3000:]
        raise Failed(f"{ended}, {len(reports)} of {processes} reports\n{tail}")
    return [json.loads(path.read_text()) for path in reports], started


def prepare(case: Case, place: Place) -> None:
    """Make the base and the photos of the case."""
    if not place.base(case.base).exists():
        subprocess.run(
            [sys.executable, "-m", "benchmarks.speed_bases", case.base, str(place.base(case.base))],
            cwd=ROOT,
            check=True,
        )
    for count in (case.photos, NOISE_IMAGES):
        programs.make_photos(place.photos(case.side, count), case.side, count)


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
    command_lines = {
        name: words for name, words in case.programs.items() if name != "reference" or place.reference
    }
    runs: dict[str, list[Figures]] = {name: [] for name in command_lines}
    load = []
    for _ in range(options.rounds):
        shutil.rmtree(place.encoded, ignore_errors=True)
        read_all(place.base(case.base))
        load.append(load_of_others())
        for name, words in command_lines.items():
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
    return {
        "machine": {
            "processor": machine.processor(),
            "cores": machine.cores(),
            "threads": options.threads,
            "python": platform.python_version(),
        },
        "versions": programs.versions(),
        "reference_sha256": programs.sha256_of(options.reference),
    }


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
    messages += programs.mistakes_of_reference(options.reference, options.reference_path)
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
            speed_tables.write(report)
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
    print(speed_tables.table(write()))
    failed = [name for name, record in cases.items() if "failed" in record]
    print(f"failed: {', '.join(failed)}" if failed else "every run succeeded")
    return bool(failed)


if __name__ == "__main__":
    # SystemExit runs the `finally` blocks, which end the current run
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main(tyro.cli(Options, use_underscores=True)))
