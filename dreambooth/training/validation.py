"""Validation pictures: drawn during training and after it, from --validation_prompt, by the main process."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreambooth.adapter_files import reading
from dreambooth.adapters import apply
from dreambooth.bases import compilation, loading, pipelines, schedulers
from dreambooth.bases.prompts import PromptEmbeds
from dreambooth.data import replayed_unet, sampling_order
from dreambooth.files import pictures
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console
from dreambooth.training import metrics, run_folder
from dreambooth.training.frozen_models import FrozenModels
from dreambooth.training.saving import Saver
from dreambooth.training.start import Start
from dreambooth.training.trainables import Trainables

_INFERENCE_STEPS = 25
_GUIDANCE_SCALE = 7.5


class ValidationPictures:
    """Draws --validation_prompt with the models in memory. Without the flag, nothing is drawn. Each picture
    has a seed of its own, so drawing changes no random number of the training."""

    def __init__(self, start: Start, frozen: FrozenModels, trainables: Trainables, check: Callable[[], None]):
        """`check` is called between the sampling steps of a picture."""
        options, self.peers = start.options, start.peers
        self.options, self.prompt = options.validation, options.validation.validation_prompt
        self.resolution, self.seed, self.speed = options.instance.resolution, options.run.seed, options.speed
        self.files = WrittenFiles(start.output_dir)
        self.frozen, self.trainables, self.check = frozen, trainables, check
        self.graphs = replayed_unet.graphs_of(self.speed, self.peers.accelerator.device, console.warn)
        self.finished: list[str] = []
        """Names of the pictures of the finished adapter, relative to the output folder."""
        # read now: text encoders may be freed before `draw_finished`
        self.layers = apply.layers_of(self._models()) if self.prompt is not None else {}

    def is_due(self, step: int, *, steps_per_epoch: int) -> bool:
        """Whether pictures are drawn after `step` steps: by --validation_steps, else --validation_epochs."""
        if self.prompt is None:
            return False
        if self.options.validation_steps:
            return step % self.options.validation_steps == 0
        epochs = step // steps_per_epoch
        return step % steps_per_epoch == 0 and (epochs - 1) % self.options.validation_epochs == 0

    def draw_current(self, step: int, progress: metrics.Progress) -> None:
        """Draw with the adapter after `step` steps, on the main process; the other processes wait. The
        pictures are written to validation/ in the output folder and sent to the trackers."""
        if self.peers.is_main and self.prompt is not None:
            with self._models_for_drawing():
                images = self._draw(self._pipeline(), *self._embeds(self.prompt))
            self._save(images, [f"step-{step:06d}-{number:02d}.png" for number in range(len(images))], step)
            progress.images(step, "validation", images, self.prompt)
        self.peers.barrier()

    def draw_finished(self, saver: Saver, step: int, progress: metrics.Progress) -> None:
        """Draw with the finished adapter file, on the main process; the other processes wait.

        The file is read like any user's adapter file, so the pictures are those that the user will get. The
        trained adapter is removed from the models for good; `saver` copies its tensors first.
        """
        if self.peers.is_main and self.prompt is not None and not self.options.skip_final_inference:
            saver.take_snapshot(step)
            with self._models_for_drawing():
                images = self._draw_with_file(saver.adapter)
            self.finished = self._save(
                images, [run_folder.final_picture(number) for number in range(len(images))], step
            )
            progress.images(step, "test", images, self.prompt)
        self.peers.barrier()

    @contextlib.contextmanager
    def _models_for_drawing(self) -> Iterator[None]:
        """Within the block the models have no gradients, no dropout, and are not compiled."""
        with torch.no_grad(), self.trainables.evaluating(), compilation.eager(wanted=self.speed.compile):
            yield

    def _draw_with_file(self, adapter_file: Path) -> list[Image.Image]:
        assert self.prompt is not None
        embeds = self._embeds(self.prompt)  # before the trained adapter is removed from the text encoders
        pipeline = self._pipeline()
        pipeline.unload_lora_weights()
        # freed text encoders are not needed: the prompts are encoded already
        models = self._models()
        stack = apply.Stack(models)
        stack.add("saved", apply.part(reading.read(adapter_file, self.layers), tuple(models)))
        # quantized weights cannot be changed, so adapters are not fused with them
        with stack.activated({"saved": 1.0}, "auto" if self.speed.quantize_base is None else "no"):
            return self._draw(pipeline, *embeds)

    def _models(self) -> dict[str, Any]:
        text = self.frozen.parts.text
        return {"unet": self.frozen.parts.unet, **(text.encoders if text else {})}

    def _pipeline(self) -> Any:
        """The base's pipeline with the models in memory. A freed VAE is loaded again."""
        parts = self.frozen.parts
        vae = parts.vae or loading.load_vae(parts.base, self.peers.accelerator.device)
        wanted = self.options.validation_scheduler
        scheduler = schedulers.sampler(parts.noise_scheduler, has_vae=parts.family.has_vae, wanted=wanted)
        return pipelines.pipeline_of(parts, scheduler, vae)

    def _embeds(self, prompt: str) -> tuple[PromptEmbeds, PromptEmbeds]:
        """Embeddings of the prompt and of the empty prompt."""
        return self.frozen.encode(prompt), self.frozen.encode("")

    def _draw(self, pipeline: Any, prompt: PromptEmbeds, negative: PromptEmbeds) -> list[Image.Image]:
        images: list[Image.Image] = []
        steps = min(_INFERENCE_STEPS, pipeline.scheduler.config.num_train_timesteps)
        with replayed_unet.replaying(pipeline, self.graphs):
            for number in range(self.options.num_validation_images):
                # one at a time, so that a picture depends on its own seed only
                with self.peers.accelerator.autocast():
                    images += pipelines.draw(
                        pipeline,
                        prompt,
                        negative,
                        [sampling_order.key(self.seed, "validation", number)],
                        num_inference_steps=steps,
                        guidance_scale=_GUIDANCE_SCALE,
                        side=self.resolution,
                        check=self.check,
                    )
        return images

    def _save(self, images: list[Image.Image], file_names: list[str], step: int) -> list[str]:
        """Write the pictures to validation/. Returns their names, relative to the output folder. A failure,
        such as a full disk, is printed as a warning; [] is returned."""
        names = [f"{run_folder.VALIDATION}/{file_name}" for file_name in file_names]
        try:
            for image, name in zip(images, names, strict=True):
                self.files.write(name, pictures.png(image, {"prompt": self.prompt, "step": step}))
        except OSError as error:
            reason = error.strerror or error
            self.peers.say(f"warning: pictures of step {step} cannot be written: {reason}")
            return []
        return names
