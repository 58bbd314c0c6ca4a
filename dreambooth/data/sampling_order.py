"""The order of samples: which photo, crop, noise and timestep at which step, as pure functions of the seed.

A *row* numbers the instance samples of a run: 0, 1, 2, ... without end. Step s has `slots` micro-batches of
`batch_size` rows each. Slot j runs on process j % world, so that the rows of a step are the same for any
number of processes. A resumed run continues with the rows that an uninterrupted one would use. Every draw has
its own CPU generator, seeded by a hash of (seed, purpose, row). Sums or shifts of seed and row would collide,
because torch's CPU generator uses only the low 32 bits of a seed.
"""

import bisect
import functools
import hashlib
import itertools

import torch


def key(seed: int, *purpose: str | int) -> int:
    """A 63-bit number that depends on the seed and on all words of `purpose`."""
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by `key`."""
    return torch.Generator("cpu").manual_seed(key(seed, *purpose))


def rows_of_slot(step: int, slot: int, *, slots: int, batch_size: int) -> range:
    """The rows of one micro-batch. `slots` is gradient accumulation steps x processes, `batch_size` per
    process."""
    start = (step * slots + slot) * batch_size
    return range(start, start + batch_size)


def my_slots(slots: int, *, rank: int, world: int) -> range:
    """The slots of a step that this process runs, in order."""
    return range(rank, slots, world)


@functools.lru_cache(maxsize=64)
def _order(seed: int, purpose: str, turn: int, count: int) -> list[int]:
    """A random order of `count` photos for the rows turn * count and following."""
    return torch.randperm(count, generator=generator(seed, purpose, turn)).tolist()


def image_of_row(seed: int, purpose: str, row: int, count: int) -> int:
    """Index of the photo of this row, in 0..count-1.

    Every `count` rows are a random order of all photos: there is no short last batch.
    """
    return _order(seed, purpose, row // count, count)[row % count]


@functools.lru_cache(maxsize=8)
def _turns_of_buckets(seed: int, purpose: str, turn: int, counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """(bucket, number of earlier batches of that bucket in this turn) of the batches of one turn."""
    bucket_of = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    taken = [0] * len(counts)
    places = []
    for index in _order(seed, purpose, turn, len(bucket_of)):
        bucket = bucket_of[index]
        places.append((bucket, taken[bucket]))
        taken[bucket] += 1
    return places


def bucket_of_row(
    seed: int, purpose: str, row: int, counts: tuple[int, ...], batch_size: int
) -> tuple[int, int]:
    """(bucket of this row, number of earlier rows of that bucket), where bucket b has counts[b] photos.

    The `batch_size` rows of a micro-batch have one bucket. In as many micro-batches as there are photos in
    all buckets, a bucket has one for each of its photos: so every photo can come up equally often.
    """
    batch, number = divmod(row, batch_size)
    turn, at = divmod(batch, sum(counts))
    bucket, earlier = _turns_of_buckets(seed, purpose, turn, counts)[at]
    return bucket, (turn * counts[bucket] + earlier) * batch_size + number


def subject_of_row(seed: int, row: int, repeats: tuple[int, ...]) -> tuple[int, int]:
    """(index of the subject of this row, number of the visit of that subject, counted from 0).

    Every `sum(repeats)` rows are a turn: in a random order, each subject has as many rows as its repeats.
    """
    turn = sum(repeats)
    place = image_of_row(seed, "subjects", row, turn)
    ends = list(itertools.accumulate(repeats))
    subject = bisect.bisect_right(ends, place)
    return subject, row // turn * repeats[subject] + place - (ends[subject] - repeats[subject])


def crop_of_row(seed: int, purpose: str, row: int, room: tuple[int, int], stride: int = 1) -> tuple[int, int]:
    """(left, top) of a random crop, multiples of `stride`. `room` is how many pixels it can move right and
    down."""
    draw = generator(seed, "crop", purpose, row)
    return tuple(stride * int(torch.randint(limit // stride + 1, (), generator=draw)) for limit in room)  # type: ignore[return-value]


def chance(seed: int, purpose: str, row: int) -> float:
    """A random number of this row, uniform in [0, 1)."""
    return float(torch.rand((), generator=generator(seed, purpose, row)))


def noise_of_rows(seed: int, purpose: str, rows: range, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, float32 [rows, *shape].

    Each row has its own generator, so that any number of processes can share a batch.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, purpose, row)) for row in rows])


def timesteps_of_rows(seed: int, purpose: str, rows: range, num_train_timesteps: int) -> torch.Tensor:
    """Timesteps, uniform in 0..num_train_timesteps-1, int64 [rows]."""
    return torch.stack(
        [torch.randint(num_train_timesteps, (), generator=generator(seed, purpose, row)) for row in rows]
    )


def biased_timestep(seed: int, purpose: str, row: int, low: int, high: int, bias: float) -> int:
    """A timestep of low..high-1, or `low`. With a `bias` b over 0 the density grows as the b-th power of the
    distance from `low`; with one under 0 it falls as the same power of the distance from `high`."""
    uniform = chance(seed, purpose, row)
    root = 1 / (1 + abs(bias))
    place = uniform**root if bias >= 0 else 1 - (1 - uniform) ** root
    return low + min(int(place * (high - low)), max(high - low - 1, 0))
