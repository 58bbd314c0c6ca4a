"""The frozen half of a run, from its files to the memory that it trains in."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from dreambooth import encoded_files, encodings, families, memory, quantization, report
from dreambooth.families import FrozenParts
from dreambooth.options import TrainOptions
from dreambooth.preparation import Start
from dreambooth.printable import shown
from dreambooth.prompts import Book
from dreambooth.samples import Source


@dataclasses.dataclass(frozen=True)
class FrozenHalf:
    """What does not learn: models, and what those that are gone have made of prompts (None where the text encoder learns) and photos (None where
    nothing is cached). `readings` are of memory, by phase."""

    parts: FrozenParts
    book: Book | None
    encoded: encodings.EncodedPhotos | None
    readings: dict[str, memory.Reading]


def prompts_of(options: TrainOptions, sources: Sequence[Source]) -> list[str]:
    """Every prompt that a run needs."""
    drawn = options.validation.validation_prompt
    return [*(prompt for source in sources for prompt in source.distinct_prompts()), *([drawn, ""] if drawn is not None else [])]


def frozen_half(start: Start, check: Callable[[], None]) -> FrozenHalf:
    """Encode what is frozen first, and free its models one after another: text encoders, VAE; the UNet is loaded last. Text encoders that are
    trained stay, and so does the VAE where nothing is cached. `check` is called between photos and prompts."""
    options, peers, base, sources = start.options, start.peers, start.base, start.sources
    instance, kind, device = options.instance, options.speed.quantize_base, peers.accelerator.device
    assert instance.resolution is not None
    if device.type == "cpu" and not options.run.gradient_checkpointing:
        memory.keep_freed()
    folder = start.encoded_dir if start.cache == "disk" else None
    entries = encoded_files.Entries(folder, lambda said: report.say(peers.accelerator, f"warning: {said}"))
    text = families.text_without_encoders(base, start.tokenizers, options.text)
    vae = book = encoded = None
    if options.text.train_text_encoder:
        text.encoders = families.load_encoders(base, start.weight_dtype, device)
    else:
        asked = prompts_of(options, sources)
        book = encodings.encode_prompts(entries, base, text, asked, start.weight_dtype, device, peers, check)
    if start.cache == "off":
        vae = families.load_vae(base, device)
    else:
        crops = encodings.Crops(instance.resolution, instance.image_interpolation_mode, instance.center_crop, base.grid)
        pictures = [picture for source in sources for picture in source.pictures()]
        encoded = encodings.encode_photos(entries, base, pictures, crops, device, peers, check)
    if entries.damaged:
        names = ", ".join(entries.damaged[:3]) + (", ..." if len(entries.damaged) > 3 else "")
        report.say(peers.accelerator, f"note: {len(entries.damaged)} files in {shown(folder)} were damaged and have been made anew: {names}")
    memory.give_back()
    readings: dict[str, memory.Reading] = {} if encoded is None else {"encoded": memory.reading(device)}
    # a GPU that holds the layers in few bits may not hold them whole
    unet = families.load_unet(base, start.weight_dtype, torch.device("cpu") if kind else device)
    if kind:
        quantization.quantize(unet, kind, device)
    scheduler = families.load_scheduler(base, edm=options.objective.do_edm_style_training)
    return FrozenHalf(FrozenParts(base, text if book is None else None, vae, unet, scheduler), book, encoded, readings)
