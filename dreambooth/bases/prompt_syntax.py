"""Finds the syntax of other programs in prompts: weights, schedules, adapters, wildcards.

The text encoders get a prompt as it is written, so that such syntax is drawn, and trained, as words.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from dreambooth.io.errors import few, shortened

_LORA = "--adapter FILE:WEIGHT of infer.py, as in --adapter dog.safetensors:0.8"
_WEIGHT = "leave out brackets and number; words have no weights here"
_SCHEDULE = "one prompt for each picture"
_CHOICES = "a line of --prompts_file, or a --prompt, for each choice"
_SENTENCE = "one sentence, with commas"
_TAGS = "plain words; tags of other programs have no meaning here"
_FLAGS = "flags of this program, as --negative_prompt and --seeds"


class _Syntax(NamedTuple):
    pattern: re.Pattern[str]
    advice: str
    is_meant: Callable[[re.Match[str]], bool] = lambda match: True
    """Whether a match is this syntax, and not plain text that looks like it."""


def _is_weight(match: re.Match[str]) -> bool:
    """Whether the text before the colon has letters and does not end in a number: (2:3), (at 10:30) and
    (chapter: 3) are plain text."""
    text, space, number = match["text"], match["space"], match["number"]
    last_word = re.split(r"[\s,]+", text.strip())[-1]
    is_ratio = re.fullmatch(r"[\d.:/]+", last_word) is not None
    is_spaced_count = bool(space) and "." not in number
    return _has_letter(text) and not is_ratio and not is_spaced_count and abs(float(number)) <= 10


def _is_schedule(match: re.Match[str]) -> bool:
    """Whether brackets switch words at a share of the steps, [dog:0.5], or at a step, [dog:cat:12]."""
    text = match["text"]
    is_ratio = re.search(r"(?:\A|[\s:])[\d.:/]+\Z", text.rstrip(":")) is not None
    return _has_letter(text) and not is_ratio and (":" in text or "." in match["number"])


def _is_lowered(match: re.Match[str]) -> bool:
    """Whether brackets hold words in small letters and no number: [V], [OC], [1990] and [sic] are plain
    text."""
    text = match["text"]
    return bool(re.search(r"[^\W\d_A-Z]{3}", text)) and not re.search(r"\b\d+\b", text) and text != "sic"


def _is_keyword(match: re.Match[str]) -> bool:
    """Whether BREAK or AND stands between words in small letters: ROCK AND ROLL is plain text."""
    before = re.search(r"\S+(?=\s*\Z)", match.string[: match.start()])
    after = re.match(r"\s*(\S+)", match.string[match.end() :])
    if match[0] == "AND" and not (before and after):
        return False
    neighbours = [word[0] for word in (before, after) if word]
    is_noun = before is not None and before[0].lower() in ("a", "an", "the", "says", "word")  # an AND gate
    is_quoted = bool(before and before[0][-1] in "\"'\u201c") or bool(after and after[1][0] in "\"'\u201d")
    has_small = any(character.islower() for character in match.string)
    capitals = [word for word in neighbours if len(re.sub(r"\W", "", word)) > 1 and word.isupper()]
    return bool(neighbours) and has_small and not (is_quoted or is_noun or capitals)


_NUMBER = r"(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))"
_SYNTAXES = (
    _Syntax(re.compile(r"<\s*(?:lora|lyco|lycoris|hypernet)\s*:[^<>]*(?:>|\Z)", re.IGNORECASE), _LORA),
    _Syntax(
        re.compile(r"<\s*(?:embedding|ti)\s*:[^<>]*>|\bembedding:[\w(]\S*", re.IGNORECASE),
        "leave it out; embeddings are not read",
    ),
    # SwarmUI's tags
    _Syntax(
        re.compile(
            r"<(?:alternate|base|break|fromto\[[^\]]*\]|object|random|refiner|region|segment|wildcard)\b"
            r"[^<>]*>"
        ),
        _TAGS,
    ),
    # schedules before weights: [a:b:0.5] has both forms
    _Syntax(re.compile(rf"\[(?P<text>[^\[\]]*):\s*{_NUMBER}\s*\]"), _SCHEDULE, _is_schedule),
    _Syntax(re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]"), _SCHEDULE, lambda match: _has_letter(match[0])),
    _Syntax(re.compile(rf"\((?P<text>[^()]*):(?P<space>\s*){_NUMBER}\s*\)"), _WEIGHT, _is_weight),
    _Syntax(re.compile(r"(?<!\()\({2,}[^()]*\)+"), _WEIGHT, lambda match: _has_letter(match[0])),
    _Syntax(re.compile(r"(?<!\[)\[+(?P<text>[^\[\]|:]+)\]+"), _WEIGHT, _is_lowered),
    _Syntax(re.compile(r"\{[^{}|]*\|[^{}]*\}"), _CHOICES),
    _Syntax(re.compile(r"(?<!\{)\{{2,}[^{}]*\}+"), _WEIGHT, lambda match: _has_letter(match[0])),
    _Syntax(re.compile(r"(?<!\w)__[\w/*. -]*?[\w*]__(?!\w)"), _CHOICES, lambda match: _has_letter(match[0])),
    _Syntax(re.compile(r"\b(?:BREAK|AND)\b"), _SENTENCE, _is_keyword),
    # Compel's: word++, (some words)--, (some words)1.2, ("a", "b").blend(...)
    _Syntax(
        re.compile(r"(?<![\w+])[^\W\d_]{3,}(?:\+{2,}|-{2,})(?=[\s,.;)]|\Z)"),
        _WEIGHT,
        lambda match: match[0].rstrip("+").lower() not in ("notepad",),
    ),
    _Syntax(re.compile(r"\([^()]*[^\W\d_][^()]*\)(?:\++|-{2,}|\d*\.\d+)(?=[\s,.;)]|\Z)"), _WEIGHT),
    _Syntax(re.compile(r"\)\.(?:and|blend|swap)\("), _SENTENCE),
    # the Regional Prompter's words, Midjourney's weights
    _Syntax(re.compile(r"\b(?:ADDCOMM|ADDBASE|ADDCOL|ADDROW)\b"), _SENTENCE),
    _Syntax(re.compile(r"\w+ *::[+-]?[\d.]+(?=[\s,]|\Z)"), _WEIGHT, lambda match: _has_letter(match[0])),
    # what A1111 writes into its pictures
    _Syntax(re.compile(r"\bNegative prompt:(?=\s)|\bSteps: \d+, Sampler: \w+"), _FLAGS),
    # kohya's lines of sample prompts and Midjourney's flags
    _Syntax(
        re.compile(
            r"(?<!\S)--(?:[nwhdlsgv]|am|ar|cfg|niji|no|seed|steps|stylize|[a-z]+(?:_[a-z]+)+)[\s=]+\S+"
        ),
        _FLAGS,
    ),
)
_ESCAPED = re.compile(r"\\[()\[\]{}]")

_MOST_CHARACTERS = 2_000  # more than any text encoder takes; bounds the time of the search


def _has_letter(text: str) -> bool:
    return any(map(str.isalpha, text))


def parts(prompt: str) -> dict[str, str]:
    """The parts of a prompt that are syntax of other programs, each with what to do instead."""
    advice_of: dict[str, str] = {}
    if escaped := _ESCAPED.search(prompt):
        advice_of[escaped[0]] = "brackets without backslashes"
    rest = _ESCAPED.sub(" ", prompt[:_MOST_CHARACTERS])
    for syntax in _SYNTAXES:

        def replaced(match: re.Match[str], syntax: _Syntax = syntax) -> str:
            if not syntax.is_meant(match):
                return match[0]
            advice_of.setdefault(match[0], syntax.advice)
            return " "  # so that no other pattern takes the same text

        rest = syntax.pattern.sub(replaced, rest)
    return advice_of


def notes(prompts: Iterable[str | None]) -> list[str]:
    """A note on prompts with syntax of other programs; [] without any."""
    concerned = {prompt: advice for prompt in dict.fromkeys(prompts) if prompt and (advice := parts(prompt))}
    if not concerned:
        return []
    texts = [f"{shortened(part, 40)} - {advice}" for part, advice in _distinct(concerned.values())]
    more = f" (and {len(concerned) - 1} more)" if len(concerned) > 1 else ""
    return [
        f"the prompt {shortened(next(iter(concerned)))}{more} has syntax of other programs, which is read as"
        f" words here. What to write instead of it: {'; '.join(texts)}"
    ]


def caption_notes(captions: Mapping[str, str]) -> list[str]:
    """A note on captions, by file name, with syntax of other programs; [] without any."""
    concerned = {name: advice for name, caption in captions.items() if (advice := parts(caption))}
    if not concerned:
        return []
    examples = [part for part, _ in _distinct(concerned.values())]
    return [
        f"{len(concerned)} of {len(captions)} captions have syntax of other programs, which is trained as"
        f" words ({few(examples, 3)}): {few(list(concerned))}. Write them as plain text"
    ]


def _distinct(tables: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(part, advice) of all prompts: one part for each advice, the first."""
    part_of: dict[str, str] = {}
    for table in tables:
        for part, advice in table.items():
            part_of.setdefault(advice, part)
    return [(part, advice) for advice, part in part_of.items()]
