"""Names of the weight files of a base's parts, with and without a variant, and what a base has of each.

The rules are those of diffusers' `variant_compatible_siblings`: of each part the files of the variant are
loaded where it has them, and otherwise the plain ones. Some part must have the variant.
"""

import re
from collections.abc import Iterable, Mapping

from dreambooth.io.errors import few

PLAIN = ""  # in place of a variant: files without one
_VARIANT = r"(?P<variant>[A-Za-z0-9_-]+?)"
_SHARD = re.compile(r".*-\d+-of-\d+")


def stem(part: str) -> str:
    """How the weight files of a part begin. transformers and diffusers have one name each."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def single(part: str, variant: str) -> str:
    """The name of the weight file of a part that is not sharded."""
    return ".".join(filter(None, (stem(part), variant, "safetensors")))


def indexes(part: str, variant: str) -> tuple[str, ...]:
    """The names that the index of a sharded part may have: today's, and those of older diffusers."""
    begin = stem(part)
    if variant == PLAIN:
        return (f"{begin}.safetensors.index.json",)
    return (
        f"{begin}.safetensors.index.{variant}.json",
        f"{begin}.safetensors.{variant}.index.json",
        f"{begin}.{variant}.safetensors.index.json",
    )


def is_index(name: str) -> bool:
    """Whether a file is the index of a sharded part."""
    return re.search(r"\.safetensors\.(.+\.)?index\.(.+\.)?json$", name) is not None


def variants(names: Iterable[str], part: str) -> set[str]:
    """The variants that a part can be loaded in, PLAIN among them, by the `names` in its folder."""
    begin = re.escape(stem(part))
    patterns = [
        rf"{begin}(\.{_VARIANT})?\.safetensors(\.index\.json)?",
        rf"{begin}\.safetensors\.index\.{_VARIANT}\.json",
        rf"{begin}\.safetensors\.{_VARIANT}\.index\.json",
    ]
    matches = [re.fullmatch(pattern, name) for name in names for pattern in patterns]
    return {
        match["variant"] or PLAIN
        for match in matches
        if match and not _SHARD.fullmatch(match["variant"] or "")
    }


def problem(available: Mapping[str, set[str]], variant: str) -> str | None:
    """What is wrong with `variant`, or with giving none, and what works; None if every part can be loaded.

    `available` are the `variants` of each part. Parts without any are left out of account.
    """
    held = {part: kinds for part, kinds in available.items() if kinds}
    known = sorted(set().union(*held.values()) - {PLAIN})
    lacking = [part for part, kinds in held.items() if not kinds & {PLAIN, variant}]
    if not lacking and variant in (PLAIN, *known):
        return None
    if variant == PLAIN:
        what = f"weights of {', '.join(lacking)} as a variant only"
    elif variant in known:
        what = f"no {variant} weights of {', '.join(lacking)}, and none without a variant"
    else:
        what = f"no {variant} weights"
    loadable = [kind for kind in known if all(kinds & {PLAIN, kind} for kinds in held.values())]
    advice = [f"give --variant {kind}" for kind in loadable]
    if variant != PLAIN and all(PLAIN in kinds for kinds in held.values()):
        advice.insert(0, "leave --variant out")
    if advice:
        return f"{what}; {' or '.join(advice)}"
    holds = "; ".join(
        f"{part} has {few(sorted(kinds), 8)}" for part, kinds in held.items() if PLAIN not in kinds
    )
    return (
        f"{what}, and no choice of --variant gives every part: {holds}. Rename the files of one variant "
        f"of a part, as {single(next(iter(held)), 'fp16')} to {single(next(iter(held)), PLAIN)}"
    )
