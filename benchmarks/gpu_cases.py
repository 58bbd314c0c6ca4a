"""What the GPU benchmark measures: its cases, the programs, and their command lines. Imports no torch."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from benchmarks.programs import NOISE_IMAGES, ROOT, Folders, training_words

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
# diffusers' example cannot run without a tracker
TRACKER = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
PHOTOS = 4
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of --photos
PRECISION = {"cuda": "bf16", "cpu": "no"}
REPLAYED, LAUNCHED, COMPILED = "replayed", "launched", "compiled, replayed"
EXAMPLE, PLAIN, RESUMED = "diffusers' example", "plain diffusers", "killed, resumed"
BARE_REPLAYED = "bare, replayed"
BARE = {"bare, launched": "launched", BARE_REPLAYED: "replayed"}  # the names in the report of bare_step.py
OURS = {
    LAUNCHED: "--cuda_graph off",
    REPLAYED: "--cuda_graph auto",
    COMPILED: "--cuda_graph auto --compile",
    RESUMED: "--cuda_graph auto",
}
TRAINING = (EXAMPLE, LAUNCHED, REPLAYED, COMPILED)
CORE = (*BARE, REPLAYED, LAUNCHED)
DRAWING = (PLAIN, LAUNCHED, REPLAYED)
HASHES = (LAUNCHED, REPLAYED, RESUMED)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: what is trained or drawn, and by which programs."""

    title: str
    base: str
    """A name of speed_bases.SHAPES; `embedded` is picturebook/model."""
    side: int
    """Pixels."""
    programs: tuple[str, ...]
    measures: Literal["steps", "pictures", "hashes", "whole run"] = "steps"
    batch: int = 1
    flags: str = ""
    """Flags for every program that trains. {class} is a folder of class images of noise, {drawn} one in which
    the run draws its own."""
    recipe: str = ""
    """A file of configs/. Without it, LoRA has rank 4 and the precision is bf16."""
    steps: int = 0
    """Optimizer steps, or sampling steps of a picture."""
    warm_up: int = 11
    """The first steps, which are not measured. On a GPU losses are read after step 1, 11, 21, ..."""


@dataclasses.dataclass(frozen=True)
class Place(Folders):
    """The device, and the folders of the benchmark."""

    device: str
    """cuda or cpu."""
    is_tiny: bool
    """Whether tiny bases stand for those of full size."""
    reference: Path | None
    user_photos: Path | None
    """Folder of photos to train on; None for smooth noise."""

    def base_name(self, case: Case) -> str:
        return f"{case.base}-tiny" if self.is_tiny and case.base != "embedded" else case.base

    def base(self, case: Case) -> Path:
        name = self.base_name(case)
        return ROOT / "picturebook" / "model" if name == "embedded" else self.work / f"{name}-{self.device}"

    def side(self, case: Case) -> int:
        return 64 if self.is_tiny else case.side

    def steps(self, case: Case) -> int:
        if not self.is_tiny:
            return case.steps
        return 2 if case.measures == "pictures" else 6

    def pictures(self, case: Case) -> int:
        """Pictures to draw, in whole batches. The first batch is not timed."""
        return case.batch * (2 if self.is_tiny else max(3, 6 // case.batch))

    def warm_up(self, case: Case) -> int:
        return min(case.warm_up, 2) if self.is_tiny else case.warm_up

    def first_checkpoint(self, case: Case) -> int:
        """The step after which a run that is compared saves its first checkpoint."""
        return max(2, self.steps(case) // 3)

    def photos(self, case: Case) -> Path:
        kind = f"of-{self.user_photos.name}" if self.user_photos else f"{self.side(case)}-{PHOTOS}"
        return self.work / f"photos-{kind}"

    def class_images(self, case: Case) -> Path:
        return self.work / f"photos-{self.side(case)}-{NOISE_IMAGES}"

    @property
    def report(self) -> Path:
        """The report that a program of this folder writes on itself."""
        return self.work / "report.json"

    def example(self, case: Case) -> Path | None:
        """diffusers' script for the case's family: --reference, or its sibling for Stable Diffusion XL."""
        if self.reference is None or case.base != "sdxl":
            return self.reference
        sibling = self.reference.with_name("train_dreambooth_lora_sdxl.py")
        return sibling if sibling.is_file() else None


SD15, SDXL = "Stable Diffusion 1.5, 512 px", "Stable Diffusion XL, 1024 px"
CHECKPOINTING, TEXT = "--gradient_checkpointing", "--train_text_encoder"
CLASS = "--class_prompt dog"  # which the measurements of a recipe need
OWN_PRIOR = "--with_prior_preservation --class_prompt dog --class_data_dir {drawn} --num_class_images 2"
PRIOR = (
    "--with_prior_preservation --class_prompt dog --class_data_dir {class} "
    f"--num_class_images {NOISE_IMAGES}"
)


def _training(base: str, what: str = "", *, batch: int = 1, flags: str = "", is_bare: bool = False) -> Case:
    title, side, steps = (SD15, 512, 51) if base == "sd15" else (SDXL, 1024, 31)
    title = f"{title}, batch {batch}{f', {what}' if what else ''}"
    programs = (*BARE, *TRAINING) if is_bare else TRAINING
    return Case(title, base, side, programs, batch=batch, flags=flags, steps=steps)


def _recipe(name: str, flags: str = "") -> Case:
    """A run of a recipe for a small card, in all its phases."""
    case = _training(name.partition("_")[0], f"configs/{name}", flags=flags)
    return dataclasses.replace(case, programs=(LAUNCHED, REPLAYED), recipe=name)


def _drawing(base: str, batch: int, what: str = "infer.py") -> Case:
    title, side = (SD15, 512) if base == "sd15" else (SDXL, 1024)
    programs = DRAWING if what == "infer.py" else (LAUNCHED, REPLAYED)
    title = f"{title}, batch {batch}, {what}"
    return Case(title, base, side, programs, measures="pictures", batch=batch, steps=25)


def _hashed(title: str, base: str, side: int, flags: str) -> Case:
    """Runs whose adapters are compared. The one that is resumed is killed after its first checkpoint."""
    flags = f"{flags} --checkpointing_steps {{saved}}"
    return Case(title, base, side, HASHES, measures="hashes", flags=flags, steps=24)


EVERYTHING = f"{TEXT} {PRIOR} --lora_dropout 0.1 --gradient_accumulation_steps 2 --random_flip"
CASES: dict[str, Case] = {
    "sd15": _training("sd15", is_bare=True),
    "sdxl": _training("sdxl", is_bare=True),
    "sd15-batch4": _training("sd15", batch=4, is_bare=True),
    "sdxl-batch4": _training("sdxl", batch=4, is_bare=True),
    "sd15-checkpointing": _training("sd15", "gradient checkpointing", flags=CHECKPOINTING),
    "sdxl-checkpointing": _training("sdxl", "gradient checkpointing", flags=CHECKPOINTING),
    "sd15-text": _training("sd15", "text encoder", flags=TEXT),
    "sdxl-text": _training("sdxl", "text encoders", flags=TEXT),
    "sd15-prior": _training("sd15", "prior preservation", flags=PRIOR),
    "sdxl-prior": _training("sdxl", "prior preservation", flags=PRIOR),
    "sd15-all": _training(
        "sd15",
        "text encoder, prior preservation, gradient checkpointing",
        batch=4,
        flags=f"{TEXT} {PRIOR} {CHECKPOINTING}",
    ),
    "recipe-sd15-4gb": _recipe("sd15_4gb.yaml", OWN_PRIOR),
    "recipe-sdxl-8gb": _recipe("sdxl_8gb.yaml", CLASS),
    "recipe-sdxl-6gb": _recipe("sdxl_6gb.yaml", CLASS),  # needs torchao
    **{f"{base}-drawing-{batch}": _drawing(base, batch) for base in ("sd15", "sdxl") for batch in (1, 4)},
    "sd15-class-images-4": _drawing("sd15", 4, "class images"),
    "same-embedded-fp32": _hashed(
        "embedded base, float32, text encoder, prior preservation, dropout, accumulation",
        "embedded",
        64,
        f"--mixed_precision no {EVERYTHING}",
    ),
    "same-embedded-bf16": _hashed(
        "embedded base, bfloat16, text encoder, prior preservation, dropout, accumulation",
        "embedded",
        64,
        f"--mixed_precision bf16 {EVERYTHING}",
    ),
    "same-sd15-bf16": _hashed(
        "Stable Diffusion 1.5, bfloat16, text encoder, dropout, accumulation",
        "sd15",
        512,
        f"{TEXT} --lora_dropout 0.1 --gradient_accumulation_steps 2 --random_flip",
    ),
    "subject": Case(
        "Stable Diffusion 1.5, 512 px, batch 1, 800 steps, from the command to the file",
        "sd15",
        512,
        (LAUNCHED, REPLAYED),
        measures="whole run",
        steps=800,
    ),
}
CORE_CASES = ("sd15", "sdxl")


def _training_words(case: Case, place: Place) -> list[str]:
    """The flags that both trainers have."""
    names = {
        "class": place.class_images(case),
        "drawn": place.drawn,
        "saved": place.first_checkpoint(case),
    }
    flags = [word.format_map(names) for word in case.flags.split()]
    if case.recipe:
        settings = f"--config configs/{case.recipe}"
    else:
        settings = "--rank 4 --learning_rate 1e-4 --lr_warmup_steps 0"
    if "--mixed_precision" not in flags:
        settings += f" --mixed_precision {PRECISION[place.device]}"
    side, steps = place.side(case), place.steps(case)
    words = training_words(
        place.base(case),
        place.photos(case),
        place.output,
        side=side,
        batch=case.batch,
        steps=steps,
        tracker=TRACKER,
    )
    return [*words, *settings.split(), *flags]


def train_words(case: Case, program: str, place: Place) -> list[str]:
    """The command line of this project's trainer."""
    return [
        str(ROOT / "train_dreambooth_lora.py"),
        *_training_words(case, place),
        *OURS[program].split(),
    ]


def example_words(case: Case, place: Place) -> list[str]:
    """The command line of diffusers' example under the probe. Call it only where there is one."""
    measured = (str(place.warm_up(case)), str(place.steps(case)))
    script = str(place.example(case))
    return ["-m", "benchmarks.gpu_probe", str(place.report), *measured, script, *_training_words(case, place)]


def bare_words(case: Case, place: Place) -> list[str]:
    """The command line of bare_step.py."""
    sizes = (str(place.side(case)), str(case.batch), place.device)
    steps = str(place.steps(case) - place.warm_up(case))
    return ["-m", "benchmarks.bare_step", str(place.base(case)), *sizes, steps, str(place.report)]


def draw_words(case: Case, program: str, place: Place) -> list[str]:
    """The command line of a program that draws."""
    base, steps = str(place.base(case)), str(place.steps(case))
    sizes = (str(case.batch), str(place.pictures(case)), steps)
    if program == PLAIN:
        return ["-m", "benchmarks.plain_drawing", base, *sizes, place.device, str(place.output)]
    precision = PRECISION[place.device]
    if case.title.endswith("class images"):
        return [
            str(ROOT / "generate_class_images.py"),
            *("--pretrained_model_name_or_path", base, "--class_prompt", "a photo of a dog"),
            *("--class_data_dir", str(place.output), "--num_class_images", sizes[1]),
            *("--sample_batch_size", sizes[0], "--class_inference_steps", steps),
            *f"--prior_generation_precision {precision} {OURS[program]}".split(),
        ]
    return [
        str(ROOT / "infer.py"),
        *("--pretrained_model_name_or_path", base, "--prompt", "a photo of a dog"),
        *("--output_dir", str(place.output), "--num_inference_steps", steps, "--batch_size", sizes[0]),
        *("--seeds", *map(str, range(int(sizes[1])))),
        *f"--mixed_precision {precision} {OURS[program]}".split(),
    ]


def pictures_in(folder: Path) -> list[Path]:
    """The photos of --photos, at most 4."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:PHOTOS]


def environment(device: str, reference_path: Path | None) -> Mapping[str, str]:
    """What the environment of every program gets."""
    words = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        words |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if reference_path:
        words["PYTHONPATH"] = str(reference_path.resolve())
    return words
