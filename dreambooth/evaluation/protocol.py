"""The protocol of the DreamBooth paper (arXiv 2208.12242): prompts and subjects of its data set, verbatim.

In a prompt {0} stands for the rare word and {1} for the class noun. Imports no torch.
"""

from pathlib import Path

from dreambooth.io import reader
from dreambooth.io.errors import UserError, shortened, shown

OBJECT_PROMPTS = (
    "a {0} {1} in the jungle",
    "a {0} {1} in the snow",
    "a {0} {1} on the beach",
    "a {0} {1} on a cobblestone street",
    "a {0} {1} on top of pink fabric",
    "a {0} {1} on top of a wooden floor",
    "a {0} {1} with a city in the background",
    "a {0} {1} with a mountain in the background",
    "a {0} {1} with a blue house in the background",
    "a {0} {1} on top of a purple rug in a forest",
    "a {0} {1} with a wheat field in the background",
    "a {0} {1} with a tree and autumn leaves in the background",
    "a {0} {1} with the Eiffel Tower in the background",
    "a {0} {1} floating on top of water",
    "a {0} {1} floating in an ocean of milk",
    "a {0} {1} on top of green grass with sunflowers around it",
    "a {0} {1} on top of a mirror",
    "a {0} {1} on top of the sidewalk in a crowded street",
    "a {0} {1} on top of a dirt road",
    "a {0} {1} on top of a white rug",
    "a red {0} {1}",
    "a purple {0} {1}",
    "a shiny {0} {1}",
    "a wet {0} {1}",
    "a cube shaped {0} {1}",
)
# the first ten and the last five are those of objects
LIVE_PROMPTS = (
    *OBJECT_PROMPTS[:10],
    "a {0} {1} wearing a red hat",
    "a {0} {1} wearing a santa hat",
    "a {0} {1} wearing a rainbow scarf",
    "a {0} {1} wearing a black top hat and a monocle",
    "a {0} {1} in a chef outfit",
    "a {0} {1} in a firefighter outfit",
    "a {0} {1} in a police outfit",
    "a {0} {1} wearing pink glasses",
    "a {0} {1} wearing a yellow shirt",
    "a {0} {1} in a purple wizard outfit",
    *OBJECT_PROMPTS[20:],
)
# Class noun of each subject of the data set.
CLASSES = {
    "backpack": "backpack",
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl",
    "can": "can",
    "candle": "candle",
    "cat": "cat",
    "cat2": "cat",
    "clock": "clock",
    "colorful_sneaker": "sneaker",
    "dog": "dog",
    "dog2": "dog",
    "dog3": "dog",
    "dog5": "dog",
    "dog6": "dog",
    "dog7": "dog",
    "dog8": "dog",
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal",
    "monster_toy": "toy",
    "pink_sunglasses": "glasses",
    "poop_emoji": "toy",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "teapot": "teapot",
    "vase": "vase",
    "wolf_plushie": "stuffed animal",
}
LIVE_CLASSES = frozenset({"cat", "dog"})


def filled(template: str, rare_word: str, class_noun: str) -> str:
    """The prompt of a template. Words without braces are put in as they are."""
    return template.replace("{0}", rare_word).replace("{1}", class_noun)


def without_rare_word(template: str, class_noun: str) -> str:
    """The prompt of a template without the rare word, which means nothing to a CLIP judge: "a dog in the
    snow"."""
    return " ".join(filled(template, " ", class_noun).split())


def read_prompts(path: Path) -> tuple[str, ...]:
    """The templates of --prompts_file, one on each line. Empty lines and lines that start with # are skipped.

    Raises UserError if the file cannot be read, has no template, or has one twice or without {0} or {1}.
    """
    where = f"--prompts_file {shown(path)}"
    lines: dict[str, int] = {}
    for number, line in enumerate(reader.lines(reader.read_text(path, where)), 1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        if "{0}" not in template or "{1}" not in template:
            raise UserError(
                f"{where}: line {number} must have {{0}}, where the rare word goes, and {{1}}, where the"
                f' class noun goes, as in "a {{0}} {{1}} in the snow"; got {shortened(template)!r}'
            )
        if template in lines:
            raise UserError(f"{where}: line {number} is line {lines[template]} again; remove one")
        lines[template] = number
    if not lines:
        raise UserError(f"{where}: no prompt in it")
    return tuple(lines)
