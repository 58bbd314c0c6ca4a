"""The meter of one run: when it measures, and what it records."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from dreambooth.bases import compilation
from dreambooth.training import meter, meter_setup, metrics
from dreambooth.training.frozen_models import FrozenModels
from dreambooth.training.start import Start
from dreambooth.training.trainables import Trainables


class RunMeter:
    """Measures at step 0, every --meter_steps steps and after the last step, on the main process; the other
    processes wait. Without the flag nothing is measured."""

    def __init__(
        self,
        start: Start,
        frozen: FrozenModels,
        trainables: Trainables,
        check: Callable[[], None],
        max_steps: int,
    ):
        """`check` is called before each forward pass; it raises Stop if the run must end."""
        self.start, self.frozen, self.trainables, self.check = start, frozen, trainables, check
        self.peers, self.steps = start.peers, start.options.meter.meter_steps
        self.max_steps = max_steps
        self.meter: meter.Meter | None = None

    def is_due(self, step: int) -> bool:
        """Whether the adapter is measured after `step` steps."""
        return self.steps > 0 and (step % self.steps == 0 or step == self.max_steps)

    def begin(self, step: int, progress: metrics.Progress) -> None:
        """Measure the base, and the adapter if that is due, before the step after `step` steps. The text
        encoders must be in memory. Raises UserError if a photo has changed since it was checked."""
        if self.steps and self.peers.is_main and not self._has_ended(step, progress):
            with self._evaluating():
                self.meter = meter_setup.of_run(self.start, self.frozen, self.trainables, self.check)
        self.measure(step, progress)

    def _has_ended(self, step: int, progress: metrics.Progress) -> bool:
        return step == self.max_steps and progress.is_evaluated(step, "meter")

    def measure(self, step: int, progress: metrics.Progress) -> None:
        """Measure the adapter after `step` steps if that is due and metrics.jsonl has no record of it."""
        if not self.is_due(step):
            return
        if self.meter is not None and not progress.is_evaluated(step, "meter"):
            started = time.monotonic()
            with self._evaluating():
                measures = self.meter.measure()
            seconds = round(time.monotonic() - started, 3)
            progress.evaluation(step, "meter", {**measures, "seconds": seconds})
            means = {f"meter/{name}": measure["mean"] for name, measure in measures.items()}
            self.peers.accelerator.log(means, step=step)
        self.peers.barrier()

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Within the block there are no gradients and no dropout, and nothing compiled is run."""
        is_compiled = self.start.options.speed.compile
        with torch.no_grad(), self.trainables.evaluating(), compilation.eager(wanted=is_compiled):
            yield
