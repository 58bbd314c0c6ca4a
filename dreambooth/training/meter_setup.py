"""Makes meters (`meter.Meter`): of the adapter that a run trains, and of adapter files on a loaded base."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dreambooth.adapter_files import reading
from dreambooth.adapters import apply, inject
from dreambooth.bases import autoencoder, loading, schedulers
from dreambooth.bases.autoencoder import Posterior
from dreambooth.bases.families import Base
from dreambooth.bases.loading import FrozenParts
from dreambooth.data import photos
from dreambooth.data.batches import Source
from dreambooth.data.crops import Crops
from dreambooth.data.photos import Photo
from dreambooth.options.training import RunOptions, TextOptions
from dreambooth.training import meter
from dreambooth.training.frozen_models import FrozenModels
from dreambooth.training.start import Start
from dreambooth.training.trainables import Trainables

_LEAST_ROWS = 4  # of one forward pass where memory is not short


def of_run(
    start: Start, frozen: FrozenModels, trainables: Trainables, check: Callable[[], None]
) -> meter.Meter:
    """The meter of the adapter in `trainables`, which must be in evaluation mode now and at every
    measurement.

    It is made before a text encoder is freed. `check` is called before each forward pass. Raises UserError if
    a photo has changed since it was checked, and Stop if the cache was damaged since.
    """
    instance, *classes = start.sources
    components = list(trainables.components)
    model = meter.Model(
        frozen.parts,
        trainables.device,
        frozen.encode,
        lambda: inject.without_adapters(components),
        frozen.autocast,
        rows=_rows(start.options.run, len(start.sources)),
        check=check,
    )

    def posterior(photo: Photo) -> Posterior:
        if frozen.encoded is None:
            return _encoded(photo, start.crops, frozen.parts.vae)
        return frozen.encoded.posterior(photo, start.crops.middle(photo.size), is_mirrored=False)

    def pictures(source: Source) -> list[meter.Picture]:
        return _pictures(source, start.crops, posterior, frozen.vae_config)

    assert start.options.prior.class_prompt is not None  # checked with the flags
    return meter.Meter(
        model,
        meter.Pictures(
            pictures(instance),
            pictures(start.held_out),
            [picture for source in classes for picture in pictures(source)],
            start.options.prior.class_prompt,
        ),
    )


class FileMeter:
    """Measures adapter files on one base, in float32.

    Example: `FileMeter(base, crops, instance, held_out, [], "a photo of a dog").measure(path)["binding"]`.
    """

    def __init__(
        self,
        base: Base,
        crops: Crops,
        instance: Source,
        held_out: Source,
        classes: Source,
        class_prompt: str,
        device: torch.device | None = None,
        *,
        rows: int = 8,
    ):
        """`instance` are photos that the adapters were trained on. `held_out` are other photos of the subject
        and `classes` are class images; both may have no photos. `source_of` makes them from folders. `crops`
        are made with stride 1. Loads the base. Raises UserError if it or a photo cannot be read."""
        device = device or torch.device("cpu")
        text = loading.text_without_encoders(base, loading.load_tokenizers(base), TextOptions())
        text.encoders = loading.load_encoders(base, torch.float32, device)
        unet = loading.load_unet(base, torch.float32, device)
        self.parts = FrozenParts(base, text, None, unet, schedulers.load_scheduler(base))
        self.models: dict[str, Any] = {"unet": unet, **text.encoders}
        self.layers = apply.layers_of(self.models)
        vae = loading.load_vae(base, device)

        def pictures(source: Source) -> list[meter.Picture]:
            return _pictures(source, crops, lambda photo: _encoded(photo, crops, vae), base.vae_config)

        model = meter.Model(
            self.parts, device, lambda prompt: text([prompt]), contextlib.nullcontext, rows=rows
        )
        self.meter = meter.Meter(
            model, meter.Pictures(pictures(instance), pictures(held_out), pictures(classes), class_prompt)
        )

    def measure(self, adapter: Path) -> dict[str, Any]:
        """`meter.Meter.measure` of an adapter file, of any kind, format and rank, with weight 1. Raises
        UserError if it cannot be read or does not fit the base."""
        content = apply.part(reading.read(adapter, self.layers), tuple(self.models))
        with apply.fused(self.models, [(content, 1.0)]):
            return self.meter.measure()


def source_of(purpose: str, folder: Path | None, prompt: str) -> Source:
    """The photos of `folder`, all with `prompt`; without a folder a source without photos. Raises UserError
    if a photo cannot be used."""
    checked = photos.check_folder(folder, purpose, allow_odd_photos=True).photos if folder else []
    return Source(purpose, checked, [prompt] * len(checked))


def _rows(run: RunOptions, sources: int) -> int:
    """Rows of a forward pass: as many as in training, where their gradients take more memory. Small batches
    are enlarged unless --gradient_checkpointing says that memory is short."""
    rows = run.train_batch_size * sources
    return rows if run.gradient_checkpointing else max(_LEAST_ROWS, rows)


def _encoded(photo: Photo, crops: Crops, vae: Any) -> Posterior:
    """The posterior of a photo's crop from the middle, [1, C, h, w] on the CPU."""
    box = crops.square(crops.middle(photo.size))
    posterior = autoencoder.encode(vae, crops.pixel_values(photos.load(photo), box)[None])
    return Posterior(posterior.mean.cpu(), posterior.std.cpu())


def _pictures(
    source: Source, crops: Crops, posterior: Callable[[Photo], Posterior], vae_config: Any
) -> list[meter.Picture]:
    """The pictures of a source, as many as a meter uses: the mean of each posterior."""
    pictures = []
    for photo, prompt in list(zip(source.photos, source.prompts, strict=True))[: meter.draws()]:
        latents = autoencoder.normalized(vae_config, posterior(photo).mean)[0]
        time_ids = crops.time_ids(photo.size, crops.middle(photo.size))
        pictures.append(meter.Picture(latents, prompt, time_ids))
    return pictures
