"""Captions of tags: shuffled, kept and dropped as a function of seed, prompt and row."""

import collections
from pathlib import Path
from typing import Any

from dreambooth.data import tags
from dreambooth.data.batches import PhotoRows, Source
from dreambooth.data.crops import Crops
from dreambooth.data.photos import Photo
from dreambooth.options.captions import CaptionOptions

PROMPT = "sks dog, on grass,  sunny , close-up, red ball"
TAGS = ["sks dog", "on grass", "sunny", "close-up", "red ball"]


def variants(seed: int = 3, **flags: Any) -> list[list[str]]:
    drawn = tags.variants(PROMPT, seed, CaptionOptions(**flags))
    return [tags.tags_of(prompt) for prompt in drawn]


def test_shuffled_prompts_have_the_same_tags_in_different_orders():
    drawn = variants(shuffle_caption=True)
    assert len(drawn) == 16
    assert all(sorted(each) == sorted(TAGS) for each in drawn)
    assert len({tuple(each) for each in drawn}) > 10
    assert drawn == variants(shuffle_caption=True)
    assert drawn != variants(seed=4, shuffle_caption=True)


def test_the_first_tags_and_that_of_the_trigger_word_stay_in_front():
    drawn = variants(shuffle_caption=True, caption_tag_dropout_rate=0.7, keep_tokens=2, trigger_word="SKS")
    assert all(each[:2] == ["sks dog", "on grass"] for each in drawn)
    drawn = variants(shuffle_caption=True, caption_tag_dropout_rate=0.7, keep_tokens=1, trigger_word="ball")
    assert all(each[:2] == ["sks dog", "red ball"] for each in drawn)


def test_each_tag_is_dropped_as_often_as_asked_and_the_others_keep_their_order():
    drawn = variants(caption_tag_dropout_rate=0.25, caption_variants=2000)
    counts = collections.Counter(tag for each in drawn for tag in each)
    assert all(0.7 < counts[tag] / 2000 < 0.8 for tag in TAGS)
    assert all(each == [tag for tag in TAGS if tag in each] for each in drawn)


def test_a_prompt_without_free_tags_does_not_vary():
    shuffled = CaptionOptions(shuffle_caption=True, keep_tokens=1)
    assert tags.variants("a photo of sks dog", 0, shuffled) == ()
    assert tags.variants("sks dog, on grass", 0, shuffled) == ()
    assert tags.variants(PROMPT, 0, CaptionOptions()) == ()


def test_a_trigger_word_is_put_before_captions_that_lack_it():
    assert tags.with_trigger("on grass", "sks") == "sks, on grass"
    assert tags.with_trigger("asks a dog", "sks") == "sks, asks a dog"
    assert tags.with_trigger("a Sks dog", "sks") == "a Sks dog"
    assert tags.with_trigger("", "sks") == ""
    assert tags.with_trigger("on grass", None) == "on grass"


def test_every_prompt_that_a_row_draws_is_known_before_the_first_step():
    prompts = [PROMPT, "sks dog"]
    drawn = {PROMPT: tags.variants(PROMPT, 1, CaptionOptions(shuffle_caption=True))}
    pictures = [Photo(Path(f"{n}.png"), (64, 64), "", str(n)) for n in range(2)]
    source = Source("instance", pictures, prompts, caption_dropout=0.2, variants=drawn)
    dataset = PhotoRows([source], 1, Crops(64, "lanczos", center_crop=True))
    of_rows = [dataset.prompt(source, row) for row in range(400)]
    assert set(of_rows) == {*drawn[PROMPT], "sks dog", ""}
    assert {*of_rows, PROMPT} == set(source.distinct_prompts())
    assert all(prompt in ("", dataset.prompt(source, row)) for row, prompt in enumerate(of_rows))
