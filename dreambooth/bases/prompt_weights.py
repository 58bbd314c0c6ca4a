"""Prompts with weights, and prompts over the length of the text encoder, for --prompt_weights.

compel reads and encodes them. It is an extra, and imported only here.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from dreambooth.bases.prompts import PromptCache, PromptEmbeds, TextParts, encode_clip, encode_t5, words_cut
from dreambooth.io.errors import UserError, raise_all, shortened, type_and_reason

# (word:1.2) of other programs, from the colon on. (10:30) and (2:3) are no weights.
_COLON = re.compile(r"(?<=[^\d\s:(]):\s*(\d+(?:\.\d*)?|\.\d+)\s*\)")
# numbers in the same place that are no weights: (word:-1), (word:1e3), (word:1.2.3)
_NO_WEIGHT = re.compile(r"(?<=[^\d\s:(]):\s*([-+.]*\d[-+.\deE]*)\s*\)")
_LONGEST_PROMPT = 20_000  # characters
_LARGEST_WEIGHT = 10
# transformers warns of long prompts, which are split here
_WARNING = "sequence-length-is-longer-than-the-specified-maximum"


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The words of a prompt, in pieces of one weight each."""

    pieces: tuple[tuple[str, float], ...]

    @property
    def words(self) -> str:
        return " ".join(text for text, _ in self.pieces)

    @property
    def has_weights(self) -> bool:
        return any(weight != 1 for _, weight in self.pieces)


def parsed(prompt: str) -> Parsed:
    """The words and weights of a prompt. Both `(word:1.2)` and compel's `(word)1.2` and `word++` are read.

    Raises UserError if compel cannot read the prompt, if it has more of compel's syntax than weights, or if a
    weight is not from 0 to 10.
    """
    from compel import Compel
    from compel.prompt_parser import FlattenedPrompt, Fragment

    text = _COLON.sub(r")\1", prompt)
    if number := _NO_WEIGHT.search(text):
        raise UserError(f"a weight must be a number from 0 to {_LARGEST_WEIGHT}, as 1.2, got {number[1]}")
    try:
        conjunction = Compel.parse_prompt_string(text)
    except Exception as error:  # pyparsing raises several kinds
        raise UserError(f"compel cannot read it ({type_and_reason(error)})") from None
    parts = conjunction.prompts
    pieces = parts[0].children if len(parts) == 1 and isinstance(parts[0], FlattenedPrompt) else None
    if pieces is None or conjunction.lora_weights or not all(type(piece) is Fragment for piece in pieces):
        raise UserError("of compel's syntax only weights are read: no and(), blend(), swap() or withLora()")
    weights = [piece.weight for piece in pieces]
    if any(not 0 <= weight <= _LARGEST_WEIGHT for weight in weights):
        odd = next(weight for weight in weights if not 0 <= weight <= _LARGEST_WEIGHT)
        raise UserError(f"a weight must be from 0 to {_LARGEST_WEIGHT}, got {odd:g}")
    return Parsed(tuple((piece.text, float(piece.weight)) for piece in pieces))


def check(prompts: Iterable[str]) -> None:
    """Raise UserError, with one line per fault, if a prompt is not as `parsed` reads it."""
    problems = []
    for prompt in dict.fromkeys(prompts):
        where = f"--prompt_weights: the prompt {shortened(prompt)}"
        if len(prompt) > _LONGEST_PROMPT:
            problems.append(f"{where} has {len(prompt):,} characters; the most are {_LONGEST_PROMPT:,}")
        elif any("\ud800" <= character <= "\udfff" for character in prompt):  # undecodable bytes of a flag
            problems.append(f"{where} has bytes in it that are no UTF-8 text")
        else:
            try:
                parsed(prompt)
            except UserError as error:
                problems.append(f"{where}: {error}")
    raise_all(problems)


def check_base(encode: Callable[..., PromptEmbeds], name: str) -> None:
    """Raise UserError unless a family that encodes prompts by `encode`, called `name`, has CLIP."""
    if encode is encode_t5:
        raise UserError(f"--prompt_weights: {name} has no CLIP; leave it out")


class _Encoder:
    """A text encoder as compel calls it. It gives the hidden states that the UNet takes."""

    def __init__(self, text: TextParts, encoder: Any) -> None:
        self.text, self.encoder = text, encoder
        self.device, self.dtype = encoder.device, encoder.dtype

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any) -> Any:
        skipped = self.text.clip_skip
        # all ones where no word has a weight under 1
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        output = self.encoder(input_ids, attention_mask=mask, output_hidden_states=True)
        if self.text.encode is encode_clip and not skipped:
            return output
        states = output.hidden_states[-(skipped + (1 if self.text.encode is encode_clip else 2))]
        if self.text.encode is encode_clip:
            states = getattr(self.encoder, "text_model", self.encoder).final_layer_norm(states)
        return SimpleNamespace(last_hidden_state=states)


def encode_all(text: TextParts, prompts: Sequence[str], check: Callable[[], None]) -> PromptCache:
    """Encode all `prompts`, of any length, with their weights. `check` is called before each.

    A prompt without weights that fits into the encoder is encoded as without compel. The embeddings of all
    prompts are as long as those of the longest: the others end in embeddings of an empty prompt.
    """
    embeds: dict[str, PromptEmbeds] = {}
    for prompt in dict.fromkeys(prompts):
        check()
        embeds[prompt] = _encoded(text, prompt).to(torch.device("cpu"))
    longest = max(each.embeds.shape[1] for each in embeds.values())
    empty = _encoded(dataclasses.replace(text, zeros_for_empty=False), "").embeds.cpu()
    for prompt, each in embeds.items():
        chunk = each.embeds if prompt == "" else empty
        count = (longest - each.embeds.shape[1]) // chunk.shape[1]
        embeds[prompt] = dataclasses.replace(each, embeds=torch.cat([each.embeds, *[chunk] * count], dim=1))
    device = next(iter(text.encoders.values())).device
    return PromptCache(embeds.__getitem__, list(embeds), device)


def _encoded(text: TextParts, prompt: str) -> PromptEmbeds:
    """The embeddings of one prompt, [1, tokens, width]. The tokens are a multiple of `text.max_tokens`."""
    from compel import Compel

    content = parsed(prompt)
    is_long = any(words_cut(tokenizer, content.words, text.max_tokens) for tokenizer in text.tokenizers)
    if not content.has_weights and not is_long:
        return text([prompt])
    states = []
    for tokenizer, encoder in zip(text.tokenizers, text.encoders.values(), strict=True):
        tokenizer.deprecation_warnings[_WARNING] = True
        compel = Compel(
            tokenizer=tokenizer,
            text_encoder=_Encoder(text, encoder),
            truncate_long_prompts=False,
            model_max_length=text.max_tokens,
            device=encoder.device,
        )
        read = compel.build_conditioning_tensor
        states.append((read(_COLON.sub(r")\1", prompt)), read("")))
    # two different tokenizers may need different numbers of pieces
    tokens = max(state.shape[1] for state, _ in states)
    padded = [
        torch.cat([state, *[empty] * ((tokens - state.shape[1]) // empty.shape[1])], dim=1)
        for state, empty in states
    ]
    # the pooled embedding, for XL only, is of the words that fit into the encoder, without weights
    return PromptEmbeds(torch.cat(padded, dim=-1), text([content.words]).pooled)
