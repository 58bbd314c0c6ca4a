"""The ways to draw two subjects that benchmarks/claims.py compares, and what is expected of them; the limits
were written before the first result. Imports no torch."""

import dataclasses
from collections.abc import Mapping

from benchmarks.claims_arms import BASELINE, RATE, STEPS, Claim, at_least, at_most

PAIRS = (("dog", "cat"), ("bird", "car"), ("cat", "bird"), ("car", "dog"))
WORDS = ("sks", "qwe")  # of the first and of the second subject
FLAGS, PAIR_RATE = BASELINE.flags, RATE

Weights = Mapping[str, float]
"""Weight by part of the models; "" stands for the parts that are not named."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A training: whose pictures, from which adapter, and how long."""

    name: str
    subjects: tuple[int, ...]
    """0 is the first subject of the pair, 1 the second."""
    steps: int
    starts_from: str | None = None
    """Name of the source whose adapter is trained on."""
    is_table: bool = False
    """Whether the subjects are rows of --subjects, in place of one folder with captions."""


SOURCES = {
    source.name: source
    for source in (
        Source("first", (0,), STEPS),
        Source("second", (1,), STEPS),
        Source("second-after-first", (1,), STEPS, "first"),
        Source("both-after-first", (0, 1), 2 * STEPS, "first"),
        Source("both", (0, 1), 2 * STEPS),
        Source("both-by-table", (0, 1), 2 * STEPS, is_table=True),
    )
}


@dataclasses.dataclass(frozen=True)
class PairArm:
    """A way to draw both subjects of a pair. `drawn` are the sources, each with its steps and weights."""

    name: str
    label: str
    drawn: tuple[tuple[str, int, Weights], ...]


def mixed(name: str, label: str, weights: Weights) -> PairArm:
    """Both subjects' own adapters, with the same weights."""
    return PairArm(name, label, (("first", STEPS, weights), ("second", STEPS, weights)))


# The arm `alone` draws each subject with its own adapter only: what the others are compared with.
ALONE = PairArm("alone", "each adapter alone, on its own subject", ())
PAIR_ARMS = (
    ALONE,
    mixed("mix-1", "both adapters, weights 1", {"": 1.0}),
    mixed("mix-0.7", "both adapters, weights 0.7", {"": 0.7}),
    mixed("mix-0.5", "both adapters, weights 0.5", {"": 0.5}),
    mixed("mix-unet", "both adapters, UNets only", {"": 1.0, "text_encoder": 0.0}),
    mixed("mix-text", "both adapters, text encoders only", {"": 1.0, "unet": 0.0}),
    mixed("mix-half-unet", "both adapters, UNets at 0.5", {"": 1.0, "unet": 0.5}),
    PairArm(
        "sequence",
        "the second trained on from the first, 200 steps",
        (("second-after-first", STEPS, {"": 1.0}),),
    ),
    PairArm(
        "sequence-kept",
        "the same with the first's pictures kept, 400 steps",
        (("both-after-first", 2 * STEPS, {"": 1.0}),),
    ),
    PairArm("together-short", "both in one run, 200 steps", (("both", STEPS, {"": 1.0}),)),
    PairArm("together", "both in one run, 400 steps", (("both", 2 * STEPS, {"": 1.0}),)),
    PairArm(
        "together-by-table",
        "the same by --subjects",
        (("both-by-table", 2 * STEPS, {"": 1.0}),),
    ),
)
LABELS = {arm.name: arm.label for arm in PAIR_ARMS}

PAIR_CLAIM = Claim(
    "two",
    "Two subjects",
    "Mixed adapters disturb each other; one run with both keeps both.",
    tuple((arm.name, 0) for arm in PAIR_ARMS),
    (
        at_most(
            -0.2, "JOINT", ("mix-1", 0), ("alone", 0), "mixing with weights 1 loses 0.2 of JOINT or more"
        ),
        at_least(0.1, "JOINT", ("mix-0.7", 0), ("mix-1", 0), "weights of 0.7 are better by 0.1"),
        at_least(
            0.1, "JOINT", ("mix-unet", 0), ("mix-1", 0), "leaving out the text encoders is better by 0.1"
        ),
        at_least(0.1, "JOINT", ("mix-half-unet", 0), ("mix-1", 0), "UNets at 0.5 are better by 0.1"),
        at_most(-0.2, "JOINT_first", ("sequence", 0), ("alone", 0), "training on loses 0.2 of the first"),
        at_least(
            -0.1,
            "JOINT",
            ("sequence-kept", 0),
            ("alone", 0),
            "training on with both's pictures loses 0.1 at most",
        ),
        at_least(-0.1, "JOINT", ("together", 0), ("alone", 0), "one run with both loses 0.1 at most"),
        at_least(0.0, "JOINT", ("together", 0), ("sequence-kept", 0), "one run is no worse than training on"),
        at_least(
            -0.05,
            "JOINT",
            ("together-by-table", 0),
            ("together", 0),
            "--subjects is no worse by 0.05 than a folder with captions",
        ),
    ),
    ("ID", "JOINT", "BLEED"),
    ("ID", "ID_all", "PA", "JOINT", "JOINT_first", "JOINT_second", "BLEED"),
)
