"""What may be wrong with a folder of photos: findings for the user, the most important first. Nothing is
changed: the user decides."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from dreambooth.data import photo_looks, tags
from dreambooth.data.crops import Crops
from dreambooth.data.photo_looks import Look
from dreambooth.data.photos import Photo
from dreambooth.io.errors import few, shown

_MOST_ASPECT = 2.0  # longer side by shorter one: a square shows less than half of such a photo
_MOST_CUT = 0.1  # share of the subject's area that a crop may leave out
_LEAST_SUBJECT = 0.1  # share of the crop's area that the subject should have in most photos


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is probably wrong, with the photos that it is about."""

    rank: int
    """1 spoils what is learned, 2 costs likeness, 3 is for your information."""
    title: str
    text: str
    """What was found."""
    advice: str
    photos: tuple[str, ...]
    """File names."""
    is_of_captions: bool = False

    @property
    def note(self) -> str:
        """The finding in one line, with the first names."""
        return f"{self.text} ({few(self.photos)}): {self.advice}"


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """The findings by rank, and within a rank those of most photos first."""
    return sorted(findings, key=lambda finding: (finding.rank, -len(finding.photos)))


def of_looks(looks: Mapping[str, Look]) -> list[Finding]:
    """Photos that show the same picture, or its mirror image, and blurred ones. `looks` are by file name."""
    findings = []
    pairs: dict[str, list[tuple[str, str]]] = {"same": [], "mirrored": []}
    for (name, look), (other, other_look) in itertools.combinations(looks.items(), 2):
        if (relation := photo_looks.same_picture(look, other_look)) is not None:
            pairs[relation].append((name, other))
    findings += [
        Finding(
            2,
            "Nearly the same picture",
            f"{len(names)} photos are nearly the same picture, which counts {len(names)} times",
            "keep one of them",
            names,
        )
        for names in _groups(pairs["same"])
    ]
    findings += [
        Finding(
            2,
            "Mirror images",
            "2 photos are mirror images of each other",
            "remove one, unless the subject looks the same both ways; --random_flip mirrors in training",
            (name, other),
        )
        for name, other in pairs["mirrored"]
    ]
    blurred = tuple(name for name, look in looks.items() if look.blur > photo_looks.MOST_BLUR)
    if blurred:
        findings.append(
            Finding(
                2,
                "Blurred",
                f"{_of(blurred, looks)} are blurred, also at {photo_looks.SHARP_SIDE} pixels",
                "the adapter learns the blur: use sharper ones",
                blurred,
            )
        )
    return findings


def of_class_images(looks: Mapping[str, Look], class_looks: Mapping[str, Look]) -> list[Finding]:
    """Photos that are also among the class images, which must not show the subject."""
    same = [
        (name, other)
        for name, look in looks.items()
        for other, other_look in class_looks.items()
        if photo_looks.same_picture(look, other_look)
    ]
    if not same:
        return []
    names = ", ".join(f"{shown(other)} is {shown(name)}" for name, other in same[:3])
    return [
        Finding(
            1,
            "Class images that show the subject",
            f"{len({other for _, other in same})} class images are photos of the subject: {names}",
            "remove them from the class images",
            tuple(dict.fromkeys(name for name, _ in same)),
        )
    ]


def of_sizes(pictures: Sequence[Photo], crops: Crops, *, is_square: bool) -> list[Finding]:
    """Photos that are smaller than the training resolution, and, where crops are squares, long ones."""
    findings = []
    small = tuple(photo.path.name for photo in pictures if min(photo.size) < crops.resolution)
    if small:
        least = min(min(photo.size) for photo in pictures)
        findings.append(
            Finding(
                2 if least * 1.5 < crops.resolution else 3,
                "Smaller than the resolution",
                f"{_of(small, pictures)} are smaller than --resolution {crops.resolution} and are enlarged, "
                f"by up to {crops.resolution / least:.1f}",
                f"use larger ones, or --resolution {max(8, least // 8 * 8)}",
                small,
            )
        )
    long = tuple(photo.path.name for photo in pictures if max(photo.size) > _MOST_ASPECT * min(photo.size))
    if is_square and long:
        findings.append(
            Finding(
                2,
                "Long photos",
                f"{_of(long, pictures)} are over {_MOST_ASPECT:.0f} times as long as wide, so that a square "
                "crop shows less than half of each",
                "cut them around the subject",
                long,
            )
        )
    return findings


def of_masks(
    masked_photos: Iterable[tuple[Photo, Image.Image]], crops: Crops, *, is_square: bool
) -> list[Finding]:
    """Photos whose crop from the middle cuts the subject off, and photos in which it is small. Each photo has
    a mask of its shape, white where the subject is; those with an empty mask are left out."""
    cut, small, masked = [], [], []
    for photo, image in masked_photos:
        size = crops.resized_size(photo.size)
        mask = np.asarray(image.convert("L").resize(size)) > 127
        left, top, right, bottom = crops.box(crops.middle_corner(photo.size))
        shown_part = mask[top:bottom, left:right] if is_square else mask
        if not mask.any():
            continue
        masked.append(photo.path.name)
        if shown_part.sum() < (1 - _MOST_CUT) * mask.sum():
            cut.append(photo.path.name)
        if shown_part.mean() < _LEAST_SUBJECT:
            small.append(photo.path.name)
    findings = []
    if cut:
        findings.append(
            Finding(
                1,
                "The crop cuts the subject off",
                f"the square from the middle leaves out over {_MOST_CUT:.0%} of the subject in "
                f"{_of(cut, masked)}",
                "cut these photos around the subject",
                tuple(cut),
            )
        )
    if 2 * len(small) > len(masked):
        findings.append(
            Finding(
                1,
                "The subject is small",
                f"the subject has less than {_LEAST_SUBJECT:.0%} of the crop's area in {_of(small, masked)}",
                "take most photos from nearer, or cut them around the subject",
                tuple(small),
            )
        )
    return findings


def of_captions(captions: Mapping[str, str], words: Sequence[str], cut: Sequence[str]) -> list[Finding]:
    """Captions, by file name, that lack all `words` of the subject, and those that are too long for the text
    encoder, whose names are `cut`."""
    findings = []
    lacking = tuple(
        name for name, caption in captions.items() if not any(tags.holds(caption, word) for word in words)
    )
    if words and lacking:
        findings.append(
            Finding(
                1,
                "Captions without the subject's word",
                f"{_of(lacking, captions, 'captions')} do not hold {' or '.join(map(shown, words))}, so that "
                "nothing calls the subject there",
                "put the word into them, or give --trigger_word",
                lacking,
                is_of_captions=True,
            )
        )
    if cut:
        findings.append(
            Finding(
                3,
                "Captions that are too long",
                f"{_of(cut, captions, 'captions')} are longer than the text encoder reads and are cut off",
                "make them shorter",
                tuple(cut),
                is_of_captions=True,
            )
        )
    return findings


def _of(
    part: Sequence[object], everything: Sequence[object] | Mapping[str, object], what: str = "photos"
) -> str:
    """As in "2 of 5 photos"."""
    return f"{len(part)} of {len(everything)} {what}"


def _groups(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The names that pairs connect, each group in order of first mention."""
    groups: list[list[str]] = []
    for pair in pairs:
        touched = [group for group in groups if set(group) & set(pair)]
        groups = [group for group in groups if group not in touched]
        groups.append(list(dict.fromkeys(itertools.chain(*touched, pair))))
    return [tuple(group) for group in groups]
