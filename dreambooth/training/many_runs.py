"""The runs of a table (--runs), one after another in one process that loads the base once."""

import contextlib
import dataclasses
import functools
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreambooth.bases import loading
from dreambooth.evaluation import runs_page
from dreambooth.files import locks
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console, reader, writer
from dreambooth.io.errors import UserError, raise_all, reason_of, shown
from dreambooth.options.run_table import PAGE, Run, Runs
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import memory, stops
from dreambooth.training import estimate, metrics, prepare, run_folder

Train = Callable[[TrainOptions], None]


def trainer(train_one: Train) -> Callable[[Runs], None]:
    """`train` with this `train_one`."""
    return functools.partial(train, train_one=train_one)


def train(runs: Runs, train_one: Train) -> None:
    """Train the runs of a command line by `train_one`, which trains one and exits if it ends early.

    All runs of a table are checked first. Finished ones are passed over. A run that fails does not end the
    others; if one has failed, the process exits with status 1 at the end. Raises UserError for a mistake in
    any run, before the first one starts.
    """
    if runs.options.run.estimate:
        train_one = functools.partial(estimate.estimate, train_one=train_one)
    if runs.table is None or runs.options.adapter.dry_run or runs.options.run.estimate:
        for number, run in enumerate(runs.to_train):
            if runs.table is not None:
                console.say(f"{run.name}:")
            with memory.clock_restarted() if number else contextlib.nullcontext():
                train_one(run.options)
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if runs.number is None and processes > 1:
        raise UserError(
            f"--runs trains one run after another in one process, and the launcher started {processes}: give "
            "--run_number to train one run of the table on all of them"
        )
    if runs.number is not None:
        if not finished(runs):
            train_one(runs.options)
        return
    done = finished(runs)
    writer.make_output_folder(runs.folder, "--output_dir")
    with locks.hold(runs.folder, "--output_dir") as notes, loading.parts_kept():
        console.notes(notes)
        _Table(runs, train_one, done).train()


def finished(runs: Runs) -> set[str]:
    """The names of the runs that are finished, of those to train. All are checked. Raises UserError with a
    line for each mistake."""
    names, problems = set(), []
    for run in runs.to_train:
        try:
            with stops.stoppable() as watch:
                if prepare.is_finished(run.options, watch):
                    names.add(run.name)
        except UserError as error:
            problems += [
                f"--runs {shown(runs.table)}: {run.name}: {line}" for line in str(error).splitlines()
            ]
    raise_all(problems)
    for name in names:
        console.say(f"{name} is finished already")
    return names


class _Table:
    """Trains a table of checked runs and writes its page."""

    def __init__(self, runs: Runs, train_one: Train, done: set[str]):
        self.runs, self.train_one, self.done = runs, train_one, done
        self.files = WrittenFiles(runs.folder)
        self.files.check_free([PAGE], "--output_dir")
        self.failures: dict[str, str] = {}
        minutes = runs.options.run.max_train_minutes
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def train(self) -> None:
        """Train what is not finished. Exits with status 1 if a run has failed."""
        self.write_page()
        for number, run in enumerate(self.runs.rows, 1):
            if run.name in self.done:
                continue
            console.say(f"run {number} of {len(self.runs.rows)}: {run.name}")
            try:
                with memory.clock_restarted():
                    self._train(run)
            finally:
                memory.release()  # models and optimizer of the run that has ended
                self.write_page()
        console.say(f"page of the runs: {self.files.folder / PAGE}")
        if self.failures:
            names = ", ".join(self.failures)
            console.error(
                f"{len(self.failures)} of {len(self.runs.rows)} runs failed: {names}; the same command tries "
                "them again"
            )
            raise SystemExit(stops.EXIT_FAILED)

    def _train(self, run: Run) -> None:
        """Train one run. A failure is printed and noted. Raises SystemExit if the run was stopped."""
        try:
            self.train_one(self._within_time(run.options))
        except SystemExit:
            status = _table_in(Path(run.options.run.output_dir) / run_folder.STATUS)
            if status.get("state") == "stopped":  # by a signal or the time limit, which end the table too
                raise
            self.failures[run.name] = str(status.get("reason", "it ended early"))
        except UserError as error:
            console.error(f"{run.name}: {error}")
            self.failures[run.name] = str(error)
        except Exception as error:  # a mistake of the program's own: shown in full, and the others go on
            console.error(traceback.format_exc(), "")
            self.failures[run.name] = reason_of(error)
        else:
            self.done.add(run.name)

    def _within_time(self, options: TrainOptions) -> TrainOptions:
        """The options with what is left of --max_train_minutes, which is for the whole table."""
        if self.deadline is None:
            return options
        left = max(0.0, (self.deadline - time.monotonic()) / 60)
        return dataclasses.replace(options, run=dataclasses.replace(options.run, max_train_minutes=left))

    def write_page(self) -> None:
        """Write the page that compares the runs. A failure, such as a full disk, is printed as a warning."""
        rows = [
            _row(run, self.failures.get(run.name), is_done=run.name in self.done) for run in self.runs.rows
        ]
        written_at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        try:
            page = runs_page.page(self.runs.folder.absolute().name, rows, written_at)
            self.files.write(PAGE, page.encode())
        except OSError as error:
            console.warn(f"{PAGE} cannot be written: {error.strerror or error}")


def _row(run: Run, failure: str | None, *, is_done: bool) -> runs_page.Row:
    """What the page shows of a run, from the files of its folder."""
    folder = Path(run.options.run.output_dir)
    status = _table_in(folder / run_folder.STATUS)
    records = _records(folder / run_folder.METRICS)
    state = "finished" if is_done else "failed" if failure else str(status.get("state", "not begun"))
    best = _table_in(folder / run_folder.BEST / run_folder.BEST_WHY)
    chosen = best.get("step")
    judged = [record for record in records if "judge" in record]
    at_chosen = [record for record in judged if record["step"] == chosen] or judged
    readings = [record["memory"] for record in records if "memory" in record]
    return runs_page.Row(
        name=run.name,
        state="interrupted" if state == "running" else state,
        why=failure or str(status.get("reason", "")),
        step=max((record["step"] for record in records), default=0),
        chosen=chosen if isinstance(chosen, int) else None,
        scores=dict(at_chosen[-1]["judge"]) if at_chosen else {},
        seconds=readings[-1].get("seconds") if readings else None,
        report=f"{run.name}/{run_folder.REPORT}" if (folder / run_folder.REPORT).is_file() else None,
    )


def _table_in(path: Path) -> dict[str, Any]:
    """The JSON table in a file; {} if there is none or it is damaged."""
    with contextlib.suppress(UserError, OSError):
        return reader.read_json_table(path, path.name)
    return {}


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl that can be read."""
    with contextlib.suppress(UserError, OSError):
        lines = reader.read_bytes(path, path.name, reader.LARGEST_LOG).split(b"\n")
        return [record for line in lines if (record := metrics.record_of(line)) is not None]
    return []
