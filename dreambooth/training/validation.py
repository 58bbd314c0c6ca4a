"""Validation pictures: drawn before training, during it and after it, from --validation_prompt and
--validation_prompts_file, by the main process."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreambooth.adapter_files import reading
from dreambooth.adapters import apply, inject
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
_SAVED = "saved"  # the name of the finished adapter on the models


class ValidationPictures:
    """Draws the validation prompts with the models in memory. Without prompts, nothing is drawn. Each picture
    has a seed of its own, so drawing changes no random number of the training."""

    def __init__(self, start: Start, frozen: FrozenModels, trainables: Trainables, check: Callable[[], None]):
        """`check` is called between the sampling steps of a picture."""
        options, self.peers = start.options, start.peers
        self.options, self.prompts = options.validation, start.validation_prompts
        judged = start.judge_plan.extra_prompts if start.judge_plan else {}
        self.counts = dict.fromkeys(self.prompts, self.options.num_validation_images) | judged
        """Numbers of pictures by prompt: those that are shown, and those that are drawn for judges alone."""
        self.resolution, self.seed, self.speed = options.instance.side, options.run.seed, options.speed
        self.starts_from_base = not start.init_adapter
        self.files = WrittenFiles(start.output_dir)
        self.frozen, self.trainables, self.check = frozen, trainables, check
        self.graphs = replayed_unet.graphs_of(self.speed, self.peers.accelerator.device, console.warn)
        self.finished: dict[str, str] = {}
        """Prompts of the pictures of the finished adapter, by their names relative to the output folder."""
        # read now: text encoders may be freed before `draw_finished`
        self.layers = apply.layers_of(self._models()) if self.prompts else {}

    def is_due(self, step: int, *, steps_per_epoch: int) -> bool:
        """Whether pictures are drawn after `step` steps: before the first step, and then by
        --validation_steps, else --validation_epochs."""
        if not self.prompts or step == 0:
            return bool(self.prompts)
        if self.options.validation_steps:
            return step % self.options.validation_steps == 0
        epochs = step // steps_per_epoch
        return step % steps_per_epoch == 0 and (epochs - 1) % self.options.validation_epochs == 0

    def are_written(self, step: int) -> bool:
        """Whether the pictures of `draw_current` after `step` steps are in the folder, all of them."""
        numbers = itertools.product(range(len(self.prompts)), range(self.options.num_validation_images))
        names = (run_folder.step_picture(step, *each, prompts=len(self.prompts)) for each in numbers)
        return all(map(self.files.is_written, names))

    def draw_current(self, step: int, progress: metrics.Progress) -> dict[str, list[Image.Image]]:
        """Draw with the adapter after `step` steps, on the main process; the other processes wait. The
        pictures are written to validation/ in the output folder and sent to the trackers. Returns them by
        prompt, with those that are drawn for the judges alone; {} on the other processes."""
        images: dict[str, list[Image.Image]] = {}
        if self.peers.is_main:
            with self._models_for_drawing():
                pipeline = self._pipeline()
                for prompt in self.counts:
                    images[prompt] = self._draw(pipeline, prompt, *self._embeds(prompt))
            names = functools.partial(run_folder.step_picture, step, prompts=len(self.prompts))
            self._save(self._shown(images), names, step)
            self._track("validation", self._shown(images), step, progress)
        self.peers.barrier()
        return images

    def draw_base(self) -> dict[str, list[Image.Image]]:
        """Draw the pictures for the judges alone, without the adapter; as `draw_current`, but nothing is
        written. No text encoder may have been freed since it was trained."""
        images: dict[str, list[Image.Image]] = {}
        if self.peers.is_main:
            with self._models_for_drawing(), inject.without_adapters(self.trainables.components):
                pipeline = self._pipeline()
                for prompt in self.counts.keys() - set(self.prompts):
                    images[prompt] = self._draw(pipeline, prompt, *self._embeds(prompt))
        self.peers.barrier()
        return images

    def draw_finished(
        self, saver: Saver, step: int, progress: metrics.Progress
    ) -> dict[str, list[Image.Image]]:
        """Draw with the finished adapter file, on the main process; the other processes wait. Returns the
        pictures as `draw_current`; {} also with --skip_final_inference.

        The file is read like any user's adapter file, so the pictures are those that the user will get. The
        trained adapter is removed from the models for good; `saver` copies its tensors first. The first
        prompt is also drawn with other weights of the adapter.
        """
        images: dict[str, list[Image.Image]] = {}
        if self.peers.is_main and self.prompts and not self.options.skip_final_inference:
            saver.take_snapshot(step)
            with self._models_for_drawing():
                embeds = {prompt: self._embeds(prompt) for prompt in self.counts}
                pipeline = self._pipeline()
                pipeline.unload_lora_weights()  # from the text encoders too: the prompts are encoded already
                stack, weights = self._stack_of_file(saver.adapter)
                with self._activated(stack, 1.0):
                    for prompt in self.counts:
                        images[prompt] = self._draw(pipeline, prompt, *embeds[prompt])
                names = functools.partial(run_folder.final_picture, prompts=len(self.prompts))
                self.finished = self._save(self._shown(images), names, step)
                self._track("test", self._shown(images), step, progress)
                self._sweep(pipeline, stack, weights, embeds[self.prompts[0]], step)
        self.peers.barrier()
        return images

    def _shown(self, images: Mapping[str, list[Image.Image]]) -> dict[str, list[Image.Image]]:
        """The pictures without those that are drawn for the judges alone."""
        return {prompt: images[prompt] for prompt in self.prompts}

    @contextlib.contextmanager
    def _models_for_drawing(self) -> Iterator[None]:
        """Within the block the models have no gradients, no dropout, and are not compiled."""
        with torch.no_grad(), self.trainables.evaluating(), compilation.eager(wanted=self.speed.compile):
            yield

    def _stack_of_file(self, adapter_file: Path) -> tuple[apply.Stack, Sequence[float]]:
        """The adapter file, ready to be used at any weight in place of the trained adapter, and the weights
        for `_sweep`."""
        # freed text encoders are not needed: the prompts are encoded already
        models = self._models()
        adapter = apply.part(reading.read(adapter_file, self.layers), tuple(models))
        stack = apply.Stack(models)
        stack.add(_SAVED, adapter)
        if not adapter.is_additive:  # it has no other weights than 0 and 1
            return stack, ()
        # at weight 0 the base draws, as before the first step
        return stack, run_folder.SWEEP if self.starts_from_base else (0.0, *run_folder.SWEEP)

    def _activated(self, stack: apply.Stack, weight: float) -> contextlib.AbstractContextManager[None]:
        # quantized weights cannot be changed, so adapters are not fused with them
        return stack.activated({_SAVED: weight}, "auto" if self.speed.quantize_base is None else "no")

    def _sweep(
        self,
        pipeline: Any,
        stack: apply.Stack,
        weights: Sequence[float],
        embeds: tuple[PromptEmbeds, PromptEmbeds],
        step: int,
    ) -> None:
        """Draw the first picture of the first prompt with the finished adapter at each of `weights`. Text
        encoders that are in memory have the adapter at that weight too."""
        prompt, has_encoders = self.prompts[0], self.frozen.parts.text is not None
        for weight in weights:
            with self._activated(stack, weight):
                embeds = self._embeds(prompt) if has_encoders else embeds
                images = self._draw(pipeline, prompt, *embeds, count=1)
            self._save({prompt: images}, lambda *_, weight=weight: run_folder.swept_picture(weight), step)

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

    def _noise_seed(self, prompt: str, number: int) -> int:
        """The seed of a picture: the same at every step, and whatever other prompts are drawn."""
        words = () if prompt == self.options.validation_prompt else (prompt,)
        return sampling_order.key(self.seed, "validation", number, *words)

    def _draw(
        self,
        pipeline: Any,
        prompt: str,
        embeds: PromptEmbeds,
        negative: PromptEmbeds,
        count: int | None = None,
    ) -> list[Image.Image]:
        """The first `count` pictures of a prompt; by default as many as `counts` has."""
        images: list[Image.Image] = []
        steps = min(_INFERENCE_STEPS, pipeline.scheduler.config.num_train_timesteps)
        with replayed_unet.replaying(pipeline, self.graphs):
            for number in range(count or self.counts[prompt]):
                # one at a time, so that a picture depends on its own seed only
                with self.peers.accelerator.autocast():
                    images += pipelines.draw(
                        pipeline,
                        embeds,
                        negative,
                        [self._noise_seed(prompt, number)],
                        num_inference_steps=steps,
                        guidance_scale=_GUIDANCE_SCALE,
                        side=self.resolution,
                        check=self.check,
                    )
        return images

    def _save(
        self, images: Mapping[str, Sequence[Image.Image]], name_of: Callable[[int, int], str], step: int
    ) -> dict[str, str]:
        """Write the pictures of each prompt; `name_of` takes the numbers of prompt and picture. Returns the
        prompts by name. A failure, such as a full disk, is printed as a warning; {} is returned."""
        prompt_of_name: dict[str, str] = {}
        try:
            for prompt_number, (prompt, drawn) in enumerate(images.items()):
                for number, image in enumerate(drawn):
                    name = name_of(prompt_number, number)
                    self.files.write(name, pictures.png(image, {"prompt": prompt, "step": step}))
                    prompt_of_name[name] = prompt
        except OSError as error:
            reason = error.strerror or error
            self.peers.say(f"warning: pictures of step {step} cannot be written: {reason}")
            return {}
        return prompt_of_name

    def _track(
        self,
        name: str,
        images: Mapping[str, Sequence[Image.Image]],
        step: int,
        progress: metrics.Progress,
    ) -> None:
        """Send the pictures to the trackers, those of each prompt apart."""
        for number, (prompt, drawn) in enumerate(images.items()):
            progress.images(step, name if len(images) == 1 else f"{name}-{number:02d}", list(drawn), prompt)
