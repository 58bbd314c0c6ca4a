"""The rule that names a checkpoint, on made records."""

import itertools
import math
import random
from typing import Any

import pytest

from dreambooth.evaluation import choice

START = 0.5  # the loss at step 0, in every band


def record(step: int, harm: float = 0.0, **more: Any) -> dict[str, Any]:
    """A record of a step whose loss on held-out photos rose by `harm`, as a logarithm, at low noise. Other
    bands say the opposite."""
    held_out = [START * math.exp(harm if band < 3 else -harm) for band in range(10)]
    meter = {"loss_trained": {"bands": [START] * 10}, "loss_held_out": {"bands": held_out}}
    return {"step": step, "meter": {**meter, "seconds": 1.0}, **more}


def run(*harms: float) -> list[dict[str, Any]]:
    """The records of step 0 and of steps 50, 100, ... with these harms."""
    return [record(0), *(record(50 * number, harm) for number, harm in enumerate(harms, 1))]


def test_the_last_step_within_the_limit_is_named():
    records = run(0.3, 0.9, 1.2)
    assert choice.choose(records).step == 100
    assert choice.choose(run(1.2, 0.9, 0.3)).step == 150
    assert choice.harms(records) == pytest.approx({50: 0.3, 100: 0.9, 150: 1.2})


@pytest.mark.parametrize(
    ("harms", "why"),
    [
        ([0.3], "up to the last measurement pictures are not damaged: {loss} is 1.3 times the base's"),
        ([0.0, -0.1], "up to the last measurement pictures are not damaged: {loss} is 0.9 times the base's"),
        ([0.3, 1.2], "later steps damage pictures: {loss} is over 2.7 times the base's"),
    ],
)
def test_the_sentence_says_why_the_step_is_named(harms, why):
    assert choice.choose(run(*harms)).why == why.format(loss="at low noise the loss on held-out photos")


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([], "nothing was measured"),
        ([{"step": 50, "loss": 0.1}, {"step": 50, "judge": {"ID": 1.0}}], "nothing was measured"),
        (run(0.3, 0.4)[1:], "the adapter was not measured at step 0"),
        (run(), "nothing was measured after step 0"),
        (
            run(1.2, 1.3, 1.4, 1.5),
            "at low noise the loss on held-out photos is always over 2.7 times the base's",
        ),
    ],
)
def test_without_a_step_within_the_limit_none_is_named_and_the_reason_is(records, why):
    assert choice.choose(records) == choice.Choice(None, why)


def test_without_a_held_out_photo_no_step_is_named():
    records = run(0.0, 0.0)
    for made in records:
        del made["meter"]["loss_held_out"]
    assert choice.choose(records).why == "no photo is held out (--holdout or --holdout_data_dir)"


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0])
def test_a_measurement_that_is_not_finite_is_passed_over(loss):
    records = run(0.3, 0.2)
    records[2]["meter"]["loss_held_out"]["bands"][1] = loss
    assert choice.choose(records).step == 50


def test_a_run_is_worse_after_three_measurements_in_a_row_over_the_limit():
    harms = [0.3, 1.1, 1.2, 1.3]
    assert choice.choose(run(*harms[:3])).worse is None
    worse = "at low noise the loss on held-out photos is 3.7 times the base's"
    assert choice.choose(run(*harms)).worse == worse
    assert choice.choose(run(*harms, 0.9)).worse is None


def test_only_the_step_named_now_and_later_ones_can_be_named_later():
    rng = random.Random(0)
    for _ in range(40):
        records = run(*(2 * rng.random() for _ in range(8)))
        for number, end in itertools.combinations(range(1, len(records) + 1), 2):
            before, after = (choice.choose(records[:count]).step for count in (number, end))
            assert after in {before, *(made["step"] for made in records[number:end])}
