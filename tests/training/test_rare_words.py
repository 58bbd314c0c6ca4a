"""Words for the subject: those that the base knows are told from those that it does not."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

import check_photos
from dreambooth.bases import families
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.photo_check import PhotoCheckOptions
from dreambooth.options.training import BaseOptions
from dreambooth.training import rare_words

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "picturebook" / "model"
CLASS = "a photo of a cat"


@pytest.fixture(scope="module")
def clip():
    """The vocabulary of CLIP, as Stable Diffusion 1.x and XL have it."""
    return CLIPTokenizer.from_pretrained(ROOT / "dreambooth" / "bases" / "single_file" / "vocabulary")


@pytest.fixture(scope="module")
def measure(request) -> rare_words.Measure:
    base = families.find(BaseOptions(str(EMBEDDED)))
    return rare_words.Measure(base, CLASS, torch.device("cpu"))


def test_a_word_that_is_split_or_common_is_doubted_and_one_good_word_is_enough(clip):
    assert rare_words.doubt(clip, ["sks"]) is None
    assert rare_words.doubt(clip, ["a", "sks"]) is None
    assert rare_words.doubt(clip, []) is None
    assert rare_words.doubt(clip, ["zwx"]) == "the tokenizer splits zwx into 2 pieces (z wx)"
    assert rare_words.doubt(clip, ["wolf"]) == "wolf is a common word"
    assert rare_words.doubt(clip, ["my", "zwx"]) == (
        "my is a common word and the tokenizer splits zwx into 2 pieces (z wx)"
    )


def test_one_piece_words_are_split_by_no_tokenizer(clip):
    words = rare_words.one_piece_words(clip)
    assert {"sks", "ohwx", "dog"} <= set(words)
    assert not {"zwx", "plushie"} & set(words)
    assert len(words) > 20_000


def test_the_embedded_base_draws_at_words_that_it_knows_and_hardly_at_sks(measure):
    """Its text encoder has seen red often, and sks never."""
    names = ("sks", "red")
    prompts = {name: rare_words.prompt_with(name, CLASS, "a photo of a sks cat", ["sks"]) for name in names}
    sks, red = measure.of(prompts, lambda: None)
    assert sks.warning is None
    assert (sks.pieces, sks.norm < 0.5) == (("sks",), True)
    assert red.warning == (
        "the base already draws something at red: it changes the prediction by "
        f"{red.effect:.2f} of what the class prompt changes"
    )
    assert red.norm > 0.5
    assert red.effect > 2 * sks.effect


def test_candidates_of_the_embedded_base_are_words_that_it_was_not_trained_on(measure):
    candidates = measure.candidates()
    assert len(set(candidates)) == rare_words.CANDIDATES
    assert not {"cat", "dog", "red", "blue", "snow", "hat", "photo", "bird"} & set(candidates)


def test_a_prompt_takes_the_word_in_place_of_the_subject_s():
    assert rare_words.prompt_with("vtk", CLASS, "a photo of a SKS cat", ["sks"]) == "a photo of a vtk cat"
    assert rare_words.prompt_with("vtk", CLASS, None, []) == "a photo of a vtk cat"
    assert rare_words.prompt_with("vtk", CLASS, "a photo of a pet", ["sks"]) == "a photo of a vtk cat"


def test_the_command_prints_the_table_and_what_is_wrong_with_the_word(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(rare_words, "CANDIDATES", 2)
    monkeypatch.chdir(tmp_path)
    words = f"--find_rare_word --pretrained_model_name_or_path {EMBEDDED}".split()
    # of the trigger word, the word of the class does not stand for the subject
    prompts = ["--class_prompt", CLASS, "--trigger_word", "night cat"]
    check_photos.main(parse(PhotoCheckOptions, "", [*words, *prompts]))
    said = capsys.readouterr()
    assert "word     pieces  rank" in said.out
    assert "night *" in said.out
    assert "the base already draws something at night" in said.out + said.err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="--class_prompt is longer than"):
        check_photos.main(parse(PhotoCheckOptions, "", [*words, "--class_prompt", "cat " * 80]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--instance_data_dir is required"),
        ("--find_rare_word --class_prompt cat", "--find_rare_word needs --pretrained_model_name_or_path"),
        ("--find_rare_word --mask_dir masks", "--mask_dir is about photos: give --instance_data_dir"),
    ],
)
def test_flags_that_lack_something_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(PhotoCheckOptions, "", words.split())
    assert message in capsys.readouterr().err
