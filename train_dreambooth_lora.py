"""Teach a Stable Diffusion base one subject from a handful of photos: DreamBooth (arXiv 2208.12242) with LoRA (arXiv 2106.09685).

The flags of Hugging Face diffusers' script of the same name work here unchanged. Launch with `accelerate launch` or plain `python`."""

from dreambooth.options import PriorPreservation, TrainOptions, adopt_local_rank, as_table, fail, parse, write_yaml

if __name__ == "__main__":
    OPTIONS = parse(TrainOptions, __doc__)  # before the imports below: --help and mistakes are answered at once

import contextlib
import dataclasses
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from PIL import Image

from dreambooth import adapter_files, adapters, checkpoints, class_images, families, photos, pipelines, processes, report, sampling_order
from dreambooth.errors import UserError
from dreambooth.families import FrozenParts
from dreambooth.samples import MicroBatch, PhotoRows, Source, micro_batches


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

    def __init__(self, options: TrainOptions, accelerator: Accelerator, parts: FrozenParts, sources: list[Source]):
        self.options, self.accelerator, self.parts, self.sources = options, accelerator, parts, sources
        run, seed = options.run, options.run.seed
        assert seed is not None
        self.seed, self.output_dir = seed, Path(run.output_dir)
        self.slots = run.gradient_accumulation_steps * accelerator.num_processes
        self.components = self._inject()
        self.parameters = [p for component in self.components for _, p in component.named_parameters()]
        self.names = {id(p): name for component in self.components for name, p in component.named_parameters()}
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.mixed_precision == "fp16")
        longest = max(len(source.photos) for source in sources)
        self.steps_per_epoch = math.ceil(math.ceil(longest / (run.train_batch_size * accelerator.num_processes)) / run.gradient_accumulation_steps)
        self.max_steps = run.max_train_steps or run.num_train_epochs * self.steps_per_epoch
        self.learning_rate_factor = self._make_schedule()
        self.prompts = [options.instance.instance_prompt]
        if len(sources) == 2:
            assert options.prior.class_prompt is not None
            self.prompts.append(options.prior.class_prompt)
        self.first_step = 0

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
        scale = run.gradient_accumulation_steps * run.train_batch_size * self.accelerator.num_processes if o.scale_lr else 1
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

    def resume(self, folder: Path) -> None:
        state = checkpoints.read_state(folder)
        for name, mine in self.identity().items():
            if state.get(name) != mine:
                what = "gradient_accumulation_steps x processes" if name == "slots" else f"--{name}"
                raise UserError(f"--resume_from_checkpoint: {folder} was trained with {what} = {state.get(name)}, now it is {mine}")
        checkpoints.restore(folder, self.components, self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["grad_scaler"])
        self.first_step = state["step"]

    def identity(self) -> dict[str, int | str]:
        """What must be the same when a run goes on."""
        precision = self.accelerator.mixed_precision
        return {"seed": self.seed, "train_batch_size": self.options.run.train_batch_size, "slots": self.slots, "mixed_precision": precision}

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
        losses = denoising_losses(model_pred, target)
        loss, pieces = dreambooth_loss(losses, sources=len(self.sources), prior_loss_weight=self.options.prior.prior_loss_weight)
        self.scaler.scale(loss / self.slots).backward()
        return {name: value.detach() for name, value in {"loss": loss, **pieces}.items()}

    def take_gradients(self, total: torch.Tensor) -> None:
        """Add every process's gradients of this micro-step to `total` in the order of their slots, which no process count changes."""
        flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in self.parameters])
        for row in self.accelerator.gather(flat[None]):  # [processes, parameters]
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
            raise SystemExit(
                f"error: the gradients of step {step + 1} are not finite; stopped before they were applied. Checkpoints are as they were"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return learning_rate

    def train(self) -> None:
        options, accelerator, run = self.options, self.accelerator, self.options.run
        self.prepare_text()
        dataset = PhotoRows(
            self.sources, self.seed, options.instance.resolution, options.instance.image_interpolation_mode, options.instance.center_crop
        )
        batches = micro_batches(
            dataset,
            self.parts.vae,
            range(self.first_step, self.max_steps),
            slots=self.slots,
            batch_size=run.train_batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=options.instance.dataloader_num_workers,
            show_progress=accelerator.is_main_process,
        )
        images_per_step = self.slots * run.train_batch_size * len(self.sources)
        progress = report.Progress(
            accelerator, self.output_dir / "metrics.jsonl", first_step=self.first_step, last_step=self.max_steps, images_per_step=images_per_step
        )
        total = torch.zeros(sum(p.numel() for p in self.parameters), device=accelerator.device)
        with contextlib.closing(progress):
            for step in range(self.first_step, self.max_steps):
                total.zero_()
                self._set_training(True)
                losses = []
                for _ in range(run.gradient_accumulation_steps):
                    losses.append(self.micro_step(next(batches)))
                    self.take_gradients(total)
                mean = {name: accelerator.gather(torch.stack([loss[name] for loss in losses])).mean().item() for name in losses[0]}
                if not math.isfinite(mean["loss"]):
                    raise SystemExit(
                        f"error: the loss of step {step + 1} is {mean['loss']}; stopped before it was applied. Checkpoints are as they were"
                    )
                learning_rate = self.update(total, step)
                progress.step(step + 1, {**mean, "lr": learning_rate})
                if (step + 1) % run.checkpointing_steps == 0:
                    self.save_checkpoint(step + 1)
                epoch = step // self.steps_per_epoch
                if (step + 1) % self.steps_per_epoch == 0 and epoch % options.validation.validation_epochs == 0 and step + 1 < self.max_steps:
                    self.validate(step + 1, progress, "validation")
                progress.restart_clock(step + 1)
            self.save_final()
            self.validate(self.max_steps, progress, "test")

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

    def save_checkpoint(self, step: int) -> None:
        if self.accelerator.is_main_process:
            state: dict[str, object] = {**self.identity()}
            if self.scaler.is_enabled():
                state["grad_scaler"] = self.scaler.state_dict()
            moments = checkpoints.optimizer_tensors(self.optimizer, self.names)
            checkpoints.save(self.output_dir, step, self.pack(step), moments, state, limit=self.options.run.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def save_final(self) -> None:
        if self.accelerator.is_main_process:
            path = self.output_dir / adapter_files.ADAPTER_NAME
            adapter_files.write_atomically(path, self.pack(self.max_steps))
            report.say(self.accelerator, f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)")
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def validate(self, step: int, progress: report.Progress, name: str) -> None:
        """Draw validation pictures with the models in memory, on the main process; generators of their own leave training's draws alone."""
        prompt = self.options.validation.validation_prompt
        if prompt is None:
            return
        if self.accelerator.is_main_process:
            self._set_training(False)
            pipeline = families.pipeline_of(self.parts)
            embeds = self.encode([prompt, ""]) if self.options.text.train_text_encoder else self.validation_embeds
            assert embeds is not None
            images: list[Image.Image] = []
            for number in range(self.options.validation.num_validation_images):
                generator = torch.Generator("cpu").manual_seed(sampling_order.key(self.seed, "validation", number))
                with self.accelerator.autocast():
                    images += pipeline(
                        prompt_embeds=embeds[:1],
                        negative_prompt_embeds=embeds[1:],
                        generator=generator,
                        num_inference_steps=25,
                        height=self.options.instance.resolution,
                        width=self.options.instance.resolution,
                    ).images
            folder = self.output_dir / "validation"
            folder.mkdir(exist_ok=True)
            for number, image in enumerate(images):
                pipelines.save_png(image, folder / f"step-{step:06d}-{number:02d}.png", {"prompt": prompt, "step": step})
            progress.images(step, name, images, prompt)
        self.accelerator.wait_for_everyone()


def choose_seed(options: TrainOptions, checkpoint: Path | None) -> int:
    """The seed given, else the checkpoint's, else a new one; the same on every process."""
    if options.run.seed is not None:
        return options.run.seed
    if checkpoint is not None:
        return int(checkpoints.read_state(checkpoint)["seed"])
    return int(broadcast_object_list([random.SystemRandom().randrange(2**31)])[0])


def adopt_class_images(prior: PriorPreservation, seed: int | None) -> PriorPreservation:
    """The options with seed and precision of the class images that are already there, where the flags leave them open."""
    there = class_images.made_with(Path(prior.class_data_dir)) if prior.with_prior_preservation and prior.class_data_dir else {}
    class_seed = prior.class_seed if prior.class_seed is not None else there.get("seed", seed or 0)
    precision = prior.prior_generation_precision or there.get("precision")
    return dataclasses.replace(prior, class_seed=class_seed, prior_generation_precision=precision)


def class_image_settings(options: TrainOptions, base_folder: Path, device: torch.device) -> class_images.Settings:
    prior = options.prior
    assert prior.class_prompt is not None
    assert prior.class_seed is not None
    return class_images.Settings(
        base=families.fingerprint(base_folder, options.base.variant),
        prompt=prior.class_prompt,
        seed=prior.class_seed,
        steps=prior.class_inference_steps,
        guidance_scale=prior.class_guidance_scale,
        batch_size=prior.sample_batch_size,
        side=families.own_side(base_folder),
        precision=class_images.precision_of(prior.prior_generation_precision, device),
    )


def gather_sources(options: TrainOptions, instance: photos.Folder, base_folder: Path, accelerator: Accelerator) -> list[Source]:
    """The photos, and with prior preservation the class images, the missing ones generated first."""
    sources = [Source("instance", instance.photos)]
    prior = options.prior
    if prior.with_prior_preservation:
        assert prior.class_data_dir is not None
        folder = Path(prior.class_data_dir)
        settings = class_image_settings(options, base_folder, accelerator.device)
        class_images.make(folder, settings, prior.num_class_images, options.base, base_folder, accelerator)
        sources.append(Source("class", photos.check_folder(folder, "--class_data_dir").photos[: prior.num_class_images]))
    return sources


def main(options: TrainOptions) -> None:
    """Train and save an adapter. Raises UserError for what the user can put right, before any model is loaded where that can be known."""
    run = options.run
    adopt_local_rank(run)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    names, notes = report.trackers(options.reports.report_to)
    output_dir = Path(run.output_dir)
    configuration = ProjectConfiguration(project_dir=run.output_dir, logging_dir=str(output_dir / options.reports.logging_dir))
    accelerator = Accelerator(mixed_precision=run.mixed_precision, log_with=names or None, project_config=configuration)
    processes.check_world(accelerator)
    if run.enable_xformers_memory_efficient_attention and accelerator.device.type != "cuda":
        raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA GPU; leave it out")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not work on a CPU; use bf16, or leave it out")
    if run.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    instance = photos.check_folder(options.instance.instance_data_dir, "--instance_data_dir")
    small = [p for p in instance.photos if min(p.size) < options.instance.resolution]
    if small:
        notes.append(
            f"{len(small)} of {len(instance.photos)} photos are smaller than --resolution {options.instance.resolution} and will be enlarged"
        )
    with accelerator.main_process_first():  # where it must be downloaded, once
        base_folder = families.local_folder(options.base)
    tokenizer = families.load_tokenizer(options.base, base_folder)
    limit = families.max_tokens(base_folder, options.text)
    prompts = {
        "--instance_prompt": options.instance.instance_prompt,
        "--class_prompt": options.prior.class_prompt if options.prior.with_prior_preservation else None,
        "--validation_prompt": options.validation.validation_prompt,
    }
    families.check_prompts(tokenizer, prompts, limit)
    checkpoint = checkpoints.find(run.resume_from_checkpoint, output_dir) if run.resume_from_checkpoint else None
    for note in [*options.notes(), *instance.notes, *notes]:
        report.say(accelerator, f"note: {note}")
    if run.resume_from_checkpoint == "latest" and checkpoint is None:
        report.say(accelerator, "Checkpoint 'latest' does not exist. Starting a new training run.")

    processes.make_folder(output_dir, "--output_dir")
    seed = choose_seed(options, checkpoint)
    # resolved, so that run.yaml repeats this run wherever it is read
    run = dataclasses.replace(run, seed=seed, mixed_precision=accelerator.mixed_precision)
    options = dataclasses.replace(options, run=run, prior=adopt_class_images(options.prior, options.run.seed))
    report.say(accelerator, f"seed: {seed}")
    sources = gather_sources(options, instance, base_folder, accelerator)
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    parts = families.load_parts(base_folder, options.base.variant, tokenizer, weight_dtype, accelerator.device, limit)
    training = Training(options, accelerator, parts, sources)
    report.say(accelerator, adapters.describe(training.components))
    if run.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()
        if options.text.train_text_encoder:
            assert parts.text_encoder is not None
            parts.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.enable_xformers_memory_efficient_attention:
        parts.unet.enable_xformers_memory_efficient_attention()
    if checkpoint:
        training.resume(checkpoint)
        report.say(accelerator, f"resuming from {checkpoint} at step {training.first_step} of {training.max_steps}")
        if training.first_step > training.max_steps:
            raise UserError(f"--resume_from_checkpoint: {checkpoint} is past step {training.max_steps}, where this run ends; raise --max_train_steps")
        if training.first_step == training.max_steps:
            report.say(accelerator, "nothing is left to train: the checkpoint is at --max_train_steps")
    if accelerator.is_main_process:
        write_yaml(options, output_dir / "run.yaml")
    accelerator.wait_for_everyone()
    if names:
        accelerator.init_trackers(report.TRACKER_NAME, config=report.jsonable(as_table(options)))
    started = time.monotonic()
    training.train()
    accelerator.end_training()
    report.say(accelerator, f"{training.max_steps - training.first_step} steps in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    try:
        main(OPTIONS)
    except UserError as error:
        fail(error)
