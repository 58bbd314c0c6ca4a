"""A folder of class images: the same set on any number of processes, after any interruption.

Picture k depends on (seed, k) only. Floating-point results depend on the batch a picture is computed in, so pictures are made in fixed
chunks by absolute number (chunk c holds pictures c*b .. c*b+b-1), chunk c on process c % world, and a chunk with a missing picture is
made again whole. `manifest.json` says what the set is; a folder made with other settings is refused. Pictures under other names are the
user's own: they count, and are never touched.
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
from dreambooth.data import photos, sampling_order
from dreambooth.errors import UserError
from dreambooth.files import atomic, locks, pictures
from dreambooth.options.photos import GenerationOptions, PriorOptions
from dreambooth.options.resolved import ResolvedPriorOptions, resolve_prior
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Watch

MANIFEST = "manifest.json"
_FLAG = "--class_data_dir"
_NAME = re.compile(r"class-\d{6}\.png")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Steps unless asked for others, by sampler. With the embedded base 25 of the solver's (arXiv 2211.01095) end within a level of 255 of where 100
# of them do, in the median of pictures.
STEPS = {"dpm": 25, "base": 50}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a set of class images is. Any difference gives other pictures."""

    base: str
    """Fingerprint of the base."""
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    batch_size: int
    side: int
    """Pixels."""
    precision: str
    scheduler: str
    """"dpm", the multistep DPM solver, or "base", the base's own."""


# How a user sets each of them.
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
    """The settings in a folder's manifest, {} if there is none."""
    manifest = _read_manifest(folder)
    return manifest["settings"] if manifest else {}


def file_name(number: int) -> str:
    return f"class-{number:06d}.png"


def precision_of(flag: str | None, device: torch.device) -> str:
    """`--prior_generation_precision` as one of fp32, fp16, bf16. None is bf16 where `device` computes in it: faster than fp32, and unlike
    fp16 without overflows. The VAE too: its pictures differ from those of float32 by a quarter of a level of 255 on average."""
    if flag is not None:
        return "fp32" if flag == "no" else flag
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return (
        "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"
    )  # elsewhere bf16 is slower than fp32


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        settings = {
            "scheduler": "base",
            **manifest["settings"],
        }  # sets from before there was a choice do not say
        if not _is_sound(settings):
            raise ValueError
        return {"settings": settings, "sha256": dict(manifest["sha256"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{_FLAG}: {path} is damaged; remove it together with the class-*.png files to make them again"
        ) from None


def _is_sound(settings: dict[str, Any]) -> bool:
    """Whether what a set in the making is continued with, where the flags say nothing, can be that."""
    seed, steps, side = (settings.get(name, 1) for name in ("seed", "steps", "side"))
    numbers = (
        all(type(number) is int for number in (seed, steps, side)) and seed >= 0 and steps >= 1 and side >= 1
    )
    return numbers and settings.get("precision", "fp32") in _DTYPES and settings["scheduler"] in STEPS


def _hash_notes(folder: Path) -> dict[str, str]:
    """Hashes that processes left beside their pictures, not yet in the manifest."""
    return {
        note.name[1:].removesuffix(".sha256"): note.read_text().strip()
        for note in sorted(folder.glob(".class-*.png.sha256"))
    }


def missing_numbers(folder: Path, settings: Settings, total: int) -> list[int]:
    """The numbers of pictures that must be made so that the folder holds `total`, the user's own pictures counted.

    Raises UserError if the folder holds a set made with other settings, or files under our names that are not ours.
    """
    if not folder.exists():
        return list(range(total))
    if not folder.is_dir():
        raise UserError(f"{_FLAG}: {folder} is not a folder")
    manifest = _read_manifest(folder)
    if manifest is not None:
        there, wanted = manifest["settings"], dataclasses.asdict(settings)
        differences = [
            f"{name} is {there.get(name)!r} there and {wanted[name]!r} now ({_FLAGS[name]})"
            for name in wanted
            if there.get(name) != wanted[name]
        ]
        if differences:
            raise UserError(
                f"{_FLAG}: {folder} holds class images made with other settings: {'; '.join(differences)}. Name another folder, or remove this one"
            )
    hashes = (
        manifest["sha256"] | _hash_notes(folder) if manifest else {}
    )  # without a manifest nothing says what a picture shows
    pictures = [
        p.name for p in folder.iterdir() if p.suffix.lower() in photos.FORMATS and not p.name.startswith(".")
    ]
    foreign = [name for name in pictures if _NAME.fullmatch(name) and name not in hashes]
    if foreign:
        raise UserError(
            f"{_FLAG}: {folder / foreign[0]} is in no manifest and would be overwritten; rename it or name another folder"
        )
    own = sum(not _NAME.fullmatch(name) for name in pictures)
    return [
        k
        for k in range(max(0, total - own))
        if not _is_whole(folder / file_name(k), hashes.get(file_name(k)))
    ]


def is_complete(folder: Path, settings: Settings, total: int) -> bool:
    """True if nothing is missing and everything is on record. Raises UserError as `missing_numbers` does."""
    return not missing_numbers(folder, settings, total) and not _hash_notes(folder)


def _is_whole(path: Path, sha256: str | None) -> bool:
    return sha256 is not None and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def fill(
    folder: Path,
    settings: Settings,
    total: int,
    make_draw: Callable[[], Callable[[Sequence[int]], list[Any]]],
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Make the missing pictures and return how many this process made.

    `make_draw()` loads what is needed, only if there is work, and gives a function from seeds to pictures. `wait` is a barrier; `check`
    raises where the work is to stop.
    Raises UserError, on every process alike, if the folder holds another set.
    """
    missing = missing_numbers(folder, settings, total)
    is_done = not missing and not _hash_notes(folder)
    wait()  # every process has looked at the folder as it was before anybody writes
    if is_done:
        return 0
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _write_manifest(folder, settings)
    wait()
    chunks = sorted({k // settings.batch_size for k in missing})
    mine = [chunk for chunk in chunks if chunk % world == rank]
    wanted, made = set(missing), 0
    if mine:
        draw = make_draw()
        for chunk in tqdm(mine, desc="class images", unit=f"x{settings.batch_size}", disable=rank != 0):
            numbers = range(chunk * settings.batch_size, (chunk + 1) * settings.batch_size)
            images = draw([sampling_order.key(settings.seed, "class-image", k) for k in numbers])
            check()
            for k, image in zip(numbers, images, strict=True):
                if k in wanted:
                    _save(folder / file_name(k), image, {**dataclasses.asdict(settings), "number": k})
                    made += 1
    wait()
    if rank == 0:
        _write_manifest(folder, settings)
    wait()
    return made


def continued(generation: GenerationOptions, made: Mapping[str, Any]) -> GenerationOptions:
    """The group with sampler, steps and precision of the class images that exist where it leaves them open.

    `made` is what `made_with` returns for their folder.
    """
    return dataclasses.replace(
        generation,
        class_scheduler=generation.class_scheduler or made.get("scheduler"),
        class_inference_steps=generation.class_inference_steps or made.get("steps"),
        prior_generation_precision=generation.prior_generation_precision or made.get("precision"),
    )


def adopt(prior: PriorOptions, seed: int) -> ResolvedPriorOptions | None:
    """The group with what it leaves open filled in; None without prior preservation.

    Sampler, steps, precision and seed are those of the class images that exist; without any the seed is `seed`.
    """
    if not prior.with_prior_preservation:
        return None
    made = made_with(Path(prior.class_data_dir)) if prior.class_data_dir else {}
    class_seed = prior.class_seed if prior.class_seed is not None else made.get("seed", seed)
    generation = continued(prior.generation, made)
    return resolve_prior(dataclasses.replace(prior, generation=generation), class_seed=class_seed)


def settings_of(
    prior: ResolvedPriorOptions, base: families.Base, fingerprint: str, device: torch.device
) -> Settings:
    """The set that training needs. `fingerprint` is the base's. Raises UserError as `sampler_of` does."""
    side = made_with(Path(prior.class_data_dir)).get("side", base.default_resolution)
    return make_settings(
        prior.generation,
        prompt=prior.class_prompt,
        seed=prior.class_seed,
        side=side,
        base=base,
        fingerprint=fingerprint,
        device=device,
    )


def make_settings(
    generation: GenerationOptions,
    *,
    prompt: str,
    seed: int,
    side: int,
    base: families.Base,
    fingerprint: str,
    device: torch.device,
) -> Settings:
    """The set that these options describe; `side` is in pixels. Raises UserError as `sampler_of` does."""
    scheduler = schedulers.sampler_of(generation.class_scheduler, base)
    return Settings(
        base=fingerprint,
        prompt=prompt,
        seed=seed,
        steps=generation.class_inference_steps or STEPS[scheduler],
        guidance_scale=generation.class_guidance_scale,
        batch_size=generation.sample_batch_size,
        side=side,
        precision=precision_of(generation.prior_generation_precision, device),
        scheduler=scheduler,
    )


def make(
    folder: Path, settings: Settings, total: int, base: families.Base, peers: Peers, watch: Watch
) -> None:
    """Fill `folder` with pictures that the base draws, shared out over `peers`; the base is loaded only if any are missing.

    Another run at work in the folder is waited for. Raises UserError as `fill` does, Stop if `watch` says so.
    """

    def make_draw() -> Callable[[Sequence[int]], list[Any]]:
        pipeline = pipelines.load_pipeline(base, _DTYPES[settings.precision], peers.accelerator.device)
        pipeline.scheduler = schedulers.class_sampler(pipeline.scheduler, settings.scheduler)
        with torch.no_grad():
            prompt_cache = pipelines.text_of(pipeline, base).encode_all([settings.prompt, ""], watch.check)
        for (
            encoder
        ) in base.family.text:  # they have said all that they have to: DeepFloyd IF's take gigabytes
            setattr(pipeline, encoder, None)
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

    settings = dataclasses.replace(
        settings, precision=peers.broadcast(settings.precision)
    )  # processes may have different hardware
    if peers.on_main(lambda: is_complete(folder, settings, total)):
        return
    if settings.precision == "fp16" and peers.accelerator.device.type == "cpu":
        raise UserError(
            "--prior_generation_precision fp16 does not work on a CPU; use bf16, or fp32 in a folder of its own"
        )
    atomic.make_output_folder(folder, _FLAG)
    told: list[str] = []

    def wait(owner: str) -> None:
        watch.check()
        if not told:
            told.append(owner)
            tqdm.write(f"waiting for another run that is making class images in {folder}: {owner}")

    with contextlib.ExitStack() as stack:
        peers.on_main(lambda: stack.enter_context(locks.hold(folder, _FLAG, wait)))
        fill(
            folder,
            settings,
            total,
            make_draw,
            rank=peers.rank,
            world=peers.world,
            wait=peers.barrier,
            check=watch.check,
        )


def _save(path: Path, image: Any, settings: dict[str, Any]) -> None:
    """The picture's hash in a file of its own, then the picture: processes share no manifest, and every picture of ours is on record."""
    data = pictures.png(image, settings)
    atomic.write(path.with_name(f".{path.name}.sha256"), hashlib.sha256(data).hexdigest().encode())
    atomic.write(path, data)


def _write_manifest(folder: Path, settings: Settings) -> None:
    manifest = _read_manifest(folder)
    notes = _hash_notes(folder)
    hashes = (manifest["sha256"] if manifest else {}) | notes
    content = {"settings": dataclasses.asdict(settings), "sha256": dict(sorted(hashes.items()))}
    atomic.write(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
    for name in notes:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / f".{name}.sha256")
