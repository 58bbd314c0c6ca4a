"""A folder of class images: the same set on any number of processes, after any interruption.

Picture k depends on (seed, k) only. The last bits of a picture also depend on the batch that it is computed
in, so pictures are made in fixed chunks of b pictures: chunk c holds pictures c*b to c*b+b-1 and is made by
process c % world. If a picture of a chunk is missing, the whole chunk is computed again.

`manifest.json` holds the settings of the set and the hash of each picture. A folder made with other settings
is refused. Pictures with other names are the user's: they count as class images, unless this program drew
them, and are never changed. Nor is a picture of the set that is no longer as it was written.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dreambooth.bases import families, pipelines, schedulers
from dreambooth.data import picture_files, replayed_unet, sampling_order
from dreambooth.files import locks, pictures
from dreambooth.io import console, reader, writer
from dreambooth.io.errors import UserError, shown
from dreambooth.options.photos import GenerationOptions, PriorOptions
from dreambooth.options.resolved import ResolvedPriorOptions, resolve_prior
from dreambooth.options.speed import GraphOptions
from dreambooth.runtime.graphs import Graphs
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Stop, Watch

MANIFEST = "manifest.json"
_FLAG = "--class_data_dir"
_NAME = re.compile(r"class-\d{6}\.png")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Default number of steps by sampler. With the embedded base, pictures after 25 steps of DPM-Solver++ (arXiv
# 2211.01095) differ from those after 100 by at most one level of 255, in the median of pictures.
STEPS = {"dpm": 25, "base": 50}


@dataclasses.dataclass(frozen=True)
class ClassImageSettings:
    """What determines the pictures of a set. The names of these fields are keys in the manifest and in PNG
    files."""

    base: str
    """`Base.fingerprint`."""
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    batch_size: int
    side: int
    """Resolution: the side of a picture, in pixels."""
    precision: str
    """"fp32", "fp16" or "bf16"."""
    scheduler: str
    """"dpm" (DPM-Solver++) or "base" (the base's own)."""


# the flag that sets each field
_FLAGS = {
    "base": "--pretrained_model_name_or_path",
    "prompt": "--class_prompt",
    "seed": "--class_seed in training, --seed in generate_class_images.py",
    "steps": "--class_inference_steps",
    "guidance_scale": "--class_guidance_scale",
    "batch_size": "--sample_batch_size",
    "side": "--resolution of generate_class_images.py",
    "precision": "--prior_generation_precision",
    "scheduler": "--class_scheduler",
}


def made_with(folder: Path) -> dict[str, Any]:
    """The settings of the class images in a folder, by field; {} without a manifest."""
    return _read_manifest(folder)[0]


def is_set(folder: Path) -> bool:
    """Whether the folder holds class images that this program made."""
    try:
        return bool(made_with(folder))
    except UserError:  # the manifest of another program
        return False


def check_outside(folder: Path, flag: str) -> None:
    """Raise UserError, naming `flag`, if the folder is a set of class images, or lies in one."""
    if "\0" in str(folder):
        return  # no folder can have that name
    path = Path(os.path.realpath(folder))
    for place in (path, *path.parents):
        if is_set(place):
            relation = "is" if place == path else "lies in"
            raise UserError(
                f"{flag}: {shown(folder)} {relation} a folder of class images; name another folder"
            )


def file_name(number: int) -> str:
    """The file name of a made picture."""
    return f"class-{number:06d}.png"


def precision_of(flag: str | None, device: torch.device) -> str:
    """--prior_generation_precision as "fp32", "fp16" or "bf16".

    The default is bf16 where `device` computes in it: faster than fp32, and without fp16's overflows. The VAE
    runs in it too; its pictures differ from those of float32 by a quarter of one level of 255 on average.
    """
    if flag is not None:
        return "fp32" if flag == "no" else flag
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # without these instructions a CPU emulates bf16, slower than fp32
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, SHA-256 of each picture by file name) from the folder's manifest; ({}, {}) without one.

    The settings are those of `ClassImageSettings`, but fields may be missing. Raises UserError if the
    manifest is damaged.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}, {}
    try:
        content = reader.read_json_table(path, _FLAG, reader.LARGEST_RECORD)
        # manifests from before --class_scheduler existed have no scheduler
        settings = {"scheduler": "base", **content["settings"]}
        if not _is_valid(settings):
            raise ValueError
        return settings, dict(content["sha256"])
    except (UserError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{_FLAG}: {path} is damaged, or another program's: name another folder, or move it and the"
            " class-*.png files away to make them again"
        ) from None


def _is_valid(settings: dict[str, Any]) -> bool:
    """Whether the settings that serve as defaults of flags have values that the flags allow."""
    numbers = [(settings.get(name, 1), least) for name, least in (("seed", 0), ("steps", 1), ("side", 1))]
    return (
        all(type(number) is int and number >= least for number, least in numbers)
        and settings.get("precision", "fp32") in _DTYPES
        and settings["scheduler"] in STEPS
    )


def _pending_hashes(folder: Path) -> dict[str, str]:
    """Hashes, by name of picture, that processes wrote beside their pictures and that are not in the manifest
    yet."""
    hashes = {}
    for path in sorted(folder.glob(".class-*.png.sha256")):
        name = path.name[1:].removesuffix(".sha256")
        if _NAME.fullmatch(name):
            with contextlib.suppress(UserError):  # another program's
                data = reader.read_bytes(path, path.name, 64, follow_links=False)
                if re.fullmatch(rb"[0-9a-f]{64}", data):
                    hashes[name] = data.decode()
    return hashes


def names_made(folder: Path) -> set[str]:
    """The file names of the pictures that this program made for the folder."""
    return {*_read_manifest(folder)[1], *_pending_hashes(folder)}


def notes(folder: Path) -> list[str]:
    """Notes for the user on files of the folder that are no class images. Raises UserError if it cannot be
    read."""
    if not os.path.exists(folder):
        return []
    skipped = picture_files.list_folder(folder, _FLAG, names_made(folder)).described()
    return [f"skipped in {shown(folder)}: {skipped}"] if skipped else []


def missing_numbers(folder: Path, settings: ClassImageSettings, total: int) -> list[int]:
    """The numbers of the pictures that must be made so that the folder holds `total` pictures, the user's
    included.

    Raises UserError if the folder holds a set made with other settings, or a file that would be overwritten.
    """
    if not os.path.exists(folder):
        return list(range(total))
    if not folder.is_dir():
        raise UserError(f"{_FLAG}: {folder} is not a folder")
    made, hashes = _read_manifest(folder)
    if made:  # without a manifest no picture is known to be of this set
        _check_settings(folder, made, settings)
        hashes |= _pending_hashes(folder)
    listing = picture_files.list_folder(folder, _FLAG, hashes)
    users = sum(not _NAME.fullmatch(name) for name in listing.pictures)
    missing, changed = [], []
    for k in range(max(0, total - users)):
        name = file_name(k)
        if not _is_intact(folder / name, hashes.get(name)):
            missing.append(k)
            if name in hashes and not _is_vacant(folder / name):
                changed.append(name)
    names = sorted(path.name for path in folder.iterdir())
    unknown = [name for name in names if _NAME.fullmatch(name) and name not in hashes]
    pending = [f".{file_name(k)}.sha256" for k in missing if file_name(k) not in hashes]
    taken = [name for name in pending if not _is_vacant(folder / name)]
    for kept, reason, remedy in (
        (unknown, " is in no manifest and", ""),
        (changed, " is not as it was made (its SHA-256 differs) and", "remove it to have it made again, "),
        (taken, "", ""),
    ):
        if kept:
            advice = f"{remedy}rename it or name another folder"
            raise UserError(f"{_FLAG}: {folder / kept[0]}{reason} would be overwritten; {advice}")
    return missing


def _is_vacant(path: Path) -> bool:
    """Whether a file may be written here: there is none, or an empty one."""
    return not os.path.lexists(path) or (
        path.is_file() and not path.is_symlink() and path.stat().st_size == 0
    )


def _check_settings(folder: Path, made: Mapping[str, Any], settings: ClassImageSettings) -> None:
    """Raise UserError if the folder's pictures were `made` with other settings."""
    differences = [
        f"{name} is {made.get(name)!r} there and {value!r} now ({_FLAGS[name]})"
        for name, value in dataclasses.asdict(settings).items()
        if made.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{_FLAG}: {folder} holds class images made with other settings: {'; '.join(differences)}. "
            "Name another folder, or remove this one"
        )


def is_complete(folder: Path, settings: ClassImageSettings, total: int) -> bool:
    """Whether no picture is missing and the manifest holds all hashes. Raises UserError as `missing_numbers`
    does."""
    return not missing_numbers(folder, settings, total) and not _pending_hashes(folder)


def _is_intact(path: Path, sha256: str | None) -> bool:
    """Whether the picture exists and has this hash."""
    if sha256 is None:
        return False
    try:
        return hashlib.sha256(reader.read_bytes(path, path.name, picture_files.LARGEST)).hexdigest() == sha256
    except UserError:
        return False


def fill(
    folder: Path,
    settings: ClassImageSettings,
    total: int,
    make_draw: Callable[[], Callable[[Sequence[int]], list[Any]]],
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Make the missing pictures. Returns how many this process made.

    `make_draw()` loads the models and returns a function from seeds to pictures; it is called only if this
    process has pictures to make. `wait` is a barrier. `check` is called after each chunk; what it raises ends
    the work. Raises UserError, on every process, as `missing_numbers` does.
    """
    # Every process reads the folder before the first one writes to it.
    missing = missing_numbers(folder, settings, total)
    is_done = not missing and not _pending_hashes(folder)
    wait()
    if is_done:
        return 0
    if rank == 0:
        writer.make_folder(folder, parents=True)
        _write_manifest(folder, settings)
    wait()

    # Draw this process's chunks; keep the pictures that are missing.
    chunks = sorted({k // settings.batch_size for k in missing})
    own_chunks = [chunk for chunk in chunks if chunk % world == rank]
    wanted, made = set(missing), 0
    if own_chunks:
        draw = make_draw()
        for chunk in tqdm(own_chunks, desc="class images", unit=f"x{settings.batch_size}", disable=rank != 0):
            numbers = range(chunk * settings.batch_size, (chunk + 1) * settings.batch_size)
            images = draw([sampling_order.key(settings.seed, "class-image", k) for k in numbers])
            check()
            for k, image in zip(numbers, images, strict=True):
                if k in wanted:
                    _save(folder / file_name(k), image, {**dataclasses.asdict(settings), "number": k})
                    made += 1

    # Collect the hashes of all processes.
    wait()
    if rank == 0:
        _write_manifest(folder, settings)
    wait()
    return made


def continued(generation: GenerationOptions, made: Mapping[str, Any]) -> GenerationOptions:
    """`generation`, with sampler, steps and precision of the existing class images for those that are None.

    `made` is what `made_with` returns for the images' folder.
    """
    return dataclasses.replace(
        generation,
        class_scheduler=generation.class_scheduler or made.get("scheduler"),
        class_inference_steps=generation.class_inference_steps or made.get("steps"),
        prior_generation_precision=generation.prior_generation_precision or made.get("precision"),
    )


def adopt(prior: PriorOptions, seed: int) -> ResolvedPriorOptions | None:
    """`prior` with its defaults filled in; None if no class images are drawn.

    The defaults of sampler, steps, precision and seed are those of the existing class images. Without any,
    the class seed is `seed`.
    """
    if not prior.draws_class_images:
        return None
    made = made_with(Path(prior.class_data_dir)) if prior.class_data_dir else {}
    class_seed = prior.class_seed if prior.class_seed is not None else made.get("seed", seed)
    generation = continued(prior.generation, made)
    return resolve_prior(dataclasses.replace(prior, generation=generation), class_seed=class_seed)


def settings_of(prior: ResolvedPriorOptions, base: families.Base, device: torch.device) -> ClassImageSettings:
    """The set that training needs. Raises UserError as `sampler_of` does."""
    side = made_with(Path(prior.class_data_dir)).get("side", base.default_resolution)
    return make_settings(prior.generation, prior.class_prompt, prior.class_seed, side, base, device)


def make_settings(
    generation: GenerationOptions,
    prompt: str,
    seed: int,
    side: int,
    base: families.Base,
    device: torch.device,
) -> ClassImageSettings:
    """The set that these options describe; `side` is in pixels. Raises UserError as `sampler_of` does."""
    scheduler = schedulers.sampler_of(generation.class_scheduler, base)
    steps = generation.class_inference_steps or STEPS[scheduler]
    schedulers.check_steps("--class_inference_steps", steps, base)
    return ClassImageSettings(
        base=base.fingerprint(),
        prompt=prompt,
        seed=seed,
        steps=steps,
        guidance_scale=generation.class_guidance_scale,
        batch_size=generation.sample_batch_size,
        side=side,
        precision=precision_of(generation.prior_generation_precision, device),
        scheduler=scheduler,
    )


def make(
    folder: Path,
    settings: ClassImageSettings,
    total: int,
    base: families.Base,
    peers: Peers,
    watch: Watch,
    speed: GraphOptions,
) -> None:
    """Fill `folder` with `total` pictures that the base draws, shared among `peers`.

    The base is loaded only if pictures are missing. If another run is filling the folder, this one waits.
    `speed` says whether the UNet may be replayed.
    Raises UserError as `fill` does, Stop if `watch` requests it.
    """
    # Processes may have different hardware: the main process decides.
    settings = dataclasses.replace(settings, precision=peers.broadcast(settings.precision))
    device = peers.accelerator.device
    if peers.on_main(lambda: is_complete(folder, settings, total)):
        return
    if settings.precision == "fp16" and device.type == "cpu":
        raise UserError(
            "--prior_generation_precision fp16 does not work on a CPU; "
            "use bf16, or fp32 in a folder of its own"
        )
    writer.make_output_folder(folder, _FLAG)
    owners: list[str] = []

    def wait_for(owner: str) -> None:
        watch.check()
        if not owners:  # the message appears once
            owners.append(owner)
            console.say(f"waiting for another run that is making class images in {folder}: {owner}")

    graphs = replayed_unet.graphs_of(speed, device, console.warn)
    with contextlib.ExitStack() as stack:
        locks.hold_for(peers, stack, folder, _FLAG, wait_for)
        fill(
            folder,
            settings,
            total,
            lambda: _make_draw(settings, base, device, watch, graphs, stack),
            rank=peers.rank,
            world=peers.world,
            wait=peers.barrier,
            check=watch.check,
        )


def _make_draw(
    settings: ClassImageSettings,
    base: families.Base,
    device: torch.device,
    watch: Watch,
    graphs: Graphs,
    stack: contextlib.ExitStack,
) -> Callable[[Sequence[int]], list[Any]]:
    """Load the base. Returns a function from seeds to pictures. `stack` drops what `graphs` records."""
    pipeline = pipelines.load_pipeline(base, _DTYPES[settings.precision], device)
    pipeline.scheduler = schedulers.class_sampler(pipeline.scheduler, settings.scheduler)
    with torch.no_grad():
        prompt_cache = pipelines.text_of(pipeline, base).encode_all([settings.prompt, ""], watch.check)
    # Free the text encoders: DeepFloyd IF's T5 takes gigabytes.
    for encoder in base.family.text:
        setattr(pipeline, encoder, None)
    stack.enter_context(replayed_unet.replaying(pipeline, graphs))
    return lambda seeds: pipelines.draw(
        pipeline,
        prompt_cache.of([settings.prompt] * len(seeds)),
        prompt_cache.of([""]),
        seeds,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        side=settings.side,
        check=watch.check,
    )


def _save(path: Path, image: Any, settings: dict[str, Any]) -> None:
    """Write the picture's hash to a file of its own, then the picture.

    Processes cannot share the manifest, and a picture without a known hash would be refused as the user's.
    Raises Stop if a file of the user has got the name since the start.
    """
    if not _is_vacant(path):
        raise Stop(f"{path} has appeared since the start and would be overwritten; move it away")
    data = pictures.png(image, settings)
    writer.write(path.with_name(f".{path.name}.sha256"), hashlib.sha256(data).hexdigest().encode())
    writer.write(path, data)


def _write_manifest(folder: Path, settings: ClassImageSettings) -> None:
    """Write the manifest with all known hashes, and remove the files of pending ones."""
    pending = _pending_hashes(folder)
    hashes = _read_manifest(folder)[1] | pending
    content = {"settings": dataclasses.asdict(settings), "sha256": dict(sorted(hashes.items()))}
    writer.write(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
    for name in pending:
        writer.remove(folder / f".{name}.sha256")
