"""Which word should stand for the subject: words of the base's tokenizer that mean little to the base.

DreamBooth binds the subject to a word that the base hardly knows (arXiv 2208.12242, section 3.2). A word of
several pieces is several common tokens, and a word that the base knows draws what it means. Measured are the
word's embedding and how much the word changes what the UNet predicts.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from transformers import PreTrainedTokenizerBase

from dreambooth.bases import loading, prediction, schedulers
from dreambooth.bases.families import Base
from dreambooth.bases.prompts import TextParts
from dreambooth.data import sampling_order, tags
from dreambooth.evaluation.photo_page import Table
from dreambooth.io.errors import shown
from dreambooth.options.training import TextOptions
from dreambooth.training import objectives

CANDIDATES = 16  # words whose effect on the UNet is measured
# The effect from which a word is named as one that the base draws something at, and the place in the
# vocabulary before which it is named as common. Both are for warnings; docs/photos.md has what was measured.
MOST_EFFECT = 0.8
COMMON_RANK = 1 / 3
_ORDERED_VOCABULARY = 10_000  # tokens: the vocabularies of bases are ordered from common to rare
_SHAPE = re.compile(r"[a-z]{3,5}")
_LEVELS, _NOISES = (0.98, 0.8, 0.6, 0.4), 2  # noise levels as parts of the timesteps, and noises of each
_SEED = 0
_ABOUT = (
    "The base knows the first words least. Pieces: tokens of the word. Rank: its place in the vocabulary; a "
    "large one goes from common to rare. Norm: length of its embedding, 1 as the words of the class prompt. "
    "Neighbours: the nearest words, with cosines. Effect: how much the word changes the prediction with the "
    "class prompt, 1 as the class prompt itself. * marks the words that name the subject now."
)


@dataclasses.dataclass(frozen=True)
class Word:
    """What was measured of a word."""

    word: str
    pieces: tuple[str, ...]
    """As the tokenizer splits it; one for a good word."""
    rank: float
    """Place of its token in the vocabulary, from 0 to 1; of several pieces the lowest."""
    norm: float
    """Length of its embedding, in units of the mean of the class prompt's words; of several pieces the
    mean."""
    neighbours: tuple[tuple[str, float], ...]
    """The nearest other words, and the cosines of their embeddings."""
    effect: float
    """Mean squared change of the UNet's prediction by the word in the class prompt, in units of the change by
    the class prompt against the empty one."""

    @property
    def warning(self) -> str | None:
        """Why the word is a bad choice by its effect; None if it is not. `doubt` has the other reasons."""
        if self.effect <= MOST_EFFECT:
            return None
        return (
            f"the base already draws something at {shown(self.word)}: it changes the prediction by "
            f"{self.effect:.2f} of what the class prompt changes"
        )


class Measure:
    """The text encoder and the UNet of a base, and what they do with words. The first tokenizer and text
    encoder decide about pieces and embeddings."""

    def __init__(self, base: Base, class_prompt: str, device: torch.device):
        """Load the models. Raises UserError if one cannot be loaded."""
        self.base, self.class_prompt, self.device = base, class_prompt, device
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        tokenizers = loading.load_tokenizers(base)
        text = loading.text_without_encoders(base, tokenizers, TextOptions())
        self.text: TextParts = dataclasses.replace(text, encoders=loading.load_encoders(base, dtype, device))
        self.tokenizer: PreTrainedTokenizerBase = tokenizers[0]
        encoder = next(iter(self.text.encoders.values()))
        self.embeddings = encoder.get_input_embeddings().weight.detach().float().cpu()
        self.words = one_piece_words(self.tokenizer)
        self.unet: UNet2DConditionModel = loading.load_unet(base, dtype, device)
        self.scheduler = schedulers.load_scheduler(base)

    def candidates(self) -> list[str]:
        """Words of 3 to 5 letters and one piece, late in the vocabulary, whose embeddings are the shortest
        and the farthest from all others: CANDIDATES of them, without words of the class prompt."""
        of_class = set(self._ids(self.class_prompt))
        words = {
            word: token
            for word, token in self.words.items()
            if _SHAPE.fullmatch(word) and token not in of_class
        }
        if _is_ordered(self.tokenizer):
            words = {word: token for word, token in words.items() if 2 * token > len(self.tokenizer)}
        if not words:
            return []
        tokens = torch.tensor(list(words.values()))
        lengths = self.embeddings[tokens].norm(dim=1)
        nearest = self._cosines(tokens).amax(dim=1)
        places = lengths.argsort().argsort() + nearest.argsort().argsort()
        order = torch.argsort(places, stable=True)[:CANDIDATES].tolist()
        return [list(words)[index] for index in order]

    def _cosines(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cosines of the embeddings of `tokens` with those of all words, -1 for the token itself, [tokens,
        words]."""
        others = torch.tensor(list(self.words.values()), dtype=torch.long)
        units = F.normalize(self.embeddings, dim=1)
        cosines = units[tokens] @ units[others].T
        return cosines.masked_fill(tokens[:, None] == others[None], -1)

    def of(self, words: Mapping[str, str], done: Callable[[], object]) -> list[Word]:
        """The measurements of `words`, by word the prompt with it. `done` is called after each word."""
        of_class = self._predictions(self.class_prompt)
        change = _mean_square(of_class - self._predictions(""))
        known = self.embeddings[self._ids(self.class_prompt)].norm(dim=1).mean()
        measured = []
        for word, prompt in words.items():
            ids = self._ids(word)
            cosines = self._cosines(torch.tensor(ids[:1]))[0]
            near = cosines.topk(min(3, len(cosines)))
            names = list(self.words)
            effects = _mean_square(self._predictions(prompt) - of_class) / change.clamp(min=1e-12)
            measured.append(
                Word(
                    word,
                    tuple(self.tokenizer.decode([token]).strip() for token in ids),
                    min(ids) / len(self.tokenizer),
                    float(self.embeddings[ids].norm(dim=1).mean() / known),
                    tuple(
                        (names[index], value)
                        for index, value in zip(near.indices.tolist(), near.values.tolist(), strict=True)
                    ),
                    float(effects.mean()),
                )
            )
            done()
        return measured

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    @torch.no_grad()
    def _predictions(self, prompt: str) -> torch.Tensor:
        """The UNet's predictions with a prompt from the same noise at each level, float32 [levels, noises,
        C, h, w]. The noise is added to latents of zeros."""
        side = self.base.default_resolution // self.base.vae_stride
        shape = (self.base.latent_channels, side, side)
        embeds = self.text([prompt]).rows(torch.zeros(_NOISES, dtype=torch.long, device=self.device))
        sizes = [self.base.default_resolution] * 2
        time_ids = torch.tensor([[*sizes, 0, 0, *sizes]] * _NOISES, dtype=torch.float32)
        predicted = []
        for level in _LEVELS:
            noise = sampling_order.noise_of_rows(_SEED, f"rare-word-{level}", range(_NOISES), shape)
            count = self.scheduler.config.num_train_timesteps
            # index 0 of an EDM scheduler is its noisiest timestep
            index = round((1 - level if self.base.is_edm else level) * (count - 1))
            indices = torch.full((_NOISES,), index)
            task = objectives.make_task(self.scheduler, torch.zeros_like(noise), noise, indices)
            model_input, timesteps = task.model_input.to(self.device), task.timesteps.to(self.device)
            ids = time_ids if self.base.takes_time_ids else None
            output = prediction.predict(self.unet, model_input, timesteps, embeds, ids)
            predicted.append(output.float().cpu())
        return torch.stack(predicted)


def _mean_square(predictions: torch.Tensor) -> torch.Tensor:
    """The mean square of each level, [levels]."""
    return (predictions**2).flatten(1).mean(dim=1)


def _is_ordered(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabulary is one of a large text, ordered from common to rare."""
    return len(tokenizer) > _ORDERED_VOCABULARY


def doubt(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> str | None:
    """Why none of `words`, those that name the subject, is a good choice: each is split or common. None if
    one of them is neither, or if there are no words."""
    reasons = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > 1:
            pieces = " ".join(tokenizer.decode([token]).strip() for token in ids)
            reasons.append(f"the tokenizer splits {shown(word)} into {len(ids)} pieces ({shown(pieces)})")
        elif ids and _is_ordered(tokenizer) and ids[0] < COMMON_RANK * len(tokenizer):
            reasons.append(f"{shown(word)} is a common word")
        else:
            return None
    return " and ".join(reasons) or None


def one_piece_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """By word, its token: the words of letters that the tokenizer does not split, in order of the
    vocabulary."""
    in_order = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # CLIP's tokens end a word with </w>, those of T5 begin one with a bar
    texts = [(token.removesuffix("</w>").removeprefix("\u2581"), number) for token, number in in_order]
    words = {text: number for text, number in texts if re.fullmatch(r"[a-z]+", text)}
    ids = tokenizer(list(words), add_special_tokens=False, verbose=False).input_ids
    return {word: split[0] for word, split in zip(words, ids, strict=True) if len(split) == 1}


def prompt_with(word: str, class_prompt: str, instance_prompt: str | None, subject: Sequence[str]) -> str:
    """A prompt with `word` for the subject: the instance prompt with `word` in place of the first of
    `subject`, if it holds that; else the class prompt with `word` before its last word."""
    if instance_prompt is not None and subject and tags.holds(instance_prompt, subject[0]):
        pattern = rf"(?<!\w){re.escape(subject[0])}(?!\w)"
        return re.sub(pattern, lambda _: word, instance_prompt, count=1, flags=re.IGNORECASE)
    *before, last = class_prompt.split()
    return " ".join([*before, word, last])


def table(words: Sequence[Word], subject: Sequence[str]) -> Table:
    """The table of `words`, in this order. Those of `subject` are marked."""
    rows = [
        (
            f"{word.word} *" if word.word in subject else word.word,
            str(len(word.pieces)),
            f"{word.rank:.0%}",
            f"{word.norm:.2f}",
            ", ".join(f"{name} {cosine:.2f}" for name, cosine in word.neighbours),
            f"{word.effect:.2f}",
        )
        for word in words
    ]
    columns = ("word", "pieces", "rank", "norm", "neighbours", "effect")
    return Table("Words for the subject", _ABOUT, columns, rows)
