"""Makes micro-batches: the latents and prompts of each row, cut from encoded photos or encoded at each use.

`sampling_order` defines rows and slots.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset, default_convert

from dreambooth.bases import autoencoder
from dreambooth.bases.autoencoder import Posterior
from dreambooth.data import photos, sampling_order
from dreambooth.data.buckets import Bucket, Buckets
from dreambooth.data.crops import Corner, Crops
from dreambooth.data.encodings import EncodedPhotos
from dreambooth.data.photos import Photo
from dreambooth.io.errors import UserError
from dreambooth.options.objective import TIMESTEPS, NoiseLevelOptions
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Stop


@dataclasses.dataclass(frozen=True)
class Share:
    """One of several subjects of a source: the next `count` of its photos."""

    prompt: str
    class_prompt: str
    count: int
    repeats: int
    """Rows of this subject in a turn, see `sampling_order.subject_of_row`."""
    weight: float
    """Factor of the loss of this subject's rows."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The photos of one half of a batch, instance or class, with a prompt for each."""

    purpose: str
    """"instance", "class" (class images), "prior" (photos with the class prompt) or "held_out". It is part of
    the seed of every draw, so that the halves draw independently."""
    photos: list[photos.Photo]
    prompts: list[str]
    random_flip: bool = False
    """Whether each use is mirrored with probability 1/2."""
    caption_dropout: float = 0.0
    """Probability of the empty prompt."""
    variants: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """By prompt: the prompts that a row draws from in its place."""
    shares: tuple[Share, ...] = ()
    """The subjects, if there are several; their rows are balanced."""

    @property
    def names(self) -> list[str]:
        """The names of the photos' files; of several subjects with the number of the subject in front."""
        files = [photo.path.name for photo in self.photos]
        numbers = [f"{number}/" for number, share in enumerate(self.shares, 1) for _ in range(share.count)]
        return [number + file for number, file in zip(numbers or [""] * len(files), files, strict=True)]

    @property
    def rows_of_pass(self) -> int:
        """The number of rows in which every photo is visited, at least once."""
        turn = sum(share.repeats for share in self.shares)
        lengths = [math.ceil(share.count / share.repeats) * turn for share in self.shares]
        return max(lengths, default=len(self.photos))

    def distinct_prompts(self) -> list[str]:
        """Every prompt of a photo, and every prompt that a row may have, once, in order of first use."""
        drawn = [prompt for variants in self.variants.values() for prompt in variants]
        return list(dict.fromkeys([*self.prompts, *drawn, *([""] if self.caption_dropout else [])]))

    def mirrorings(self) -> tuple[bool, ...]:
        """Whether a photo may be mirrored: every value that a row may have."""
        return (False, True) if self.random_flip else (False,)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass. All tensors and lists have the rows of the first source, followed by
    those of the second."""

    step: int
    slot: int
    """Number of the micro-batch within the step, over all processes."""
    rows: range
    """The numbers of the rows, the same for each source."""
    posterior: Posterior
    prompts: list[str]
    time_ids: torch.Tensor
    """Stable Diffusion XL's sizes of each row in pixels, float32 [rows, 6]: original height and width, crop
    top and left, target height and width."""

    def parts(self, most: int) -> Iterator["MicroBatch"]:
        """The micro-batch in parts of at most `most` rows, in their order."""
        count = len(self.rows)
        if most >= count:
            yield self
            return
        for rows in (range(first, min(first + most, count)) for first in range(0, count, most)):
            at = [half + row for half in range(0, len(self.prompts), count) for row in rows]
            yield dataclasses.replace(
                self,
                rows=self.rows[rows.start : rows.stop],
                posterior=Posterior(self.posterior.mean[at], self.posterior.std[at]),
                prompts=[self.prompts[row] for row in at],
                time_ids=self.time_ids[at],
            )


class PhotoRows(Dataset):
    """The data set of rows. Item `row` is the cropped photo of each source, float32 [sources, 3, height,
    width] in [-1, 1]."""

    def __init__(
        self,
        sources: list[Source],
        seed: int,
        crops: Crops,
        buckets: Buckets | None = None,
        batch_size: int = 1,
    ):
        """Without `buckets` all photos are cut by `crops`. With them the `batch_size` rows of a micro-batch
        have the shape of one bucket of photos of one subject, which take turns; class images are cut to the
        same shape."""
        self.sources, self.seed, self.crops, self.batch_size = sources, seed, crops, batch_size
        self.buckets = buckets
        self.by_subject = _by_subject(sources[0], buckets) if buckets else ()
        self.filled = tuple(bucket for of_subject in self.by_subject for bucket in of_subject)

    def crops_of(self, row: int) -> Crops:
        """How the photos of this row are cut."""
        if not self.filled:
            return self.crops
        subject, bucket, _ = self._bucket(row)
        return self.crops.of(self.by_subject[subject][bucket].shape)

    def _bucket(self, row: int) -> tuple[int, int, int]:
        """(subject of this row, its bucket, number of earlier rows of that bucket)."""
        subject, visit, purpose = 0, row, "bucket"
        if self.sources[0].shares:
            subject, visit = self._subject(self.sources[0], row)
            purpose = f"bucket-{subject}"
        counts = tuple(len(bucket.photos) for bucket in self.by_subject[subject])
        return subject, *sampling_order.bucket_of_row(self.seed, purpose, visit, counts, self.batch_size)

    def _has_buckets(self, source: Source) -> bool:
        """Whether a row takes its photo of this source from its bucket: those are photos of the subject."""
        return bool(self.filled) and source.purpose in ("instance", "prior")

    def all_crops(self, source: Source) -> list[tuple[Photo, Crops]]:
        """Every (photo, how it is cut) that a row may have. A source that rows do not take photos from has
        the crops that are measured."""
        if not self.filled:
            return [(photo, self.crops) for photo in source.photos]
        if self._has_buckets(source):
            pairs = [(source.photos[n], bucket.shape) for bucket in self.filled for n in bucket.photos]
        elif source.purpose == "class":
            shapes = dict.fromkeys(bucket.shape for bucket in self.filled)
            pairs = [(photo, shape) for shape in shapes for photo in source.photos]
        else:
            return [(photo, self.measured_crops(source, photo)) for photo in source.photos]
        return [(photo, self.crops.of(shape)) for photo, shape in pairs]

    def crops_of_photo(self, source: Source, photo: Photo) -> list[Crops]:
        """How a photo is cut; [] for a class image, which is cut to the shapes of all photos."""
        if source.purpose == "class":
            return []
        return [crops for other, crops in self.all_crops(source) if other == photo]

    def measured_crops(self, source: Source, photo: Photo) -> Crops:
        """How a photo is cut where it is measured: to its shape for the first resolution; a class image to
        the shape of the fullest bucket."""
        if self.buckets is None:
            return self.crops
        if source.purpose == "class":
            return self.crops.of(self.filled[0].shape)
        return self.crops.of(self.buckets.shapes_of(photo.size)[0])

    def pictures(self, sources: Sequence[Source]) -> list[tuple[Photo, bool, Crops]]:
        """Every (photo, whether mirrored, how it is cut) of these sources that a row may have."""
        return [
            (photo, is_mirrored, crops)
            for source in sources
            for photo, crops in self.all_crops(source)
            for is_mirrored in source.mirrorings()
        ]

    def photo(self, source: Source, row: int) -> int:
        """Index of the photo of this row."""
        order = f"{source.purpose}-order"
        if self._has_buckets(source):
            subject, bucket, place = self._bucket(row)
            photos_of_bucket = self.by_subject[subject][bucket].photos
            order = f"{order}-{subject}" if source.shares else order
            # photos of one shape have the order of a run without buckets
            order = f"{order}-{bucket}" if bucket else order
            return photos_of_bucket[
                sampling_order.image_of_row(self.seed, order, place, len(photos_of_bucket))
            ]
        if source.shares:
            number, visit = self._subject(source, row)
            first = sum(share.count for share in source.shares[:number])
            order = f"{order}-{number}"
            return first + sampling_order.image_of_row(self.seed, order, visit, source.shares[number].count)
        return sampling_order.image_of_row(self.seed, order, row, len(source.photos))

    def _subject(self, source: Source, row: int) -> tuple[int, int]:
        """(index of the subject of this row, number of the visit). It is the same in every source; with
        buckets all rows of a micro-batch have one subject."""
        repeats = tuple(share.repeats for share in source.shares)
        if not self.filled:
            return sampling_order.subject_of_row(self.seed, row, repeats)
        batch, number = divmod(row, self.batch_size)
        subject, visit = sampling_order.subject_of_row(self.seed, batch, repeats)
        return subject, visit * self.batch_size + number

    def weights(self, rows: range) -> torch.Tensor | None:
        """The weight of each row's loss, float32 [sources * rows]; None if all are 1."""
        if all(share.weight == 1 for source in self.sources for share in source.shares):
            return None
        pairs = [(source, row) for source in self.sources for row in rows]
        return torch.tensor([source.shares[self._subject(source, row)[0]].weight for source, row in pairs])

    def is_mirrored(self, source: Source, row: int) -> bool:
        """Whether the photo of this row is mirrored."""
        return source.random_flip and sampling_order.chance(self.seed, f"{source.purpose}-flip", row) < 0.5

    def prompt(self, source: Source, row: int) -> str:
        """The prompt of this row: that of its photo, or one of its variants; "" if it is dropped."""
        is_dropped = (
            source.caption_dropout > 0
            and sampling_order.chance(self.seed, f"{source.purpose}-caption", row) < source.caption_dropout
        )
        if is_dropped:
            return ""
        prompt = source.prompts[self.photo(source, row)]
        if not (variants := source.variants.get(prompt)):
            return prompt
        chance = sampling_order.chance(self.seed, f"{source.purpose}-variant", row)
        return variants[int(chance * len(variants))]

    def named_prompt(self, source: Source, row: int) -> tuple[str, str]:
        """(name of the photo, prompt) of this row."""
        return source.photos[self.photo(source, row)].path.name, self.prompt(source, row)

    def corner(self, source: Source, row: int) -> Corner:
        """(left, top) of the crop in the resized, possibly mirrored photo."""
        size, crops = source.photos[self.photo(source, row)].size, self.crops_of(row)
        if crops.center_crop:
            return crops.middle_corner(size)
        return sampling_order.crop_of_row(self.seed, source.purpose, row, crops.room(size), crops.stride)

    def time_ids(self, source: Source, row: int) -> tuple[int, ...]:
        """The sizes of this row, as in `MicroBatch.time_ids`."""
        size = source.photos[self.photo(source, row)].size
        return self.crops_of(row).time_ids(size, self.corner(source, row))

    def randn(self, name: str, rows: range, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers for the rows of each source, float32 [sources * rows, *shape]. Draws of
        other names are independent."""
        purposes = [f"{source.purpose}-{name}" for source in self.sources]
        return torch.cat([sampling_order.noise_of_rows(self.seed, p, rows, shape) for p in purposes])

    def timesteps(self, rows: range, count: int, levels: NoiseLevelOptions) -> torch.Tensor:
        """Timesteps of 0..count-1 for the rows of each source, int64 [sources * rows]."""
        purposes = [f"{source.purpose}-timestep" for source in self.sources]
        if not levels.is_uniform:
            ends = [bound * count // TIMESTEPS for bound in (levels.min_timestep, levels.max_timestep)]
            return torch.tensor(
                [
                    sampling_order.biased_timestep(self.seed, p, row, ends[0], ends[1], levels.timestep_bias)
                    for p in purposes
                    for row in rows
                ]
            )
        return torch.cat([sampling_order.timesteps_of_rows(self.seed, p, rows, count) for p in purposes])

    def describe(self, rows: list[int]) -> str:
        """The rows and the names of their photos, as they may stand in a message."""
        names = sorted({s.photos[self.photo(s, row)].path.name for s in self.sources for row in rows})
        return f"rows {rows[0]} to {rows[-1]}: " + ", ".join(ascii(name)[1:-1] for name in names[:5])

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.stack([self._pixels(source, row) for source in self.sources])

    def __getitems__(self, rows: list[int]) -> torch.Tensor | UserError:
        """Float32 [rows, sources, 3, height, width]; the error if a photo cannot be used.

        An error that a loading process raises would reach the training process as a traceback.
        """
        try:
            return torch.stack([self[row] for row in rows])
        except UserError as error:
            return error

    def _pixels(self, source: Source, row: int) -> torch.Tensor:
        image = photos.load(source.photos[self.photo(source, row)])
        crops = self.crops_of(row)
        box = crops.box(self.corner(source, row))
        return crops.pixel_values(image, box, is_mirrored=self.is_mirrored(source, row))


def _by_subject(source: Source, buckets: Buckets) -> tuple[tuple[Bucket, ...], ...]:
    """The buckets of each subject of a source."""
    filled, first = [], 0
    for count in [share.count for share in source.shares] or [len(source.photos)]:
        sizes = [photo.size for photo in source.photos[first : first + count]]
        filled.append(tuple(bucket.moved(first) for bucket in buckets.filled(sizes)))
        first += count
    return tuple(filled)


def micro_batches(
    dataset: PhotoRows,
    encoded: EncodedPhotos | None,
    vae: AutoencoderKL | None,
    steps: range,
    *,
    slots: int,
    batch_size: int,
    peers: Peers,
    workers: int = 0,
) -> Iterator[MicroBatch]:
    """This process's micro-batches of all `steps`, in order.

    With `encoded` the latents are cut from encoded photos. Without it, `workers` processes load photos, and
    `vae` encodes them. A step has `slots` micro-batches of `batch_size` rows over all `peers`.

    Raises Stop, on every process, if a photo or the cache has been damaged since it was checked.
    """
    order = [
        (step, slot, sampling_order.rows_of_slot(step, slot, slots=slots, batch_size=batch_size))
        for step in steps
        for slot in sampling_order.my_slots(slots, rank=peers.rank, world=peers.world)
    ]
    rows_in_order = [rows for _, _, rows in order]
    if encoded is not None:
        posteriors = _cached_posteriors(dataset, encoded, rows_in_order)
    else:
        posteriors = _fresh_posteriors(dataset, vae, rows_in_order, workers)
    for step, slot, rows in order:
        try:
            posterior = next(posteriors)
        except Stop as stop:
            peers.sync_stop(stop)
            raise
        samples = [(source, row) for source in dataset.sources for row in rows]
        prompts = [dataset.prompt(source, row) for source, row in samples]
        time_ids = [dataset.time_ids(source, row) for source, row in samples]
        yield MicroBatch(step, slot, rows, posterior, prompts, torch.tensor(time_ids, dtype=torch.float32))


def _cached_posteriors(dataset: PhotoRows, encoded: EncodedPhotos, order: list[range]) -> Iterator[Posterior]:
    """The posteriors of each micro-batch, cut from encoded photos."""
    for rows in order:
        posteriors = [
            encoded.posterior(
                source.photos[dataset.photo(source, row)],
                dataset.crops_of(row),
                dataset.corner(source, row),
                is_mirrored=dataset.is_mirrored(source, row),
            )
            for source in dataset.sources
            for row in rows
        ]
        mean = torch.cat([posterior.mean for posterior in posteriors])
        std = torch.cat([posterior.std for posterior in posteriors])
        yield Posterior(mean, std)


def _fresh_posteriors(
    dataset: PhotoRows, vae: AutoencoderKL | None, order: list[range], workers: int
) -> Iterator[Posterior]:
    """The posteriors of each micro-batch, encoded from photos that are loaded for it."""
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[list(rows) for rows in order],  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=default_convert,  # a batch comes from `PhotoRows.__getitems__` as it is
        persistent_workers=workers > 0,
    )
    for pixel_values in loader:  # [rows, sources, 3, height, width]
        if isinstance(pixel_values, UserError):
            raise Stop(
                f"{pixel_values}. Once the picture is as it was, --resume_from_checkpoint latest continues "
                "the run"
            )
        by_source = pixel_values.transpose(0, 1).flatten(0, 1)  # [sources * rows, 3, ...]
        posterior = autoencoder.encode(vae, by_source)
        yield Posterior(posterior.mean.cpu(), posterior.std.cpu())
