"""The frozen half of a run, from its files to the memory that it trains in."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from dreambooth.bases import families, quantization
from dreambooth.bases.families import FrozenParts
from dreambooth.bases.prompts import PromptCache
from dreambooth.data import encoding_cache, encodings
from dreambooth.data.batches import PhotoRows, Source
from dreambooth.errors import UserError, shown
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import memory
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Stop
from dreambooth.training import metrics
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


def prompts_of(options: TrainOptions, sources: Sequence[Source]) -> list[str]:
    """Every prompt that a run needs."""
    drawn = options.validation.validation_prompt
    return [
        *(prompt for source in sources for prompt in source.distinct_prompts()),
        *([drawn, ""] if drawn is not None else []),
    ]


def encodes_ahead(start: Start) -> bool:
    """Whether all photos are encoded before the UNet is loaded, and not just those of the first step. On a CPU a photo takes seconds, and whether
    the first step goes well is worth knowing before; the VAE then works in memory that the backward pass has freed. With gradient checkpointing
    that would be too little, a GPU that holds UNet and VAE at once would hold more than it must, and several processes stop together, between
    steps, where this may take long."""
    return (
        start.peers.accelerator.device.type != "cpu"
        or start.peers.world > 1
        or start.options.run.gradient_checkpointing
    )


def frozen_half(start: Start, check: Callable[[], None]) -> FrozenHalf:
    """Encode what is frozen first, and free its models one after another: text encoders, VAE; the UNet is loaded last. Text encoders that are
    trained stay, and so does the VAE where nothing is cached; unless `encodes_ahead` most photos are left for `encode_rest`. `check` is called
    between photos and prompts."""
    options, peers, base, sources = start.options, start.peers, start.base, start.sources
    kind, device = options.speed.quantize_base, peers.accelerator.device
    folder = start.encoded_dir if start.cache == "disk" else None
    entries = encoding_cache.Entries(folder, lambda said: metrics.say(peers.accelerator, f"warning: {said}"))
    text = families.text_without_encoders(base, start.tokenizers, options.text)
    vae = prompt_cache = encoded = None
    if options.text.train_text_encoder:
        text.encoders = families.load_encoders(base, start.weight_dtype, device)
    else:
        asked = prompts_of(options, sources)
        prompt_cache = encodings.encode_prompts(
            entries, base, text, asked, start.weight_dtype, device, peers, check
        )
    assert options.run.seed is not None
    rows = PhotoRows(sources, options.run.seed, start.crops)
    if start.cache == "off":
        vae = families.load_vae(base, device)
    else:
        pictures = [picture for source in sources for picture in source.pictures()]
        soon = set(pictures) if encodes_ahead(start) else rows.pictures(_first_rows(start))
        now, later = (
            [picture for picture in pictures if (picture in soon) == is_soon] for is_soon in (True, False)
        )
        encoded = encodings.encode_photos(entries, base, now, start.crops, device, peers, check, later)
        say_damaged(entries, peers)
    memory.give_back()
    readings: dict[str, memory.Reading] = {} if encoded is None else {"encoded": memory.reading(device)}
    # a GPU that holds the layers in few bits may not hold them whole
    unet = families.load_unet(base, start.weight_dtype, torch.device("cpu") if kind else device)
    if kind:
        quantization.quantize(unet, kind, device)
    memory.trim()  # in which the weights were read and cast
    scheduler = families.load_scheduler(base, edm=options.objective.do_edm_style_training)
    return FrozenHalf(
        FrozenParts(base, text if prompt_cache is None else None, vae, unet, scheduler),
        prompt_cache,
        rows,
        encoded,
        readings,
    )


def _first_rows(start: Start) -> range:
    """The rows of the first step that is taken."""
    first = start.checkpoint.step if start.checkpoint else 0
    count = (
        start.options.run.gradient_accumulation_steps * start.peers.world * start.options.run.train_batch_size
    )
    return range(first * count, (first + 1) * count)


def encode_rest(encoded: encodings.EncodedPhotos, peers: Peers) -> None:
    """Encode the photos that were left for after the first step. Raises Stop if one has changed since it was checked, or the VAE."""
    memory.trim()  # the VAE needs blocks of other sizes than the UNet
    try:
        encoded.encode_rest()
    except UserError as error:
        raise Stop(str(error)) from None
    say_damaged(encoded.entries, peers)
    memory.trim()


def say_damaged(entries: encoding_cache.Entries, peers: Peers) -> None:
    """Say once which files have been made anew."""
    if found := entries.damaged:
        names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        metrics.say(
            peers.accelerator,
            f"note: {len(found)} files in {shown(entries.folder)} were damaged and have been made anew: {names}",
        )
        entries.damaged = []
