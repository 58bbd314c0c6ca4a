"""--prompt_weights: weights and long prompts, as compel encodes them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("compel", reason="an extra: pip install '.[weights]'")

import infer
from dreambooth.bases import families, pipelines, prompt_weights
from dreambooth.bases.prompts import PromptEmbeds, TextParts
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions
from tests import single_files


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Tiny bases with CLIP's own tokenizers."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: single_files.build_folder(folder / kind, kind) for kind in ("sd1", "sdxl")}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def loaded(request, bases) -> tuple[Any, families.Base]:
    base = families.find(BaseOptions(str(bases[request.param])))
    return pipelines.load_pipeline(base, torch.float32, torch.device("cpu")), base


def text_of(loaded: tuple[Any, families.Base], clip_skip: int = 0) -> TextParts:
    return pipelines.text_of(*loaded, clip_skip=clip_skip)


def encoded(text: TextParts, *prompts: str) -> list[PromptEmbeds]:
    with torch.no_grad():
        cache = prompt_weights.encode_all(text, prompts, lambda: None)
        return [cache.of([prompt]) for prompt in prompts]


def equal(one: PromptEmbeds, other: PromptEmbeds) -> bool:
    if one.pooled is None or other.pooled is None:
        return one.pooled is other.pooled and torch.equal(one.embeds, other.embeds)
    return torch.equal(one.embeds, other.embeds) and torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_a_plain_prompt_is_encoded_as_without_the_flag(loaded, clip_skip):
    text = text_of(loaded, clip_skip)
    for prompt in ("a photo of sks dog, it's nice", "", "a clock at 10:30 (on a wall)"):
        (found,) = encoded(text, prompt)
        with torch.no_grad():
            assert equal(found, text([prompt])), prompt


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_weights_scale_the_words_away_from_an_empty_prompt(loaded, clip_skip):
    """compel's rule for weights over 1, by hand: the rest of the prompt does not change."""
    text = text_of(loaded, clip_skip)
    prompts = ("a (red dog:1.5) runs", "a (red dog)1.5 runs", "a red dog runs", "")
    weighted, compels, plain, empty = encoded(text, *prompts)
    if empty.pooled is not None:  # of XL; compel has no zeros for an empty prompt
        (empty,) = encoded(dataclasses.replace(text, zeros_for_empty=False), "")
    assert equal(weighted, compels)
    expected = plain.embeds.clone()
    words = slice(2, 4)  # begin, a, red, dog
    expected[:, words] = empty.embeds[:, words] + 1.5 * (plain.embeds - empty.embeds)[:, words]
    assert torch.allclose(weighted.embeds, expected, atol=1e-5)
    assert torch.equal(weighted.embeds[:, 4:], plain.embeds[:, 4:])
    less = encoded(text, "a (red dog:0.5) runs")[0]
    assert not torch.equal(less.embeds, plain.embeds)
    if weighted.pooled is not None and plain.pooled is not None:
        assert torch.equal(weighted.pooled, plain.pooled)


def test_a_long_prompt_is_encoded_in_pieces_and_the_others_are_as_long(loaded):
    text = text_of(loaded)
    long = ", ".join(f"word {number}" for number in range(60))
    found, short, negative = encoded(text, long, "a dog", "")
    assert found.embeds.shape[1] == short.embeds.shape[1] == negative.embeds.shape[1] > text.max_tokens
    with torch.no_grad():
        assert torch.equal(short.embeds[:, : text.max_tokens], text(["a dog"]).embeds)
        assert torch.equal(negative.embeds[:, text.max_tokens : 2 * text.max_tokens], text([""]).embeds)


@pytest.mark.slow
def test_pictures_of_plain_prompts_do_not_depend_on_the_flag(bases, tmp_path):
    def run(name: str, *words: str) -> None:
        given = ["--pretrained_model_name_or_path", str(bases["sdxl"]), "--output_dir", str(tmp_path / name)]
        given += ["--num_inference_steps", "2", "--batch_size", "1"]
        infer.main(parse(InferOptions, "", [*given, *words]))

    run("plain", "--prompt", "a dog")
    run("flag", "--prompt", "a dog", "--prompt_weights")
    run("weighted", "--prompt", "a (dog:1.4)", "a dog " * 50, "--prompt_weights")
    pixels = {
        name: [infer.Image.open(path).tobytes() for path in sorted((tmp_path / name).glob("0*.png"))]
        for name in ("plain", "flag", "weighted")
    }
    assert pixels["plain"] == pixels["flag"]
    assert len(set(pixels["weighted"] + pixels["plain"])) == 3


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ('("a cat", "a dog").blend(1, 1)', "of compel's syntax only weights are read"),
        ('("a cat", "a dog").and()', "of compel's syntax only weights are read"),
        ("a (dog:20)", "a weight must be from 0 to 10, got 20"),
        ("a (dog:-1)", "a weight must be a number from 0 to 10, as 1.2, got -1"),
        ("a (dog:1e3)", "a weight must be a number from 0 to 10, as 1.2, got 1e3"),
        ("a (dog)-1", None),
    ],
)
def test_what_is_not_read_is_refused(prompt, said):
    if said is None:
        prompt_weights.check([prompt])
        return
    with pytest.raises(UserError, match=f"^--prompt_weights: the prompt .*: {said}"):
        prompt_weights.check([prompt])


def test_numbers_of_plain_text_are_no_weights():
    for prompt in ("a ratio (2:3)", "a clock (10:30)", "a (dog)", "(chapter: one)"):
        assert not prompt_weights.parsed(prompt).has_weights, prompt
    assert prompt_weights.parsed("a (red (big:1.2) dog:1.5)").pieces == (
        ("a", 1.0),
        ("red", 1.5),
        ("big", pytest.approx(1.8)),
        ("dog", 1.5),
    )
