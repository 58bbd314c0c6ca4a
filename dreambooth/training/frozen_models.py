"""The frozen models of one run. They are loaded one after another, so that few are in memory at once."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dreambooth.bases import loading, quantization, schedulers
from dreambooth.bases.loading import FrozenParts
from dreambooth.bases.prompts import PromptCache, PromptEmbeds, TextParts
from dreambooth.data import encoding_cache, encodings
from dreambooth.data.batches import PhotoRows
from dreambooth.data.masks import LatentMasks
from dreambooth.io.errors import shown
from dreambooth.runtime import memory
from dreambooth.runtime.graphs import Tensors
from dreambooth.training.start import Start


@dataclasses.dataclass
class FrozenModels:
    """Frozen models, and the prompt embeddings and latents of models that are already freed."""

    parts: FrozenParts
    vae_config: Mapping[str, Any] | None
    """None for a base that works on pixels."""
    prompts: list[str]
    """Every prompt that the run needs."""
    prompt_cache: PromptCache | None
    """Embeddings of `prompts`; None while a text encoder is trained."""
    base_prompts: PromptCache | None
    """Embeddings of prompts for which the base's own predictions are targets, by text encoders without an
    adapter; None if there are none."""
    has_base_priors: bool
    """Whether the targets of class rows are the base's own predictions (--prior_source base)."""
    masks: LatentMasks | None
    """The masks of the instance photos; None without masks."""
    dataset: PhotoRows
    encoded: encodings.EncodedPhotos | None
    """Latents of the photos; None with --cache_latents off."""
    autocast: Callable[[], contextlib.AbstractContextManager[None]]
    """The run's mixed precision."""

    def prompt_inputs(self, prompts: Sequence[str]) -> Tensors:
        """What `prompt_embeds` takes for these prompts: their embeddings, one row each; while a text encoder
        is trained, the tokens of the distinct prompts, and for each row the index of its prompt."""
        if self.prompt_cache is not None:
            cached = self.prompt_cache.of(prompts)
            pooled = {} if cached.pooled is None else {"pooled_prompt_embeds": cached.pooled}
            return {"prompt_embeds": cached.embeds, **pooled}
        assert self.parts.text is not None
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return {**self.parts.text.tokens(distinct), "prompt_rows": rows}

    def base_prompt_inputs(self, prompts: Sequence[str]) -> Tensors:
        """The embeddings of `prompts` for the base's own prediction, one row each; {} without any."""
        if self.base_prompts is None or not prompts:
            return {}
        cached = self.base_prompts.of(prompts)
        pooled = {} if cached.pooled is None else {"base_pooled_prompt_embeds": cached.pooled}
        return {"base_prompt_embeds": cached.embeds, **pooled}

    def prompt_embeds(self, inputs: Tensors) -> PromptEmbeds:
        """Embeddings of prompts, one row each; with gradients while a text encoder is trained. `inputs` are
        those of `prompt_inputs`, on the device."""
        if self.prompt_cache is not None:
            return PromptEmbeds(inputs["prompt_embeds"], inputs.get("pooled_prompt_embeds"))
        assert self.parts.text is not None
        with self.autocast():
            return self.parts.text.encode(self.parts.text, inputs).rows(inputs["prompt_rows"])

    def encode(self, prompt: str) -> PromptEmbeds:
        """Embeddings of one prompt."""
        if self.prompt_cache is not None:
            return self.prompt_cache.of([prompt])
        assert self.parts.text is not None
        with self.autocast():
            return self.parts.text([prompt])

    @torch.no_grad()
    def free_text_encoders(self, check: Callable[[], None]) -> None:
        """Encode every prompt, then free the text encoders. `check` is called before each prompt."""
        assert self.parts.text is not None
        with self.autocast():
            self.prompt_cache = self.parts.text.encode_all(self.prompts, check)
        self.parts.text = None


def _prompt_caches(
    start: Start,
    text: TextParts,
    prompts: Sequence[str],
    cache: encoding_cache.EncodingCache,
    check: Callable[[], None],
) -> tuple[PromptCache | None, PromptCache | None]:
    """`FrozenModels.prompt_cache` and `base_prompts`. Text encoders that are trained are loaded into `text`;
    then the first is None."""
    peers, base, dtype, device = start.peers, start.base, start.weight_dtype, start.peers.accelerator.device
    prompt_cache = base_prompts = None
    if start.options.text.train_text_encoder:
        text.encoders = loading.load_encoders(base, dtype, device)
        if start.base_prompts:  # while the encoders have no adapter
            with torch.no_grad(), peers.accelerator.autocast():
                base_prompts = text.encode_all(start.base_prompts, check)
    else:
        prompt_cache = encodings.encode_prompts(cache, base, text, prompts, dtype, device, peers, check)
        base_prompts = prompt_cache if start.base_prompts else None
    phase = "text encoders loaded" if prompt_cache is None else "prompts encoded"
    start.phases[phase] = memory.reading(device)
    return prompt_cache, base_prompts


def load(start: Start, check: Callable[[], None]) -> FrozenModels:
    """Encode prompts and photos, free the text encoders and the VAE, then load the UNet.

    Text encoders that are trained are not freed, nor is the VAE with --cache_latents off. `check` is called
    before each prompt and photo. Raises UserError if the base or a photo has changed since it was checked.
    """
    options, peers, base = start.options, start.peers, start.base
    device = peers.accelerator.device
    folder = start.cache.folder if start.cache.mode == "disk" else None
    cache = encoding_cache.EncodingCache(folder, lambda warning: peers.say(f"warning: {warning}"))
    text = loading.text_without_encoders(base, start.tokenizers, options.text)
    prompts = [prompt for source in start.sources for prompt in source.distinct_prompts()]
    prompts += start.measured_prompts
    if start.validation_prompts:
        judged = start.judge_plan.extra_prompts if start.judge_plan else ()
        prompts += [*start.validation_prompts, *judged, ""]
    vae = encoded = None
    start.say_prompts()

    # text encoders
    prompt_cache, base_prompts = _prompt_caches(start, text, prompts, cache, check)

    # VAE
    dataset = start.photo_rows()
    if start.cache.mode == "off":
        vae = loading.load_vae(base, device)
    else:
        sources = [*start.sources, *([start.held_out] if options.meter.meter_steps else [])]
        pictures = dataset.pictures(sources)
        encoded = encodings.encode_photos(cache, base, pictures, device, peers, check)
        if files := cache.damaged:
            names = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
            damaged = f"{len(files)} files in {shown(cache.folder)} were damaged and have been encoded again"
            peers.say_notes([f"{damaged}: {names}"])
    memory.release()
    start.phases["VAE loaded" if encoded is None else "photos encoded"] = memory.reading(device)

    # UNet: quantized from the CPU, since the GPU may not have room for the layers before quantization
    quantize = options.speed.quantize_base
    unet = loading.load_unet(base, start.weight_dtype, torch.device("cpu") if quantize else device)
    if quantize:
        quantization.quantize(unet, quantize, device)
    memory.trim()  # reading and casting the weights left freed memory behind
    start.phases["UNet loaded"] = memory.reading(device)
    noise_scheduler = schedulers.load_scheduler(base, edm=options.objective.do_edm_style_training)
    parts = FrozenParts(base, text if prompt_cache is None else None, vae, unet, noise_scheduler)
    return FrozenModels(
        parts=parts,
        vae_config=base.vae_config,
        prompts=prompts,
        prompt_cache=prompt_cache,
        base_prompts=base_prompts,
        has_base_priors=options.prior.has_base_targets,
        masks=LatentMasks(dataset, start.masks, options.instance.masks) if start.masks else None,
        dataset=dataset,
        encoded=encoded,
        autocast=peers.accelerator.autocast,
    )
