"""The fault matrix: injects every fault that the tests have, and counts the results; `make faults`.

    python -m benchmarks.faults

Writes `benchmarks/results/faults.json` and the table in docs/exactness.md. Ends with status 1 if a promise
was broken. Takes minutes on two cores.
"""

import functools
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# the tests that are run here need it, and the libraries below read it when they are imported
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.faults import (
    base_config_faults,
    checkpoint_faults,
    folder_faults,
    odd_inputs,
    output_faults,
    ownership_faults,
    run_faults,
)
from tests.faults.jobs import World

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "exactness.md"
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
MARKS = ("<!-- faults: written by make faults -->", "<!-- faults end -->")
# A module of faults under whole runs lists in WORKS its functions of a world that return counts.
WORKS: tuple[Callable[[World], dict[str, Any]], ...] = (
    *run_faults.WORKS,
    *folder_faults.WORKS,
    *output_faults.WORKS,
)
PEER_FAULTS = {"kill": "killed", "raise": "raises", "leave": "exits with 0", "hang": "hangs"}


class Counter:
    """Counts the passed and the failed tests of a pytest run, by their function."""

    def __init__(self) -> None:
        self.passed: dict[str, int] = {}
        self.failed: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed:
            name = report.nodeid.partition("::")[2].partition("[")[0]
            into = self.passed if report.passed else self.failed
            into[name] = into.get(name, 0) + 1


def bad_inputs() -> dict[str, int]:
    """Counts of bad inputs, fuzzed files and executed payloads, and of the tests that failed."""
    from tests.scripts import test_bad_input

    counter = Counter()
    code = pytest.main(
        [
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            str(ROOT / "tests" / "scripts" / "test_bad_input.py"),
        ],
        plugins=[counter],
    )
    if code == pytest.ExitCode.INTERNAL_ERROR or not counter.passed:
        raise RuntimeError(f"the tests of bad input did not run ({code})")
    kinds = [name for name in {*counter.passed, *counter.failed} if not name.startswith("test_fuzz")]
    return {
        "bad_inputs": len(test_bad_input.BAD_INPUTS),
        "bad_input_tests_failed": sum(counter.failed.get(name, 0) for name in kinds),
        "fuzzed_files": test_bad_input.TALLY["fuzzed_files"],
        "fuzz_tests_failed": sum(
            count for name, count in counter.failed.items() if name.startswith("test_fuzz")
        ),
        "payloads_executed": test_bad_input.TALLY["payloads_executed"],
    }


def ownership() -> dict[str, int]:
    """Counts of folders with random files of a user, of which none may change."""
    with tempfile.TemporaryDirectory() as folder:
        return ownership_faults.count(Path(folder), 300)


def base_configs(most: int = 600) -> dict[str, int]:
    """Counts of bases with one odd value in one field of one configuration file."""
    with tempfile.TemporaryDirectory() as folder:
        bases = base_config_faults.build(Path(folder))
        drawn = random.Random(0).sample(list(base_config_faults.cases(bases)), most)
        _, wrong = base_config_faults.count(bases, drawn)
    print("\n".join(wrong))
    return {"odd_fields": len(drawn), "odd_fields_failed": len(wrong)}


def broken(counts: dict[str, Any]) -> list[str]:
    """One phrase for each promise that the counts break."""
    equal = [
        ("violations", 0),
        ("detected", counts["damaged"]),
        ("damaged_skipped", counts["damaged"]),
        ("worlds_equal", True),
        ("control_differs", True),
        ("faults_recovered", counts["faults_injected"]),
        ("final_hash_equal", True),
        ("stops_right", counts["stops"]),
        ("folders_lost_right", counts["folders_lost"]),
        ("outputs_lost_right", counts["outputs_lost"]),
        ("outputs_lost_equal", True),
        ("outputs_lost_control", True),
        *(
            (name, True)
            for name in (
                "launcher_stopped",
                "launcher_killed",
                "not_a_number_stopped",
                "disk_full",
                "second_run_refused",
            )
        ),
        *((name, True) for name in ("class_images_equal", "one_process_said")),
        *((name, 0) for name in ("bad_input_tests_failed", "fuzz_tests_failed", "payloads_executed")),
        *((name, 0) for name in ("layouts_violated", "odd_tracebacks", "odd_hangs", "odd_changes")),
        *(("odd_control_seen", True), ("odd_fields_failed", 0)),
    ]
    phrases = [f"{name} is {counts[name]}, not {wanted}" for name, wanted in equal if counts[name] != wanted]
    phrases += [
        f"a peer that did {kind}: {result}"
        for kind, result in counts["peers_lost"].items()
        if not result["right"]
    ]
    least = [
        ("kill_points", 100),
        ("faults_injected", 40),
        ("damaged", 200),
        ("bad_inputs", 60),
        ("fuzzed_files", 500),
        ("odd_inputs", 2000),
    ]
    phrases += [
        f"{name} is only {counts[name]}, not {wanted}" for name, wanted in least if counts[name] < wanted
    ]
    if counts["seconds_to_stop_max"] >= 5:
        phrases.append(f"a stop took {counts['seconds_to_stop_max']} s, not under 5")
    return phrases


ROWS = (
    (
        "random faults in one run (all killed, one process killed, terminated), "
        "on one process or two in turn",
        "{faults_injected} injected, {faults_recovered} recovered; "
        "final bytes {final_hash} the unbroken run's",
    ),
    (
        "steps lost to a fault, with a checkpoint every {checkpoint_interval}",
        "{steps_lost_mean} on average, {steps_lost_max} at most",
    ),
    (
        "the same run on 1, 2 and 4 processes, and resumed across them",
        "{runs} runs, bytes {worlds_hash} each other",
    ),
    (
        "killed at every call to the file system while saving",
        "{kill_points} kill points, {violations} without a whole checkpoint",
    ),
    (
        "newest checkpoint damaged",
        "{damaged} times, {detected} detected, {damaged_skipped} passed over for the one before",
    ),
    (
        "TERM, INT and USR1: seconds until the last step is saved",
        "{seconds_to_stop_median} median, {seconds_to_stop_max} at most of {stops}",
    ),
    (
        "launcher killed; launcher of two processes stopped",
        "saved and ended in {launcher_killed_seconds} s; {launcher_stop_seconds} s",
    ),
    (
        "one of two processes: {peer_kinds}",
        "{peers_right} of {peers} jobs ended with its name and the last step saved",
    ),
    (
        "the folder of a run that trains moved, removed, given to another run or locked by it; its lock alone"
        " removed",
        "{folders_lost_right} of {folders_lost} runs wrote nothing there and ended with one message, or, with"
        " the lock made again, trained on",
    ),
    (
        "log written, log on a full disk, pipe closed, streams closed, tracker's disk full, terminal lost,"
        " terminal lost with nohup",
        "{outputs_lost_right} of {outputs_lost} runs ended as they had to; bytes {outputs_hash} each other",
    ),
    (
        "class images killed and completed",
        "{class_image_kills} times; pictures {class_hash} an unbroken set's",
    ),
    (
        "kinds of bad input, each with one message and exit status 2",
        "{bad_inputs} kinds, {bad_input_tests_failed} not so",
    ),
    (
        "fuzzed pictures, adapters, configs and manifests",
        "{fuzzed_files} files, {fuzz_tests_failed} kinds with a traceback",
    ),
    (
        "pipes, devices, link loops, deep JSON, ... in place of each file; odd values of each flag",
        "{odd_inputs} cases, {odd_tracebacks} tracebacks, {odd_hangs} hangs, {odd_changes} changed files",
    ),
    (
        "files of the user under names that the scripts write",
        "{layouts} folders, {layouts_violated} with a changed file",
    ),
    (
        "odd values in the fields of a base's configurations",
        "{odd_fields} cases, {odd_fields_failed} with neither a message nor a working base",
    ),
    ("code carried in files", "{payloads_executed} times executed"),
)


def table(counts: dict[str, Any]) -> str:
    """The table of docs/exactness.md."""
    equal = {True: "equal to", False: "**not** equal to"}
    values = counts | {
        "final_hash": equal[counts["final_hash_equal"]],
        "worlds_hash": equal[counts["worlds_equal"]],
        "outputs_hash": equal[counts["outputs_lost_equal"]],
        "class_hash": equal[counts["class_images_equal"]],
        "runs": len(counts["worlds"]),
        "peers": len(counts["peers_lost"]),
        "peers_right": sum(result["right"] for result in counts["peers_lost"].values()),
        "peer_kinds": ", ".join(PEER_FAULTS[kind] for kind in counts["peers_lost"]),
    }
    rows = [f"| {fault} | {measured} |" for fault, measured in ROWS]
    return "\n".join(["| fault | measured |", "|---|---|", *rows]).format_map(values)


def write_page(text: str) -> None:
    """Put `text` between the marks in docs/exactness.md. Raises RuntimeError unless the marks are there
    once."""
    pattern = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    content, count = pattern.subn(lambda _: f"{MARKS[0]}\n{text}\n{MARKS[1]}", PAGE.read_text())
    if count != 1:
        raise RuntimeError(f"{PAGE.name} must have the marks of the table once, has them {count} times")
    PAGE.write_text(content)


def main() -> int:
    """Run all parts and write the results. Returns 1 if a promise was broken.

    Each finished part is stored in `benchmarks/results/faults.partial.json`. An interrupted run continues
    from there."""
    partial = RESULTS.with_suffix(".partial.json")
    RESULTS.parent.mkdir(exist_ok=True)
    parts: dict[str, Any] = json.loads(partial.read_text()) if partial.exists() else {}

    def keep(name: str, counts: dict[str, Any], seconds: float) -> None:
        parts[name] = {"counts": counts, "seconds": round(seconds, 1)}
        partial.write_text(json.dumps(parts, indent=1) + "\n")
        print(f"{name}: {json.dumps(counts)} ({seconds:.0f} s)", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        works: dict[str, Callable[[], dict[str, Any]]] = {
            work.__name__: functools.partial(work, world) for work in WORKS
        }
        works |= {"checkpoints": checkpoint_faults.count_all, "bad_inputs": bad_inputs}
        works |= {"ownership": ownership, "odd_inputs": odd_inputs.count_all, "base_configs": base_configs}
        for name, work in works.items():
            if name not in parts:
                before = time.monotonic()
                keep(name, work(), time.monotonic() - before)
    counts = {name: value for part in parts.values() for name, value in part["counts"].items()}
    seconds = {name: part["seconds"] for name, part in parts.items()}
    wrong = broken(counts)
    machine = {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    record = {
        "counts": counts,
        "broken": wrong,
        "seconds": {**seconds, "all": round(sum(seconds.values()), 1)},
        "machine": machine,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    partial.unlink()
    write_page(table(counts))
    print(table(counts))
    print("\n".join(wrong) or "every promise kept")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
