"""The forward and backward passes of a micro-batch: one with all of its rows, or several that memory has room
for.

With --auto_batch a pass takes half as many rows each time memory runs out, and gradient checkpointing is
turned on when a single row is too many. The rows of an optimizer step stay the same, and so do its gradients
up to rounding: the gradient of a mean is the weighted sum of the gradients of its parts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dreambooth.data import sampling_order
from dreambooth.data.batches import MicroBatch
from dreambooth.files.checkpoint_folders import Content
from dreambooth.io.errors import UserError, is_memory_error, type_and_reason
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import memory
from dreambooth.runtime.graphs import Graphs, Tensors
from dreambooth.runtime.stops import Stop
from dreambooth.training import checkpoints, metrics, recomputation, run_identity, step_inputs
from dreambooth.training.frozen_models import FrozenModels
from dreambooth.training.start import Start
from dreambooth.training.trainables import Trainables

_LARGEST = 4096  # rows of a micro-batch


def joined(
    options: TrainOptions, before: Mapping[str, Any] | None, world: int, *, has_buckets: bool
) -> TrainOptions:
    """The options with the micro-batches of each process's optimizer step put together to one, for
    --auto_batch.

    A run with the record `before` that was begun with the micro-batches that are given keeps them. With
    buckets the shapes of rows depend on the micro-batches, which are therefore kept.
    """
    run = options.run
    rows = run.train_batch_size * run.gradient_accumulation_steps
    is_kept = not run.auto_batch or has_buckets or rows > _LARGEST
    if before is not None and run_identity.is_identity(before):
        slots = run.gradient_accumulation_steps * world
        is_kept |= (before["flags"].get("train_batch_size"), before["slots"]) == (run.train_batch_size, slots)
    if is_kept:
        return options
    return dataclasses.replace(
        options, run=dataclasses.replace(run, train_batch_size=rows, gradient_accumulation_steps=1)
    )


class Passes:
    """Takes the passes of a run's micro-batches. With --auto_batch `rows` and `is_checkpointed` change when
    memory runs out, on all processes together."""

    def __init__(
        self,
        start: Start,
        frozen: FrozenModels,
        trainables: Trainables,
        graphs: Graphs,
        forward_backward: Callable[[Tensors], Tensors],
    ):
        """`forward_backward` returns the losses and the `gradients` of one pass from its inputs."""
        run = start.options.run
        self.options, self.seed, self.batch_size = start.options, run.seed, run.train_batch_size
        self.slots = run.gradient_accumulation_steps * start.peers.world
        self.is_automatic, self.peers, self.status = run.auto_batch, start.peers, start.status
        self.frozen, self.trainables, self.graphs = frozen, trainables, graphs
        self.forward_backward = forward_backward
        self.rows, self.is_checkpointed = run.train_batch_size, run.gradient_checkpointing
        self.unreported: list[dict[str, Any]] = []
        if self.is_automatic:
            self._record()

    def resume(self, checkpoint: Content) -> None:
        """Go on with the passes of a checkpoint. Raises UserError if it is damaged."""
        saved = checkpoints.read_state(checkpoint).get("passes")
        if not self.is_automatic or saved is None:
            return
        rows = saved.get("rows") if isinstance(saved, dict) else None
        if type(rows) is not int or rows < 1 or type(saved.get("gradient_checkpointing")) is not bool:
            raise UserError(f"--resume_from_checkpoint: state.json is damaged: its passes are {saved!r}")
        self.rows = min(rows, self.batch_size)
        if saved["gradient_checkpointing"]:
            self._checkpoint_gradients()
        self._record()

    def take(self, batch: MicroBatch) -> Tensors:
        """The losses of a micro-batch, scalars by name, and its `gradients`, [count]. The next call
        overwrites the gradients. Raises Stop if memory is short for one row with gradient checkpointing."""
        if not self.is_automatic:
            return self._sum_of_parts(batch)
        while True:
            outputs, error = self._tried(batch)
            if not self.peers.any(error is not None):
                return outputs
            self._step_down(batch.step, error or "another process ran out of memory")

    def _tried(self, batch: MicroBatch) -> tuple[Tensors, str | None]:
        """(what `_sum_of_parts` returns, None), or ({}, the error) if memory ran out."""
        try:
            return self._sum_of_parts(batch), None
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            return {}, type_and_reason(error)  # the error itself holds the tensors of the pass

    def _sum_of_parts(self, batch: MicroBatch) -> Tensors:
        """The outputs of the passes of a micro-batch: gradients are summed, losses averaged by rows."""
        total: Tensors = {}
        for part in batch.parts(self.rows):
            inputs = step_inputs.of_batch(part, self.frozen, self.options.objective)
            # dropout takes no generator, so torch's global one is seeded
            torch.manual_seed(sampling_order.key(self.seed, "dropout", batch.step, batch.slot))
            outputs = self.forward_backward(inputs)
            is_whole, share = part is batch, len(part.rows) / len(batch.rows)
            for name, value in outputs.items():
                if name != "gradients":
                    value = value.clone() if is_whole else value * share
                elif not is_whole:  # the next pass overwrites them; those of a single pass are read before
                    value = value.clone()
                total[name] = total[name] + value if name in total else value
        return total

    def of_step(self, rows: int) -> float:
        """How many passes like one of `rows` rows are in an optimizer step of all processes."""
        return self.slots * self.batch_size / rows

    def _step_down(self, step: int, error: str) -> None:
        """Take smaller passes from now on, because of `error` in step number `step`, counted from 0. Raises
        Stop if there are none."""
        self.graphs.forget()
        if self.rows > 1:
            self.rows = (self.rows + 1) // 2
        elif not self.is_checkpointed:
            self._checkpoint_gradients()
        else:
            raise Stop(
                f"out of memory in step {step + 1}, with passes of one row and gradient checkpointing: lower "
                "--resolution or add --mixed_precision bf16, --quantize_base or --offload"
            )
        memory.release()
        self._record()
        self.peers.say(
            f"note: out of memory in step {step + 1} ({error}): from now on {self.description}. The "
            "gradients are the same up to rounding."
        )
        self.unreported.append({"step": step + 1, "out_of_memory": {**self.status.passes, "error": error}})

    @property
    def description(self) -> str:
        """How passes are taken, in words."""
        rows = "one row" if self.rows == 1 else f"{self.rows} rows"
        with_checkpointing = ", with gradient checkpointing" if self.is_checkpointed else ""
        return f"a pass takes {rows} of the {self.batch_size} of a micro-batch{with_checkpointing}"

    def report(self, progress: metrics.Progress) -> None:
        """Write to metrics.jsonl when memory ran out since the last call."""
        for record in self.unreported:
            progress.event(record)
        self.unreported = []

    def _checkpoint_gradients(self) -> None:
        self.is_checkpointed = True
        encoders = [component.model for component in self.trainables.text_components()]
        recomputation.enable(self.frozen.parts.unet, encoders)

    def _record(self) -> None:
        self.status.passes = {"rows": self.rows, "gradient_checkpointing": self.is_checkpointed}
