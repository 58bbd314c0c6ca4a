"""Syntax of other programs in prompts is noted, and plain text is not taken for it."""

import pytest

from dreambooth.adapters import variants
from dreambooth.bases import families, loading, prompt_syntax
from dreambooth.options.pictures import DrawingOptions, InferOptions
from dreambooth.options.training import BaseOptions, TextOptions
from dreambooth.training import checks

SYNTAX = {
    "a <lora:dog:0.8> dog": "<lora:dog:0.8>",
    "<LyCO: style : .3>": "<LyCO: style : .3>",
    "<hypernet:x:1> dog": "<hypernet:x:1>",
    "a (word:1.4) dog": "(word:1.4)",
    "(blue eyes : 1.2)": "(blue eyes : 1.2)",
    "(white hair, (blue eyes:-.5), smile)": "(blue eyes:-.5)",
    "((best quality)), dog": "((best quality))",
    "a [blurry] dog": "[blurry]",
    "[[blurry]] dog": "[[blurry]]",
    "a dog BREAK a cat": "BREAK",
    "BREAK a dog": "BREAK",
    "masterpiece,\nBREAK\na dog": "BREAK",
    "a cat AND a dog": "AND",
    "[cat:dog:0.5]": "[cat:dog:0.5]",
    "[dog::12]": "[dog::12]",
    "[dog:0.25] in a field": "[dog:0.25]",
    "[cow|horse] in a field": "[cow|horse]",
    "a {red|blue} dog": "{red|blue}",
    "a {{shiny}} dog": "{{shiny}}",
    "__animals/dog*__ in a park": "__animals/dog*__",
    "embedding:easynegative, dog": "embedding:easynegative,",
    "a ball++ on grass": "ball++",
    "(red ball)-- on grass": "(red ball)--",
    "(red ball)1.3 on grass": "(red ball)1.3",
    '("a cat", "a dog").blend(0.5, 0.5)': ").blend(",
    r"saber \(fate\)": r"\(",
    "a dog --n blurry --w 512": "--n blurry",
    "a dog --ar 16:9": "--ar 16:9",
    "a dog --negative_prompt blurry": "--negative_prompt blurry",
    "a dog <lora:x:0.8": "<lora:x:0.8",
    "a <random:red, blue> dog": "<random:red, blue>",
    "a dog <segment:face>": "<segment:face>",
    "a dog ADDCOL a cat": "ADDCOL",
    "a dog::2 and a cat": "dog::2",
    "a dog\nNegative prompt: blurry": "Negative prompt:",
    "a dog, Steps: 20, Sampler: Euler a": "Steps: 20, Sampler: Euler",
}
PLAIN = (
    *(
        "a photo of sks dog",
        "a (small) dog (brown)",
        "a photo of an AND gate",
        "a sign that says BREAK",
        "a <new1> dog",
        "the std::vector poster",
        "a poster from [1990]",
        "a [V] dog",
        "[sic]",
        "[12:30]",
        "[page:12]",
        "[at 10:30]",
    ),
    *(
        "a photo (2:3)",
        "(16:9) photo",
        "a clock (at 10:30)",
        "John (3:16)",
        "(see chapter: 3)",
        "(scale 1:1.5)",
    ),
    *("a dog: 1.5 meters tall", "a smiley :)", ":((", "a dog -- big", "a dog--a cat", "5--6 dogs", "f(x)"),
    *("ROCK AND ROLL", "TAKE A BREAK", "AND gate", 'a sign that says "BREAK"', "breakfast and dinner"),
    *("C++ code", "Notepad++ on a screen", "18+", "Disney+", "<sks> dog", "<cat-toy>", "{dog}", "a | b"),
    *("a_b__c", "_dog_", "____", "(3.5)", "(born in 1990)", "a caf\u00e9 (Paris)", "", " "),
)


@pytest.mark.parametrize(("prompt", "part"), SYNTAX.items())
def test_syntax_is_named_with_what_to_write_instead(prompt, part):
    assert part in prompt_syntax.parts(prompt)
    (note,) = prompt_syntax.notes([prompt])
    assert note.startswith("the prompt ")
    assert f" {prompt_syntax.parts(prompt)[part]}" in note


@pytest.mark.parametrize("prompt", PLAIN)
def test_plain_text_gives_no_note(prompt):
    assert prompt_syntax.parts(prompt) == {}
    assert prompt_syntax.notes([prompt, None]) == []


def test_many_prompts_give_one_note_and_captions_a_count():
    (note,) = prompt_syntax.notes(["a dog", *SYNTAX])
    assert f"(and {len(SYNTAX) - 1} more)" in note
    captions = {f"{number}.png": prompt for number, prompt in enumerate(["a dog", *SYNTAX])}
    (note,) = prompt_syntax.caption_notes(captions)
    assert note.startswith(f"{len(SYNTAX)} of {len(captions)} captions have syntax of other programs")
    assert "1.png" in note
    assert prompt_syntax.caption_notes({"a.png": "a dog"}) == []


def test_a_long_or_broken_prompt_is_searched_at_once():
    for prompt in ("(" * 50_000, "[" * 50_000, "a(:1." * 10_000, "__" * 20_000, "\x1b[2J (a:1.4)" * 2_000):
        prompt_syntax.parts(prompt)
    (note,) = prompt_syntax.notes(["\x1b[2J (dog:1.4)"])
    assert "\x1b" not in note


def test_every_place_where_prompts_come_in_gives_the_note(tiny_base):
    base = families.find(BaseOptions(str(tiny_base)))
    tokenizers = loading.load_tokenizers(base)
    for flag in ("--instance_prompt", "--class_prompt", "--validation_prompt"):
        (note,) = checks.check_prompts({flag: "a (dog:1.4)"}, {}, TextOptions(), base, tokenizers)
        assert "(dog:1.4)" in note
    captions = {"1.png": "a <lora:x:1> dog", "2.png": "a dog"}
    (note,) = checks.check_prompts({"--instance_prompt": "a dog"}, captions, TextOptions(), base, tokenizers)
    assert note.startswith("1 of 2 captions have syntax of other programs")
    for prompt, negative in (("a (dog:1.4)", ""), ("a dog", "a (dog:1.4)")):
        options = InferOptions(base.options, prompt=(prompt,), drawing=DrawingOptions(negative))
        plan = variants.plan(options, [], {}, options.prompt)
        (note,) = variants.notes(options.drawing, plan, {}, base)
        assert "(dog:1.4)" in note
