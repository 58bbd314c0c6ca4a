"""Subjects whose photos all have one background: the ways to train on them that benchmarks/claims.py
compares, and what is expected of them; the limits were written before the first result. Imports no torch."""

import dataclasses

from benchmarks.claims_arms import BASELINE, STEPS, Claim, Part, Term, at_least, at_most

# The place of all photos of a subject; the prompts that are drawn name others.
PLACE_OF = {"dog": "desert", "cat": "night", "bird": "sea", "car": "room"}


@dataclasses.dataclass(frozen=True)
class MaskArm:
    """Runs that differ in subject and seed only. `flags` are None for the base without an adapter."""

    name: str
    label: str
    flags: str | None
    has_masks: bool = False
    """Whether the photos have masks of the subject."""
    has_one_place: bool = True
    """Whether all photos have one background; else each has a place of its own."""


MASK_ARMS = (
    MaskArm("mask-no-adapter", "base, no adapter", None),
    MaskArm("many-places", "a place for each photo, no masks", BASELINE.flags, has_one_place=False),
    MaskArm("one-place", "one background, no masks", BASELINE.flags),
    MaskArm("one-place-masked", "one background, masks", BASELINE.flags, has_masks=True),
    MaskArm(
        "one-place-weighted",
        "one background, masks, weight 0.1 outside",
        f"{BASELINE.flags} --unmasked_weight 0.1",
        has_masks=True,
    ),
    MaskArm(
        "one-place-base",
        "one background, masks, the base's prediction outside",
        f"{BASELINE.flags} --unmasked_target base",
        has_masks=True,
    ),
)
LABELS = {arm.name: f"{arm.label}, {STEPS} steps" if arm.flags else arm.label for arm in MASK_ARMS}


def _difference(first: str, second: str) -> tuple[Term, Term]:
    return Term(1, first, 0), Term(-1, second, 0)


MASK_CLAIM = Claim(
    "masks",
    "Masks",
    "Without masks the one background is drawn with the subject; with masks it is not.",
    tuple((arm.name, 0) for arm in MASK_ARMS),
    (
        at_least(
            0.3,
            "PLACE_free",
            ("one-place", 0),
            ("mask-no-adapter", 0),
            "without masks there is something to avoid: 0.3 more of the background where none is named",
        ),
        *(
            at_most(
                0.1,
                "PLACE_free",
                (arm, 0),
                ("mask-no-adapter", 0),
                f"{words}: at most 0.1 more of the background than the base draws",
            )
            for arm, words in (
                ("one-place-masked", "masks"),
                ("one-place-base", "masks and the base's prediction"),
            )
        ),
        Part(
            "masks: less of the background where another place is named",
            "PLACE",
            _difference("one-place-masked", "one-place"),
            False,
            0.0,
        ),
        at_least(-0.05, "ID", ("one-place-masked", 0), ("one-place", 0), "masks lose at most 0.05 of ID"),
        at_least(0.0, "JOINT", ("one-place-masked", 0), ("one-place", 0), "masks lose no JOINT"),
        at_least(
            -0.1,
            "JOINT",
            ("one-place-masked", 0),
            ("many-places", 0),
            "masks come within 0.1 of the JOINT of photos in several places",
        ),
        at_least(
            -0.05,
            "JOINT",
            ("one-place-base", 0),
            ("one-place-masked", 0),
            "the base's prediction outside loses at most 0.05 of JOINT",
        ),
    ),
    ("ID", "JOINT", "PLACE_free"),
    ("ID", "ID_all", "PA", "JOINT", "PLACE", "PLACE_free"),
)
