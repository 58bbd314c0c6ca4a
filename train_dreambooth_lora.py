"""Teach a Stable Diffusion base one subject from a handful of photos: DreamBooth (arXiv 2208.12242) with LoRA (arXiv 2106.09685).

The flags of Hugging Face diffusers' script of the same name work here unchanged. Launch with `accelerate launch` or plain `python`."""

from dreambooth import stops
from dreambooth.command_line import as_table, fail, parse, write_yaml
from dreambooth.options import TrainOptions

if __name__ == "__main__":
    OPTIONS = parse(TrainOptions, __doc__)  # before the imports below: --help and mistakes are answered at once
    stops.until_imports_are_done()

import contextlib
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler

from dreambooth import adapter_files, adapters, checkpoints, families, pipelines, preparation, report, runs, sampling_order
from dreambooth.errors import UserError
from dreambooth.families import FrozenParts
from dreambooth.processes import Peers
from dreambooth.samples import MicroBatch, PhotoRows, Source, micro_batches
from dreambooth.stops import Stop, Watch


def denoising_losses(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each row, float32 [B]."""
    return F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


def dreambooth_loss(losses: torch.Tensor, *, sources: int, prior_loss_weight: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(scalar to minimise, its parts). Instance and class rows are averaged separately (DreamBooth, arXiv 2208.12242, eq. 2)."""
    if sources == 1:
        return losses.mean(), {}
    instance, prior = (half.mean() for half in losses.chunk(2))
    return instance + prior_loss_weight * prior, {"loss_instance": instance, "loss_prior": prior}


def noise_and_target(
    noise_scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(noisy latents, what the UNet is to predict from them), both [B, C, h, w]."""
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noisy_latents, noise_scheduler.get_velocity(latents, noise, timesteps)
    return noisy_latents, noise


class Training:
    """One run: the frozen base, the adapter on it, and the loop that trains it."""

    def __init__(
        self, options: TrainOptions, peers: Peers, watch: Watch, parts: FrozenParts, sources: list[Source], identity: dict[str, Any] | None = None
    ):
        self.options, self.peers, self.watch, self.parts, self.sources, self.identity = options, peers, watch, parts, sources, identity or {}
        self.accelerator = peers.accelerator
        run, seed = options.run, options.run.seed
        assert seed is not None
        self.seed, self.output_dir = seed, Path(run.output_dir)
        self.slots = run.gradient_accumulation_steps * peers.world
        self.components = self._inject()
        self.parameters = [p for component in self.components for _, p in component.named_parameters()]
        self.names = {id(p): name for component in self.components for name, p in component.named_parameters()}
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self.accelerator.mixed_precision == "fp16")
        self.steps_per_epoch, self.max_steps = preparation.steps_of_run(options, max(len(source.photos) for source in sources), peers.world)
        self.learning_rate_factor = self._make_schedule()
        self.prompts = [options.instance.instance_prompt]
        if len(sources) == 2:
            assert options.prior.class_prompt is not None
            self.prompts.append(options.prior.class_prompt)
        instance = options.instance
        self.dataset = PhotoRows(sources, seed, instance.resolution, instance.image_interpolation_mode, instance.center_crop)
        self.first_step = 0
        self.completed = 0  # steps whose update is in the parameters
        self.saved = 0  # the step of the newest checkpoint
        self.is_between_steps = True

    def _inject(self) -> list[adapters.Component]:
        lora = self.options.adapter
        models: list[tuple[str, torch.nn.Module, tuple[str, ...]]] = [("unet", self.parts.unet, adapters.UNET_TARGETS)]
        if self.options.text.train_text_encoder:
            assert self.parts.text_encoder is not None
            models.append(("text_encoder", self.parts.text_encoder, adapters.TEXT_ENCODER_TARGETS))
        return [
            adapters.inject_lora(
                name, model, rank=lora.rank, dropout=lora.lora_dropout, targets=targets, seed=sampling_order.key(self.seed, "lora-init", name)
            )
            for name, model, targets in models
        ]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        o, run = self.options.optimization, self.options.run
        scale = run.gradient_accumulation_steps * run.train_batch_size * self.peers.world if o.scale_lr else 1
        self.learning_rate = o.learning_rate * scale
        if o.use_8bit_adam:
            import bitsandbytes

            kind = bitsandbytes.optim.AdamW8bit
        else:
            kind = torch.optim.AdamW
        betas = (o.adam_beta1, o.adam_beta2)
        return kind(self.parameters, lr=self.learning_rate, betas=betas, weight_decay=o.adam_weight_decay, eps=o.adam_epsilon)

    def _make_schedule(self):
        """step -> factor on the learning rate. diffusers' schedules are functions of the step; used as such they have no state to restore."""
        o = self.options.optimization
        throwaway = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
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
                component.load_state_dict(state[component.name])

    def resume(self, checkpoint: checkpoints.Content) -> None:
        """Go on from a checkpoint that has been found to be of this run. Raises UserError if it does not fit all the same."""
        checkpoints.restore(checkpoint, self.components, self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoints.read_state(checkpoint)["grad_scaler"])
        self.first_step = self.completed = self.saved = checkpoint.step

    def prepare_text(self) -> None:
        """Encode the prompts once and free the text encoder, if nothing in it will change."""
        validation_prompt = self.options.validation.validation_prompt
        self.prompt_embeds = None
        if self.options.text.train_text_encoder:
            return
        with torch.no_grad():
            self.prompt_embeds = self.encode(self.prompts)  # [sources, tokens, width]
            self.validation_embeds = self.encode([validation_prompt, ""]) if validation_prompt else None
        self.parts.text_encoder = None

    def encode(self, prompts: list[str]) -> torch.Tensor:
        with self.accelerator.autocast():
            return families.encode_prompts(self.parts, prompts, attention_mask=self.options.text.text_encoder_use_attention_mask)

    def micro_step(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Forward and backward of one micro-batch; gradients are left on the parameters. Returns the detached loss and its parts."""
        device, scheduler = self.accelerator.device, self.parts.noise_scheduler
        shape = tuple(batch.posterior.mean.shape[1:])

        def draw(what: str) -> torch.Tensor:
            return torch.cat([sampling_order.noise_of_rows(self.seed, f"{s.purpose}-{what}", batch.rows, shape) for s in self.sources])

        latents = batch.posterior.latents(draw("posterior"), self.parts.vae.config.scaling_factor).to(device)
        noise = draw("noise").to(device)
        count = scheduler.config.num_train_timesteps
        timesteps = torch.cat([sampling_order.timesteps_of_rows(self.seed, f"{s.purpose}-timestep", batch.rows, count) for s in self.sources]).to(
            device
        )
        noisy_latents, target = noise_and_target(scheduler, latents, noise, timesteps)
        torch.manual_seed(sampling_order.key(self.seed, "dropout", batch.step, batch.slot))  # dropout has no generator argument
        # each distinct prompt is encoded once, then repeated for its rows: [sources, tokens, width] -> [sources * rows, tokens, width]
        prompt_embeds = self.encode(self.prompts) if self.prompt_embeds is None else self.prompt_embeds
        prompt_embeds = prompt_embeds.repeat_interleave(len(batch.rows), dim=0)
        with self.accelerator.autocast():
            model_input = noisy_latents.to(self.parts.unet.dtype).contiguous(memory_format=torch.channels_last)
            model_pred = self.parts.unet(model_input, timesteps, prompt_embeds.to(self.parts.unet.dtype)).sample
        if self.peers.world == 1:  # several stop together, once a micro-step
            self.watch.check()
        losses = denoising_losses(model_pred, target)
        loss, pieces = dreambooth_loss(losses, sources=len(self.sources), prior_loss_weight=self.options.prior.prior_loss_weight)
        self.scaler.scale(loss / self.slots).backward()
        self.peers.agree()
        return {name: value.detach() for name, value in {"loss": loss, **pieces}.items()}

    def take_gradients(self, total: torch.Tensor) -> None:
        """Add the gradients of this micro-step to `total`: every process's, in the order of their slots, which no process count changes; or
        with --gradient_sync ddp this process's alone, for one sum at the end of the step."""
        flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in self.parameters])
        if self.options.run.gradient_sync == "ddp":
            total += flat
        else:
            for row in self.peers.gather(flat[None]):  # [processes, parameters]
                total += row
        for parameter in self.parameters:
            parameter.grad = None

    def update(self, total: torch.Tensor, step: int) -> float:
        """One optimizer step from the summed gradients; returns the learning rate it was taken with."""
        learning_rate = self.learning_rate * self.learning_rate_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter, gradient in zip(self.parameters, total.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.optimization.max_grad_norm or math.inf)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):  # with fp16 the scaler skips such a step and lowers its scale
            raise Stop(f"the gradients of step {step + 1} are not finite; they were not applied")
        self.is_between_steps = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.completed = step + 1
        self.is_between_steps = True
        return learning_rate

    def train(self) -> None:
        """All steps, checkpoints and validations, and the finished adapter. Whatever ends it early, the last completed step is saved."""
        run = self.options.run
        self.prepare_text()
        batches = micro_batches(
            self.dataset,
            self.parts.vae,
            range(self.first_step, self.max_steps),
            slots=self.slots,
            batch_size=run.train_batch_size,
            rank=self.peers.rank,
            world=self.peers.world,
            workers=self.options.instance.dataloader_num_workers,
            show_progress=self.peers.is_main,
            check=self.watch.check,
        )
        images_per_step = self.slots * run.train_batch_size * len(self.sources)
        progress = report.Progress(
            self.accelerator, self.output_dir / "metrics.jsonl", first_step=self.first_step, last_step=self.max_steps, images_per_step=images_per_step
        )
        with contextlib.closing(progress):
            try:
                for step in range(self.first_step, self.max_steps):
                    self.step(step, batches, progress)
                self.save_final()
                self.validate(self.max_steps, progress, "test")
            except BaseException:
                self.save_what_is_done()
                raise

    def step(self, step: int, batches: Iterator[MicroBatch], progress: report.Progress) -> None:
        """Step number `step`, counted from 0, and what is due after it. Raises Stop, its update undone or not begun, if the run is to end."""
        run, validation = self.options.run, self.options.validation
        total = torch.zeros(sum(p.numel() for p in self.parameters), device=self.accelerator.device)
        self._set_training(True)
        losses = []
        for _ in range(run.gradient_accumulation_steps):
            losses.append(self.micro_step(next(batches)))
            self.take_gradients(total)
        if run.gradient_sync == "ddp" and self.peers.world > 1:
            total = self.peers.sum(total)
        by_slot = {name: self._by_slot(torch.stack([loss[name] for loss in losses])) for name in losses[0]}
        if not torch.isfinite(by_slot["loss"]).all():
            raise Stop(self._not_finite(step, by_slot["loss"]))
        self.peers.agree()
        learning_rate = self.update(total, step)
        progress.step(step + 1, {**{name: values.mean().item() for name, values in by_slot.items()}, "lr": learning_rate})
        if (step + 1) % run.checkpointing_steps == 0:
            self.save_checkpoint(step + 1)
        epoch = step // self.steps_per_epoch
        if (step + 1) % self.steps_per_epoch == 0 and epoch % validation.validation_epochs == 0 and step + 1 < self.max_steps:
            self.validate(step + 1, progress, "validation")
        progress.restart_clock(step + 1)

    def _by_slot(self, values: torch.Tensor) -> torch.Tensor:
        """[slots] from every process's [micro-steps]: slot j was micro-step j // world of process j % world."""
        return self.peers.gather(values[None]).transpose(0, 1).flatten()

    def _not_finite(self, step: int, losses: torch.Tensor) -> str:
        """What to say of losses, [slots], that are not all finite: the pictures, since with the seed they are all it takes to see it again."""
        size = self.options.run.train_batch_size
        slots = [slot for slot, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        rows = [row for slot in slots for row in sampling_order.rows_of_slot(step, slot, slots=self.slots, batch_size=size)]
        names = sorted({source.photos[self.dataset.photo(source, row)].path.name for source in self.sources for row in rows})
        shown = ", ".join(ascii(name)[1:-1] for name in names[:5])
        values = ", ".join(str(losses[slot].item()) for slot in slots[:3])
        return f"the loss of step {step + 1} is not finite ({values}) at rows {rows[0]} to {rows[-1]}: {shown}; it was not applied"

    def _set_training(self, training: bool) -> None:
        """LoRA dropout and gradient checkpointing work in training mode only; pictures are drawn in eval mode."""
        for component in self.components:
            component.model.train(training)

    def pack(self, step: int) -> bytes:
        o = self.options
        info = {
            "steps": step,
            "seed": self.seed,
            "resolution": o.instance.resolution,
            "instance_prompt": o.instance.instance_prompt,
            "class_prompt": o.prior.class_prompt if o.prior.with_prior_preservation else None,
        }
        configs = {c.name: adapters.lora_metadata(c) for c in self.components}
        return adapter_files.pack({c.name: c.state_dict() for c in self.components}, configs, info)

    def _publish(self, step: int) -> None:
        """Write checkpoint-<step>; for the main process alone."""
        around = runs.surroundings(threads=torch.get_num_threads(), device=self.accelerator.device.type, options=self.options)
        state: dict[str, object] = {"seed": self.seed, "surroundings": around}
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        moments = checkpoints.optimizer_tensors(self.optimizer, self.names)
        limit = self.options.run.checkpoints_total_limit
        try:
            folder = checkpoints.save(self.output_dir, step, self.pack(step), moments, state, limit=limit, identity=self.identity)
        except checkpoints.PruneFailed as error:
            report.say(self.accelerator, f"warning: {error}")
            folder = self.output_dir / f"checkpoint-{step}"
        self.saved = step
        if note := checkpoints.room_note(self.output_dir, checkpoints.size(folder)):
            report.say(self.accelerator, f"warning: {note}")

    def save_checkpoint(self, step: int) -> None:
        """A checkpoint that cannot be written (a full disk) is said, and tried again at the next interval: the run goes on."""
        if self.peers.is_main:
            try:
                self._publish(step)
            except checkpoints.SaveFailed as error:
                report.say(self.accelerator, f"warning: {error}")
        self.peers.wait()

    def _write_adapter(self, step: int) -> Path:
        path = self.output_dir / adapter_files.ADAPTER_NAME
        adapter_files.write_atomically(path, self.pack(step))
        return path

    def save_final(self) -> None:
        if self.peers.is_main:
            try:
                path = self._write_adapter(self.max_steps)
            except OSError as error:
                raise Stop(f"{self.output_dir / adapter_files.ADAPTER_NAME} cannot be written: {error.strerror or error}") from None
            report.say(self.accelerator, f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)")
        self.peers.wait()

    def save_what_is_done(self) -> None:
        """Checkpoint and adapter of the last completed step, written without the other processes: they may be gone."""
        if not self.peers.is_main or not self.is_between_steps or self.completed == 0:
            return
        for what, is_needed, write in (
            ("checkpoint", self.completed > self.saved, self._publish),
            ("adapter", True, self._write_adapter),
        ):
            try:
                if is_needed:
                    write(self.completed)
                report.say(self.accelerator, f"saved step {self.completed} of {self.max_steps}: {what}")
            except (OSError, ValueError, checkpoints.SaveFailed) as trouble:  # ValueError: an adapter that is not finite
                report.say(self.accelerator, f"warning: step {self.completed} could not be saved as {what}: {trouble}")

    @torch.no_grad()
    def validate(self, step: int, progress: report.Progress, name: str) -> None:
        """Draw validation pictures with the models in memory, on the main process; generators of their own leave training's draws alone."""
        prompt = self.options.validation.validation_prompt
        if prompt is None:
            return
        if self.peers.is_main:
            self._set_training(False)
            embeds = self.encode([prompt, ""]) if self.options.text.train_text_encoder else self.validation_embeds
            assert embeds is not None
            numbers = range(self.options.validation.num_validation_images)
            with self.accelerator.autocast():
                images = pipelines.draw_embeds(
                    families.pipeline_of(self.parts),
                    embeds,
                    [sampling_order.key(self.seed, "validation", number) for number in numbers],
                    side=self.options.instance.resolution,
                    check=self.watch.check,
                )
            folder = self.output_dir / "validation"
            try:
                folder.mkdir(exist_ok=True)
                for number, image in enumerate(images):
                    pipelines.save_png(image, folder / f"step-{step:06d}-{number:02d}.png", {"prompt": prompt, "step": step})
            except OSError as error:  # a full disk: the pictures are worth less than the run
                report.say(self.accelerator, f"warning: validation pictures of step {step} cannot be written: {error.strerror or error}")
            progress.images(step, name, images, prompt)
        self.peers.wait()


def train(options: TrainOptions, watch: Watch) -> None:
    """Everything from the check of the input to the finished adapter."""
    with contextlib.ExitStack() as stack:
        start = preparation.prepare(options, watch, stack)
        options, peers = start.options, start.peers
        parts = families.load_parts(
            start.base_folder, options.base.variant, start.tokenizer, start.weight_dtype, peers.accelerator.device, start.max_tokens
        )
        training = Training(options, peers, watch, parts, start.sources, start.identity)
        start.status.step = lambda: training.completed
        if options.run.gradient_checkpointing:
            parts.unet.enable_gradient_checkpointing()
            if options.text.train_text_encoder:
                assert parts.text_encoder is not None
                parts.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if options.run.enable_xformers_memory_efficient_attention:
            parts.unet.enable_xformers_memory_efficient_attention()
        report.say(peers.accelerator, adapters.describe(training.components))
        report.say(peers.accelerator, f"training on {peers.world} process{'es' if peers.world > 1 else ''}, {training.slots} micro-batches a step")
        if start.checkpoint:
            training.resume(start.checkpoint)
            left = "" if training.first_step < training.max_steps else "; nothing is left to train"
            report.say(peers.accelerator, f"resuming from {start.checkpoint.folder} at step {training.first_step} of {training.max_steps}{left}")
        else:
            training.start_from(start.first_adapter)
        peers.check_same({"adapter weights at the start": hashlib.sha256(training.pack(training.first_step)).hexdigest()})
        if peers.is_main:
            if not start.checkpoint or not start.is_own:
                runs.begin(training.output_dir, training.identity, overwrite=options.run.overwrite)
            run_once = dataclasses.replace(options.run, overwrite=False, allow_data_change=False, resume_from_checkpoint=None, local_rank=-1)
            write_yaml(dataclasses.replace(options, run=run_once), training.output_dir / "run.yaml")
        peers.wait()
        if peers.accelerator.log_with:
            peers.accelerator.init_trackers(report.TRACKER_NAME, config=report.jsonable(as_table(options)))
        started = time.monotonic()
        watch.is_immediate = False
        training.train()
        peers.accelerator.end_training()
        report.say(peers.accelerator, f"{training.max_steps - training.first_step} steps in {time.monotonic() - started:.1f} s")


def main(options: TrainOptions) -> None:
    """Train and save an adapter.

    Raises UserError for what the user can put right, before any model is loaded where that can be known; SystemExit with the status that
    the README lists if the run ends early.
    """
    watch = Watch(options.run.max_train_minutes)
    watch.is_immediate = True
    try:
        train(options, watch)
    except Stop as stop:
        print(f"{'error' if stop.state == 'failed' else 'note'}: {stop.reason}", file=sys.stderr, flush=True)
        raise SystemExit(stop.exit_code) from None
    finally:
        watch.close()


if __name__ == "__main__":
    try:
        main(OPTIONS)
    except UserError as error:
        fail(error)
