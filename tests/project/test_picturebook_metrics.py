"""The scores of pictures of the drawn world, on readings and pictures whose scores are known."""

import dataclasses
import random

import numpy as np
import pytest
from PIL import Image

from picturebook import metrics
from picturebook.draw import draw
from picturebook.read import Reading
from picturebook.world import Identity, Scene, random_identity

IDENTITY = Identity(1, 2, 3, 0)
OTHER = Identity(0, 0, 0, 1)
HALF = Identity(1, 2, 0, 1)


def reading(kind: str = "dog", place: str = "snow", identity: Identity = IDENTITY, confidence: float = 0.9):
    return Reading(Scene(kind, "red", place, identity), confidence)


def scores(readings: list[Reading], prompts: list[str]) -> dict[str, float]:
    return metrics.subject_scores(readings, prompts, "dog", "red", IDENTITY)


def test_joint_asks_for_the_identity_and_the_prompt_on_the_same_picture():
    """One picture shows the subject elsewhere, another the right place with another dog, the third both."""
    readings = [reading(place="beach"), reading(identity=OTHER), reading()]
    found = scores(readings, ["a photo of a sks dog in the snow"] * 3)
    assert found["ID_all"] == pytest.approx(2 / 3)
    assert found["PA_all"] == pytest.approx(2 / 3)
    assert found["JOINT"] == pytest.approx(1 / 3)


def test_id_and_pa_are_shares_of_attributes():
    """Half of the identity, and one of the two attributes that the prompt names."""
    found = scores([reading(place="beach", identity=HALF)], ["a photo of a sks dog in the snow"])
    assert (found["ID"], found["PA"]) == (0.5, 0.5)
    assert (found["ID_all"], found["PA_all"], found["JOINT"]) == (0, 0, 0)


def test_an_accessory_that_the_prompt_does_not_name_is_no_fault():
    worn = dataclasses.replace(reading().scene, accessory="hat", accessory_colour="blue")
    pictures = [Reading(worn, 0.9)] * 2
    prompts = ["a photo of a sks dog in the snow", "a photo of a sks dog in the snow wearing a red hat"]
    assert scores(pictures, prompts)["PA_all"] == 0.5


def test_an_unreadable_picture_counts_as_wrong_everywhere():
    unreadable = reading(confidence=0.1)
    found = scores([reading(), unreadable], ["a photo of a sks dog in the snow"] * 2)
    assert {found[name] for name in ("ID", "ID_all", "PA", "PA_all", "JOINT", "valid")} == {0.5}
    assert metrics.leak([reading(kind="car"), unreadable], IDENTITY) == 0.5


def test_leak_counts_the_identity_on_other_kinds_where_id_does_not():
    other_kind = reading(kind="cat")
    assert metrics.leak([other_kind], IDENTITY) == 1
    assert metrics.identity_share(other_kind, "dog", IDENTITY) == 0


def test_leak_of_random_identities_is_the_mean_chance():
    rng = random.Random(0)
    readings = [reading(kind="cat", identity=random_identity(rng)) for _ in range(4000)]
    assert metrics.leak(readings, IDENTITY) == pytest.approx((1 / 6 + 1 / 8 + 1 / 6 + 1 / 4) / 4, abs=0.01)


def test_prior_tv_is_zero_for_the_same_identities_and_one_for_disjoint_ones():
    some = [reading(), reading(identity=OTHER)]
    assert metrics.prior_tv(some, some[::-1]) == 0
    assert metrics.prior_tv([reading()], [reading(identity=OTHER)]) == 1
    assert metrics.prior_tv(some, [reading()] * 2) == 0.5


def test_prior_tv_sees_that_pictures_became_unreadable():
    assert metrics.prior_tv([reading(), reading(confidence=0.1)], [reading()] * 2) == 0.5


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (value,) * 3)


def test_diversity_is_the_mean_distance_within_prompts():
    """Black and white are 1 apart, equal pictures 0; pictures of different prompts are not compared."""
    images = [flat(0), flat(255), flat(0), flat(0)]
    assert metrics.diversity(images, ["a", "a", "b", "b"]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two pictures of 'a'"):
        metrics.diversity(images[:1], ["a"])


def test_distances_are_of_low_passed_pictures():
    """A checkerboard of single pixels is grey after the low pass."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    grey = metrics.low_passed([flat(127)])
    assert metrics.distances(metrics.low_passed([board]), grey)[0, 0] < 0.01
    assert metrics.distances(metrics.low_passed([flat(255)]), grey)[0, 0] == pytest.approx(0.5, abs=0.01)


def test_copies_are_counted_and_fresh_renders_are_not():
    training = [draw(Scene("dog", "red", place, IDENTITY)) for place in ("snow", "beach", "city", "room")]
    limit = metrics.copy_limit("dog", "red", IDENTITY)
    noise = np.random.default_rng(0).normal(0, 8, (64, 64, 3))
    noisy = [
        Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)) for image in training
    ]
    assert metrics.copied(noisy, training, limit) == 1
    elsewhere = [draw(Scene("dog", "red", place, IDENTITY)) for place in ("forest", "desert", "night", "sea")]
    assert metrics.copied(elsewhere, training, limit) == 0
    assert metrics.copied([noisy[0], elsewhere[0]], training, limit) == 0.5


def test_interval_is_over_subjects_not_over_pictures():
    """More values of the same two subjects do not make it narrower."""
    few = metrics.bootstrap_interval({"dog": [0.0], "cat": [1.0]})
    many = metrics.bootstrap_interval({"dog": [0.0] * 50, "cat": [1.0] * 50})
    assert few == many == (0, 1)
    assert metrics.bootstrap_interval({"dog": [0.25], "cat": [0.25]}) == (0.25, 0.25)
    with pytest.raises(ValueError, match="needs values"):
        metrics.bootstrap_interval({"dog": []})


def test_interval_of_many_subjects_covers_the_mean_as_the_standard_error_does():
    values = {str(n): [float(v)] for n, v in enumerate(np.random.default_rng(1).normal(0, 1, 100))}
    low, high = metrics.bootstrap_interval(values)
    mean = float(np.mean(list(values.values())))
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1, rel=0.25)
