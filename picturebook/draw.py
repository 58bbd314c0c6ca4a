"""Draws the pictures of the drawn world with Pillow.

A picture is a backdrop and a stack of flat layers, each an 8-bit coverage mask and a colour. A mask is drawn
at four times the size and averaged down, once per (layer, mirror), and moved by whole pixels. So a picture
takes a few pastes only, and the reader can compare the same masks with a picture.

Shapes are given in units of one pixel of a 64 x 64 picture, facing right, standing on y = 57.
"""

import functools
import random

from PIL import Image, ImageChops, ImageDraw

from picturebook.world import ACCESSORY_COLOURS, BACKDROPS, COLOURS, EYES, PATTERNS, SECOND_HUES, Scene

SIDE = 64
SUPERSAMPLING = 4
GROUND = 57.0
INK = (24, 22, 28)
WHITE = (252, 252, 252)
GOLD = (255, 200, 30)
STRAW = (244, 176, 60)

Rgb = tuple[int, int, int]
Layer = tuple[Image.Image, Rgb]

# A shape is ("ellipse", x0, y0, x1, y1), ("box", x0, y0, x1, y1), ("poly", x, y, x, y, ...)
# or ("line", width, x, y, x, y, ...).
Shape = tuple


def _poly(*points: tuple[float, float]) -> Shape:
    return ("poly", *(value for point in points for value in point))


# Ears, tails, roofs, sails and handles: six of each, the `shape` of an identity. All change the outline.
_DOG_SHAPES = (
    (
        _poly((41, 20), (35, 24), (33, 38), (39, 36), (44, 26)),
        ("line", 4, 12, 38, 5, 28),
    ),  # hanging ear, tail up
    (_poly((38, 24), (37, 8), (47, 19)), ("line", 4, 12, 40, 4, 46)),  # pricked ear, tail down
    (("ellipse", 33, 9, 45, 23), ("ellipse", 3, 30, 13, 40)),  # round ear, pompom
    (
        _poly((40, 22), (27, 16), (29, 28), (40, 28)),
        ("line", 4, 13, 37, 5, 37, 5, 28, 9, 26),
    ),  # ear blown back, hooked tail
    (
        _poly((37, 24), (33, 8), (40, 17)),
        _poly((43, 18), (49, 7), (51, 20)),
        _poly((13, 34), (3, 24), (3, 38)),
    ),  # two ears, brush tail
    (("line", 7, 42, 20, 34, 26, 34, 46), ("line", 3, 12, 36, 2, 36)),  # very long ear, straight thin tail
)
_CAT_SHAPES = (
    (
        _poly((20, 24), (19, 9), (31, 17)),
        _poly((44, 24), (45, 9), (33, 17)),
        ("line", 4, 44, 53, 54, 50, 54, 38),
    ),
    (("ellipse", 14, 10, 27, 23), ("ellipse", 37, 10, 50, 23), ("line", 4, 44, 54, 57, 54)),
    (_poly((22, 22), (8, 14), (24, 32)), _poly((42, 22), (56, 14), (40, 32)), ("ellipse", 46, 44, 58, 56)),
    (
        _poly((22, 22), (24, 4), (30, 18)),
        _poly((42, 22), (40, 4), (34, 18)),
        ("line", 4, 44, 53, 50, 46, 57, 40),
    ),
    (
        _poly((19, 26), (13, 16), (28, 15)),
        _poly((45, 26), (51, 16), (36, 15)),
        _poly((44, 55), (60, 57), (56, 45)),
    ),
    (
        _poly((18, 26), (9, 35), (22, 36)),
        _poly((46, 26), (55, 35), (42, 36)),
        ("line", 4, 44, 54, 51, 52, 51, 40, 57, 40),
    ),
)
_BIRD_SHAPES = (
    (_poly((38, 18), (36, 7), (43, 15)), _poly((18, 40), (5, 34), (6, 46))),
    (("ellipse", 35, 7, 43, 16), ("line", 3, 18, 42, 4, 50)),
    (_poly((36, 19), (28, 8), (42, 14)), _poly((20, 36), (4, 24), (6, 38))),
    (_poly((36, 17), (34, 8), (39, 12), (42, 6), (44, 13), (49, 9), (47, 17)), ("ellipse", 4, 38, 18, 48)),
    (("line", 3, 38, 16, 32, 9, 26, 12), _poly((19, 38), (3, 36), (9, 42), (3, 48))),
    (("box", 36, 10, 47, 16), _poly((20, 42), (4, 42), (4, 56), (16, 50))),
)
_FISH_SHAPES = (
    (_poly((17, 37), (4, 25), (4, 49)), _poly((26, 28), (34, 15), (42, 28))),
    (_poly((17, 37), (3, 24), (9, 37), (3, 50)), ("ellipse", 24, 18, 44, 34)),
    (("ellipse", 2, 28, 18, 46), _poly((24, 30), (20, 17), (40, 28))),
    (("box", 5, 27, 16, 47), ("box", 26, 19, 40, 30)),
    (
        _poly((18, 37), (2, 33), (2, 41)),
        _poly((24, 30), (24, 17), (30, 25), (34, 15), (38, 25), (44, 18), (44, 30)),
    ),
    (_poly((17, 36), (4, 18), (11, 34)), _poly((17, 38), (4, 56), (11, 40)), ("line", 4, 34, 28, 26, 16)),
)
_CAR_SHAPES = (
    (_poly((14, 38), (21, 24), (43, 24), (51, 38)),),  # saloon
    (_poly((6, 38), (6, 21), (43, 21), (50, 38)),),  # van
    (_poly((32, 38), (32, 22), (46, 22), (52, 38)), ("box", 5, 33, 11, 39)),  # pick-up
    (("ellipse", 12, 17, 48, 56),),  # bubble
    (_poly((38, 38), (31, 26), (34, 25), (42, 38)), ("line", 4, 7, 38, 4, 28, 14, 28)),  # open, with a wing
    (_poly((18, 38), (18, 16), (44, 16), (44, 38)), ("box", 12, 14, 50, 19)),  # tall, with a rack
)
_HOUSE_SHAPES = (
    (_poly((8, 32), (32, 12), (56, 32)),),
    (("box", 9, 22, 55, 32),),
    (("ellipse", 12, 12, 52, 50),),
    (_poly((12, 32), (24, 6), (36, 32)), _poly((30, 32), (43, 14), (54, 32))),
    (("box", 12, 16, 20, 34), ("box", 28, 16, 36, 34), ("box", 44, 16, 52, 34), ("box", 12, 26, 52, 34)),
    (_poly((6, 32), (14, 14), (50, 14), (58, 32)),),
)
_BOAT_SHAPES = (
    (_poly((31, 10), (31, 38), (10, 38)),),
    (_poly((31, 10), (31, 38), (10, 38)), _poly((34, 16), (34, 38), (53, 38))),
    (("box", 16, 14, 46, 34),),
    (("ellipse", 18, 8, 52, 36),),
    (("box", 24, 26, 48, 40), ("box", 30, 12, 38, 28)),
    (_poly((31, 8), (31, 22), (54, 15)), ("box", 12, 30, 30, 40)),
)
_MUG_SHAPES = (
    (("line", 4, 44, 30, 55, 30, 55, 46, 44, 46),),
    (("line", 4, 44, 32, 52, 28, 57, 38, 52, 48, 44, 44),),
    (("line", 4, 44, 28, 58, 24), ("line", 4, 20, 28, 6, 24)),
    (("line", 4, 44, 30, 53, 38, 44, 46), ("line", 4, 20, 30, 11, 38, 20, 46)),
    (_poly((18, 30), (6, 20), (4, 24), (18, 44)), ("line", 4, 44, 30, 55, 36, 44, 48)),
    (("line", 4, 44, 32, 58, 32), ("line", 4, 56, 32, 56, 44), ("ellipse", 24, 14, 40, 28)),
)


class _Kind:
    """The parts of a kind.

    `body`, `front` and the identity's one of `shapes` have the captioned colour. The pattern in the second
    hue is drawn within `coat`. `trims` have fixed colours. `eyes` are centres, `eye` is their radius. `hat`,
    `scarf` and `bow` say where an accessory is drawn.
    """

    def __init__(self, *, body, coat, front=(), shapes, trims=(), eyes, eye=4.2, hat, scarf, bow):
        self.body, self.coat, self.front, self.shapes, self.trims = body, coat, front, shapes, trims
        self.eyes, self.eye, self.hat, self.scarf, self.bow = eyes, eye, hat, scarf, bow


_KINDS = {
    "dog": _Kind(
        body=(("ellipse", 8, 30, 46, 52), ("box", 11, 44, 18, 57), ("box", 35, 44, 42, 57)),
        coat=(("ellipse", 8, 30, 46, 52),),
        front=(("ellipse", 36, 15, 56, 35), ("ellipse", 48, 23, 60, 34)),
        shapes=_DOG_SHAPES,
        trims=((INK, ("ellipse", 56, 23, 61, 28)),),
        eyes=((47.5, 23.5),),
        hat=(46.5, 16, 15),
        scarf=(36, 34, 49, 38, 40),
        bow=(23, 31),
    ),
    "cat": _Kind(
        body=(("ellipse", 17, 31, 47, 58),),
        coat=(("ellipse", 17, 31, 47, 58),),
        front=(("ellipse", 17, 13, 47, 37),),
        shapes=_CAT_SHAPES,
        trims=(((236, 120, 140), _poly((29.5, 29), (34.5, 29), (32, 32.5))),),
        eyes=((25, 24), (39, 24)),
        eye=4.4,
        hat=(32, 14.5, 16),
        scarf=(21, 37, 43, 37, 38),
        bow=(32, 54),
    ),
    "bird": _Kind(
        body=(("ellipse", 13, 27, 47, 53),),
        coat=(("ellipse", 13, 27, 47, 53),),
        front=(("ellipse", 31, 14, 51, 34),),
        shapes=_BIRD_SHAPES,
        trims=(
            (STRAW, _poly((49, 21), (60, 26), (49, 29))),
            (STRAW, ("line", 2.4, 26, 51, 26, 58, 30, 58)),
            (STRAW, ("line", 2.4, 35, 51, 35, 58, 39, 58)),
        ),
        eyes=((42.5, 22.5),),
        hat=(41, 15.5, 14),
        scarf=(29, 32, 47, 33, 34),
        bow=(21, 29),
    ),
    "fish": _Kind(
        body=(("ellipse", 12, 24, 58, 51),),
        coat=(("ellipse", 14, 24, 40, 51),),
        front=(
            _poly((40, 25), (48, 26.5), (56, 33), (57.6, 38), (55, 43), (48, 48.5), (40, 50.5), (42, 38)),
        ),
        shapes=_FISH_SHAPES,
        trims=((INK, ("line", 1.6, 51, 44, 56, 42.5)),),
        eyes=((48.5, 34.5),),
        hat=(46, 26.5, 15),
        scarf=(38, 28, 40, 49, 40),
        bow=(25, 48),
    ),
    "car": _Kind(
        body=(_poly((5, 36), (55, 36), (60, 42), (60, 51), (4, 51), (4, 39)),),
        coat=(_poly((5, 36), (42, 36), (42, 51), (4, 51), (4, 39)), ("box", 4, 14, 42, 38)),
        shapes=_CAR_SHAPES,
        trims=(
            (INK, ("ellipse", 9, 44, 22, 57)),
            (INK, ("ellipse", 40, 44, 53, 57)),
            ((190, 190, 196), ("ellipse", 13, 48, 18, 53)),
            ((190, 190, 196), ("ellipse", 44, 48, 49, 53)),
        ),
        eyes=((52.5, 40),),
        hat=(34, 20, 15),
        scarf=(26, 35, 26, 51, 30),
        bow=(11, 37),
    ),
    "house": _Kind(
        body=(("box", 13, 31, 51, 57),),
        coat=(("box", 13, 31, 51, 57),),
        shapes=_HOUSE_SHAPES,
        trims=(((92, 60, 40), ("box", 28, 47, 36, 57)),),
        eyes=((23, 39), (41, 39)),
        eye=4.4,
        hat=(32, 14, 16),
        scarf=(13, 33, 51, 33, 16),
        bow=(32, 44),
    ),
    "boat": _Kind(
        body=(_poly((6, 40), (60, 40), (50, 56), (15, 56)),),
        coat=(_poly((6, 40), (42, 40), (42, 56), (15, 56)), ("box", 4, 6, 42, 40)),
        shapes=_BOAT_SHAPES,
        trims=(((110, 76, 50), ("line", 2.6, 32, 8, 32, 40)),),
        eyes=((49, 46),),
        hat=(32, 11, 15),
        scarf=(24, 40, 24, 55, 28),
        bow=(12, 43),
    ),
    "mug": _Kind(
        body=(_poly((17, 24), (47, 24), (44, 57), (20, 57)),),
        coat=(_poly((17, 24), (47, 24), (44, 57), (20, 57)),),
        shapes=_MUG_SHAPES,
        trims=(((96, 58, 38), ("ellipse", 19, 21.5, 45, 27)),),
        eyes=((26, 34), (38, 34)),
        eye=4.4,
        hat=(32, 22, 16),
        scarf=(19, 43, 45, 43, 40),
        bow=(32, 52),
    ),
}


# Where patterns are cut, on the grid of four pixels: (y of the lower half, x of the front half, left and top
# of the patch).
_CUTS = {
    "dog": (40, 28, 16, 32),
    "cat": (44, 32, 24, 40),
    "bird": (40, 28, 20, 32),
    "fish": (36, 28, 20, 28),
    "car": (40, 24, 16, 32),
    "house": (44, 32, 24, 32),
    "boat": (44, 24, 20, 36),
    "mug": (40, 32, 24, 40),
}


def _pattern_shapes(kind: str, pattern: int) -> tuple[Shape, ...]:
    """The boxes of a pattern. They are on a grid of four pixels, as the offsets are, so that each patch of
    the autoencoder shows one flat colour or an outline.
    """
    middle_y, middle_x, left, top = _CUTS[kind]
    cells = [(x, y) for x in range(0, SIDE, 4) for y in range(0, SIDE, 4)]

    def box(x, y, width=4, height=4):
        return (
            "box",
            x,
            y,
            x + width - 1 / SUPERSAMPLING,
            y + height - 1 / SUPERSAMPLING,
        )  # Pillow's boxes include their last row

    match PATTERNS[pattern]:
        case "rows":
            return tuple(box(0, y, SIDE) for y in range(0, SIDE, 8))
        case "columns":
            return tuple(box(x, 0, 4, SIDE) for x in range(0, SIDE, 8))
        case "checks":
            return tuple(box(x, y) for x, y in cells if (x + y) % 8 == 0)
        case "lower half":
            return (box(0, middle_y, SIDE, SIDE),)
        case "front half":
            return (box(middle_x, 0, SIDE, SIDE),)
        case _:  # patch
            return (box(left, top, 16, 12),)


def _eye_shapes(kind: _Kind, style: int) -> tuple[tuple[Rgb, Shape], ...]:
    shapes: list[tuple[Rgb, Shape]] = []
    for x, y in kind.eyes:
        r = kind.eye
        ring = (INK, ("ellipse", x - r - 0.8, y - r - 0.8, x + r + 0.8, y + r + 0.8))
        match EYES[style]:
            case "dot":
                shapes += [(INK, ("ellipse", x - 2.7, y - 2.7, x + 2.7, y + 2.7))]
            case "wide":
                shapes += [
                    ring,
                    (WHITE, ("ellipse", x - r, y - r, x + r, y + r)),
                    (INK, ("ellipse", x - 1, y - 1.8, x + 2.6, y + 1.8)),
                ]
            case "closed":
                shapes += [
                    (INK, ("line", 2.4, x - r, y - 1, x - r / 2, y + 1.6, x + r / 2, y + 1.6, x + r, y - 1))
                ]
            case _:  # gold
                shapes += [
                    ring,
                    (GOLD, ("ellipse", x - r, y - r, x + r, y + r)),
                    (INK, ("box", x - 0.9, y - r, x + 0.9, y + r)),
                ]
    return tuple(shapes)


def _accessory_shapes(kind: _Kind, accessory: str) -> tuple[Shape, ...]:
    if accessory == "hat":
        x, y, width = kind.hat
        return (
            ("box", x - width / 2, y - 1.5, x + width / 2, y + 2),
            ("box", x - width / 3.2, y - 9.5, x + width / 3.2, y),
        )
    if accessory == "scarf":
        x0, y0, x1, y1, hang = kind.scarf
        end = min(y0 + 16, GROUND) if y0 == y1 or abs(y1 - y0) < 8 else y1
        top = y0 if abs(y1 - y0) < 8 else (y0 + y1) / 2
        tail = (
            ("line", 5, hang, top, hang, end) if abs(y1 - y0) < 8 else ("line", 5, x0, top, x0 - 11, top + 3)
        )
        return (("line", 5.5, x0, y0, x1, y1), tail)
    x, y = kind.bow
    return (
        _poly((x, y), (x - 8, y - 5.5), (x - 8, y + 5.5)),
        _poly((x, y), (x + 8, y - 5.5), (x + 8, y + 5.5)),
        ("ellipse", x - 2.6, y - 2.6, x + 2.6, y + 2.6),
    )


def _large_mask(shapes: tuple[Shape, ...]) -> Image.Image:
    """Coverage of the union of `shapes` at the supersampled size."""
    k = SUPERSAMPLING
    mask = Image.new("L", (SIDE * k, SIDE * k))
    pen = ImageDraw.Draw(mask)

    for name, *units in shapes:
        values = [unit * k for unit in units]
        if name == "ellipse":
            pen.ellipse(values, fill=255)
        elif name == "box":
            pen.rectangle(values, fill=255)
        elif name == "poly":
            pen.polygon(values, fill=255)
        else:
            width, *points = values
            pairs = list(zip(points[::2], points[1::2], strict=True))
            pen.line(pairs, fill=255, width=round(width), joint="curve")
            r = width / 2
            for x, y in pairs:  # round ends and joints
                pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return mask


def _finish(mask: Image.Image, flip: bool) -> Image.Image:
    small = mask.reduce(SUPERSAMPLING)
    return small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small


def _grown(mask: Image.Image, pixels: float) -> Image.Image:
    """The mask with a square border of `pixels` added. As Pillow's MaxFilter, but over ten times as fast."""
    radius = round(pixels * SUPERSAMPLING)
    for along_x in (True, False):
        grown = mask
        for shift in (*range(-radius, 0), *range(1, radius + 1)):
            x, y = (shift, 0) if along_x else (0, shift)
            grown = ImageChops.lighter(grown, mask.crop((x, y, x + mask.width, y + mask.height)))
        mask = grown
    return mask


@functools.cache
def sprite_masks(kind: str, shape: int, flip: bool) -> dict[str, Image.Image]:
    """Coverage masks, 64 x 64, of a kind with one shape: `outline` (the silhouette and its ink line),
    `body` and `front`.
    """
    k = _KINDS[kind]
    body = _large_mask((*k.body, *k.shapes[shape]))
    front = _large_mask(k.front)
    trims = _large_mask(tuple(trim for _, trim in k.trims))
    silhouette = functools.reduce(ImageChops.lighter, (body, front, trims))
    # A thin ink line where the head covers the coat separates the head from a patterned body.
    rim = ImageChops.darker(_grown(front, 0.75), body) if k.front else front
    masks = {"outline": _grown(silhouette, 1.25), "body": body, "rim": rim, "front": front}
    return {name: _finish(mask, flip) for name, mask in masks.items()}


@functools.cache
def pattern_mask(kind: str, shape: int, pattern: int, flip: bool) -> Image.Image:
    """Coverage of the second hue: the pattern within the coat."""
    k = _KINDS[kind]
    coat = ImageChops.darker(_large_mask(k.coat), _large_mask((*k.body, *k.shapes[shape])))
    return _finish(ImageChops.darker(coat, _large_mask(_pattern_shapes(kind, pattern))), flip)


@functools.cache
def trim_layers(kind: str, flip: bool) -> tuple[Layer, ...]:
    return tuple((_finish(_large_mask((shape,)), flip), colour) for colour, shape in _KINDS[kind].trims)


@functools.cache
def eye_layers(kind: str, eyes: int, flip: bool) -> tuple[Layer, ...]:
    return tuple(
        (_finish(_large_mask((shape,)), flip), colour) for colour, shape in _eye_shapes(_KINDS[kind], eyes)
    )


@functools.cache
def accessory_masks(kind: str, accessory: str, flip: bool) -> tuple[Image.Image, Image.Image]:
    """(ink outline, fill) coverage of a worn accessory."""
    fill = _large_mask(_accessory_shapes(_KINDS[kind], accessory))
    return _finish(_grown(fill, 1.0), flip), _finish(fill, flip)


def layers(scene: Scene) -> list[Layer]:
    """The sprite's layers from back to front, before they are moved by (dx, dy)."""
    flip, identity = scene.pose.flip, scene.identity
    masks = sprite_masks(scene.kind, identity.shape, flip)
    colour = COLOURS[scene.colour]
    second = tuple(SECOND_HUES.values())[identity.second]
    stack: list[Layer] = [
        (masks["outline"], INK),
        (masks["body"], colour),
        (pattern_mask(scene.kind, identity.shape, identity.pattern, flip), second),
        (masks["rim"], INK),
        (masks["front"], colour),
        *trim_layers(scene.kind, flip),
        *eye_layers(scene.kind, identity.eyes, flip),
    ]
    if scene.accessory and scene.accessory_colour:
        outline, fill = accessory_masks(scene.kind, scene.accessory, flip)
        stack += [(outline, INK), (fill, ACCESSORY_COLOURS[scene.accessory_colour])]
    return stack


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 64 x 64."""
    picture = backdrop(scene.place, scene.backdrop).copy()
    for mask, colour in layers(scene):
        picture.paste(colour, (scene.pose.dx, scene.pose.dy), mask)
    return picture


@functools.cache
def backdrop(place: str, variant: int) -> Image.Image:
    """A place without a sprite: RGB, 64 x 64. `variant` (0..BACKDROPS-1) moves horizon and scenery."""
    if not 0 <= variant < BACKDROPS:
        raise ValueError(f"backdrop variant must be in 0..{BACKDROPS - 1}, got {variant}")
    rng = random.Random(f"{place} {variant}")
    horizon = (38, 42, 46)[variant % 3]
    brush = _Brush(rng)
    box, disc, poly, scattered = brush.box, brush.disc, brush.poly, brush.scattered
    side = rng.choice((9, 55))  # where the sun, the moon or the lamp stands
    match place:
        case "snow":
            box(0, 0, 64, 64, (176, 208, 236))
            box(0, horizon, 64, 64, (244, 248, 252))
            for x, y in scattered(16, 2, 62):
                disc(x, y, 1.5, (255, 255, 255))
        case "beach":
            box(0, 0, 64, 64, (160, 220, 248))
            box(0, horizon - 6, 64, 64, (84, 168, 210))
            box(0, horizon, 64, 64, (244, 226, 168))
            disc(side, 9, 6, (255, 240, 150))
        case "forest":
            box(0, 0, 64, 64, (120, 172, 120))
            for x in (3, 17, 33, 47, 61):
                x += rng.uniform(-3, 3)
                box(x - 2.4, 0, x + 2.4, horizon, (108, 84, 62))
            box(0, horizon, 64, 64, (158, 196, 104))
        case "city":
            box(0, 0, 64, 64, (204, 208, 216))
            brush.houses(horizon)
            box(0, horizon, 64, 64, (112, 114, 122))
        case "desert":
            box(0, 0, 64, 64, (255, 222, 178))
            poly((236, 186, 122), (0, horizon), (14 + rng.uniform(-6, 6), horizon - 10), (34, horizon))
            poly((236, 186, 122), (28, horizon), (48 + rng.uniform(-6, 6), horizon - 14), (64, horizon))
            box(0, horizon, 64, 64, (222, 164, 96))
        case "night":
            box(0, 0, 64, 64, (36, 40, 84))
            for x, y in scattered(14, 1, horizon - 2):
                disc(x, y, 1.1, (240, 240, 200))
            disc(side, 9, 6, (236, 236, 216))
            box(0, horizon, 64, 64, (66, 72, 96))
        case "sea":
            box(0, 0, 64, 64, (84, 190, 196))
            for x, y in scattered(10, 2, 60):
                disc(x, y, 2.2, (168, 228, 230))
            box(0, horizon + 10, 64, 64, (200, 206, 160))
        case "room":
            box(0, 0, 64, 64, (236, 200, 204))
            box(side - 8, 5, side + 8, 21, (250, 250, 244))
            box(side - 6.5, 6.5, side + 6.5, 19.5, (176, 214, 240))
            box(0, horizon, 64, 64, (188, 138, 100))
            for y in range(horizon + 5, 64, 6):
                box(0, y, 64, y + 1, (164, 116, 82))
        case _:
            raise ValueError(f"no place {place!r}")
    return brush.picture.reduce(SUPERSAMPLING)


class _Brush:
    """Draws a picture SUPERSAMPLING times as large as its coordinates. Random positions come from `rng`."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.picture = Image.new("RGB", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
        self.pen = ImageDraw.Draw(self.picture)

    def box(self, x0, y0, x1, y1, colour):
        k = SUPERSAMPLING
        self.pen.rectangle((x0 * k, y0 * k, x1 * k, y1 * k), fill=colour)

    def disc(self, x, y, r, colour):
        k = SUPERSAMPLING
        self.pen.ellipse(((x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k), fill=colour)

    def poly(self, colour, *points):
        self.pen.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=colour)

    def scattered(self, count, low, high):
        """Random points between two heights."""
        return [(self.rng.uniform(0, SIDE), self.rng.uniform(low, high)) for _ in range(count)]

    def houses(self, horizon):
        """A row of houses of random heights, with lit windows."""
        for x in range(0, 64, 11):
            top = self.rng.uniform(6, 26)
            self.box(x, top, x + 9, horizon, (150, 154, 168))
            for row in range(int(top) + 3, horizon - 3, 6):
                self.box(x + 2, row, x + 4, row + 2.5, (238, 226, 160))
                self.box(x + 5.5, row, x + 7.5, row + 2.5, (238, 226, 160))
