"""Scores agree with what loops over pairs give, and failed pictures count."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from dreambooth.evaluation import scores


def rows(count: int, seed: int, width: int = 7) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """By hand, number by number."""
    dot = sum(float(a) * float(b) for a, b in zip(one, other, strict=True))
    lengths = math.sqrt(sum(float(a) ** 2 for a in one)) * math.sqrt(sum(float(b) ** 2 for b in other))
    return dot / lengths


PICTURES, PHOTOS, TEXTS = rows(6, 1), rows(4, 5), rows(6, 3)
PROMPTS = ["snow", "snow", "snow", "sea", "sea", "room"]


def mean(values) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def test_mean_cosines_are_those_of_a_loop_over_pairs():
    by_hand = [mean(cosine(picture, photo) for photo in PHOTOS) for picture in PICTURES]
    assert scores.picture_cosines(PICTURES, PHOTOS) == pytest.approx(by_hand, abs=1e-6)
    assert scores.mean_cosine(PICTURES, PHOTOS) == pytest.approx(mean(by_hand), abs=1e-6)


def test_the_real_row_is_given_with_and_without_self_pairs():
    pairs = {(a, b): cosine(PHOTOS[a], PHOTOS[b]) for a in range(4) for b in range(4)}
    real = scores.real_row(PHOTOS)
    assert real["including_self"] == pytest.approx(mean(pairs.values()), abs=1e-6)
    others = mean(value for (a, b), value in pairs.items() if a != b)
    assert real["excluding_self"] == pytest.approx(others, abs=1e-6)


def test_one_photo_has_no_row_without_self_pairs():
    assert scores.real_row(PHOTOS[:1]) == {"excluding_self": None, "including_self": pytest.approx(1)}
    assert scores.copying(PICTURES, PHOTOS[:1])["copies"] is None


def test_clip_t_is_the_raw_cosine_of_each_picture_with_its_text():
    by_hand = [cosine(picture, text) for picture, text in zip(PICTURES, TEXTS, strict=True)]
    assert min(by_hand) < 0  # neither scaled nor cut
    assert scores.text_cosines(PICTURES, TEXTS) == pytest.approx(by_hand, abs=1e-6)


def test_copying_is_judged_against_held_out_photos_and_the_photos_themselves():
    trained, held_out = PHOTOS[:3], PHOTOS[3:]
    nearest = [max(cosine(picture, photo) for photo in trained) for picture in PICTURES]
    real = mean(max(cosine(trained[a], trained[b]) for b in range(3) if b != a) for a in range(3))
    copying = scores.copying(PICTURES, trained, held_out)
    assert copying["nearest_trained"] == pytest.approx(mean(nearest), abs=1e-6)
    assert copying["nearest_held_out"] == pytest.approx(
        mean(cosine(p, held_out[0]) for p in PICTURES), abs=1e-6
    )
    share = mean(value > real for value in nearest)
    assert 0 < share < 1
    assert copying["copies"] == pytest.approx(share)
    assert scores.copying(trained, trained)["copies"] == 1
    assert scores.copying(PICTURES, trained)["nearest_held_out"] is None


def test_diversity_is_over_pairs_of_one_prompt_then_over_prompts():
    snow = mean(1 - cosine(PICTURES[a], PICTURES[b]) for a, b in itertools.combinations(range(3), 2))
    sea = 1 - cosine(PICTURES[3], PICTURES[4])
    assert scores.diversity(PICTURES, PROMPTS) == pytest.approx((snow + sea) / 2, abs=1e-6)
    assert scores.diversity(PICTURES, range(6)) is None


def test_failed_pictures_count_and_raise_no_score():
    failed = PICTURES.copy()
    failed[3] = 0
    expected = mean(0 if n == 3 else mean(cosine(PICTURES[n], p) for p in PHOTOS) for n in range(6))
    assert scores.mean_cosine(failed, PHOTOS) == pytest.approx(expected, abs=1e-6)
    assert scores.text_cosines(failed, TEXTS)[3] == 0
    snow = scores.diversity(PICTURES[:3], PROMPTS[:3])
    assert snow is not None
    assert scores.diversity(failed, PROMPTS) == pytest.approx(snow / 2)  # of the sea's only pair nothing
    assert scores.has_failed(failed).tolist() == [False, False, False, True, False, False]


def test_black_and_unreadable_pictures_have_failed():
    black, dark = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    dark.putpixel((3, 5), (0, 0, 1))
    assert [scores.failure(image) for image in (black, None, dark)] == ["all black", "unreadable", None]
    assert scores.failure(Image.new("L", (8, 8))) == "all black"


def test_macro_weighs_subjects_and_micro_their_terms():
    values, counts = {"dog": 0.5, "cat": 0.8}, {"dog": 100 * 6, "cat": 100 * 4}
    assert scores.macro(values) == pytest.approx(0.65)
    assert scores.micro(values, counts) == pytest.approx((0.5 * 600 + 0.8 * 400) / 1000)


def test_the_interval_is_over_subjects_and_the_same_for_the_same_seed():
    values = list(np.random.default_rng(0).normal(0.7, 0.1, 30))
    low, high = scores.interval(values) or (0, 0)
    assert (low, high) == scores.interval(values) != scores.interval(values, seed=1)
    # close to the mean plus and minus 1.96 standard errors
    half = 1.96 * np.std(values) / math.sqrt(30)
    expected = np.mean(values) - half, np.mean(values) + half
    assert (low, high) == pytest.approx(expected, abs=0.005)
    assert scores.interval([0.5]) is None


@pytest.mark.parametrize(
    ("instance", "of_class", "words"),
    [
        ("a photo of sks dog", "a photo of dog", ("sks",)),
        ("a photo of SKS dog", "A photo of a dog.", ("sks",)),
        ("sks dog", "a dog", ("sks",)),
        ("a zwx qwe toy, sks", "a toy", ("zwx", "qwe", "sks")),
        ("a dog", "a photo of a dog", ()),
    ],
)
def test_the_words_of_a_subject_are_those_that_the_class_lacks(instance, of_class, words):
    assert scores.subject_words(instance, of_class) == words


def test_words_are_removed_as_whole_words():
    assert scores.without_words("a photo of sks dog, sksy", ("sks",)) == "a photo of dog, sksy"
    assert scores.without_words('"Sks" at night', ("sks",)) == "at night"
    assert scores.names_subject("a (sks) dog", ("sks",))
    assert not scores.names_subject("a sksy dog", ("sks",))
