"""The reader as a judge gives the scores of picturebook/metrics.py."""

import random

import pytest
from PIL import Image

from dreambooth.evaluation import reader_judge
from dreambooth.io.errors import UserError
from picturebook import metrics, subjects
from picturebook.draw import draw
from picturebook.read import read
from picturebook.world import random_scene

SUBJECT = subjects.FOLDER / "cat"
PROMPTS = ["a photo of sks cat in the snow", "a photo of sks cat"]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.open(path) for path in sorted(SUBJECT.glob("*.png"))]


@pytest.fixture(scope="module")
def judge(photos) -> reader_judge.Reader:
    return reader_judge.Reader(reader_judge.find(str(SUBJECT)), photos[:3])


@pytest.fixture(scope="module")
def renders() -> list[Image.Image]:
    rng = random.Random(0)
    return [draw(random_scene(rng)) for _ in range(3)]


def test_photos_of_the_subject_show_it_and_are_copies(judge, photos):
    scores = judge.of_subject(photos[:4], [PROMPTS[1]] * 4)
    assert (scores["ID"], scores["ID_all"], scores["PA"], scores["JOINT"]) == (1, 1, 1, 1)
    assert scores["COPY"] == 0.75
    assert scores["DIV"] == pytest.approx(metrics.diversity(photos[:4], [PROMPTS[1]] * 4))


def test_pictures_of_different_prompts_have_no_diversity(judge, photos):
    assert "DIV" not in judge.of_subject(photos[:2], PROMPTS)


def test_scores_of_class_and_other_kinds_are_those_of_the_metrics(judge, renders):
    kind, _, identity = subjects.load_subject(SUBJECT)
    readings = list(map(read, renders))
    preserved, identities = judge.of_class(renders)
    shares = [metrics.identity_share(reading, kind, identity) for reading in readings]
    assert preserved == pytest.approx(sum(shares) / 3)
    assert judge.of_others(renders) == metrics.leak(readings, identity)
    # what is recorded of the base's pictures is enough for PRIOR_TV
    blank = [*identities[1:], None]
    unread = read(Image.effect_noise((64, 64), 90).convert("RGB"))
    assert not unread.valid
    assert reader_judge.prior_tv(blank, identities) == metrics.prior_tv([*readings[1:], unread], readings)
    assert reader_judge.prior_tv(identities, identities) == 0


def test_other_kinds_take_the_place_of_the_subjects():
    prompts = reader_judge.prompts_of_other_kinds("a photo of a cat", "cat")
    assert (len(prompts), prompts[0]) == (7, "a photo of a dog")
    with pytest.raises(UserError, match="must name the kind of the subject"):
        reader_judge.prompts_of_other_kinds("a photo of a catfish", "cat")
