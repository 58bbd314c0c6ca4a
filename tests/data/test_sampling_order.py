"""Which sample, noise, timestep and crop at which step: functions of seed, purpose and row, and of nothing
else."""

import itertools
from typing import Any

import pytest
import torch

from dreambooth.data import sampling_order as order


def drawn(seed: int, *what: str | int) -> torch.Tensor:
    return torch.randn(16, generator=order.generator(seed, *what))


# --- keys


def test_a_key_is_a_pure_function_of_its_words():
    first = order.key(5, "noise", 3)
    order.key(6, "noise", 3)
    torch.manual_seed(1)
    assert order.key(5, "noise", 3) == first
    assert 0 <= first < 2**63


def test_every_word_of_a_key_counts():
    """Words are kept apart: seed 1 at row 23 is not seed 12 at row 3, and a number is not its spelling."""
    words: list[Any] = [
        (5,),
        (6,),
        (-5,),
        (5, "a"),
        (5, "b"),
        (5, "a", 0),
        (5, "a", 1),
        (5, "a", "1"),
        (5, "a1"),
        (5, 1, "a"),
        (5, 5),
        (1, 23),
        (12, 3),
        (123,),
    ]
    assert len({order.key(*what) for what in words}) == len(words)


def test_a_generator_draws_the_same_however_much_was_drawn_before():
    first = drawn(5, "noise", 3)
    torch.manual_seed(99)
    torch.randn(1000)
    drawn(5, "noise", 4)
    assert torch.equal(drawn(5, "noise", 3), first)
    assert not torch.equal(drawn(5, "noise", 4), first)


def test_drawing_leaves_torch_s_own_generator_alone():
    """Else a validation or a crop would change the dropout after it."""
    torch.manual_seed(1)
    undisturbed = torch.randn(4)
    torch.manual_seed(1)
    order.noise_of_rows(5, "noise", range(3), (2,))
    order.timesteps_of_rows(5, "timestep", range(3), 1000)
    order.image_of_row(5, "order", 3, 7)
    order.crop_of_row(5, "instance", 3, (4, 4))
    assert torch.equal(torch.randn(4), undisturbed)


def test_seeds_that_share_their_low_32_bits_differ():
    """torch's CPU generator reads no more of a seed than those."""
    assert not torch.equal(drawn(5), drawn(5 + 2**32))
    rows, shape = range(4), (2, 3)
    assert not torch.equal(
        order.noise_of_rows(5, "noise", rows, shape), order.noise_of_rows(5 + 2**32, "noise", rows, shape)
    )


def test_no_two_rows_of_a_long_run_share_a_generator():
    """Seed + row would give row 1 of seed 0 what row 0 of seed 1 gets; torch reads the low 32 bits of a
    key."""
    keys = [order.key(seed, "noise", row) for seed in range(10) for row in range(1000)]
    assert len({key % 2**32 for key in keys}) == len(keys)
    assert max(keys) > 2**62


# --- rows


@pytest.mark.parametrize("batch_size", [1, 3])
def test_steps_and_slots_number_the_rows_without_gap_or_overlap(batch_size):
    found = [
        row
        for step in range(5)
        for slot in range(4)
        for row in order.rows_of_slot(step, slot, slots=4, batch_size=batch_size)
    ]
    assert found == list(range(5 * 4 * batch_size))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_see_the_same_rows_however_many_they_are(world):
    """Four slots a step: one process accumulates four, two accumulate two each, four take one each."""
    for step in range(3):
        seen = []
        for rank in range(world):
            mine = order.my_slots(4, rank=rank, world=world)
            assert len(mine) == 4 // world
            seen += [row for slot in mine for row in order.rows_of_slot(step, slot, slots=4, batch_size=3)]
        assert len(seen) == len(set(seen)) == 12
        assert set(seen) == set(range(step * 12, step * 12 + 12))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_slots_taken_in_turn_are_in_order(world):
    """The n-th micro-batches of all processes, rank by rank, are the next slots: gradients gathered so are
    added in one order always."""
    turns = zip(*(order.my_slots(4, rank=rank, world=world) for rank in range(world)), strict=True)
    assert list(itertools.chain.from_iterable(turns)) == [0, 1, 2, 3]


# --- images


@pytest.mark.parametrize("count", [1, 3, 5, 30])
def test_every_image_is_visited_once_a_turn(count):
    for turn in range(6):
        visited = [
            order.image_of_row(5, "order", row, count) for row in range(turn * count, (turn + 1) * count)
        ]
        assert sorted(visited) == list(range(count))


def test_turns_seeds_and_purposes_have_orders_of_their_own():
    def turn(number: int, seed: int = 5, purpose: str = "instance-order") -> tuple[int, ...]:
        return tuple(
            order.image_of_row(seed, purpose, row, 20) for row in range(number * 20, number * 20 + 20)
        )

    orders = [turn(0), turn(1), turn(2), turn(0, seed=6), turn(0, purpose="class-order")]
    assert len(set(orders)) == len(orders)


def test_the_image_of_a_row_does_not_depend_on_what_was_asked_before():
    """A resumed run starts in the middle of a turn, and loader workers ask in any order."""
    rows = list(range(40))
    forward = {row: order.image_of_row(5, "order", row, 7) for row in rows}
    order._order.cache_clear()
    assert {row: order.image_of_row(5, "order", row, 7) for row in reversed(rows)} == forward


# --- noise, timesteps, crops


def test_the_noise_of_a_row_does_not_depend_on_the_rows_beside_it():
    together = order.noise_of_rows(5, "noise", range(3, 9), (4, 2, 2))
    apart = [order.noise_of_rows(5, "noise", range(row, row + 1), (4, 2, 2)) for row in range(3, 9)]
    assert torch.equal(together, torch.cat(apart))
    assert torch.equal(together[2:4], order.noise_of_rows(5, "noise", range(5, 7), (4, 2, 2)))


def test_noise_is_standard_normal_and_differs_by_row_seed_and_purpose():
    noise = order.noise_of_rows(5, "noise", range(64), (4, 8, 8))
    assert (noise.shape, noise.dtype, noise.device.type) == ((64, 4, 8, 8), torch.float32, "cpu")
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    others = [
        order.noise_of_rows(6, "noise", range(64), (4, 8, 8)),
        order.noise_of_rows(5, "posterior", range(64), (4, 8, 8)),
    ]
    rows = torch.cat([noise, *others]).flatten(1)
    closeness = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
    assert closeness.abs().max() < 0.4  # 192 rows of 256 independent numbers


def test_the_timestep_of_a_row_does_not_depend_on_the_rows_beside_it():
    together = order.timesteps_of_rows(5, "timestep", range(3, 9), 1000)
    apart = [order.timesteps_of_rows(5, "timestep", range(row, row + 1), 1000) for row in range(3, 9)]
    assert torch.equal(together, torch.cat(apart))


def test_timesteps_are_uniform_over_the_whole_range():
    found = order.timesteps_of_rows(5, "timestep", range(4000), 1000)
    assert (found.shape, found.dtype) == ((4000,), torch.int64)
    assert found.min() >= 0
    assert found.max() <= 999
    per_tenth = torch.bincount(found // 100, minlength=10)
    assert per_tenth.min() > 320  # 400 expected, standard deviation 19
    assert per_tenth.max() < 480
    assert len(found.unique()) > 900


def test_timesteps_reach_both_ends():
    assert order.timesteps_of_rows(5, "timestep", range(50), 2).unique().tolist() == [0, 1]
    assert order.timesteps_of_rows(5, "timestep", range(5), 1).unique().tolist() == [0]


def test_seeds_and_purposes_have_timesteps_of_their_own():
    found = [
        order.timesteps_of_rows(seed, purpose, range(50), 1000)
        for seed in (5, 6)
        for purpose in ("instance-timestep", "class-timestep")
    ]
    assert all((a == b).sum() < 10 for a, b in itertools.combinations(found, 2))


def test_crops_use_all_of_their_room_and_no_more():
    crops = [order.crop_of_row(5, "instance", row, (3, 0)) for row in range(100)]
    assert {left for left, _ in crops} == {0, 1, 2, 3}
    assert {top for _, top in crops} == {0}
    assert {top for _, top in (order.crop_of_row(5, "instance", row, (0, 2)) for row in range(100))} == {
        0,
        1,
        2,
    }


def test_crops_on_a_grid_use_all_of_their_room_in_steps_of_it():
    crops = [order.crop_of_row(5, "instance", row, (27, 7), 8) for row in range(100)]
    assert {left for left, _ in crops} == {0, 8, 16, 24}
    assert {top for _, top in crops} == {0}
    assert order.crop_of_row(5, "instance", 3, (27, 7), 1) == order.crop_of_row(5, "instance", 3, (27, 7))


def test_the_crop_of_a_row_is_its_own():
    room = (1000, 1000)
    crops = [order.crop_of_row(5, "instance", row, room) for row in range(50)]
    assert crops == [order.crop_of_row(5, "instance", row, room) for row in range(50)]
    assert len(set(crops)) == 50
    assert sum(left == top for left, top in crops) < 5
    for others in (
        [order.crop_of_row(6, "instance", row, room) for row in range(50)],
        [order.crop_of_row(5, "class", row, room) for row in range(50)],
    ):
        assert not set(crops) & set(others)
