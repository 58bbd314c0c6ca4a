"""Trains, draws and scores one run of benchmarks/claims.py, and keeps what is finished."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import runpy
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import machine
from benchmarks.claims_arms import WORD, Arm
from benchmarks.programs import ROOT
from dreambooth.adapter_files import native, reading
from dreambooth.adapters import apply
from dreambooth.bases import families, pipelines
from dreambooth.options.command_line import parse
from dreambooth.options.training import BaseOptions, TrainOptions
from picturebook import metrics, subjects
from picturebook.read import Reading, read
from picturebook.world import ACCESSORIES, ACCESSORY_COLOURS, KINDS, PLACES, describe

SCORING = 1  # counted up when picturebook's reader or metrics give other scores for the same pictures
HELD_OUT = 1  # pictures of a subject that are not trained on, the last by name
SUBJECT_SEED, CLASS_SEED, OTHER_SEED, NOISE_SEED = 1000, 2000, 3000, 4000


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all runs have in common. Every field is part of a result's key."""

    base: Path = Path("picturebook/model")
    batch: int = 2
    checkpointing: int = 50
    places: int = 4
    """Places of the test prompts; each has a prompt with an accessory and one without."""
    seeds: int = 2
    """Pictures of each test prompt."""
    class_pictures: int = 8
    """Pictures of the class prompt."""
    other_pictures: int = 4
    """Pictures of each of two other kinds."""
    sampling_steps: int = 10
    guidance_scale: float = 3.0
    drawn_together: int = 16

    @property
    def pictures(self) -> dict[str, Any]:
        """The fields that decide which pictures an adapter draws."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in ("base", "checkpointing")}


# ---- results


class Results:
    """A file with one JSON line for each scored adapter, found by the key of its configuration."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Read the lines that this and other processes have written."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.records = {record["key"]: record for record in map(json.loads, lines)}

    def add(self, record: dict[str, Any]) -> None:
        """Write one line. Processes that append do not disturb each other."""
        self.records[record["key"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def key_of(**configuration: Any) -> str:
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def fingerprint(base: Path) -> str:
    """Hash of the base's weights."""
    return families.find(BaseOptions(str(base))).fingerprint()


@dataclasses.dataclass(frozen=True)
class Training:
    """One training: an arm with a rate, of one subject with one seed."""

    flags: str
    rate: float
    class_images: int
    init: str
    subject: str
    seed: int

    def configuration(self, protocol: Protocol) -> dict[str, Any]:
        """What decides the adapter after any step."""
        base = {"base": fingerprint(protocol.base), "batch": protocol.batch}
        return dataclasses.asdict(self) | base

    def key(self, protocol: Protocol) -> str:
        return key_of(**self.configuration(protocol))

    def result_key(self, protocol: Protocol, step: int, word: str | None, averaged: int = 1) -> str:
        """Key of the scores after `step` steps, of pictures whose prompts have `word`, with the mean of the
        last `averaged` checkpoints."""
        training = self.configuration(protocol)
        mean = {"averaged": averaged} if averaged > 1 else {}
        return key_of(
            training=training, step=step, word=word, pictures=protocol.pictures, scoring=SCORING, **mean
        )


def training_of(arm: Arm, rate: float, subject: str, seed: int) -> Training:
    return Training(arm.flags, rate, arm.class_images, arm.init, subject, seed)


def base_key(protocol: Protocol, subject: str) -> str:
    """Key of the scores of the base without an adapter."""
    base = fingerprint(protocol.base)
    return key_of(base=base, subject=subject, pictures=protocol.pictures, scoring=SCORING)


# ---- training


@functools.cache
def training_script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "train_dreambooth_lora.py"))


def train(words: Sequence[str]) -> None:
    """Run the training script in this process."""
    training_script()["main"](parse(TrainOptions, "", list(words)))


def photos_of(subject: str, work: Path) -> tuple[Path, list[Path]]:
    """(folder of the pictures that are trained on, those pictures)."""
    folder = work / "photos" / subject
    pictures = sorted((subjects.FOLDER / subject).glob("*.png"))[:-HELD_OUT]
    folder.mkdir(parents=True, exist_ok=True)
    copies = [folder / picture.name for picture in pictures]
    for picture, copy in zip(pictures, copies, strict=True):
        if not copy.exists():  # another process may be reading it
            shutil.copyfile(picture, copy)
    return folder, copies


def shared_words(
    protocol: Protocol, photos: Path, output: Path, *, steps: int, rate: float, seed: int
) -> list[str]:
    """The flags that the trainings of all claims have."""
    return (
        f"--pretrained_model_name_or_path {protocol.base} --instance_data_dir {photos} --output_dir {output} "
        f"--resolution 64 --train_batch_size {protocol.batch} --max_train_steps {steps} "
        f"--learning_rate {rate} --lr_scheduler constant --lr_warmup_steps 0 --seed {seed} "
        f"--checkpointing_steps {protocol.checkpointing} --num_threads 1 --report_to none"
    ).split()


def words_of(training: Training, protocol: Protocol, work: Path, output: Path, steps: int) -> list[str]:
    """The command line of a training."""
    photos, _ = photos_of(training.subject, work)
    rate, seed = training.rate, training.seed
    words = shared_words(protocol, photos, output, steps=steps, rate=rate, seed=seed)
    words += [*training.flags.split(), "--instance_prompt", f"a photo of a {WORD} {training.subject}"]
    if training.class_images:
        count, folder = training.class_images, work / "class" / f"{training.subject}-{training.class_images}"
        words += (
            f"--with_prior_preservation --class_data_dir {folder} --num_class_images {count} --class_seed 0 "
            f"--sample_batch_size 16 --class_guidance_scale {protocol.guidance_scale} --class_scheduler base "
            f"--class_inference_steps {protocol.sampling_steps} --prior_generation_precision fp32"
        ).split()
    if "--with_prior_preservation" in words:
        words += ["--class_prompt", f"a photo of a {training.subject}"]
    return words


def default_init(training: Training, protocol: Protocol, work: Path) -> Path:
    """An adapter file with peft's default initial values: Kaiming uniform (a = sqrt 5), and zeros.

    Names and shapes are those of a training of one step.
    """
    output = work / "init" / training.key(protocol)
    shutil.rmtree(output, ignore_errors=True)
    gaussian = dataclasses.replace(training, init="gaussian")
    train(words_of(gaussian, protocol, work, output, 1))
    torch.manual_seed(training.seed)
    with safe_open(output / native.ADAPTER_NAME, "pt") as file:
        tensors = {name: torch.zeros_like(file.get_tensor(name)) for name in sorted(file.keys())}
        metadata = file.metadata()
    for name, tensor in tensors.items():
        if "lora_A" in name or "lora.down" in name:
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    path = output.with_suffix(".safetensors")
    save_file(tensors, path, metadata)
    shutil.rmtree(output)
    return path


def adapters_after(training: Training, protocol: Protocol, work: Path, steps: int) -> Path:
    """The folder with the adapter of every checkpoint of a training, as `train_adapters` makes it."""
    key = training.key(protocol)
    folder, output = work / "adapters" / key, work / "runs" / key
    if adapter_file(folder, steps).exists():
        return folder
    words = words_of(training, protocol, work, output, steps)
    if training.init == "default":
        words += ["--init_adapter", str(default_init(training, protocol, work))]
    train_adapters(words, output, folder, steps, training.configuration(protocol))
    return folder


def train_adapters(
    words: Sequence[str], output: Path, folder: Path, steps: int, configuration: dict[str, Any]
) -> None:
    """Train in `output`, then keep the adapter of every checkpoint in `folder`, as `step-000050.safetensors`
    and so on, with the configuration in `run.json`.

    A training that was cut off is resumed.
    """
    resumed = ["--resume_from_checkpoint", "latest"] if any(output.glob("checkpoint-*")) else []
    if not resumed:
        shutil.rmtree(output, ignore_errors=True)
    train([*words, *resumed])
    folder.mkdir(parents=True, exist_ok=True)
    for checkpoint in sorted(output.glob("checkpoint-*")):
        step = int(checkpoint.name.rpartition("-")[2])
        shutil.copyfile(checkpoint / native.ADAPTER_NAME, adapter_file(folder, step))
    (folder / "run.json").write_text(json.dumps(configuration | {"steps": steps}, indent=1) + "\n")
    shutil.copyfile(output / native.ADAPTER_NAME, adapter_file(folder, steps))  # last: the folder is whole
    shutil.rmtree(output)


def adapter_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.safetensors"


# ---- pictures


class Studio:
    """The base in memory, on a CUDA GPU if there is one. Draws with adapters, which are merged into its
    weights and taken out again bit for bit."""

    def __init__(self, protocol: Protocol) -> None:
        torch.set_num_threads(1)
        self.protocol = protocol
        self.base = families.find(BaseOptions(str(protocol.base)))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device_name = torch.cuda.get_device_name() if device.type == "cuda" else machine.processor()
        self.pipeline = pipelines.load_pipeline(self.base, torch.float32, device)
        self.pipeline.unet.to(memory_format=torch.channels_last)
        self.models = {part: getattr(self.pipeline, part) for part in ("unet", *self.base.family.text)}
        self.layers = apply.layers_of(self.models)

    @contextlib.contextmanager
    def adapted(self, adapters: Sequence[tuple[Path, apply.Weight]]) -> Iterator[None]:
        """Within the block the base has these adapters, each with its weight."""
        weighted = [(reading.read(path, self.layers), weight) for path, weight in adapters]
        with apply.fused(self.models, weighted):
            yield

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture of each prompt with its seed."""
        cache = pipelines.text_of(self.pipeline, self.base).encode_all([*prompts, ""])
        images: list[Image.Image] = []
        for first in range(0, len(prompts), self.protocol.drawn_together):
            chunk = slice(first, first + self.protocol.drawn_together)
            images += pipelines.draw(
                self.pipeline,
                cache.of(prompts[chunk]),
                cache.of([""]),
                seeds[chunk],
                num_inference_steps=self.protocol.sampling_steps,
                guidance_scale=self.protocol.guidance_scale,
            )
        return images

    @functools.cache  # noqa: B019 - one studio lives as long as its process
    def class_readings(self, kind: str, first_seed: int) -> list[Reading]:
        """The base's pictures of a kind; call it while no adapter is in the base."""
        seeds = range(first_seed, first_seed + self.protocol.class_pictures)
        return list(map(read, self.draw([f"a photo of a {kind}"] * len(seeds), seeds)))


def subject_prompts(kind: str, word: str | None, protocol: Protocol) -> list[str]:
    """Every place plain and with an accessory, each prompt once for every picture."""
    prompts = []
    for number, place in enumerate(list(PLACES)[: protocol.places]):
        accessory = ACCESSORIES[number % len(ACCESSORIES)]
        colour = list(ACCESSORY_COLOURS)[number % len(ACCESSORY_COLOURS)]
        for worn in (None, accessory):
            description = describe(kind, None, place, worn, colour if worn else None)
            prompts += [f"a photo of a {f'{word} ' if word else ''}{description}"] * protocol.seeds
    return prompts


def subject_scores(
    studio: Studio, subject: str, word: str | None, copies: Sequence[Path]
) -> dict[str, float]:
    """ID, ID_all, PA, PA_all, JOINT, DIV and COPY of pictures of the subject."""
    protocol = studio.protocol
    kind, colour, identity = subjects.load_subject(subjects.FOLDER / subject)
    prompts = subject_prompts(kind, word, protocol)
    images = studio.draw(prompts, range(SUBJECT_SEED, SUBJECT_SEED + len(prompts)))
    scores = metrics.subject_scores(list(map(read, images)), prompts, kind, colour, identity)
    kept = ("ID", "ID_all", "PA", "PA_all", "JOINT", "subject_colour", "valid")
    training = [Image.open(path) for path in copies]
    return {
        **{name: scores[name] for name in kept},
        "DIV": metrics.diversity(images, prompts),
        "COPY": metrics.copied(images, training, metrics.copy_limit(kind, colour, identity)),
    }


def prior_scores(studio: Studio, subject: str, base: list[Reading]) -> dict[str, float]:
    """PRES, PRIOR_TV and LEAK: what became of the class and of two other kinds. `base` are the readings of
    the base's own class pictures."""
    protocol = studio.protocol
    kind, _, identity = subjects.load_subject(subjects.FOLDER / subject)
    seeds = range(CLASS_SEED, CLASS_SEED + protocol.class_pictures)
    class_readings = list(map(read, studio.draw([f"a photo of a {kind}"] * len(seeds), seeds)))
    position = KINDS.index(kind)
    others = [KINDS[(position + shift) % len(KINDS)] for shift in (1, 2)]
    prompts = [f"a photo of a {other}" for other in others for _ in range(protocol.other_pictures)]
    other_images = studio.draw(prompts, range(OTHER_SEED, OTHER_SEED + len(prompts)))
    return {
        "PRES": sum(metrics.identity_share(r, kind, identity) for r in class_readings) / len(class_readings),
        "PRIOR_TV": metrics.prior_tv(class_readings, base),
        "LEAK": metrics.leak(list(map(read, other_images)), identity),
    }


def rounded_scores(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}


def score_base(studio: Studio, subject: str, work: Path) -> dict[str, Any]:
    """The record of the base without an adapter. Its PRIOR_TV is the noise floor: the distance between
    pictures with two sets of seeds."""
    _, copies = photos_of(subject, work)
    first, second = (studio.class_readings(subject, seed) for seed in (CLASS_SEED, NOISE_SEED))
    scores = subject_scores(studio, subject, WORD, copies) | prior_scores(studio, subject, first)
    scores["PRIOR_TV"] = metrics.prior_tv(second, first)
    key = base_key(studio.protocol, subject)
    return {"key": key, "arm": "base", "subject": subject, "step": 0, "scores": rounded_scores(scores)}


def score_arm(
    studio: Studio, arm: Arm, training: Training, step: int, folder: Path, work: Path
) -> dict[str, Any]:
    """The record of an adapter: the scores of its pictures, its size, and the device that drew them."""
    _, copies = photos_of(training.subject, work)
    base = studio.class_readings(training.subject, CLASS_SEED)
    path = adapter_file(folder, step)
    steps = [step - studio.protocol.checkpointing * number for number in range(arm.averaged)]
    with studio.adapted([(adapter_file(folder, at), 1 / len(steps)) for at in steps]):
        scores = subject_scores(studio, training.subject, arm.word, copies)
        if arm.word == WORD:
            scores |= prior_scores(studio, training.subject, base)
    with safe_open(path, "pt") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return {
        "key": training.result_key(studio.protocol, step, arm.word, arm.averaged),
        "arm": arm.name,
        "subject": training.subject,
        "seed": training.seed,
        "step": step,
        "rate": training.rate,
        "parameters": parameters,
        "device": studio.device_name,
        "scores": rounded_scores(scores),
    }
