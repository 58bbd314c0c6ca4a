"""Losses and gradient norms of optimizer steps: checked, and read from the device a few steps at a time."""

import dataclasses
import math
from collections.abc import Callable

import torch

from dreambooth.runtime.stops import Stop
from dreambooth.training import metrics, optimizers
from dreambooth.training.trainables import Trainables


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one optimizer step leaves for the log. `step` counts from 0.

    `losses` are by name, [slots] each, and `grad_norm` is a scalar: both are on the device. `learning_rates` are by name in the log.
    """

    step: int
    losses: dict[str, torch.Tensor]
    grad_norm: torch.Tensor
    learning_rates: dict[str, float]


class LossLog:
    """The records of a run's steps.

    Reading a number waits for the GPU. On a GPU records are therefore read every ten steps, and a step whose numbers are not finite is
    skipped on the device, with all steps after it, until the records are read. `completed` counts the steps that the parameters have taken.
    """

    def __init__(
        self,
        device: torch.device,
        trainables: Trainables,
        pictures_of: Callable[[int, list[int]], str],
    ):
        """`pictures_of(step, slots)` names the rows and pictures of these slots, for the message about a loss that is not finite."""
        self.optimizer, self.scaler, self.pictures_of = trainables.optimizer, trainables.scaler, pictures_of
        can_skip = optimizers.can_skip_on_device(self.optimizer) and not self.scaler.is_enabled()
        self.steps_between_readings = 10 if device.type == "cuda" and can_skip else 1
        self.nonfinite = torch.zeros(
            (), device=device
        )  # 1 from the first step on whose numbers are not finite
        self.completed = 0
        self.unread: list[StepRecord] = []

    def check(self, record: StepRecord) -> None:
        """Raise Stop before the optimizer steps if the record's numbers are not finite; on a GPU have the device skip the step instead."""
        if self.steps_between_readings == 1:
            self._raise_if_nonfinite(record)
        else:
            is_bad = ~torch.isfinite(record.losses["loss"].sum() + record.grad_norm)
            self.nonfinite = torch.maximum(self.nonfinite, is_bad.to(self.nonfinite))
            optimizers.skip_if_nonfinite(self.optimizer, self.nonfinite)

    def add(self, record: StepRecord) -> None:
        """Count a step that the optimizer has taken, or has skipped on the device."""
        self.completed = record.step + 1
        self.unread.append(record)

    @property
    def is_due(self) -> bool:
        return len(self.unread) >= self.steps_between_readings

    def drop_skipped(self) -> Stop | None:
        """Drop the steps that the device skipped from the records and from `completed`. Returns the reason, or None if none was skipped."""
        for place, record in enumerate(self.unread):
            try:
                self._raise_if_nonfinite(record)
            except Stop as stop:
                self.completed, self.unread = record.step, self.unread[:place]
                return stop
        return None

    def read(self, progress: metrics.Progress) -> None:
        """Write the unread records to `progress`. Raises Stop if the device skipped a step."""
        reason = self.drop_skipped()
        records, self.unread = self.unread, []
        progress.steps(
            [
                (r.step + 1, {**{name: v.mean().item() for name, v in r.losses.items()}, **r.learning_rates})
                for r in records
            ]
        )
        if reason is not None:
            raise reason

    def _raise_if_nonfinite(self, record: StepRecord) -> None:
        losses, step = record.losses["loss"], record.step + 1
        if not torch.isfinite(losses).all():
            # With the seed, the rows and their pictures are all that it takes to see the loss again.
            slots = [slot for slot, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
            values = ", ".join(str(losses[slot].item()) for slot in slots[:3])
            pictures = self.pictures_of(record.step, slots)
            raise Stop(f"the loss of step {step} is not finite ({values}) at {pictures}; it was not applied")
        # With fp16 the scaler skips such a step and lowers its scale.
        if not self.scaler.is_enabled() and not torch.isfinite(record.grad_norm):
            raise Stop(f"the gradients of step {step} are not finite; they were not applied")
