"""Row numbers -> latents: from a cache where no crop varies, else from photos loaded ahead by worker processes."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL

from dreambooth import caches, photos, sampling_order


@dataclasses.dataclass(frozen=True)
class Source:
    """The photos of one half of a batch. `purpose` ("instance" or "class") separates its random draws from the other half's."""

    purpose: str
    photos: list[photos.Photo]


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One forward pass: its step, its slot within the step, its rows, and the posterior of [sources * rows] latents, source by source."""

    step: int
    slot: int
    rows: range
    posterior: caches.Posterior


class PhotoRows(torch.utils.data.Dataset):
    """Row -> [sources, 3, resolution, resolution]: the picture of each source at that row, in its own crop."""

    def __init__(self, sources: list[Source], seed: int, resolution: int, interpolation: str, center_crop: bool):
        self.sources, self.seed = sources, seed
        self.resolution, self.interpolation, self.center_crop = resolution, interpolation, center_crop

    @property
    def crops_are_fixed(self) -> bool:
        rooms = (photos.crop_room(photo.size, self.resolution) for source in self.sources for photo in source.photos)
        return self.center_crop or all(room == (0, 0) for room in rooms)

    def photo(self, source: Source, row: int) -> int:
        return sampling_order.image_of_row(self.seed, f"{source.purpose}-order", row, len(source.photos))

    def __getitem__(self, row: int) -> torch.Tensor:
        pictures = []
        for source in self.sources:
            photo = source.photos[self.photo(source, row)]
            room = photos.crop_room(photo.size, self.resolution)
            corner = None if self.center_crop else sampling_order.crop_of_row(self.seed, source.purpose, row, room)
            pictures.append(photos.pixel_values(photo.path, self.resolution, self.interpolation, corner))
        return torch.stack(pictures)


def micro_batches(
    dataset: PhotoRows,
    vae: AutoencoderKL,
    steps: range,
    *,
    slots: int,
    batch_size: int,
    rank: int,
    world: int,
    workers: int,
    show_progress: bool,
    check: Callable[[], None] = lambda: None,
) -> Iterator[MicroBatch]:
    """This process's micro-batches of all `steps`, in order. `check` is called between photos that are encoded ahead."""
    mine = sampling_order.my_slots(slots, rank=rank, world=world)
    order = [(step, slot, sampling_order.rows_of_slot(step, slot, slots=slots, batch_size=batch_size)) for step in steps for slot in mine]
    if dataset.crops_are_fixed:
        cached = [
            caches.encode_photos(
                vae, [p.path for p in source.photos], dataset.resolution, dataset.interpolation, show_progress=show_progress, check=check
            )
            for source in dataset.sources
        ]
        for step, slot, rows in order:
            found = [cache[dataset.photo(source, row)] for source, cache in zip(dataset.sources, cached, strict=True) for row in rows]
            posterior = caches.Posterior(torch.cat([f.mean for f in found]), torch.cat([f.std for f in found]))
            yield MicroBatch(step, slot, rows, posterior)
        return
    loader = torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=[list(rows) for _, _, rows in order],  # type: ignore[arg-type]
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    for (step, slot, rows), pixels in zip(order, loader, strict=True):
        by_source = pixels.transpose(0, 1).flatten(0, 1)  # [rows, sources, ...] -> [sources * rows, 3, resolution, resolution]
        posterior = caches.encode(vae, by_source)
        yield MicroBatch(step, slot, rows, caches.Posterior(posterior.mean.cpu(), posterior.std.cpu()))
