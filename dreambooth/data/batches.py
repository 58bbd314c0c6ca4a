"""Row numbers -> latents and prompts: from photos encoded once, or from photos loaded ahead by worker processes and encoded at each visit."""

import dataclasses
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL

from dreambooth.bases import autoencoder
from dreambooth.data import photos, sampling_order
from dreambooth.data.crops import Corner, Crops
from dreambooth.data.encodings import EncodedPhotos
from dreambooth.data.photos import Photo


@dataclasses.dataclass(frozen=True)
class Source:
    """The photos of one half of a batch and a prompt for each. `purpose` ("instance" or "class") separates its random draws from the other
    half's; `random_flip` mirrors half of the visits, `caption_dropout` is the share of them with the empty prompt."""

    purpose: str
    photos: list[photos.Photo]
    prompts: list[str]
    random_flip: bool = False
    caption_dropout: float = 0.0

    def distinct_prompts(self) -> list[str]:
        """Every prompt that a visit may have, once, in order of first use."""
        return list(dict.fromkeys([*self.prompts, *([""] if self.caption_dropout else [])]))

    def pictures(self) -> list[tuple[Photo, bool]]:
        """Every (photo, whether mirrored) that a visit may have."""
        return [
            (photo, is_mirrored)
            for photo in self.photos
            for is_mirrored in ((False, True) if self.random_flip else (False,))
        ]


@dataclasses.dataclass(frozen=True)
class Frame:
    """What Stable Diffusion XL is told of a picture, in pixels: its size before resizing, and where in the resized picture the crop begins."""

    height: int
    width: int
    top: int
    left: int


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One forward pass: its step, its slot within the step, its rows, and source by source the posterior of [sources * rows] latents, with a
    prompt and a frame for each."""

    step: int
    slot: int
    rows: range
    posterior: autoencoder.Posterior
    prompts: list[str]
    frames: list[Frame]

    def time_ids(self, resolution: int) -> torch.Tensor:
        """Stable Diffusion XL's sizes of each row, float32 [rows, 6]: original height and width, crop top and left, target height and width."""
        sizes = [(f.height, f.width, f.top, f.left, resolution, resolution) for f in self.frames]
        return torch.tensor(sizes, dtype=torch.float32)


class PhotoRows(torch.utils.data.Dataset):
    """Row -> [sources, 3, resolution, resolution]: the photo of each source at that row, cropped for that row."""

    def __init__(self, sources: list[Source], seed: int, crops: Crops):
        self.sources, self.seed, self.crops = sources, seed, crops

    def photo(self, source: Source, row: int) -> int:
        return sampling_order.image_of_row(self.seed, f"{source.purpose}-order", row, len(source.photos))

    def is_mirrored(self, source: Source, row: int) -> bool:
        return source.random_flip and sampling_order.chance(self.seed, f"{source.purpose}-flip", row) < 0.5

    def prompt(self, source: Source, row: int) -> str:
        is_dropped = (
            source.caption_dropout > 0
            and sampling_order.chance(self.seed, f"{source.purpose}-caption", row) < source.caption_dropout
        )
        return "" if is_dropped else source.prompts[self.photo(source, row)]

    def corner(self, source: Source, row: int) -> Corner:
        """(left, top) of the crop, in the resized and possibly mirrored picture."""
        size = source.photos[self.photo(source, row)].size
        if self.crops.center_crop:
            return self.crops.middle_corner(size)
        room = self.crops.room(size)
        return sampling_order.crop_of_row(self.seed, source.purpose, row, room, self.crops.stride)

    def frame(self, source: Source, row: int) -> Frame:
        width, height = source.photos[self.photo(source, row)].size
        left, top = self.corner(source, row)
        return Frame(height, width, top, left)

    def randn(self, name: str, rows: range, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers for the rows of each source, float32 [sources * rows, *shape]. Draws of other names are independent."""
        return torch.cat(
            [
                sampling_order.noise_of_rows(self.seed, f"{s.purpose}-{name}", rows, shape)
                for s in self.sources
            ]
        )

    def timesteps(self, rows: range, count: int) -> torch.Tensor:
        """Timestep indices for the rows of each source, uniform in 0..count-1, int64 [sources * rows]."""
        return torch.cat(
            [
                sampling_order.timesteps_of_rows(self.seed, f"{s.purpose}-timestep", rows, count)
                for s in self.sources
            ]
        )

    def describe(self, rows: list[int]) -> str:
        """The rows and the names of their photos, as they may stand in a message."""
        names = sorted({s.photos[self.photo(s, row)].path.name for s in self.sources for row in rows})
        return f"rows {rows[0]} to {rows[-1]}: " + ", ".join(ascii(name)[1:-1] for name in names[:5])

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.stack([self._pixels(source, row) for source in self.sources])

    def _pixels(self, source: Source, row: int) -> torch.Tensor:
        image = photos.load(source.photos[self.photo(source, row)].path)
        box = self.crops.square(self.corner(source, row))
        return self.crops.pixel_values(image, box, is_mirrored=self.is_mirrored(source, row))


def micro_batches(
    dataset: PhotoRows,
    encoded: EncodedPhotos | None,
    vae: AutoencoderKL | None,
    steps: range,
    *,
    slots: int,
    batch_size: int,
    rank: int,
    world: int,
    workers: int = 0,
) -> Iterator[MicroBatch]:
    """This process's micro-batches of all `steps`, in order: of photos that are `encoded`, else loaded by `workers` and encoded by `vae`."""
    mine = sampling_order.my_slots(slots, rank=rank, world=world)
    order = [
        (step, slot, sampling_order.rows_of_slot(step, slot, slots=slots, batch_size=batch_size))
        for step in steps
        for slot in mine
    ]
    if encoded is not None:
        posteriors = _looked_up(dataset, encoded, [rows for _, _, rows in order])
    else:
        posteriors = _encoded(dataset, vae, [rows for _, _, rows in order], workers)
    for (step, slot, rows), posterior in zip(order, posteriors, strict=True):
        visits = [(source, row) for source in dataset.sources for row in rows]
        prompts = [dataset.prompt(source, row) for source, row in visits]
        yield MicroBatch(
            step, slot, rows, posterior, prompts, [dataset.frame(source, row) for source, row in visits]
        )


def _looked_up(
    dataset: PhotoRows, encoded: EncodedPhotos, order: list[range]
) -> Iterator[autoencoder.Posterior]:
    """Each visit's crop of what was encoded once."""
    for rows in order:
        found = [
            encoded.posterior(
                source.photos[dataset.photo(source, row)],
                dataset.corner(source, row),
                is_mirrored=dataset.is_mirrored(source, row),
            )
            for source in dataset.sources
            for row in rows
        ]
        yield autoencoder.Posterior(torch.cat([f.mean for f in found]), torch.cat([f.std for f in found]))


def _encoded(
    dataset: PhotoRows, vae: AutoencoderKL | None, order: list[range], workers: int
) -> Iterator[autoencoder.Posterior]:
    """Each visit in its own crop, encoded as it comes."""
    loader = torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[list(rows) for rows in order],  # type: ignore[arg-type]
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    for pixels in loader:
        by_source = pixels.transpose(0, 1).flatten(
            0, 1
        )  # [rows, sources, ...] -> [sources * rows, 3, resolution, resolution]
        posterior = autoencoder.encode(vae, by_source)
        yield autoencoder.Posterior(posterior.mean.cpu(), posterior.std.cpu())
