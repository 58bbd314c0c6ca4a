"""The log of losses and gradient norms. They are checked, and read from the device a few steps at a time."""

import dataclasses
import math

import torch

from dreambooth.data import sampling_order
from dreambooth.data.batches import PhotoRows
from dreambooth.runtime.stops import Stop
from dreambooth.training import metrics, optimizers
from dreambooth.training.trainables import Trainables


def steps_between_readings(device: torch.device) -> int:
    """The number of steps after which losses are read. Reading waits for a GPU, which then stands idle."""
    return 10 if device.type == "cuda" else 1


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """The numbers of one optimizer step. `step` counts from 0. `losses` are by name, [slots] each, and
    `grad_norm` is a scalar; both are on the device. `learning_rates` are by their names in the log."""

    step: int
    losses: dict[str, torch.Tensor]
    grad_norm: torch.Tensor
    learning_rates: dict[str, float]


class LossLog:
    """The records of a run's steps. `completed` is the number of optimizer steps taken.

    Reading a number waits for the GPU. On a GPU records are therefore read every ten steps. If the numbers of
    a step are not finite, the device skips this step and all later ones; `completed` counts them until the
    records are read.
    """

    def __init__(
        self,
        trainables: Trainables,
        dataset: PhotoRows,
        slots: int,
        batch_size: int,
    ):
        """`dataset`, `slots` (micro-batches a step) and `batch_size` are for messages: they name the photos
        of a loss that is not finite."""
        self.optimizer, self.scaler = trainables.optimizer, trainables.scaler
        self.dataset, self.slots, self.batch_size = dataset, slots, batch_size
        can_skip = optimizers.can_skip_on_device(self.optimizer) and not self.scaler.is_enabled()
        self.steps_between_readings = steps_between_readings(trainables.device) if can_skip else 1
        # 1 from the first step on whose numbers are not finite
        self.nonfinite = torch.zeros((), device=trainables.device)
        self.completed = 0
        self.unread: list[StepRecord] = []

    @property
    def is_checked_on_device(self) -> bool:
        """Whether the device alone decides if a step is taken; the host reads the numbers later."""
        return self.steps_between_readings > 1

    def check_losses(self, losses: torch.Tensor) -> None:
        """Raise Stop if the next step's losses, [slots], are not finite, unless that is checked on the
        device."""
        if not self.is_checked_on_device:
            self._raise_if_nonfinite(self.completed, losses, None)

    def check_norm(self, losses: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Check the next step's `grad_norm`, a scalar, before the optimizer steps. `losses` are [slots].

        Where the device checks, it skips the step if a loss or the norm is not finite. With fp16 the scaler
        skips the step and lowers its scale. Else this raises Stop if the norm is not finite.
        """
        if self.is_checked_on_device:
            is_nonfinite = ~torch.isfinite(losses.sum() + grad_norm)
            self.nonfinite.copy_(torch.maximum(self.nonfinite, is_nonfinite.to(self.nonfinite)))
            optimizers.skip_if_nonfinite(self.optimizer, self.nonfinite)
        elif not self.scaler.is_enabled():  # reading the norm would wait for the device
            self._raise_if_nonfinite(self.completed, losses[:0], grad_norm)

    def add(self, record: StepRecord) -> None:
        """Count a step that the optimizer has taken, or has skipped on the device."""
        self.completed = record.step + 1
        self.unread.append(record)

    @property
    def is_due(self) -> bool:
        """Whether it is time to `read`."""
        return len(self.unread) >= self.steps_between_readings

    def drop_skipped(self) -> Stop | None:
        """Drop skipped steps from the records and from `completed`. Returns the reason why they were skipped;
        None if none was."""
        for index, record in enumerate(self.unread):
            try:
                self._raise_if_nonfinite(record.step, record.losses["loss"], record.grad_norm)
            except Stop as stop:
                self.completed, self.unread = record.step, self.unread[:index]
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

    def _raise_if_nonfinite(self, index: int, losses: torch.Tensor, grad_norm: torch.Tensor | None) -> None:
        """`index` is the number of the step, counted from 0."""
        if not torch.isfinite(losses).all():
            # the message names all that reproduces the loss: step, rows and pictures
            slots = [slot for slot, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
            values = ", ".join(str(losses[slot].item()) for slot in slots[:3])
            pictures = self.dataset.describe(self._rows(index, slots))
            raise Stop(
                f"the loss of step {index + 1} is not finite ({values}) at {pictures}; it was not applied"
            )
        # with fp16 the scaler skips such a step
        if grad_norm is not None and not self.scaler.is_enabled() and not torch.isfinite(grad_norm):
            raise Stop(f"the gradients of step {index + 1} are not finite; they were not applied")

    def _rows(self, step: int, slots: list[int]) -> list[int]:
        """The rows of these slots of a step."""
        ranges = (
            sampling_order.rows_of_slot(step, slot, slots=self.slots, batch_size=self.batch_size)
            for slot in slots
        )
        return [row for rows in ranges for row in rows]
