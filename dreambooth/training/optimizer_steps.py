"""Optimizer steps: clip the summed gradients, hold back what is not finite, step."""

import math

import torch

from dreambooth.runtime.graphs import Graphs, Tensors
from dreambooth.training import optimizers
from dreambooth.training.loss_log import LossLog, StepRecord
from dreambooth.training.trainables import Trainables


class OptimizerSteps:
    """Takes the optimizer steps of a run and records their numbers in the log of losses."""

    def __init__(self, graphs: Graphs, trainables: Trainables, loss_log: LossLog, *, max_norm: float):
        """`max_norm` is --max_grad_norm; 0 clips nothing."""
        self.trainables, self.loss_log, self.max_norm = trainables, loss_log, max_norm or math.inf
        self.is_between_steps = True
        """False while a step is half done and must not be saved."""
        can_be_recorded = optimizers.can_be_recorded(trainables.optimizer)
        self.run_clip_and_step = graphs.replayed(self.clip_and_step, self._state, is_recorded=can_be_recorded)

    def take(self, step: int, losses: Tensors) -> None:
        """Take step number `step`, counted from 0, with the gradients in `trainables.gradient_sum`. `losses`
        are [slots] each, by name.

        Raises Stop before the step if a loss or gradient is not finite. On a GPU this is decided on the
        device and read later.
        """
        learning_rates = self.trainables.set_learning_rates(step)
        self.loss_log.check_losses(losses["loss"])
        grad_norm = self.run_clip_and_step({"loss": losses["loss"]})["grad_norm"].clone()
        self.loss_log.add(StepRecord(step, losses, grad_norm, learning_rates))
        self.is_between_steps = True

    def clip_and_step(self, inputs: Tensors) -> Tensors:
        """Clip the gradients and step. `inputs` has `loss`, [slots]; the result has `grad_norm`, a scalar. A
        GPU records this function and replays it, see runtime/graphs.py."""
        trainables, gradients = self.trainables, self.trainables.gradient_sum
        trainables.put_gradients(gradients)
        if trainables.scaler.is_enabled():
            trainables.scaler._per_optimizer_states.clear()  # of a recording that failed
        # clip
        trainables.scaler.unscale_(trainables.optimizer)
        norm = torch.nn.utils.get_total_norm([gradients])  # the parameters' gradients are views of it
        gradients *= torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)
        # check
        self.loss_log.check_norm(inputs["loss"], norm)
        # step
        self.is_between_steps = False
        trainables.optimizer_step()
        return {"grad_norm": norm}

    def _state(self) -> list[torch.Tensor]:
        """All tensors that `clip_and_step` reads and that change."""
        trainables = self.trainables
        moments = optimizers.initial_state(trainables.optimizer)
        rates = [group["lr"] for group in trainables.optimizer.param_groups]
        return [trainables.gradient_sum, *moments, *rates, self.loss_log.nonfinite, *trainables.state()]
