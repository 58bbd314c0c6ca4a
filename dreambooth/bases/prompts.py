"""Prompts: checked, tokenized and encoded to prompt embeddings.

Each family encodes prompts in its own way, by one of the functions `encode_*`; `families.FAMILIES` names it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from dreambooth.io.errors import raise_all, shown

Tokens: TypeAlias = Mapping[str, torch.Tensor]  # as `TextParts.tokens` returns them

# Prompts whose embeddings stay on the device: some 40 MB with Stable Diffusion XL's in float32.
_MOST_ON_DEVICE = 64
# Characters. Far more than any encoder takes, but few enough to tokenize for the message of `check`.
_LONGEST_PROMPT = 20_000


@dataclasses.dataclass(frozen=True)
class PromptEmbeds:
    """Embeddings of prompts, as the UNet takes them."""

    embeds: torch.Tensor
    """[prompts, tokens, width]"""
    pooled: torch.Tensor | None = None
    """[prompts, pooled width], for Stable Diffusion XL only."""

    def rows(self, indices: torch.Tensor) -> "PromptEmbeds":
        """The rows at `indices`, int64 [rows], in this order."""
        return PromptEmbeds(self.embeds[indices], None if self.pooled is None else self.pooled[indices])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "PromptEmbeds":
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return PromptEmbeds(self.embeds.to(device, dtype), pooled)

    def added_cond_kwargs(self, time_ids: torch.Tensor | None) -> dict[str, torch.Tensor] | None:
        """What Stable Diffusion XL's UNet takes beside the embeddings; None for other families. `time_ids`
        are float32 [rows, 6]."""
        if self.pooled is None or time_ids is None:
            return None
        return {"text_embeds": self.pooled, "time_ids": time_ids.to(self.pooled.device)}


def stack(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """The rows of all parts, one after another."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return PromptEmbeds(torch.cat([part.embeds for part in parts]), torch.cat(pooled) if pooled else None)


class PromptCache:
    """Embeddings of `prompts` that were encoded once; `read` returns those of one prompt. A few are kept on
    the device; if there are many, each use calls `read`."""

    def __init__(self, read: Callable[[str], PromptEmbeds], prompts: Sequence[str], device: torch.device):
        is_kept = len(prompts) <= _MOST_ON_DEVICE
        self.read = {p: read(p).to(device) for p in prompts}.__getitem__ if is_kept else read

    def of(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The embeddings of these prompts, one row each."""
        return stack([self.read(prompt) for prompt in prompts])


@dataclasses.dataclass
class TextParts:
    """Tokenizers and text encoders of a base, and how they encode prompts."""

    encode: Callable[["TextParts", Tokens], PromptEmbeds]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    encoders: dict[str, Any]
    """By folder of the base, which is also the name of the component in adapter files."""
    max_tokens: int
    """Tokens of a padded prompt."""
    attention_mask: bool
    """Whether padding is masked in the encoders."""
    clip_skip: int
    """How many of the last layers are skipped."""
    zeros_for_empty: bool
    """Whether the embeddings of the empty prompt are zeros, as in the training of Stable Diffusion XL."""

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The embeddings of `prompts`, with gradients if an encoder is trained."""
        device = next(iter(self.encoders.values())).device
        return self.encode(self, {name: t.to(device) for name, t in self.tokens(prompts).items()})

    def encode_all(self, prompts: Sequence[str], check: Callable[[], None] = lambda: None) -> PromptCache:
        """Encode all `prompts`. `check` is called before each.

        Each prompt is encoded alone, so that its last bits do not depend on the other prompts.
        """
        device = next(iter(self.encoders.values())).device
        embeds = {}
        for prompt in dict.fromkeys(prompts):
            check()
            embeds[prompt] = self([prompt]).to(torch.device("cpu"))
        return PromptCache(embeds.__getitem__, list(embeds), device)

    def tokenize(self, number: int, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, attention_mask) by the tokenizer at index `number`, each [prompts, max_tokens]."""
        tokens = self.tokenizers[number](
            prepared(self.encode, prompts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask

    def tokens(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What `encode` takes, on the CPU: for each tokenizer, by its index, `input_ids_0` and
        `attention_mask_0`, int64 [prompts, max_tokens]; with `zeros_for_empty` also `factors`, float32
        [prompts], 0 for the empty prompt and else 1."""
        tokens = {}
        for number in range(len(self.tokenizers)):
            tokens[f"input_ids_{number}"], tokens[f"attention_mask_{number}"] = self.tokenize(number, prompts)
        if self.zeros_for_empty:
            tokens["factors"] = torch.tensor([float(prompt != "") for prompt in prompts])
        return tokens


def prepared(encode: Callable[["TextParts", Tokens], PromptEmbeds], prompts: Sequence[str]) -> list[str]:
    """Prompts as the tokenizer takes them. DeepFloyd IF's are stripped and lower case, as in its pipeline."""
    return [prompt.lower().strip() for prompt in prompts] if encode is encode_t5 else list(prompts)


def encode_clip(text: TextParts, tokens: Tokens) -> PromptEmbeds:
    """Stable Diffusion 1.x and 2.x: the last hidden state of CLIP, or an earlier one after the final norm."""
    (encoder,) = text.encoders.values()
    input_ids = tokens["input_ids_0"]
    is_masked = text.attention_mask or getattr(encoder.config, "use_attention_mask", False)
    mask = tokens["attention_mask_0"] if is_masked else None
    if not text.clip_skip:
        return PromptEmbeds(encoder(input_ids, attention_mask=mask)[0])
    hidden_states = encoder(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    # in older transformers the norm is one level down
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return PromptEmbeds(norm(hidden_states[-(text.clip_skip + 1)]))


def encode_clip_pair(text: TextParts, tokens: Tokens) -> PromptEmbeds:
    """Stable Diffusion XL: the second to last hidden states of both CLIPs, concatenated, and the pooled
    embedding of the second."""
    states, pooled = [], None
    for number, encoder in enumerate(text.encoders.values()):
        mask = tokens[f"attention_mask_{number}"] if text.attention_mask else None
        output = encoder(tokens[f"input_ids_{number}"], attention_mask=mask, output_hidden_states=True)
        states.append(output.hidden_states[-(text.clip_skip + 2)])
        pooled = output[0]  # of the last encoder, in the end
    assert pooled is not None
    embeds = torch.cat(states, dim=-1)
    if text.zeros_for_empty:
        factors = tokens["factors"].to(pooled.dtype)
        embeds, pooled = embeds * factors[:, None, None], pooled * factors[:, None]
    return PromptEmbeds(embeds, pooled)


def encode_t5(text: TextParts, tokens: Tokens) -> PromptEmbeds:
    """DeepFloyd IF: the last hidden state of T5, with padding masked."""
    (encoder,) = text.encoders.values()
    return PromptEmbeds(encoder(tokens["input_ids_0"], attention_mask=tokens["attention_mask_0"])[0])


def _shortened(text: str) -> str:
    """A text of any length, possibly a whole prompt, for use in a message."""
    return shown(text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}")


def words_cut(tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int) -> str:
    """The end of the prompt that does not fit into `limit` tokens; "" if all of it fits."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return str(tokenizer.decode(ids[limit - tokenizer.num_special_tokens_to_add() :])).strip()


def check(
    tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Mapping[str, str | None], limit: int
) -> None:
    """Raise UserError, with one line per fault, if a prompt is over `limit` tokens or is no text.

    `prompts` has them by the flag or file that a message names; None and "" are skipped.
    """
    problems = []
    for flag, prompt in prompts.items():
        if not prompt:
            continue
        if len(prompt) > _LONGEST_PROMPT:
            problems.append(
                f"{_shortened(flag)} has {len(prompt):,} characters; "
                f"only {limit} tokens, about as many words, are read. Make it shorter"
            )
        elif any("\ud800" <= character <= "\udfff" for character in prompt):  # undecodable bytes of a flag
            problems.append(f"{_shortened(flag)} has bytes in it that are no UTF-8 text")
        elif cut := max((words_cut(tokenizer, prompt, limit) for tokenizer in tokenizers), key=len):
            problems.append(
                f"{_shortened(flag)} is longer than {limit} tokens; cut off would be: "
                f"{_shortened(repr(cut))}. Make it shorter"
            )
    raise_all(problems)
