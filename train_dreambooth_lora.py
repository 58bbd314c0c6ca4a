"""Teach a diffusion model one subject from a handful of photos: DreamBooth (arXiv 2208.12242) with LoRA (arXiv 2106.09685).

The base may be Stable Diffusion 1.x, 2.x or XL, or the first stage of DeepFloyd IF. The flags of Hugging Face diffusers' scripts of the same
name work here unchanged. Launch with `accelerate launch` or plain `python`."""

from dreambooth.bases import folders
from dreambooth.options.command_line import as_table, parse, without_token, yaml_text
from dreambooth.options.training import TrainOptions, pictures_of_pass
from dreambooth.runtime import startup, stops

if __name__ == "__main__":
    OPTIONS = parse(TrainOptions, __doc__)
    startup.begin()
    folders.hash_ahead(OPTIONS.base)

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler

from dreambooth.adapters import inject
from dreambooth.bases import autoencoder, compilation, families
from dreambooth.bases.prompts import PromptEmbeds
from dreambooth.data import sampling_order
from dreambooth.data.batches import MicroBatch, micro_batches
from dreambooth.errors import UserError
from dreambooth.files import checkpoint_folders
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.runtime import memory
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Stop, Watch
from dreambooth.training import (
    checkpoints,
    frozen_models,
    hub,
    metrics,
    model_card,
    objectives,
    optimizers,
    prepare,
    run_folder,
    saving,
    validation,
)


def denoising_losses(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each row, times its weight, float32 [B]."""
    losses = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
    return losses if weights is None else losses * weights


def dreambooth_loss(
    losses: torch.Tensor, *, sources: int, prior_loss_weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(scalar to minimise, its parts). Instance and class rows are averaged separately (DreamBooth, arXiv 2208.12242, eq. 2)."""
    if sources == 1:
        return losses.mean(), {}
    instance, prior = (half.mean() for half in losses.chunk(2))
    return instance + prior_loss_weight * prior, {"loss_instance": instance, "loss_prior": prior}


@dataclasses.dataclass(frozen=True)
class Taken:
    """A step that was taken, or held back if its numbers are not finite: losses by name, [slots], and the gradients' norm, still on the device."""

    step: int
    losses: dict[str, torch.Tensor]
    norm: torch.Tensor
    rates: dict[str, float]


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; a GPU gets it while the host goes on, which memory that can be swapped out would not allow."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def steps_between_readings(device: torch.device) -> int:
    """After how many steps losses are read: reading waits for a GPU, which then has nothing to do until it is told more."""
    return 10 if device.type == "cuda" else 1


class Training:
    """One run: the frozen base, the adapter on it, and the loop that trains it. `options` are complete: nothing in them is left open."""

    def __init__(
        self,
        options: ResolvedTrainOptions,
        peers: Peers,
        watch: Watch,
        frozen: frozen_models.FrozenHalf,
        identity: dict[str, Any] | None = None,
    ):
        self.options, self.peers, self.watch = options, peers, watch
        self.parts, self.prompt_cache, self.dataset, self.encoded = (
            frozen.parts,
            frozen.prompt_cache,
            frozen.rows,
            frozen.encoded,
        )
        self.sources = self.dataset.sources
        self.accelerator = peers.accelerator
        run, instance = options.run, options.instance
        self.seed, self.resolution, self.output_dir = run.seed, instance.resolution, Path(run.output_dir)
        self.identity = identity or {}
        self.slots = run.gradient_accumulation_steps * peers.world
        self.components = self._inject()
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(
            self.accelerator.device.type, enabled=self.accelerator.mixed_precision == "fp16"
        )
        self.saver = saving.Saver(
            run,
            peers,
            self.components,
            self.optimizer,
            self.scaler,
            info=saving.adapter_info(as_table(options), self.identity.get("base")),
            identity=self.identity,
            environment=run_folder.environment_of(
                run, self.accelerator.device, is_compiled=options.speed.compile
            ),
        )
        pictures = pictures_of_pass([len(source.photos) for source in self.sources], instance.repeats)
        self.steps_per_epoch, self.max_steps = run.steps(pictures, peers.world)
        self.text_steps = options.text_steps(self.max_steps)
        self.learning_rate_factor = self._make_schedule()
        self.vae_config = self.parts.base.vae_config
        prompt = options.validation.validation_prompt
        self.pictures = (
            validation.Pictures(prompt, options, peers, self.parts, watch.check) if prompt else None
        )
        self.first_step = 0
        self.completed = 0  # steps whose update is in the parameters
        self.is_between_steps = True
        self.unread: list[Taken] = []
        can_wait = optimizers.can_skip_on_device(self.optimizer) and not self.scaler.is_enabled()
        self.read_every = steps_between_readings(self.accelerator.device) if can_wait else 1
        self.is_spoilt = torch.zeros(
            (), device=self.accelerator.device
        )  # 1 from the first step on whose numbers are not finite
        self.result_pictures: list[str] = []  # names of those drawn with the finished adapter
        self.memory: dict[str, memory.Reading] = dict(frozen.readings)  # by phase

    def _inject(self) -> list[inject.Component]:
        options, text = self.options.adapter, self.options.text
        models: list[tuple[str, torch.nn.Module, tuple[str, ...]]] = [
            ("unet", self.parts.unet, inject.unet_targets(options))
        ]
        if text.train_text_encoder:
            assert self.parts.text is not None
            for name, encoder in self.parts.text.encoders.items():
                unused = families.unused_layers(self.parts.family, name, text)
                targets = inject.text_targets(
                    encoder.config.num_hidden_layers, unused, options, inject.shapes_of(encoder)
                )
                models.append((name, encoder, targets))
        components = [
            inject.inject(
                name, model, options, targets, seed=sampling_order.key(self.seed, "lora-init", name)
            )
            for name, model, targets in models
        ]
        for component in components:
            if self.options.speed.compile and component.name == "unet":
                compilation.compile_blocks(component.model)
            component.model.train()  # LoRA dropout and gradient checkpointing work in training mode only
        return components

    def _make_optimizer(self) -> torch.optim.Optimizer:
        o, run = self.options.optimization, self.options.run
        scale = run.gradient_accumulation_steps * run.train_batch_size * self.peers.world if o.scale_lr else 1
        own_rates = self.options.adapter.learning_rates
        groups = []
        for component in self.components:
            rate, decay = o.rate_and_decay(component.name)
            by_rate: dict[float | None, list[torch.nn.Parameter]] = {}
            for name, parameter in component.named_parameters():
                by_rate.setdefault(inject.by_part(own_rates, name), []).append(parameter)
            for own, parameters in by_rate.items():
                # the component's name is also that of its parameters without a rate of their own
                name = component.name if own is None else f"{component.name}:{own!r}"
                groups.append(
                    optimizers.Group(name, parameters, (rate if own is None else own) * scale, decay)
                )
        return optimizers.make(o, groups)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those still trained, in the order in which their gradients are exchanged."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _make_schedule(self):
        """step -> factor on the learning rate. diffusers' schedules are functions of the step; used as such they have no state to restore."""
        o = self.options.optimization
        if optimizers.schedules_itself(o):
            return lambda step: 1.0
        # the polynomial one ends at a rate of 1e-7, whatever it starts from
        start = o.learning_rate if o.learning_rate > 1e-7 else 1.0
        throwaway = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=start)
        schedule = get_scheduler(
            o.lr_scheduler,
            throwaway,
            num_warmup_steps=o.lr_warmup_steps,
            num_training_steps=self.max_steps,
            num_cycles=o.lr_num_cycles,
            power=o.lr_power,
        )
        return schedule.lr_lambdas[0]

    def start_from(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Fill the adapter from an adapter file; a component that the file lacks stays as it was drawn."""
        for component in self.components:
            if component.name in state:
                try:
                    component.load_state_dict(state[component.name])
                except UserError as error:
                    raise UserError(f"--init_adapter: {error}") from None

    def resume(self, checkpoint: checkpoint_folders.Content) -> None:
        """Go on from a checkpoint that has been found to be of this run. Raises UserError if it does not fit all the same."""
        state = checkpoints.read_state(checkpoint)
        if not state.get("trains_text", True):
            self.drop_text()
        checkpoints.restore(checkpoint, self.components, self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["grad_scaler"])
        self.first_step = self.completed = self.saver.saved = checkpoint.step

    def text_components(self) -> list[inject.Component]:
        return [component for component in self.components if component.name != "unet"]

    def drop_text(self) -> None:
        """Step the text encoders' parameters no more."""
        for name in [group["name"] for group in self.optimizer.param_groups]:
            if name.startswith("text_encoder"):
                optimizers.drop(self.optimizer, name)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.parts.unet.enable_gradient_checkpointing()
        for component in self.text_components():
            component.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )  # type: ignore[operator]

    @torch.no_grad()
    def finish_text(self) -> None:
        """Train the text encoders no more, and free them: what they have learned is kept, and so is what they make of the prompts."""
        assert self.parts.text is not None
        with saving.in_eval_mode(self.components, self.optimizer), self.accelerator.autocast():
            self.prompt_cache = self.parts.text.encode_all(
                frozen_models.prompts_of(self.options, self.sources), self.watch.check
            )
        self.parts.text = None
        self.drop_text()
        for component in self.text_components():
            self.saver.finish(component)
        self.components = [component for component in self.components if component.name == "unet"]
        self.peers.say(f"the text encoder is trained no more after step {self.text_steps}")

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The conditions of each of `prompts`; each distinct one is encoded once."""
        if self.prompt_cache is not None:
            return self.prompt_cache.of(prompts)
        assert self.parts.text is not None
        distinct = list(dict.fromkeys(prompts))
        with self.accelerator.autocast():
            return self.parts.text(distinct).rows([distinct.index(prompt) for prompt in prompts])

    def make_task(self, batch: MicroBatch) -> objectives.Task:
        """The batch's question to the UNet, on its device. Every draw is a function of the row alone."""
        device, scheduler = self.accelerator.device, self.parts.noise_scheduler
        shape = tuple(batch.posterior.mean.shape[1:])

        def draw(what: str, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.cat(
                [
                    sampling_order.noise_of_rows(self.seed, f"{s.purpose}-{what}", batch.rows, shape)
                    for s in self.sources
                ]
            )

        latents = autoencoder.normalized(self.vae_config, batch.posterior.sample(draw("posterior", shape)))
        noise = draw("noise", shape)
        if offset := self.options.objective.noise_offset:
            noise = noise + offset * draw("noise-offset", (shape[0], 1, 1))
        count = scheduler.config.num_train_timesteps
        levels = torch.cat(
            [
                sampling_order.timesteps_of_rows(self.seed, f"{s.purpose}-timestep", batch.rows, count)
                for s in self.sources
            ]
        )
        gamma = self.options.objective.snr_gamma
        return objectives.make_task(
            scheduler, *(moved(tensor, device) for tensor in (latents, noise, levels)), snr_gamma=gamma
        )

    def predict(self, task: objectives.Task, conditions: PromptEmbeds, batch: MicroBatch) -> torch.Tensor:
        """What the UNet answers, [B, C, h, w]."""
        unet, device = self.parts.unet, self.accelerator.device
        conditions = conditions.to(device, unet.dtype)
        added = None
        if conditions.pooled is not None:
            side = self.resolution
            sizes = [(f.height, f.width, f.top, f.left, side, side) for f in batch.frames]
            added = {
                "text_embeds": conditions.pooled,
                "time_ids": torch.tensor(sizes, device=device, dtype=torch.float32),
            }  # bf16 would round sizes
        keeping = memory.offloaded(unet) if self.options.speed.offload else contextlib.nullcontext()
        with self.accelerator.autocast(), keeping:
            model_input = task.model_input.to(unet.dtype).contiguous(memory_format=torch.channels_last)
            output = unet(model_input, task.timesteps, conditions.embeds, added_cond_kwargs=added).sample
        # a UNet that predicts the variance as well has it in the second half of its channels
        return (
            output.chunk(2, dim=1)[0] if unet.config.out_channels == 2 * unet.config.in_channels else output
        )

    def micro_step(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Forward and backward of one micro-batch; gradients are left on the parameters. Returns the detached loss and its parts."""
        task = self.make_task(batch)
        torch.manual_seed(
            sampling_order.key(self.seed, "dropout", batch.step, batch.slot)
        )  # dropout has no generator argument
        output = self.predict(task, self.encode(batch.prompts), batch)
        if self.peers.world == 1:  # several stop together, once a micro-step
            self.watch.check()
        losses = denoising_losses(task.prediction(output), task.target, task.weights)
        loss, pieces = dreambooth_loss(
            losses, sources=len(self.sources), prior_loss_weight=self.options.prior.prior_loss_weight
        )
        self.scaler.scale(loss / self.slots).backward()
        self.peers.sync_stop()
        return {name: value.detach() for name, value in {"loss": loss, **pieces}.items()}

    def take_gradients(self, total: torch.Tensor) -> None:
        """Add the gradients of this micro-step to `total`: every process's, in the order of their slots, which no process count changes; or
        with --gradient_sync ddp this process's alone, for one sum at the end of the step."""
        flat = torch.cat(
            [
                p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten()
                for p in self.parameters
            ]
        )
        if self.options.run.gradient_sync == "ddp":
            total += flat
        else:
            for row in self.peers.gather(flat[None]):  # [processes, parameters]
                total += row
        for parameter in self.parameters:
            parameter.grad = None

    def update(self, total: torch.Tensor, step: int, losses: dict[str, torch.Tensor]) -> None:
        """One optimizer step from the summed gradients. Raises Stop, the step not taken, if they or the losses are found not to be finite; what is
        not looked at yet is held back on the device, with all that follows."""
        rates = optimizers.set_learning_rate(self.optimizer, self.learning_rate_factor(step))
        for parameter, gradient in zip(
            self.parameters, total.split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([total])  # whose views the gradients are
        total *= torch.clamp((self.options.optimization.max_grad_norm or math.inf) / (norm + 1e-6), max=1.0)
        taken = Taken(
            step,
            losses,
            norm,
            {"lr" if name == "unet" else f"lr_{name}": rate for name, rate in rates.items()},
        )
        if self.read_every == 1:
            self._check(taken)
        else:
            self.is_spoilt = torch.maximum(
                self.is_spoilt, (~torch.isfinite(losses["loss"].sum() + norm)).to(self.is_spoilt)
            )
            optimizers.skip_if_nonfinite(self.optimizer, self.is_spoilt)
        self.is_between_steps = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.completed = step + 1
        self.unread.append(taken)
        self.is_between_steps = True

    def _check(self, taken: Taken) -> None:
        """Raise Stop if the numbers of a step are not finite."""
        if not torch.isfinite(taken.losses["loss"]).all():
            raise Stop(self._not_finite(taken.step, taken.losses["loss"]))
        if not self.scaler.is_enabled() and not torch.isfinite(
            taken.norm
        ):  # with fp16 the scaler skips such a step and lowers its scale
            raise Stop(f"the gradients of step {taken.step + 1} are not finite; they were not applied")

    def count_back(self) -> Stop | None:
        """Leave out of the steps taken those that were held back, and of the unread ones them too; why they were, if any."""
        for place, taken in enumerate(self.unread):
            try:
                self._check(taken)
            except Stop as stop:
                self.completed, self.unread = taken.step, self.unread[:place]
                return stop
        return None

    def read_losses(self, progress: metrics.Progress) -> None:
        """Record the steps that are not recorded yet. Raises Stop if the numbers of one are not finite: from it on none was taken."""
        spoilt = self.count_back()
        records, self.unread = self.unread, []
        progress.steps(
            [
                (t.step + 1, {**{name: losses.mean().item() for name, losses in t.losses.items()}, **t.rates})
                for t in records
            ]
        )
        if spoilt is not None:
            raise spoilt

    def train(self) -> None:
        """All steps, checkpoints and validations, and the finished adapter. Whatever ends it early, the last completed step is saved."""
        run = self.options.run
        batches = micro_batches(
            self.dataset,
            self.encoded,
            self.parts.vae,
            range(self.first_step, self.max_steps),
            slots=self.slots,
            batch_size=run.train_batch_size,
            rank=self.peers.rank,
            world=self.peers.world,
            workers=self.options.instance.dataloader_num_workers,
        )
        images_per_step = self.slots * run.train_batch_size * len(self.sources)
        progress = metrics.Progress(
            self.accelerator,
            self.output_dir / run_folder.METRICS,
            first_step=self.first_step,
            last_step=self.max_steps,
            images_per_step=images_per_step,
        )
        with contextlib.closing(progress):
            for phase, found in self.memory.items():  # of before
                progress.memory(self.first_step, phase, found)
            try:
                for step in range(self.first_step, self.max_steps):
                    if (
                        step >= self.text_steps and self.text_components()
                    ):  # a resumed run that stopped before it could
                        self.finish_text()
                    self.step(step, batches, progress)
                self.note_memory("training", self.max_steps, progress)
                self.saver.final(self.max_steps)
                self.look_at_the_result(progress)
            except BaseException as error:
                spoilt = None
                if self.is_between_steps:
                    spoilt = self.count_back()
                    self.saver.what_is_done(self.completed, self.max_steps)
                    self.read_losses(progress)
                if spoilt is not None and isinstance(
                    error, Stop
                ):  # who asked the run to stop must learn that it would fail again
                    raise spoilt from None
                raise

    def step(self, step: int, batches: Iterator[MicroBatch], progress: metrics.Progress) -> None:
        """Step number `step`, counted from 0, and what is due after it. Raises Stop, its update undone or not begun, if the run is to end."""
        run = self.options.run
        total = torch.zeros(sum(p.numel() for p in self.parameters), device=self.accelerator.device)
        losses = []
        for _ in range(run.gradient_accumulation_steps):
            losses.append(self.micro_step(next(batches)))
            self.take_gradients(total)
        if run.gradient_sync == "ddp" and self.peers.world > 1:
            total = self.peers.sum(total)
        by_slot = {name: self._by_slot(torch.stack([loss[name] for loss in losses])) for name in losses[0]}
        self.peers.sync_stop()
        self.update(total, step, by_slot)
        ends_text = step + 1 == self.text_steps < self.max_steps and bool(self.text_components())
        is_saved = (step + 1) % run.checkpointing_steps == 0 or step + 1 == self.max_steps
        if (
            ends_text
            or is_saved
            or step == self.first_step
            or self._is_validated(step + 1)
            or len(self.unread) >= self.read_every
        ):
            self.read_losses(progress)
        if ends_text:
            self.finish_text()
        if step == self.first_step:
            self.note_memory("first step", step + 1, progress)
        if (step + 1) % run.checkpointing_steps == 0:
            self.saver.checkpoint(step + 1)
        if self._is_validated(step + 1):
            self.validate(step + 1, progress)
        if not self.unread:
            progress.restart_clock(step + 1)

    def note_memory(self, phase: str, step: int, progress: metrics.Progress) -> None:
        """Read what this process takes at the end of a phase; the main process records it."""
        self.memory[phase] = memory.reading(self.accelerator.device)
        progress.memory(step, phase, self.memory[phase])

    def _is_validated(self, step: int) -> bool:
        """Whether pictures are due after `step` steps; those of the last are `look_at_the_result`'s."""
        when = self.options.validation
        if step == self.max_steps or self.pictures is None:
            return False
        if when.validation_steps:
            return step % when.validation_steps == 0
        return (
            step % self.steps_per_epoch == 0
            and (step // self.steps_per_epoch - 1) % when.validation_epochs == 0
        )

    def _by_slot(self, values: torch.Tensor) -> torch.Tensor:
        """[slots] from every process's [micro-steps]: slot j was micro-step j // world of process j % world."""
        return self.peers.gather(values[None]).transpose(0, 1).flatten()

    def _not_finite(self, step: int, losses: torch.Tensor) -> str:
        """What to say of losses, [slots], that are not all finite: the pictures, since with the seed they are all it takes to see it again."""
        size = self.options.run.train_batch_size
        slots = [slot for slot, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        rows = [
            row
            for slot in slots
            for row in sampling_order.rows_of_slot(step, slot, slots=self.slots, batch_size=size)
        ]
        names = sorted(
            {
                source.photos[self.dataset.photo(source, row)].path.name
                for source in self.sources
                for row in rows
            }
        )
        shown = ", ".join(ascii(name)[1:-1] for name in names[:5])
        values = ", ".join(str(losses[slot].item()) for slot in slots[:3])
        return f"the loss of step {step + 1} is not finite ({values}) at rows {rows[0]} to {rows[-1]}: {shown}; it was not applied"

    @torch.no_grad()
    def validate(self, step: int, progress: metrics.Progress) -> None:
        """Pictures of the adapter as it is, drawn by the main process; the others wait."""
        if self.peers.is_main and self.pictures is not None:
            with (
                saving.in_eval_mode(self.components, self.optimizer),
                compilation.eager(wanted=self.options.speed.compile),
            ):
                asked = self.encode([self.pictures.prompt]), self.encode([""])
                self.pictures.along_the_way(step, progress, *asked)
        self.peers.barrier()

    @torch.no_grad()
    def look_at_the_result(self, progress: metrics.Progress) -> None:
        """Pictures of the finished file, read back as a user's program reads it, by the main process; the others wait."""
        if (
            self.peers.is_main
            and self.pictures is not None
            and not self.options.validation.skip_final_inference
        ):
            self.saver.hold(self.max_steps)
            with (
                saving.in_eval_mode(self.components, self.optimizer),
                compilation.eager(wanted=self.options.speed.compile),
            ):
                asked = self.encode([self.pictures.prompt]), self.encode([""])
                self.result_pictures = self.pictures.of_the_file(
                    self.saver.adapter, self.max_steps, progress, *asked
                )
        self.peers.barrier()


def assemble(start: prepare.Start, watch: Watch) -> Training:
    """The run before its first step."""
    training = Training(
        start.options, start.peers, watch, frozen_models.frozen_half(start, watch.check), start.identity
    )
    training.memory["loaded"] = memory.reading(start.peers.accelerator.device)
    return training


def train(options: TrainOptions, watch: Watch) -> None:
    """Everything from the check of the input to the finished adapter."""
    with contextlib.ExitStack() as stack:
        start = prepare.prepare(options, watch, stack)
        resolved, peers = start.options, start.peers
        training = assemble(start, watch)
        if resolved.run.gradient_checkpointing:
            training.enable_gradient_checkpointing()
        if resolved.run.enable_xformers_memory_efficient_attention:
            training.parts.unet.enable_xformers_memory_efficient_attention()
        peers.say(inject.describe(training.components))
        peers.say(
            f"training on {peers.world} process{'es' if peers.world > 1 else ''}, {training.slots} micro-batches a step",
        )
        if start.checkpoint:
            training.resume(start.checkpoint)
            left = "" if training.first_step < training.max_steps else "; nothing is left to train"
            peers.say(
                f"resuming from {start.checkpoint.folder} at step {training.first_step} of {training.max_steps}{left}",
            )
        else:
            training.start_from(start.first_adapter)
        peers.check_same(
            {
                "adapter weights at the start": hashlib.sha256(
                    training.saver.pack(training.first_step)
                ).hexdigest()
            }
        )
        flags = without_token(as_table(resolved.without_once()))
        if peers.is_main:
            run_folder.begin(
                training.output_dir,
                training.identity,
                yaml_text(flags),
                is_resumed=start.checkpoint is not None and start.is_own,
                overwrite=resolved.run.overwrite,
            )
        peers.barrier()
        if peers.accelerator.log_with:
            peers.accelerator.init_trackers(
                metrics.TRACKER_NAME, config=metrics.jsonable(without_token(as_table(resolved)))
            )
        started = time.monotonic()
        watch.is_immediate = False
        try:
            training.train()
        finally:
            start.status.step = training.completed
        if peers.is_main:
            if resolved.adapter.output_kohya_format:
                saving.write_kohya(
                    training.saver.adapter, start.base, resolution=training.resolution, seed=training.seed
                )
            if start.repository is not None:
                card = model_card.model_card(
                    flags,
                    base_folder=start.base.folder,
                    family=start.base.family.key,
                    pictures=training.result_pictures,
                    repository=start.repository,
                    token=resolved.reports.hub_token,
                )
                hub.publish(resolved.reports, training.output_dir, card, training.result_pictures)
        peers.barrier()
        peers.accelerator.end_training()
        peers.say(
            f"{training.max_steps - training.first_step} steps in {time.monotonic() - started:.1f} s",
        )
        peers.say(memory.summary(training.memory))


def main(options: TrainOptions) -> None:
    """Train and save an adapter.

    Raises UserError for what the user can put right, before any model is loaded where that can be known; SystemExit with the status that
    the README lists if the run ends early.
    """
    with stops.stoppable(options.run.max_train_minutes) as watch:
        try:
            train(options, watch)
        except prepare.Planned as planned:
            if str(planned):  # the main process's
                print(planned)


if __name__ == "__main__":
    startup.run(main, OPTIONS)
