"""Makes the meter (`meter.Meter`) of the adapter that a run trains."""

import functools
from collections.abc import Callable
from typing import Any

from dreambooth.adapters import inject
from dreambooth.bases import autoencoder
from dreambooth.bases.autoencoder import Posterior
from dreambooth.data import photos
from dreambooth.data.batches import Source
from dreambooth.data.crops import Crops
from dreambooth.data.photos import Photo
from dreambooth.options.training import RunOptions
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
    instance = start.sources[0]
    classes = [source for source in start.sources if source.purpose == "class"]
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

    def posterior(photo: Photo, crops: Crops) -> Posterior:
        if frozen.encoded is None:
            return _encoded(photo, crops, frozen.parts.vae)
        return frozen.encoded.posterior(photo, crops, crops.middle(photo.size), is_mirrored=False)

    def pictures(source: Source) -> list[meter.Picture]:
        crops_of = functools.partial(frozen.dataset.measured_crops, source)
        return _pictures(source, crops_of, posterior, frozen.vae_config)

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


def _rows(run: RunOptions, sources: int) -> int:
    """Rows of a forward pass: as many as in training, where their gradients take more memory. Small batches
    are enlarged unless --gradient_checkpointing says that memory is short."""
    rows = run.train_batch_size * sources
    return rows if run.gradient_checkpointing else max(_LEAST_ROWS, rows)


def _encoded(photo: Photo, crops: Crops, vae: Any) -> Posterior:
    """The posterior of a photo's crop from the middle, [1, C, h, w] on the CPU."""
    box = crops.box(crops.middle(photo.size))
    posterior = autoencoder.encode(vae, crops.pixel_values(photos.load(photo), box)[None])
    return Posterior(posterior.mean.cpu(), posterior.std.cpu())


def _pictures(
    source: Source,
    crops_of: Callable[[Photo], Crops],
    posterior: Callable[[Photo, Crops], Posterior],
    vae_config: Any,
) -> list[meter.Picture]:
    """The pictures of a source, as many as a meter uses: the mean of each posterior."""
    pictures = []
    for photo, prompt in list(zip(source.photos, source.prompts, strict=True))[: meter.draws()]:
        crops = crops_of(photo)
        latents = autoencoder.normalized(vae_config, posterior(photo, crops).mean)[0]
        time_ids = crops.time_ids(photo.size, crops.middle(photo.size))
        pictures.append(meter.Picture(latents, prompt, time_ids))
    return pictures
