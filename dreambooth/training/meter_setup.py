"""Makes the meter (`meter.Meter`) of the adapter that a run trains."""

import functools
import itertools
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

    def pictures(source: Source) -> list[list[meter.Picture]]:
        crops_of = functools.partial(frozen.dataset.measured_crops, source)
        return _by_subject(source, crops_of, posterior, frozen.vae_config, class_prompt)

    class_prompt = start.options.prior.class_prompt or ""
    trained, held_out = pictures(start.sources[0]), pictures(start.held_out)
    classes = [source for source in start.sources if source.purpose == "class"]
    measured = [of_held_out or of_trained for of_held_out, of_trained in zip(held_out, trained, strict=True)]
    return meter.Meter(
        model,
        meter.Pictures(
            _in_turns(trained),
            _in_turns(held_out),
            [picture for source in classes for part in pictures(source) for picture in part],
            [
                meter.Subject(share.prompt, share.class_prompt, photos_of_it)
                for share, photos_of_it in zip(start.shares, measured, strict=bool(start.shares))
            ],
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


def _by_subject(
    source: Source,
    crops_of: Callable[[Photo], Crops],
    posterior: Callable[[Photo, Crops], Posterior],
    vae_config: Any,
    class_prompt: str,
) -> list[list[meter.Picture]]:
    """The pictures of a source, of each subject as many as a meter uses: the mean of each posterior.
    `class_prompt` is that of a run with one subject."""
    counts = [share.count for share in source.shares] or [len(source.photos)]
    classes = [share.class_prompt for share in source.shares] or [class_prompt]
    pairs = iter(zip(source.photos, source.prompts, strict=True))
    pictures: list[list[meter.Picture]] = []
    for count, of_subject in zip(counts, classes, strict=True):
        pictures.append([])
        for photo, prompt in list(itertools.islice(pairs, count))[: meter.draws()]:
            crops = crops_of(photo)
            latents = autoencoder.normalized(vae_config, posterior(photo, crops).mean)[0]
            time_ids = crops.time_ids(photo.size, crops.middle(photo.size))
            pictures[-1].append(meter.Picture(latents, prompt, time_ids, of_subject))
    return pictures


def _in_turns(by_subject: list[list[meter.Picture]]) -> list[meter.Picture]:
    """The pictures of all subjects, of each subject one in turn: a meter uses the first."""
    turns = itertools.zip_longest(*by_subject)
    return [picture for turn in turns for picture in turn if picture is not None][: meter.draws()]
