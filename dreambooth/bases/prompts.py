"""Prompts: checked, tokenised and encoded into what the UNet is told.

Each family has its own way from words to conditions; the functions here are those ways, and `families.py`
says which is whose.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dreambooth.errors import UserError, shown

_MOST_ON_DEVICE = 64  # prompts: with Stable Diffusion XL's in float32 some 40 MB
_LONGEST_PROMPT = 20_000  # characters: far more than fits, and little enough to find the words that do not


@dataclasses.dataclass(frozen=True)
class PromptEmbeds:
    """What the UNet is told of some prompts: [prompts, tokens, width], and for Stable Diffusion XL one vector
    each, [prompts, pooled width]."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None

    def rows(self, index: Sequence[int]) -> "PromptEmbeds":
        """The conditions of the prompts at these places, in this order."""
        places = torch.tensor(index, device=self.embeds.device)
        return PromptEmbeds(self.embeds[places], None if self.pooled is None else self.pooled[places])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "PromptEmbeds":
        return PromptEmbeds(
            self.embeds.to(device, dtype), None if self.pooled is None else self.pooled.to(device, dtype)
        )

    def added_cond_kwargs(self, time_ids: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """What Stable Diffusion XL's UNet takes beside the embeddings; None for other families. `time_ids` are float32 [rows, 6]."""
        return None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": time_ids}


def stack(conditions: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """The prompts of all of them, one after another."""
    pooled = [c.pooled for c in conditions if c.pooled is not None]
    return PromptEmbeds(torch.cat([c.embeds for c in conditions]), torch.cat(pooled) if pooled else None)


@dataclasses.dataclass(frozen=True)
class PromptCache:
    """PromptEmbeds of prompts that were encoded once; `read` gives those of one."""

    read: Callable[[str], PromptEmbeds]

    def of(self, prompts: Sequence[str]) -> PromptEmbeds:
        return stack([self.read(prompt) for prompt in prompts])


def prompt_cache(
    read: Callable[[str], PromptEmbeds], prompts: Sequence[str], device: torch.device
) -> PromptCache:
    """The conditions of `prompts`: few wait on the device, many are read where they lie at each visit."""
    if len(prompts) > _MOST_ON_DEVICE:
        return PromptCache(read)
    held = {prompt: read(prompt).to(device) for prompt in prompts}
    return PromptCache(held.__getitem__)


@dataclasses.dataclass
class TextParts:
    """Tokenizers and text encoders of a base, the encoders by the name that they have in its folder and in
    adapter files."""

    encode: Callable[["TextParts", Sequence[str]], PromptEmbeds]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    encoders: dict[str, Any]
    max_tokens: int
    attention_mask: bool = False
    clip_skip: int = 0
    zeros_for_empty: bool = False
    """Whether the empty prompt is zeros, as Stable Diffusion XL was trained."""

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The conditions of `prompts`; gradients flow if an encoder is trained."""
        return self.encode(self, prompts)

    def encode_all(self, prompts: Sequence[str], check: Callable[[], None] = lambda: None) -> PromptCache:
        """All `prompts` encoded, each alone: its last bits do not depend on which others there are. `check`
        is called before each."""
        device = next(iter(self.encoders.values())).device
        found = {}
        for prompt in dict.fromkeys(prompts):
            check()
            found[prompt] = self([prompt]).to(torch.device("cpu"))
        return prompt_cache(found.__getitem__, list(found), device)

    def ids(self, number: int, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask) of the tokenizer at `number`, each [prompts, max_tokens]."""
        read = as_read(self.encode, prompts)
        found = self.tokenizers[number](
            read, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return found.input_ids, found.attention_mask

    def tokens(self, number: int, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`ids` on the device of their encoder."""
        encoder = list(self.encoders.values())[number]
        ids, mask = self.ids(number, prompts)
        return ids.to(encoder.device), mask.to(encoder.device)


def as_read(
    encode: Callable[["TextParts", Sequence[str]], PromptEmbeds], prompts: Sequence[str]
) -> list[str]:
    """Prompts as they come to the tokenizer: for DeepFloyd IF in lower case and trimmed, as its pipeline has
    them."""
    return [prompt.lower().strip() for prompt in prompts] if encode is encode_t5 else list(prompts)


def encode_clip(text: TextParts, prompts: Sequence[str]) -> PromptEmbeds:
    """Stable Diffusion 1.x and 2.x: CLIP's last hidden state, or an earlier one, after its final norm."""
    (encoder,) = text.encoders.values()
    ids, mask = text.tokens(0, prompts)
    is_masked = text.attention_mask or getattr(encoder.config, "use_attention_mask", False)
    if not text.clip_skip:
        return PromptEmbeds(encoder(ids, attention_mask=mask if is_masked else None)[0])
    hidden = encoder(ids, attention_mask=mask if is_masked else None, output_hidden_states=True).hidden_states
    norm = getattr(
        encoder, "text_model", encoder
    ).final_layer_norm  # older transformers keep it one level down
    return PromptEmbeds(norm(hidden[-(text.clip_skip + 1)]))


def encode_clip_pair(text: TextParts, prompts: Sequence[str]) -> PromptEmbeds:
    """Stable Diffusion XL: the last hidden states but one of both CLIPs, side by side, and the second's
    projection of the whole prompt."""
    embeds, pooled = [], None
    for number, encoder in enumerate(text.encoders.values()):
        ids, mask = text.tokens(number, prompts)
        out = encoder(ids, attention_mask=mask if text.attention_mask else None, output_hidden_states=True)
        embeds.append(out.hidden_states[-(text.clip_skip + 2)])
        pooled = out[0]  # the last encoder's stays
    assert pooled is not None
    found = PromptEmbeds(torch.cat(embeds, dim=-1), pooled)
    if not text.zeros_for_empty or all(prompts):
        return found
    kept = torch.tensor([float(prompt != "") for prompt in prompts], device=pooled.device, dtype=pooled.dtype)
    return PromptEmbeds(found.embeds * kept[:, None, None], pooled * kept[:, None])


def encode_t5(text: TextParts, prompts: Sequence[str]) -> PromptEmbeds:
    """DeepFloyd IF: T5's last hidden state, padding masked."""
    (encoder,) = text.encoders.values()
    ids, mask = text.tokens(0, prompts)
    return PromptEmbeds(encoder(ids, attention_mask=mask)[0])


def _shortened(text: str) -> str:
    """A text that may hold a whole prompt, as it may stand in a message."""
    return shown(text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}")


def words_cut(tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int) -> str:
    """The end of the prompt that does not fit into `limit` tokens, "" if all of it does."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return str(tokenizer.decode(ids[limit - tokenizer.num_special_tokens_to_add() :])).strip()


def check(
    tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Mapping[str, str | None], limit: int
) -> None:
    """Raise UserError naming flag and words for every prompt that would be cut off, or is no text. `prompts`
    are by what names them."""
    problems = []
    for flag, prompt in prompts.items():
        if not prompt:
            continue
        if len(prompt) > _LONGEST_PROMPT:
            problems.append(
                f"{_shortened(flag)} has {len(prompt):,} characters; only {limit} tokens, about as many words, are read. Make it shorter"
            )
            continue
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            problems.append(f"{_shortened(flag)} has bytes in it that are no UTF-8 text")
            continue
        cut = max((words_cut(tokenizer, prompt, limit) for tokenizer in tokenizers), key=len)
        if cut:
            problems.append(
                f"{_shortened(flag)} is longer than {limit} tokens; cut off would be: {_shortened(repr(cut))}. Make it shorter"
            )
    if problems:
        raise UserError("\n".join(problems))
