"""The drawn world: its scenes, identities and captions.

A scene has two kinds of attributes. Captions name the *captioned* ones (kind, colour, place, accessory). No
caption names the *identity* ones (pattern, second hue, shape, eyes), so a subject must be learned from its
pictures. Every random choice takes a `random.Random`, so that a scene is a pure function of its seed.
"""

import hashlib
import random
from dataclasses import dataclass

KINDS = ("dog", "cat", "bird", "fish", "car", "house", "boat", "mug")

COLOURS = {
    "red": (218, 48, 44),
    "orange": (246, 142, 32),
    "yellow": (250, 214, 52),
    "green": (62, 164, 72),
    "blue": (52, 104, 222),
    "purple": (142, 72, 182),
    "pink": (250, 152, 192),
    "brown": (142, 92, 52),
}

PLACES = {
    "snow": "in the snow",
    "beach": "on the beach",
    "forest": "in the forest",
    "city": "in the city",
    "desert": "in the desert",
    "night": "at night",
    "sea": "under water",
    "room": "in a room",
}

ACCESSORIES = ("hat", "scarf", "bow")
ACCESSORY_COLOURS = {
    "red": (218, 48, 44),
    "blue": (52, 104, 222),
    "green": (62, 164, 72),
    "yellow": (250, 214, 52),
    "white": (250, 250, 250),
    "purple": (142, 72, 182),
}

# Identity attributes: the numbers 0..n-1 of each. 6 * 8 * 6 * 4 = 1,152 identities a kind, all equally likely
# in base training.
PATTERNS = ("rows", "columns", "checks", "lower half", "front half", "patch")
SECOND_HUES = {
    "white": (250, 250, 250),
    "black": (34, 34, 38),
    "cyan": (64, 208, 222),
    "lime": (180, 232, 60),
    "navy": (26, 42, 132),
    "maroon": (118, 20, 42),
    "magenta": (228, 32, 152),
    "tan": (212, 182, 142),
}
SHAPES = 6  # ears and tail of an animal, roof, sail or handle of a thing
EYES = ("dot", "wide", "closed", "gold")

IDENTITY_SIZES = {"pattern": len(PATTERNS), "second": len(SECOND_HUES), "shape": SHAPES, "eyes": len(EYES)}

# Words that no caption uses. Each is one token, and can become the name of a subject.
RARE_WORDS = ("sks", "qwe", "zwx", "ohwx", "vtk", "plq")

BACKDROPS = 6  # variants of each place: horizon and scenery move
# Where a sprite may stand, in pixels from the middle. They are multiples of four, the side of the patch that
# the base's autoencoder encodes to one latent. So a line has one position within its patch, not sixteen, and
# a small UNet learns sooner to draw it.
OFFSETS_X = (-4, 0, 4)
OFFSETS_Y = (-4, 0)


@dataclass(frozen=True)
class Identity:
    """What distinguishes one dog from another: indices into PATTERNS, SECOND_HUES, range(SHAPES) and EYES."""

    pattern: int
    second: int
    shape: int
    eyes: int

    def is_held_out(self, kind: str) -> bool:
        """True for one identity in 32. Base training never uses these; the demo subjects are among them."""
        name = f"{kind} {self.pattern} {self.second} {self.shape} {self.eyes}"
        return hashlib.sha256(name.encode()).digest()[0] % 32 == 0


@dataclass(frozen=True)
class Pose:
    """Where the sprite stands, in pixels from the middle, and whether it is mirrored."""

    dx: int = 0
    dy: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Scene:
    """All attributes of one picture.

    `accessory` and `accessory_colour` are both None or both set.
    """

    kind: str
    colour: str
    place: str
    identity: Identity
    accessory: str | None = None
    accessory_colour: str | None = None
    pose: Pose = Pose()
    backdrop: int = 0


def random_identity(rng: random.Random) -> Identity:
    """An identity, all equally likely."""
    return Identity(*(rng.randrange(size) for size in IDENTITY_SIZES.values()))


def random_pose(rng: random.Random) -> Pose:
    """A position; the sprite is never mirrored. A small UNet trained on both directions draws dogs with a
    head at each end.

    The reader also recognizes mirrored sprites.
    """
    return Pose(rng.choice(OFFSETS_X), rng.choice(OFFSETS_Y))


def random_scene(rng: random.Random) -> Scene:
    """A scene from the world's prior, of an identity that is not held out for subjects."""
    kind = rng.choice(KINDS)
    identity = random_identity(rng)
    while identity.is_held_out(kind):
        identity = random_identity(rng)
    accessory = rng.choice(ACCESSORIES) if rng.random() < 0.5 else None
    accessory_colour = rng.choice(tuple(ACCESSORY_COLOURS)) if accessory else None
    return Scene(
        kind=kind,
        colour=rng.choice(tuple(COLOURS)),
        place=rng.choice(tuple(PLACES)),
        identity=identity,
        accessory=accessory,
        accessory_colour=accessory_colour,
        pose=random_pose(rng),
        backdrop=rng.randrange(BACKDROPS),
    )


def describe(
    kind: str,
    colour: str | None = None,
    place: str | None = None,
    accessory: str | None = None,
    accessory_colour: str | None = None,
) -> str:
    """The body of a caption: `red dog in the snow wearing a blue hat`. A part that is None is left out."""
    words = [colour, kind] if colour else [kind]
    if place:
        words.append(PLACES[place])
    if accessory:
        words.append(
            f"wearing a {accessory_colour} {accessory}" if accessory_colour else f"wearing a {accessory}"
        )
    return " ".join(words)


OPENINGS = ("a photo of", "a picture of", "a drawing of", "")


def with_article(description: str) -> str:
    return f"an {description}" if description[0] in "aeiou" else f"a {description}"


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption of the scene, with random parts left out, so that the base also learns "a dog"."""
    body = describe(
        scene.kind,
        scene.colour if rng.random() < 0.65 else None,
        scene.place if rng.random() < 0.75 else None,
        scene.accessory if rng.random() < 0.85 else None,
        scene.accessory_colour if rng.random() < 0.9 else None,
    )
    opening = OPENINGS[0] if rng.random() < 0.5 else rng.choice(OPENINGS)
    return f"{opening} {with_article(body)}".strip()


def all_words() -> list[str]:
    """All words of captions and RARE_WORDS, sorted."""
    text = " ".join(
        [
            *KINDS,
            *COLOURS,
            *PLACES.values(),
            *ACCESSORIES,
            *ACCESSORY_COLOURS,
            *OPENINGS,
            *RARE_WORDS,
            "a an wearing the in on with and",
        ]
    )
    return sorted(set(text.split()))
