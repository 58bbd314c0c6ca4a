"""The frozen half of a run, from its files to the memory that it trains in."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from dreambooth.bases import loading, quantization, schedulers
from dreambooth.bases.loading import FrozenParts
from dreambooth.bases.prompts import PromptCache
from dreambooth.data import encoding_cache, encodings
from dreambooth.data.batches import PhotoRows, Source
from dreambooth.errors import shown
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.runtime import memory
from dreambooth.runtime.processes import Peers
from dreambooth.training.prepare import Start


@dataclasses.dataclass(frozen=True)
class FrozenHalf:
    """What does not learn: models, and what those that are gone have made of prompts (None where the text encoder learns) and photos (None where
    nothing is cached). `rows` are the photos in the order of the run; `readings` are of memory, by phase."""

    parts: FrozenParts
    prompt_cache: PromptCache | None
    rows: PhotoRows
    encoded: encodings.EncodedPhotos | None
    readings: dict[str, memory.Reading]


def prompts_of(options: ResolvedTrainOptions, sources: Sequence[Source]) -> list[str]:
    """Every prompt that a run needs."""
    drawn = options.validation.validation_prompt
    return [
        *(prompt for source in sources for prompt in source.distinct_prompts()),
        *([drawn, ""] if drawn is not None else []),
    ]


def frozen_half(start: Start, check: Callable[[], None]) -> FrozenHalf:
    """Encode prompts and photos with the text encoders and the VAE, free these one after another, and load the UNet last.
    Text encoders that are trained stay loaded, and so does the VAE where nothing is cached. `check` is called between
    photos and between prompts."""
    options, peers, base, sources = start.options, start.peers, start.base, start.sources
    kind, device = options.speed.quantize_base, peers.accelerator.device
    folder = start.encoded_dir if start.cache == "disk" else None
    cache = encoding_cache.EncodingCache(folder, lambda said: peers.say(f"warning: {said}"))
    text = loading.text_without_encoders(base, start.tokenizers, options.text)
    vae = prompt_cache = encoded = None
    if options.text.train_text_encoder:
        text.encoders = loading.load_encoders(base, start.weight_dtype, device)
    else:
        asked = prompts_of(options, sources)
        prompt_cache = encodings.encode_prompts(
            cache, base, text, asked, start.weight_dtype, device, peers, check
        )
    rows = PhotoRows(sources, options.run.seed, start.crops)
    if start.cache == "off":
        vae = loading.load_vae(base, device)
    else:
        pictures = [picture for source in sources for picture in source.pictures()]
        encoded = encodings.encode_photos(cache, base, pictures, start.crops, device, peers, check)
        say_damaged(cache, peers)
    memory.give_back()
    readings: dict[str, memory.Reading] = {} if encoded is None else {"encoded": memory.reading(device)}
    # a GPU that holds the layers in few bits may not hold them whole
    unet = loading.load_unet(base, start.weight_dtype, torch.device("cpu") if kind else device)
    if kind:
        quantization.quantize(unet, kind, device)
    memory.trim()  # in which the weights were read and cast
    scheduler = schedulers.load_scheduler(base, edm=options.objective.do_edm_style_training)
    return FrozenHalf(
        FrozenParts(base, text if prompt_cache is None else None, vae, unet, scheduler),
        prompt_cache,
        rows,
        encoded,
        readings,
    )


def say_damaged(cache: encoding_cache.EncodingCache, peers: Peers) -> None:
    """Say once which files have been made anew."""
    if found := cache.damaged:
        names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        peers.say(
            f"note: {len(found)} files in {shown(cache.folder)} were damaged and have been made anew: {names}",
        )
        cache.damaged = []
