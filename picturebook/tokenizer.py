"""A CLIP tokenizer of a small vocabulary: each word of the drawn world, and each rare word, is one token.

Any other text is encoded byte by byte, as in CLIP's tokenizer.
"""

import itertools
from collections import Counter

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from picturebook.world import all_words

MAX_TOKENS = 32  # with begin and end; the longest caption takes 15
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first and ties by spelling, until every word is one token.

    The trainer of the tokenizers library is not used: it breaks ties differently from run to run.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer. Its vocabulary has CLIP's order: bytes, bytes that end a word, merged pieces, begin,
    end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(all_words())
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(left + right for left, right in merges),
        BEGIN,
        END,
    ]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
