"""What the speed benchmark measures: its cases, the programs, and their command lines. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.programs import NOISE_IMAGES, ROOT, Folders, training_words

BARE = ROOT / "benchmarks" / "speed_bare.py"
TRACKER = "tensorboard"  # the reference cannot run without a tracker
ADAPTER_FLAGS = "--rank 4 --learning_rate 1e-4 --lr_warmup_steps 0"
AT_ONCE = 4  # class images in one batch
DRAWING_FLAGS = (
    "--class_prompt dog --class_data_dir {drawn} --num_class_images {count} "
    f"--sample_batch_size {AT_ONCE}"
)


@dataclass(frozen=True)
class Case:
    """One comparison: the programs, their flags, and the steps or pictures that are measured."""

    title: str
    base: str
    """Name of a shape; `embedded` is picturebook/model."""
    side: int
    """Pixels."""
    programs: Mapping[str, Callable[["Case", "Place"], list[str]]]
    """Command lines, by the name of the program, in the order in which they run."""
    steps: int = 1
    batch: int = 1
    warm_up: int = 1
    """Steps after the first that are not measured."""
    flags: str = ""
    """Flags for every program."""
    own_flags: str = ""
    """Flags for this program alone."""
    processes: int = 1
    photos: int = 4
    drawn: int = 0
    """Class images to draw. If not 0, pictures are measured in place of steps."""
    limit: int = 900
    """Seconds after which a run is ended as failed."""


@dataclass(frozen=True)
class Place(Folders):
    """The folders that one run reads and writes."""

    reference: Path | None

    def base(self, name: str) -> Path:
        return ROOT / "picturebook" / "model" if name == "embedded" else self.work / name

    def photos(self, side: int, count: int) -> Path:
        return self.work / f"photos-{side}-{count}"

    def fill(self, flags: str, case: "Case") -> list[str]:
        """The words of `flags`, with folders and numbers filled into the braces."""
        names = {
            "own": self.photos(case.side, NOISE_IMAGES),
            "drawn": self.drawn,
            "encoded": self.encoded,
            "count": case.drawn,
        }
        return [word.format_map(names) for word in flags.split()]

    @property
    def encoded(self) -> Path:
        """The --encoded_dir that the two runs of a round share. It is removed before a round."""
        return self.work / "encoded"


def _training(case: Case, place: Place) -> list[str]:
    """The flags that both trainers have."""
    base, photos = place.base(case.base), place.photos(case.side, case.photos)
    words = training_words(
        base, photos, place.output, side=case.side, batch=case.batch, steps=case.steps, tracker=TRACKER
    )
    return [*words, *place.fill(f"{ADAPTER_FLAGS} {case.flags}", case)]


def train_here(case: Case, place: Place) -> list[str]:
    """The command line of this project's trainer."""
    return [
        str(ROOT / "train_dreambooth_lora.py"),
        *_training(case, place),
        *place.fill(case.own_flags, case),
    ]


def train_reference(case: Case, place: Place) -> list[str]:
    """The command line of diffusers' example."""
    return [str(place.reference), *_training(case, place)]


def train_bare(case: Case, place: Place) -> list[str]:
    """The command line of speed_bare.py."""
    precision = "bf16" if "bf16" in case.flags else "fp32"
    return [
        str(BARE),
        str(place.base(case.base)),
        str(case.side),
        str(case.batch),
        precision,
        str(case.steps),
    ]


def draw_here(case: Case, place: Place) -> list[str]:
    """The command line of generate_class_images.py."""
    script = [
        str(ROOT / "generate_class_images.py"),
        "--pretrained_model_name_or_path",
        str(place.base(case.base)),
    ]
    return [*script, *place.fill(f"{DRAWING_FLAGS} {case.own_flags}", case)]


def draw_reference(case: Case, place: Place) -> list[str]:
    """The reference draws class images before it trains. It trains one step, which is not measured."""
    return [*train_reference(case, place), *place.fill(f"--with_prior_preservation {DRAWING_FLAGS}", case)]


TRAINING = {"here": train_here, "reference": train_reference}
WITH_BARE = {**TRAINING, "bare": train_bare}
DRAWING = {"here": draw_here, "reference": draw_reference}
TWICE = {"here": train_here, "again": train_here}  # the second run reads the first one's encodings

BF16, TEXT = "--mixed_precision bf16", "--train_text_encoder"
PRIOR = (
    f"--with_prior_preservation --class_prompt dog --class_data_dir {{own}} --num_class_images {NOISE_IMAGES}"
)
KEPT = "--cache_latents disk --encoded_dir {encoded}"
M35, SD15 = "35 M UNet, 256 px", "Stable Diffusion 1.5's shape, 512 px"
# the settings that the reference always draws class images with
EQUAL_STEPS = "--class_scheduler base --class_inference_steps 50 --prior_generation_precision fp32"

CASES: dict[str, Case] = {
    "tiny": Case("embedded base, 64 px, batch 1, fp32", "embedded", 64, TRAINING, steps=60, warm_up=4),
    "m35": Case(f"{M35}, batch 1, fp32", "m35", 256, WITH_BARE, steps=16, warm_up=2),
    "m35-bf16": Case(f"{M35}, batch 1, bf16", "m35", 256, WITH_BARE, steps=16, warm_up=2, flags=BF16),
    "m35-prior": Case(
        f"{M35}, batch 1, prior preservation, fp32", "m35", 256, TRAINING, steps=16, warm_up=2, flags=PRIOR
    ),
    "m35-text": Case(
        f"{M35}, batch 4, text encoder, fp32", "m35", 256, TRAINING, steps=12, batch=4, flags=TEXT
    ),
    "m35-text-bf16": Case(
        f"{M35}, batch 4, text encoder, bf16", "m35", 256, TRAINING, steps=12, batch=4, flags=f"{TEXT} {BF16}"
    ),
    "m35-processes": Case(
        f"{M35}, batch 1 on each of 2 processes, fp32", "m35", 256, TRAINING, steps=16, warm_up=2, processes=2
    ),
    "sd15": Case(f"{SD15}, batch 1, fp32", "sd15", 512, WITH_BARE, steps=5, limit=1800),
    "sd15-bf16": Case(f"{SD15}, batch 1, bf16", "sd15", 512, WITH_BARE, steps=5, flags=BF16, limit=1800),
    "sd15-checkpointing": Case(
        f"{SD15}, batch 1, fp32, gradient checkpointing",
        "sd15",
        512,
        TRAINING,
        steps=5,
        flags="--gradient_checkpointing",
        limit=1800,
    ),
    "class-images-equal": Case(
        f"{M35}, 50 steps of the base's sampler", "m35", 256, DRAWING, drawn=12, own_flags=EQUAL_STEPS
    ),
    "class-images": Case(f"{M35}, each program's defaults", "m35", 256, DRAWING, drawn=12),
    **{
        f"pictures-{count}": Case(
            f"{count:,} pictures",
            "embedded",
            64,
            TWICE,
            steps=24,
            batch=4,
            warm_up=4,
            photos=count,
            own_flags=KEPT,
            limit=3600,
        )
        for count in (10, 100, 10_000)
    },
}
