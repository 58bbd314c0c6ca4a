"""Pictures along the way and at the end: with the models in memory, in eval mode, with generators of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreambooth.adapters import apply
from dreambooth.bases import loading, pipelines, schedulers
from dreambooth.bases.loading import FrozenParts
from dreambooth.bases.prompts import PromptEmbeds
from dreambooth.data import sampling_order
from dreambooth.files import pictures
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.runtime.processes import Peers
from dreambooth.training import metrics

_STEPS = 25  # of the sampler
_GUIDANCE = 7.5


class Pictures:
    """Draws --validation_prompt, on the main process alone."""

    def __init__(
        self,
        prompt: str,
        options: ResolvedTrainOptions,
        peers: Peers,
        parts: FrozenParts,
        check: Callable[[], None],
    ):
        self.options, self.parts, self.check = options, parts, check
        self.peers, self.accelerator = peers, peers.accelerator
        self.prompt = prompt
        self.folder = Path(options.run.output_dir)
        encoders = parts.text.encoders if parts.text else {}
        self.layers = apply.layers_of({"unet": parts.unet, **encoders})  # now, while all parts are there

    def _pipeline(self) -> Any:
        """On the models in memory. A VAE that is not there is loaded, and goes with the pipeline."""
        vae = self.parts.vae or loading.load_vae(self.parts.base, self.accelerator.device)
        scheduler = schedulers.sampler(
            self.parts.noise_scheduler,
            has_vae=self.parts.family.has_vae,
            wanted=self.options.validation.validation_scheduler,
        )
        return pipelines.pipeline_of(self.parts, scheduler, vae)

    def along_the_way(
        self, step: int, progress: metrics.Progress, prompt: PromptEmbeds, empty: PromptEmbeds
    ) -> None:
        """As the adapter is after `step` steps, to validation/ and the trackers."""
        images = self._draw(self._pipeline(), prompt, empty)
        folder = self.folder / "validation"
        self._save(
            images, [folder / f"step-{step:06d}-{number:02d}.png" for number in range(len(images))], step
        )
        progress.images(step, "validation", images, self.prompt)

    def of_the_file(
        self, path: Path, step: int, progress: metrics.Progress, prompt: PromptEmbeds, empty: PromptEmbeds
    ) -> list[str]:
        """As the saved adapter draws: the file itself, put on the frozen models, from which the one that was trained is taken off. Names of the
        pictures."""
        pipeline = self._pipeline()
        pipeline.unload_lora_weights()
        models = {
            "unet": self.parts.unet,
            **(self.parts.text.encoders if self.parts.text else {}),
        }  # what has been freed has spoken in `prompt` already
        stack = apply.Stack(models)
        stack.add("saved", apply.part(apply.read(path, self.layers), tuple(models)))
        is_quantized = (
            self.options.speed.quantize_base is not None
        )  # then nothing can be added to the weights
        with stack.worn({"saved": 1.0}, "no" if is_quantized else "auto"):
            images = self._draw(pipeline, prompt, empty)
        names = [f"image_{number}.png" for number in range(len(images))]
        is_saved = self._save(images, [self.folder / name for name in names], step)
        progress.images(step, "test", images, self.prompt)
        return names if is_saved else []

    def _draw(self, pipeline: Any, prompt: PromptEmbeds, empty: PromptEmbeds) -> list[Any]:
        numbers = range(self.options.validation.num_validation_images)
        images: list[Any] = []
        for number in numbers:  # alone, so that each depends on its own seed only
            with self.accelerator.autocast():
                images += pipelines.draw(
                    pipeline,
                    prompt,
                    empty,
                    [sampling_order.key(self.options.run.seed or 0, "validation", number)],
                    num_inference_steps=_STEPS,
                    guidance_scale=_GUIDANCE,
                    side=self.options.instance.resolution,
                    check=self.check,
                )
        return images

    def _save(self, images: list[Any], paths: list[Path], step: int) -> bool:
        try:
            for image, path in zip(images, paths, strict=True):
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(pictures.png(image, {"prompt": self.prompt, "step": step}))
        except OSError as error:  # a full disk: the pictures are worth less than the run
            self.peers.say(
                f"warning: pictures of step {step} cannot be written: {error.strerror or error}",
            )
            return False
        return True
