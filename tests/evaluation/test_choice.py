"""The rule that names a checkpoint, on made records."""

import math
import random
from typing import Any

import pytest

from dreambooth.evaluation import choice

START = 0.5  # the loss at step 0, in every band


def record(step: int, fit: float = 0.0, harm: float = 0.0, **more: Any) -> dict[str, Any]:
    """A record of a step whose loss on trained photos fell by `fit` at middle noise, and whose loss on
    held-out photos rose by `harm` at low noise, both as logarithms. Other bands say the opposite."""
    trained = [START * math.exp(-fit if 3 <= band < 7 else fit) for band in range(10)]
    held_out = [START * math.exp(harm if band < 3 else -harm) for band in range(10)]
    meter = {"loss_trained": {"bands": trained}, "loss_held_out": {"bands": held_out}}
    return {"step": step, "meter": {**meter, "seconds": 1.0}, **more}


def run(*scores: tuple[float, float]) -> list[dict[str, Any]]:
    """The records of step 0 and of steps 50, 100, ... with these pairs of fit and harm."""
    return [record(0), *(record(50 * number, *pair) for number, pair in enumerate(scores, 1))]


def test_the_step_with_the_most_fit_less_harm_is_named():
    records = run((0.3, 0.0), (0.6, 0.1), (0.7, 0.4))
    assert choice.choose(records).step == 100
    scored = choice.score(records[2]["meter"], records[0]["meter"])
    assert (scored.fit, scored.harm) == pytest.approx((0.6, 0.1))


def test_of_steps_that_are_nearly_as_good_the_last_is_named():
    assert choice.choose(run((0.6, 0.0), (0.55, 0.0), (0.3, 0.0))).step == 100
    assert choice.choose(run((0.6, 0.0), (0.3, 0.0), (0.51, 0.0))).step == 150


def test_a_step_that_lost_more_than_it_learned_is_never_named():
    assert choice.choose(run((0.05, 0.0), (0.0, 0.01))).step == 50


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        ([(0.3, 0.0), (0.5, 0.0)], "no earlier step is clearly better"),
        ([(0.5, 0.0), (0.3, 0.0)], "likeness no longer grows"),
        ([(0.5, 0.0), (0.4, 0.2)], "likeness no longer grows, and the loss on held-out photos rises"),
        ([(0.5, 0.0), (0.6, 0.3)], "likeness still grows, but the loss on held-out photos rises more"),
    ],
)
def test_the_sentence_says_what_changed_after_the_named_step(scores, why):
    assert choice.choose(run(*scores)).why == why


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([], "nothing was measured"),
        ([{"step": 50, "loss": 0.1}, {"step": 50, "judge": {"ID": 1.0}}], "nothing was measured"),
        (run((0.3, 0.0), (0.4, 0.0))[1:], "the adapter was not measured at step 0"),
        (run((0.3, 0.0)), "a choice needs two measurements after step 0, and there are 1"),
        (
            run((0.1, 0.2), (0.2, 0.3)),
            "the loss on held-out photos rose more than the loss on trained photos fell",
        ),
    ],
)
def test_without_enough_measurements_no_step_is_named_and_the_reason_is(records, why):
    chosen = choice.choose(records)
    assert (chosen.step, chosen.worse) == (None, None)
    assert chosen.why.startswith(why)


def test_without_a_held_out_photo_no_step_is_named():
    records = run((0.3, 0.0), (0.4, 0.0))
    for made in records:
        del made["meter"]["loss_held_out"]
    assert choice.choose(records).why == "no photo is held out (--holdout or --holdout_data_dir)"
    assert choice.candidates(records) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0])
def test_a_measurement_that_is_not_finite_is_passed_over(loss):
    records = run((0.3, 0.0), (0.9, 0.0), (0.1, 0.0))
    records[2]["meter"]["loss_trained"]["bands"][5] = loss
    assert choice.choose(records).step == 50


def test_a_run_is_worse_after_three_measurements_in_a_row_far_under_the_best():
    falls = [(0.6, 0.0), (0.6, 0.2), (0.6, 0.2), (0.6, 0.3)]
    assert choice.choose(run(*falls[:3])).worse is None
    fall = "the score of the measurements fell from 0.60 to 0.30"
    assert choice.choose(run(*falls)).worse == fall
    assert choice.choose(run(*falls, (0.6, 0.05))).worse is None
    assert choice.choose(run((0.6, 0.0), (0.6, 0.05), (0.6, 0.2), (0.6, 0.2))).worse is None


def test_only_the_present_candidate_and_later_steps_can_be_named_later():
    rng = random.Random(0)
    for _ in range(40):
        records = run(*((rng.random(), rng.random() / 2) for _ in range(8)))
        for number in range(1, len(records)):
            kept = choice.candidates(records[:number])
            assert len(kept) <= 1
            for end in range(number, len(records) + 1):
                named = choice.choose(records[:end]).step
                assert named in {None, *kept, *(made["step"] for made in records[number:end])}
