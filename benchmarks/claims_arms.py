"""What benchmarks/claims.py compares: the arms, and each claim's direction and least effect. The limits were
written before the first result. Imports no torch."""

import dataclasses
from typing import Literal

from benchmarks.claims_additions import ADDITIONS, AVERAGED

SUBJECTS = ("dog", "cat", "bird", "car")
SEEDS = (0, 1, 2)
WORD, OTHER_WORD = "sks", "zwx"  # the rare word of training, and one that no training used
RATE = 1e-3
COLUMNS = ("ID", "ID_all", "PA", "JOINT", "PRES", "LEAK", "PRIOR_TV", "DIV", "COPY")
CURVE = (50, 100, 200, 400, 800)  # steps of the longest runs
STEPS = 200  # after which most arms are compared

# Rates are searched with a seed that no result uses.
SEARCH_SEED, SEARCH_SUBJECTS, SEARCH_STEP = 7, ("dog", "bird"), STEPS
# LoHa and LoKr start as a product of more factors and learn more slowly at the same rate.
SEARCH_RATES = {
    "lora": (3e-4, 1e-3, 3e-3),
    "dora": (3e-4, 1e-3, 3e-3),
    "loha": (1e-3, 3e-3, 1e-2),
    "lokr": (1e-3, 3e-3, 1e-2),
}
KIND_FLAGS = {
    "lora": "--rank 8 --train_text_encoder",
    "dora": "--rank 8 --use_dora --train_text_encoder",
    "loha": "--adapter loha --rank 4 --train_text_encoder",
    "lokr": "--adapter lokr --rank 8 --train_text_encoder",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in subject and seed only. The rate is constant, so the adapter after N steps of a long
    run is that of a run of N steps."""

    name: str
    label: str
    flags: str
    """Flags of train_dreambooth_lora.py beside those of every run."""
    steps: tuple[int, ...]
    """Steps after which the adapter is scored."""
    rate: float | None = RATE
    """None: the best rate of the search for this kind."""
    class_images: int = 0
    """Class images of prior preservation."""
    init: Literal["gaussian", "default"] = "gaussian"
    """Initial values of LoRA's first factor: this program's, or peft's default (Kaiming uniform)."""
    word: str | None = WORD
    """The rare word in the prompts that are drawn; None leaves it out. Training always uses WORD."""
    averaged: int = 1
    """Number of checkpoints, up to that of the step, whose mean is drawn with."""


TEXT_ATTENTION = "--text_encoder_layers q_proj,k_proj,v_proj,out_proj --text_encoder_rank 8"
BASELINE = Arm("text+unet", "text encoder and UNet, rank 8", "--rank 8 --train_text_encoder", CURVE)
ARMS = (
    # (a), and the over-training experiment
    BASELINE,
    # (f): the adapters of the baseline, other prompts
    Arm("other-word", "another unused word", BASELINE.flags, (STEPS,), word=OTHER_WORD),
    Arm("no-word", "no word", BASELINE.flags, (STEPS,), word=None),
    # (a) again
    Arm("unet", "UNet, rank 8", "--rank 8", (100, STEPS)),
    Arm("unet-equal", "UNet, rank 10 (as many parameters)", "--rank 10", CURVE),
    # a rank of 0 does not exist: the UNet's adapter keeps its initial 0 at a rate of 0
    Arm("text", "text encoder, rank 8", "--rank 8 --train_text_encoder --lr_pattern unet=0", (100, STEPS)),
    # (b)
    Arm("prior-200", "prior, 200 class images", BASELINE.flags, (STEPS,), class_images=200),
    Arm(
        "prior-other-word",
        "prior (200), another word",
        BASELINE.flags,
        (STEPS,),
        class_images=200,
        word=OTHER_WORD,
    ),
    Arm("prior-no-word", "prior (200), no word", BASELINE.flags, (STEPS,), class_images=200, word=None),
    Arm("prior-20", "prior, 20 class images", BASELINE.flags, (STEPS,), class_images=20),
    Arm(
        "prior-base",
        "prior, targets of the base on the photos",
        f"{BASELINE.flags} --with_prior_preservation --prior_source base",
        (STEPS,),
    ),
    # (d); LoRA comes first because its best rate may be the baseline's
    *(
        Arm(f"best-{kind}", label, KIND_FLAGS[kind], (SEARCH_STEP,), rate=None)
        for kind, label in {
            "lora": "LoRA, rank 8",
            "lokr": "LoKr, rank 8",
            "loha": "LoHa, rank 4",
            "dora": "DoRA, rank 8",
        }.items()
    ),
    # (e)
    *(
        Arm(
            f"rank-{rank}",
            f"rank {rank}",
            f"--rank {rank} --train_text_encoder",
            (100, STEPS) if rank == 16 else (STEPS,),
        )
        for rank in (1, 16, 64)
    ),
    # (g)
    Arm(
        "full",
        "all layers, rank 8",
        f"--rank 8 --target_preset full --train_text_encoder {TEXT_ATTENTION}",
        (STEPS,),
    ),
    Arm(
        "full-equal",
        "all layers, rank 2 (137,088 parameters in the UNet)",
        f"--rank 2 --target_preset full --train_text_encoder {TEXT_ATTENTION}",
        (STEPS,),
    ),
    Arm(
        "attention-equal",
        "attention, rank 12 (141,312 parameters in the UNet)",
        "--rank 12 --train_text_encoder --text_encoder_rank 8",
        (STEPS,),
    ),
    # (c)
    Arm("gaussian-2", "rank 2, gaussian", "--rank 2 --train_text_encoder", (100,)),
    Arm("default-2", "rank 2, peft's default", "--rank 2 --train_text_encoder", (100,), init="default"),
    Arm(
        "default-16",
        "rank 16, peft's default",
        "--rank 16 --train_text_encoder",
        (100, STEPS),
        init="default",
    ),
)
ARMS += (
    # (h)
    *(Arm(name, label, f"{BASELINE.flags} {flags}", (STEPS,)) for name, label, flags in ADDITIONS),
    Arm(AVERAGED, "mean of the last 3 checkpoints", BASELINE.flags, (STEPS,), averaged=3),
)
BY_NAME = {arm.name: arm for arm in ARMS}


@dataclasses.dataclass(frozen=True)
class Term:
    """A score of an arm after a step, times a factor. The arm `base` has no adapter and the step 0."""

    factor: float
    arm: str
    step: int


@dataclasses.dataclass(frozen=True)
class Part:
    """One sentence of a claim: the sum of the terms is at least, or at most, the limit."""

    sentence: str
    score: str
    terms: tuple[Term, ...]
    is_least: bool
    limit: float


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the method: its parts, the rows of its table, and the scores that its plot shows."""

    letter: str
    title: str
    expectation: str
    rows: tuple[tuple[str, int], ...]
    """(arm, step) of each row of the table."""
    parts: tuple[Part, ...]
    plotted: tuple[str, ...] = ("ID", "JOINT", "PRES")
    columns: tuple[str, ...] = COLUMNS
    """Scores of the table."""


def at_least(
    limit: float, score: str, first: tuple[str, int], second: tuple[str, int], sentence: str
) -> Part:
    """The score of the first arm minus that of the second is at least the limit."""
    return Part(sentence, score, (Term(1, *first), Term(-1, *second)), True, limit)


def at_most(limit: float, score: str, first: tuple[str, int], second: tuple[str, int], sentence: str) -> Part:
    """The score of the first arm minus that of the second is at most the limit."""
    return Part(sentence, score, (Term(1, *first), Term(-1, *second)), False, limit)


BASE = ("base", 0)
CLAIMS = (
    Claim(
        "a",
        "An adapter on the text encoder too binds the subject better than one on the UNet alone",
        "Reports of users only; the cost is expected in PRES and LEAK.",
        tuple(
            (arm, step) for arm in ("text+unet", "unet", "unet-equal", "text") for step in BY_NAME[arm].steps
        ),
        (
            at_least(0.05, "ID", ("text+unet", 200), ("unet", 200), "more ID after 200 steps, at equal rank"),
            at_least(
                0.05,
                "ID",
                ("text+unet", 200),
                ("unet-equal", 200),
                "more ID after 200 steps, at equal parameters",
            ),
            at_least(
                0.05,
                "ID",
                ("text+unet", 400),
                ("unet-equal", 400),
                "not only sooner: more ID after 400 steps, at equal parameters",
            ),
            at_least(
                0.05,
                "JOINT",
                ("text+unet", 400),
                ("unet-equal", 400),
                "more JOINT after 400 steps, at equal parameters",
            ),
            at_most(
                0.05,
                "PRES",
                ("text+unet", 400),
                ("unet-equal", 400),
                "at no cost in PRES after 400 steps, at equal parameters",
            ),
        ),
    ),
    Claim(
        "b",
        "Prior preservation limits forgetting",
        "The paper: PRES -0.17, DIV +0.02, DINO -0.03 with it.",
        (
            *(BASE, ("text+unet", 100), ("text+unet", STEPS)),
            *(("prior-20", STEPS), ("prior-200", STEPS), ("prior-base", STEPS)),
        ),
        (
            at_least(
                0.2,
                "PRES",
                ("text+unet", STEPS),
                BASE,
                "without it there is something to limit: PRES rises by 0.2 after 200 steps",
            ),
            Part(
                "200 class images halve the rise of PRES",
                "PRES",
                (Term(1, "prior-200", STEPS), Term(-0.5, "text+unet", STEPS), Term(-0.5, *BASE)),
                False,
                0.0,
            ),
            at_least(
                -0.05,
                "ID",
                ("prior-200", STEPS),
                ("text+unet", STEPS),
                "at most 0.05 of ID is lost to 200 class images",
            ),
            at_most(
                0.0,
                "PRES",
                ("prior-200", STEPS),
                ("text+unet", 100),
                "it is not only less training: less PRES than without it at half the steps",
            ),
            at_most(
                0.05, "PRES", ("prior-20", STEPS), ("prior-200", STEPS), "20 class images do as well as 200"
            ),
            # --prior_source base, written before any run with it
            at_least(
                -0.05,
                "ID",
                ("prior-base", STEPS),
                ("prior-200", STEPS),
                "targets of the base: at most 0.05 of ID less than with 200 class images",
            ),
            *(
                at_most(
                    0.05,
                    score,
                    ("prior-base", STEPS),
                    ("prior-200", STEPS),
                    f"targets of the base: {score} no worse by 0.05 than with 200 class images",
                )
                for score in ("PRES", "PRIOR_TV", "LEAK")
            ),
        ),
        ("ID", "JOINT", "PRES", "PRIOR_TV"),
    ),
    Claim(
        "c",
        "Gaussian initial values with alpha = rank learn at a pace that does not depend on the rank",
        "peft's default has a first step in proportion to the rank: too slow at low ranks.",
        tuple(
            (arm, step)
            for arm in ("gaussian-2", "default-2", "rank-16", "default-16")
            for step in BY_NAME[arm].steps
        ),
        (
            at_least(
                0.05,
                "ID",
                ("gaussian-2", 100),
                ("default-2", 100),
                "more ID than the default at rank 2, 100 steps",
            ),
            at_least(
                -0.05,
                "ID",
                ("rank-16", 100),
                ("default-16", 100),
                "no less ID than the default at rank 16, 100 steps",
            ),
            at_least(
                -0.05,
                "JOINT",
                ("rank-16", STEPS),
                ("default-16", STEPS),
                "no less JOINT at rank 16 after 200 steps",
            ),
        ),
    ),
    Claim(
        "d",
        "LoKr and DoRA learn the subject better than LoRA, LoHa forgets less",
        "LyCORIS' ranks: ID LoKr > LoRA > LoHa, DIV LoHa > LoRA > LoKr. Each at its best of three rates.",
        tuple((f"best-{kind}", SEARCH_STEP) for kind in SEARCH_RATES),
        (
            at_least(0.03, "ID", ("best-lokr", STEPS), ("best-lora", STEPS), "LoKr has more ID than LoRA"),
            at_least(0.03, "ID", ("best-lora", STEPS), ("best-loha", STEPS), "LoRA has more ID than LoHa"),
            at_least(0.03, "ID", ("best-dora", STEPS), ("best-lora", STEPS), "DoRA has more ID than LoRA"),
            at_most(
                -0.03, "PRES", ("best-loha", STEPS), ("best-lora", STEPS), "LoHa has less PRES than LoRA"
            ),
            at_least(
                -0.05,
                "JOINT",
                ("best-lokr", STEPS),
                ("best-lora", STEPS),
                "LoKr has no less JOINT, with a seventh of the parameters",
            ),
        ),
        ("ID", "JOINT", "PRES", "DIV"),
    ),
    Claim(
        "e",
        "Likeness and forgetting grow with the rank, and level off",
        "peft's comparison: rank 64 over 32, likeness +0.046, drift +0.026.",
        (("rank-1", STEPS), ("text+unet", STEPS), ("rank-16", STEPS), ("rank-64", STEPS)),
        (
            at_least(0.05, "ID", ("rank-16", STEPS), ("rank-1", STEPS), "rank 16 has more ID than rank 1"),
            at_most(
                0.05, "ID", ("rank-64", STEPS), ("rank-16", STEPS), "rank 64 has no more ID than rank 16"
            ),
            at_least(
                0.05, "PRES", ("rank-64", STEPS), ("rank-1", STEPS), "rank 64 has more PRES than rank 1"
            ),
            at_least(
                0.0, "COPY", ("rank-64", STEPS), ("rank-1", STEPS), "rank 64 copies no less than rank 1"
            ),
        ),
    ),
    Claim(
        "f",
        "The subject is bound to the rare word",
        "With another unused word, and without one, likeness falls to that of the class.",
        (
            BASE,
            ("text+unet", STEPS),
            ("other-word", STEPS),
            ("no-word", STEPS),
            ("prior-200", STEPS),
            ("prior-other-word", STEPS),
            ("prior-no-word", STEPS),
        ),
        (
            at_least(
                0.2, "ID", ("text+unet", STEPS), ("other-word", STEPS), "another unused word shows it less"
            ),
            at_least(
                0.2, "ID", ("text+unet", STEPS), ("no-word", STEPS), "without the word it is shown less"
            ),
            at_most(
                0.1, "ID", ("other-word", STEPS), ("no-word", STEPS), "another word is no better than none"
            ),
            at_most(0.1, "ID", ("no-word", STEPS), BASE, "without the word, ID is nearly the base's"),
            # added after the first long runs, in which class pictures show the subject; before any with prior
            at_least(
                0.2,
                "ID",
                ("prior-200", STEPS),
                ("prior-other-word", STEPS),
                "with prior preservation, another word shows it less",
            ),
            at_least(
                0.2,
                "ID",
                ("prior-200", STEPS),
                ("prior-no-word", STEPS),
                "with prior preservation, it is shown less without the word",
            ),
        ),
        ("ID", "JOINT", "PA"),
    ),
    Claim(
        "g",
        "Attention layers alone are enough",
        "LyCORIS: attention alone lowers likeness and improves the rest.",
        (("text+unet", STEPS), ("attention-equal", STEPS), ("full-equal", STEPS), ("full", STEPS)),
        (
            at_most(
                0.03,
                "ID",
                ("full-equal", STEPS),
                ("attention-equal", STEPS),
                "all layers have no more ID, at equal parameters",
            ),
            at_most(
                0.03, "ID", ("full", STEPS), ("text+unet", STEPS), "all layers have no more ID, at equal rank"
            ),
            at_most(
                0.0,
                "PRES",
                ("attention-equal", STEPS),
                ("full-equal", STEPS),
                "attention alone has no more PRES, at equal parameters",
            ),
            at_least(
                0.0,
                "PA",
                ("attention-equal", STEPS),
                ("full-equal", STEPS),
                "attention alone keeps to the prompt as well, at equal parameters",
            ),
        ),
    ),
    Claim(
        "h",
        "A small addition pays",
        "Reports of users and papers, one for each; most with other bases, and for other tasks.",
        tuple((arm, STEPS) for arm in (BASELINE.name, *(name for name, _, _ in ADDITIONS), AVERAGED)),
        tuple(
            part
            for name, label, _ in (*ADDITIONS, (AVERAGED, BY_NAME[AVERAGED].label, ""))
            for part in (
                at_least(0.03, "JOINT", (name, STEPS), (BASELINE.name, STEPS), f"{label}: more JOINT"),
                at_most(0.03, "PRES", (name, STEPS), (BASELINE.name, STEPS), f"{label}: no more PRES"),
            )
        ),
    ),
)
