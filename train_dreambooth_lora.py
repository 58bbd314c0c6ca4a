"""Teach a diffusion model one subject from a handful of photos.

The method is DreamBooth (arXiv 2208.12242) with LoRA (arXiv 2106.09685). The base is Stable Diffusion 1.x,
2.x or XL, or the first stage of DeepFloyd IF. Command lines of Hugging Face diffusers' scripts of the same
name work unchanged. Launch with `accelerate launch` or plain `python`.
"""

from dreambooth.bases import folders
from dreambooth.options import run_table
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import startup, stops

if __name__ == "__main__":  # before the slow imports, see runtime/startup.py
    startup.begin()
    RUNS = run_table.parse(__doc__)
    folders.hash_ahead(RUNS.options.base)

import contextlib
import time
from collections.abc import Iterator

import torch

from dreambooth.adapters import inject
from dreambooth.bases import prediction
from dreambooth.bases.prompts import PromptEmbeds
from dreambooth.data.batches import MicroBatch, micro_batches
from dreambooth.io import console
from dreambooth.runtime import environment, memory
from dreambooth.runtime.graphs import Graphs, Tensors
from dreambooth.runtime.stops import Stop, Watch
from dreambooth.training import (
    base_targets,
    checks,
    frozen_models,
    many_runs,
    metrics,
    objectives,
    prepare,
    publishing,
    run_folder,
    saving,
)
from dreambooth.training.evaluation import Evaluation
from dreambooth.training.frozen_models import FrozenModels
from dreambooth.training.loss_log import LossLog
from dreambooth.training.optimizer_steps import OptimizerSteps
from dreambooth.training.passes import Passes
from dreambooth.training.start import Start
from dreambooth.training.trainables import Trainables


def denoising_losses(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    huber_c: float | None = None,
) -> torch.Tensor:
    """Mean error of each row, float32 [B]: squared, or --huber_c's. `weights` are [B] or [B, 1, h, w]."""
    return objectives.row_losses(objectives.errors(model_pred, target, huber_c), weights)


def dreambooth_loss(
    losses: torch.Tensor, *, sources: int, prior_loss_weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss to minimise, its parts by name), from the losses of all rows. All results are scalars.

    With one source, `losses` are [B], of instance photos. With two they are [2B]: B instance photos, then B
    class images. The two halves are averaged separately (DreamBooth, arXiv 2208.12242, eq. 2).
    """
    if sources == 1:
        return losses.mean(), {}
    instance, prior = (half.mean() for half in losses.chunk(2))
    return instance + prior_loss_weight * prior, {"loss_instance": instance, "loss_prior": prior}


class Training:
    """One run: frozen models, trainable adapters, and the loop over steps."""

    def __init__(self, start: Start, frozen: FrozenModels, watch: Watch):
        options = start.options
        self.options, self.peers, self.watch, self.frozen = options, start.peers, watch, frozen
        self.accelerator, self.device = start.peers.accelerator, start.peers.accelerator.device
        self.sources, self.dataset, self.seed = frozen.dataset.sources, frozen.dataset, options.run.seed
        self.slots = options.run.gradient_accumulation_steps * self.peers.world  # micro-batches of a step
        self.steps_per_epoch, self.max_steps = start.steps()
        self.text_steps = options.text_steps(self.max_steps)
        self.trainables = Trainables(start, frozen.parts, self.max_steps)
        self.saver = saving.Saver(start, self.trainables)
        self.loss_log = LossLog(self.trainables, self.dataset, self.slots, options.run.train_batch_size)
        self.graphs = Graphs(self.device, checks.reason_not_to_record(options), console.warn)
        self.evaluation = Evaluation(
            start,
            frozen,
            self.trainables,
            self.saver,
            self.graphs,
            watch.check,
            steps_per_epoch=self.steps_per_epoch,
            max_steps=self.max_steps,
        )
        forward_backward = self.graphs.replayed(self.forward_backward, self.trainables.state)
        self.passes = Passes(start, frozen, self.trainables, self.graphs, forward_backward)
        max_norm = options.optimization.max_grad_norm
        self.optimizer_steps = OptimizerSteps(self.graphs, self.trainables, self.loss_log, max_norm=max_norm)
        self.first_step, self.phases = 0, start.phases

    # ---- one step

    def step(self, step: int, batches: Iterator[MicroBatch]) -> None:
        """Take optimizer step number `step`, counted from 0. Raises Stop before it if the run must end."""
        run, gradients = self.options.run, self.trainables.zeroed_sum()
        losses = []
        for _ in range(run.gradient_accumulation_steps):
            outputs = self.micro_step(next(batches))
            self.gather_gradients(gradients, outputs.pop("gradients"))
            losses.append(outputs)
        if run.gradient_sync == "ddp" and self.peers.world > 1:
            gradients.copy_(self.peers.sum(gradients))
        slot_losses = {
            name: self.peers.gather_slots(torch.stack([loss[name] for loss in losses])) for name in losses[0]
        }
        self.peers.sync_stop()
        self.optimizer_steps.take(step, slot_losses)

    def micro_step(self, batch: MicroBatch) -> Tensors:
        """Forward and backward pass of one micro-batch. Returns what `forward_backward` returns."""
        outputs = self.passes.take(batch)
        self.peers.sync_stop()
        return outputs

    def forward_backward(self, inputs: Tensors) -> Tensors:
        """The loss and its parts, scalars by name, and the `gradients` of all parameters, [count].

        It is a function of tensors on the device: `inputs` has the fields of a Task, the prompts, and time
        ids. A GPU records it once and then replays it, without this Python code; see runtime/graphs.py.
        """
        with self.trainables.step_weights.in_place(), environment.deterministic(self.device):
            task = objectives.Task.of(inputs)
            target = base_targets.of_task(task, inputs, self.predict, self.trainables.base_unet)
            # prediction
            model_output = self.predict(task, self.frozen.prompt_embeds(inputs), inputs.get("time_ids"))
            if self.peers.world == 1:  # several processes stop together, in sync_stop of micro_step
                self.watch.check()
            # loss
            model_pred, huber_c = task.prediction(model_output), self.options.objective.huber_c
            losses = denoising_losses(model_pred, target, task.weights, huber_c)
            weight = self.options.prior.prior_loss_weight
            loss, parts = dreambooth_loss(losses, sources=len(self.sources), prior_loss_weight=weight)
            # backward
            loss_of_step = loss / self.passes.of_step(rows=len(losses) // len(self.sources))
            gradients = self.trainables.gradients(self.trainables.scaler.scale(loss_of_step))
        outputs = {name: value.detach() for name, value in {"loss": loss, **parts}.items()}
        return {**outputs, "gradients": gradients}

    def predict(
        self, task: objectives.Task, prompt_embeds: PromptEmbeds, time_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """The UNet's output, [B, C, h, w], without a predicted variance."""
        unet = self.frozen.parts.unet
        offload = memory.offloaded(unet) if self.options.speed.offload else contextlib.nullcontext()
        with self.accelerator.autocast(), offload:
            return prediction.predict(unet, task.model_input, task.timesteps, prompt_embeds, time_ids)

    def gather_gradients(self, total: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add the micro-step's gradients of every process to `total`, [count], in the order of slots.

        That order does not depend on the number of processes. With --gradient_sync ddp only `gradients`,
        those of this process, are added; the sum over processes follows at the end of the step.
        """
        if self.options.run.gradient_sync == "ddp":
            total += gradients
        else:
            for row in self.peers.gather(gradients[None]):  # [processes, count]
                total += row

    # ---- all steps

    def train(self) -> None:
        """Train all steps and write the finished adapter. An early end saves the last completed step."""
        run = self.options.run
        batches = micro_batches(
            self.dataset,
            self.frozen.encoded,
            self.frozen.parts.vae,
            range(self.first_step, self.max_steps),
            slots=self.slots,
            batch_size=run.train_batch_size,
            peers=self.peers,
            workers=self.options.instance.dataloader_num_workers,
        )
        progress = metrics.Progress(
            self.accelerator,
            self.saver.output_dir / run_folder.METRICS,
            first_step=self.first_step,
            last_step=self.max_steps,
            images_per_step=self.slots * run.train_batch_size * len(self.sources),
            phases=self.phases,
        )
        with contextlib.closing(progress):
            try:
                self.evaluation.begin(self.first_step, progress)
                progress.restart_clock(self.first_step)
                for step in range(self.first_step, self.max_steps):
                    if self.evaluation.is_over:
                        break
                    if step >= self.text_steps and self.trainables.text_components():
                        self.finish_text()  # of a resumed run that ended between this step and finish_text
                    self.step(step, batches)
                    self.after_step(step + 1, progress)
                last_step = self.loss_log.completed
                progress.end_phase("training", last_step)
                self.saver.save_adapter(last_step)
                self.evaluation.finish(last_step, progress)
            except BaseException as error:
                self.save_last_step(error, progress)
                raise

    def after_step(self, step: int, progress: metrics.Progress) -> None:
        """Do what is due after `step` steps: read losses, freeze text encoders, save, evaluate."""
        ends_text = step == self.text_steps < self.max_steps and bool(self.trainables.text_components())
        is_first, is_last = step == self.first_step + 1, step == self.max_steps
        is_saved = step % self.options.run.checkpointing_steps == 0
        is_evaluated = self.evaluation.is_due(step)
        if ends_text or is_saved or is_first or is_last or is_evaluated or self.loss_log.is_due:
            self.loss_log.read(progress)
        self.passes.report(progress)
        if ends_text:
            self.finish_text()
        if is_first:
            progress.end_phase("first step", step)
        if is_saved:
            self.saver.save_checkpoint(step)
        self.evaluation.after_step(step, progress)
        if not self.loss_log.unread:
            progress.restart_clock(step)

    @torch.no_grad()
    def finish_text(self) -> None:
        """End the training of the text encoders: encode all prompts, keep the adapters, free the models."""
        with self.trainables.evaluating():
            self.frozen.free_text_encoders(self.watch.check)
        self.graphs.forget()
        for component in self.trainables.drop_text_encoders():
            self.saver.keep(component)
        self.peers.say(f"the text encoder is not trained after step {self.text_steps}")

    def save_last_step(self, error: BaseException, progress: metrics.Progress) -> None:
        """Save the last completed step. Raises Stop in place of `error` if steps were skipped."""
        if not self.optimizer_steps.is_between_steps:
            return
        reason = self.loss_log.drop_skipped()
        self.saver.save_early_end(self.loss_log.completed, self.max_steps)
        self.loss_log.read(progress)
        if reason is not None and isinstance(error, Stop):
            raise reason from None  # the resumed run would fail at that step again


def assemble(start: Start, watch: Watch) -> Training:
    """Load the models and inject the adapters. Returns the run before its first step."""
    frozen = frozen_models.load(start, watch.check)
    training = Training(start, frozen, watch)
    start.phases["adapters injected"] = memory.reading(training.device)
    return training


def train(options: TrainOptions, watch: Watch) -> None:
    """Run everything, from the check of the input to the upload of the finished adapter."""
    with contextlib.ExitStack() as stack:
        start = prepare.prepare(options, watch, stack)
        if start is None:  # --dry_run
            return
        peers = start.peers
        training = assemble(start, watch)
        peers.say(inject.describe(training.trainables.components))
        processes = f"{peers.world} process{'es' if peers.world > 1 else ''}"
        peers.say(f"training on {processes}, {training.slots} micro-batches a step")

        # where the run starts
        if start.checkpoint:
            training.trainables.restore(start.checkpoint)
            training.passes.resume(start.checkpoint)
            training.first_step = training.loss_log.completed = training.saver.saved = start.checkpoint.step
            done, steps = training.first_step, training.max_steps
            suffix = "" if done < steps else "; nothing is left to train"
            peers.say(f"resuming from {start.checkpoint.folder} at step {done} of {steps}{suffix}")
        else:
            training.trainables.start_from(start.init_adapter)
        peers.check_same({"adapter weights at the start": training.saver.digest(training.first_step)})
        start.begin_folder()

        # the loop
        started = time.monotonic()
        watch.is_immediate = False  # from here on a signal ends the run at the next check
        try:
            training.train()
        finally:
            last_step = training.loss_log.completed
            start.status.step, start.status.cuda_graph = last_step, training.graphs.outcome
        if last_step < training.max_steps:
            start.status.early_end = training.evaluation.best.early_end(last_step, training.max_steps)
            peers.say(start.status.early_end)

        if peers.is_main:
            publishing.publish(start, training.saver.adapter, training.evaluation.pictures.finished)
        peers.barrier()
        peers.accelerator.end_training()
        peers.say(f"{last_step - training.first_step} steps in {time.monotonic() - started:.1f} s")
        peers.say(memory.summary(training.phases))
        peers.say(publishing.last_line(start))


def main(options: TrainOptions) -> None:
    """Train and save an adapter. Raises UserError for a user's mistake, SystemExit if the run ends early."""
    with stops.stoppable(options.run.max_train_minutes) as watch:
        train(options, watch)


if __name__ == "__main__":
    startup.run(many_runs.trainer(main), RUNS)
