"""The best checkpoint of a run, in `best/`: its adapter, and why it was chosen. Kept current as the run goes.

`evaluation/choice.py` chooses among the steps that were measured. The adapter of the chosen step is kept
beside it, as `candidate-SSSSSS.safetensors`. A resumed run chooses from the records up to its first step, so
the candidate that was chosen at the newest checkpoint's step is kept too.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dreambooth.adapter_files import native
from dreambooth.evaluation import choice
from dreambooth.files import checkpoint_folders
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import reader
from dreambooth.io.errors import UserError, shown
from dreambooth.training import metrics, run_folder
from dreambooth.training.saving import Saver
from dreambooth.training.start import Start

ADAPTER, WHY = f"{run_folder.BEST}/{native.ADAPTER_NAME}", f"{run_folder.BEST}/{run_folder.BEST_WHY}"
_CANDIDATE = re.compile(r"candidate-([0-9]+)\.safetensors")


class BestAdapter:
    """Chooses the best step of a run after each measurement, and writes `best/`, on the main process."""

    def __init__(self, start: Start, saver: Saver):
        self.peers, self.saver, self.options = start.peers, saver, start.options.meter
        self.files = WrittenFiles(start.output_dir)
        self.choice = choice.Choice(None, "nothing was measured")

    def update(self, step: int, progress: metrics.Progress) -> None:
        """Choose after the measurements after `step` steps, record the choice, and bring `best/` up to date.
        A file that cannot be written, as on a full disk, is printed as a warning."""
        if not self.peers.is_main:
            return
        records = [record for record in progress.evaluations if record["step"] <= step]
        self.choice = choice.choose(records)
        try:
            self._write(step, records)
        except OSError as error:
            reason = error.strerror or error
            self.peers.say(f"warning: {run_folder.BEST}/ of step {step} cannot be written: {reason}")
        if progress.is_evaluated(step, "meter") and not progress.is_evaluated(step, "best"):
            progress.evaluation(step, "best", {"step": self.choice.step, "why": self.choice.why})

    def is_worse(self) -> bool:
        """Whether the measurements got worse since the chosen step. The same on all processes."""
        return self.peers.broadcast(self.choice.worse is not None)

    def early_end(self, step: int, last_step: int) -> str:
        """Why --stop_when_worse ended the run after `step` steps."""
        return f"--stop_when_worse: ended after step {step} of {last_step}: {self.choice.worse}"

    def say(self) -> None:
        """Print the choice of a run that measures; nothing without --meter_steps."""
        if not self.options.meter_steps:
            return
        if self.choice.step is None:
            self.peers.say(f"best: no step is named: {self.choice.why}")
        else:
            self.peers.say(
                f"best: step {self.choice.step}: {self.choice.why} ({self.files.folder / ADAPTER})"
            )

    def _write(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Write this step's adapter if it is chosen, then the chosen one, then remove what can no longer be
        chosen. Raises OSError."""
        if step == self.choice.step:
            self.files.write(_candidate(step), self.saver.pack(step))
        if self.choice.step is not None and (data := self._adapter(self.choice.step)) is not None:
            why = {"step": self.choice.step, "why": self.choice.why}
            self.files.write(ADAPTER, data)
            self.files.write(WHY, (json.dumps(why, indent=1) + "\n").encode())
        resumed = [record for record in records if record["step"] <= self.saver.saved]
        kept = {self.choice.step, choice.choose(resumed).step}
        for name, number in self._candidates():
            if number not in kept:
                self.files.remove(name)

    def _adapter(self, step: int) -> bytes | None:
        """The adapter file of a candidate; of a checkpoint if the candidate is gone. None, with a warning, if
        neither is there."""
        path = self.files.folder / _candidate(step)
        if not self.files.is_written(_candidate(step)):
            folder = self.files.folder / f"checkpoint-{step}"
            if not folder.is_dir() or checkpoint_folders.verify(folder):
                self.peers.say(f"warning: step {step} is the best, and its adapter was not kept")
                return None
            path = folder / native.ADAPTER_NAME
        try:
            return reader.read_bytes(path, shown(path))
        except UserError as error:
            self.peers.say(f"warning: {error}")
            return None

    def _candidates(self) -> Iterator[tuple[str, int]]:
        """The candidates in the folder: (name, step)."""
        for path in sorted((self.files.folder / run_folder.BEST).glob("candidate-*")):
            if match := _CANDIDATE.fullmatch(path.name):
                yield f"{run_folder.BEST}/{path.name}", int(match[1])


def _candidate(step: int) -> str:
    return f"{run_folder.BEST}/candidate-{step:06d}.safetensors"
