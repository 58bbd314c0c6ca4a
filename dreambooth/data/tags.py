"""Captions of tags: parts between commas, which may be shuffled and dropped from visit to visit.

A prompt has a fixed number of variants, so that all of them can be encoded before the first step. They are a
function of seed and prompt; which of them a row has is a function of seed and row.
"""

import re

import torch

from dreambooth.data import sampling_order
from dreambooth.options.captions import CaptionOptions


def tags_of(prompt: str) -> list[str]:
    """The parts between commas, without empty ones."""
    return [tag.strip() for tag in prompt.split(",") if tag.strip()]


def holds(text: str, words: str) -> bool:
    """Whether the text has these words, in any case, and not within longer words."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger in front, unless it is empty or holds it already."""
    return f"{trigger}, {caption}" if trigger and caption and not holds(caption, trigger) else caption


def variants(prompt: str, seed: int, options: CaptionOptions) -> tuple[str, ...]:
    """The --caption_variants prompts that the visits of a photo with this prompt draw from, which may be
    equal; () if the prompt does not vary.

    Tags beyond the first --keep_tokens, and without --trigger_word, are shuffled, and each is dropped with
    probability --caption_tag_dropout_rate. A prompt that loses all its tags is empty.
    """
    tags = tags_of(prompt)
    trigger, keep = options.trigger_word, options.keep_tokens
    kept = [*tags[:keep], *(tag for tag in tags[keep:] if trigger and holds(tag, trigger))]
    free = [tag for tag in tags[keep:] if not (trigger and holds(tag, trigger))]
    if not options.varies or not free or (len(free) == 1 and not options.caption_tag_dropout_rate):
        return ()
    drawn = []
    for number in range(options.caption_variants):
        draw = sampling_order.generator(seed, "tags", prompt, number)
        order = torch.randperm(len(free), generator=draw).tolist()
        chances = torch.rand(len(free), generator=draw).tolist()
        chosen = [n for n in range(len(free)) if chances[n] >= options.caption_tag_dropout_rate]
        if options.shuffle_caption:
            chosen.sort(key=order.__getitem__)
        drawn.append(", ".join([*kept, *(free[n] for n in chosen)]))
    return tuple(drawn)
