"""Draw pictures with adapters, or without: sets of adapters x weights x prompts x seeds -> PNG files with their settings inside, and a contact
sheet. Launch with `accelerate launch` to share the work among processes: the pictures are the same on any number of them."""

from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.runtime import startup, stops

if __name__ == "__main__":
    OPTIONS = parse(InferOptions, __doc__)
    startup.begin()

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dreambooth.adapter_files import deltas, native
from dreambooth.adapter_files.formats import Adapter
from dreambooth.adapter_files.rotations import Rotations
from dreambooth.adapters import apply
from dreambooth.bases import families, loading, pipelines, prompts
from dreambooth.errors import UserError, shown
from dreambooth.files import atomic, locks, pictures
from dreambooth.options import adapter_sets
from dreambooth.options.adapter_sets import AdapterSet, Choice
from dreambooth.options.training import TextOptions
from dreambooth.runtime import processes
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Watch


def read_prompts(options: InferOptions) -> list[str]:
    if not options.prompts_file:
        return list(options.prompt)
    try:
        lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--prompts_file {shown(options.prompts_file)}: {reason}") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--prompts_file {options.prompts_file}: no prompt in it")
    return prompts


@dataclasses.dataclass(frozen=True, eq=False)
class Worn:
    """An adapter that some set has: its name on the models, what it is, how it is shown, and the hash of its files."""

    key: str
    adapter: Adapter | Rotations
    label: str
    sha256: str
    clip_skip: int


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is drawn in one go: a set of adapters at its weights times `factor`, or the base alone; (prompt, seed) of every picture."""

    label: str
    set: AdapterSet | None
    factor: float
    clip_skip: int
    jobs: tuple[tuple[str, int], ...]

    def weights(self, adapters: dict[Path, Worn]) -> dict[str, apply.Weight]:
        """By the adapters' names on the models."""
        return {adapters[choice.path].key: choice.weights(self.factor) for choice in self.choices}

    @property
    def choices(self) -> tuple[Choice, ...]:
        return self.set.choices if self.set else ()

    @property
    def where(self) -> str:
        """How messages name it."""
        return self.set.where if self.set else "--prompt"


def main(options: InferOptions) -> None:
    """Draw and save every picture, `images.json` and `contact_sheet.png`. Raises SystemExit if a signal ends it."""
    with stops.stoppable(advice="images.json is written at the end, and was not") as watch:
        infer(options, watch)


def infer(options: InferOptions, watch: Watch) -> None:
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    peers = processes.join(watch, peer_timeout=600)
    device = peers.accelerator.device
    for note in processes.notes():
        print(f"note: {note}")
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not work on a CPU; use bf16, or leave it out")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]
    words = read_prompts(options)
    sets = adapter_sets.of(options.adapter, options.adapter_weights, options.adapters_file)
    peers.on_main(lambda: families.find(options.base).folder)  # downloaded, where it must be, once
    base = families.find(options.base)
    adapters = read_adapters(sets, base, options.clip_skip)
    arms = plan(options, sets, adapters, words)
    check(options, arms, adapters, base)
    peers.check_same(
        {
            "prompts and adapters": hashlib.sha256(
                repr((arms, [worn.sha256 for worn in adapters.values()])).encode()
            ).hexdigest()
        }
    )
    output_dir = Path(options.output_dir)
    atomic.make_output_folder(output_dir, "--output_dir")
    with contextlib.ExitStack() as stack:
        for note in peers.on_main(lambda: stack.enter_context(locks.hold(output_dir, "--output_dir"))):
            print(f"note: {note}")
        if peers.is_main:
            print(table(arms, adapters, options.fuse, dtype), end="")
            for name in ("images.json", "contact_sheet.png"):  # of pictures that are about to be drawn over
                (output_dir / name).unlink(missing_ok=True)
        peers.barrier()
        pipeline = pipelines.load_pipeline(base, dtype, device)
        records = draw_all(options, pipeline, base, arms, adapters, peers, watch)
        peers.barrier()
        if peers.is_main:
            collect(options, arms, records)


def read_adapters(sets: Sequence[AdapterSet], base: families.Base, clip_skip: int | None) -> dict[Path, Worn]:
    """Every adapter that some set has, by its path, each read once. Raises UserError naming flag or set and file."""
    layers = base.layers()
    adapter_sets.check_parts(sets, layers)
    found: dict[Path, Worn] = {}
    for one in sets:
        for choice in one.choices:
            if choice.path in found:
                continue
            try:
                adapter = apply.read(choice.path, layers)
                label, sha256 = _identity(choice.path)
            except UserError as error:
                raise UserError(f"{one.where}: {error}") from None
            recorded = native.recorded(adapter.metadata).get("clip_skip", 0)
            recorded = recorded if type(recorded) is int and recorded >= 0 else 0
            found[choice.path] = Worn(
                f"adapter_{len(found)}",
                adapter,
                label,
                sha256,
                clip_skip if clip_skip is not None else recorded,
            )
    return found


def _identity(path: Path) -> tuple[str, str]:
    """(how an adapter is shown, a hash of its files)."""
    whole = path / native.ADAPTER_NAME
    file = whole if path.is_dir() and whole.exists() else path
    files = (
        [file]
        if file.is_file()
        else sorted(p for p in file.rglob("adapter_*") if p.suffix in (".safetensors", ".json"))
    )
    hashes = []
    try:
        for one in files:
            with one.open("rb") as opened:
                hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    absolute = file.absolute()
    return f"{absolute.parent.name}/{absolute.name}", hashes[0] if len(hashes) == 1 else hashlib.sha256(
        "".join(hashes).encode()
    ).hexdigest()


def plan(
    options: InferOptions, sets: Sequence[AdapterSet], adapters: dict[Path, Worn], words: Sequence[str]
) -> list[Arm]:
    """All that is drawn, in the order of its columns on the sheet; the base first, if it is wanted."""
    wanted: list[tuple[str, AdapterSet | None, float]] = (
        [("base", None, 0.0)] if options.compare or not sets else []
    )
    for one in sets:
        label = one.name if options.adapters_file else "adapter"
        wanted += [
            (label if options.sweep is None else f"{label} x {factor:g}", one, factor)
            for factor in options.factors()
        ]
    arms = []
    skips = [adapters[choice.path].clip_skip for one in sets for choice in one.choices]
    everything = dict.fromkeys([*words, *(prompt for one in sets for prompt in one.prompts)])
    for label, chosen, factor in wanted:
        asked = list(everything) if chosen is None else list(chosen.prompts or words)
        if not asked:
            raise UserError(
                f"{chosen.where if chosen else '--prompt'} has no prompts; give it some, or --prompt for all sets"
            )
        own = [adapters[choice.path].clip_skip for choice in chosen.choices] if chosen else []
        clip_skip = options.clip_skip if options.clip_skip is not None else next(iter(own or skips), 0)
        arms.append(
            Arm(
                label,
                chosen,
                factor,
                clip_skip,
                tuple((prompt, seed) for prompt in asked for seed in options.seeds),
            )
        )
    return arms


def check(
    options: InferOptions, arms: Sequence[Arm], adapters: dict[Path, Worn], base: families.Base
) -> None:
    """Raise UserError if an arm asks for what its adapters, or this base, cannot do."""
    asked = {f"the prompt {prompt!r}": prompt for arm in arms for prompt, _ in arm.jobs} | {
        "--negative_prompt": options.negative_prompt
    }
    prompts.check(loading.load_tokenizers(base), asked, families.max_tokens(base))
    for clip_skip in dict.fromkeys(arm.clip_skip for arm in arms):
        families.check_text(base, TextOptions(clip_skip=clip_skip))
    for arm in arms:
        for choice in arm.choices:
            adapter = adapters[choice.path].adapter
            if isinstance(adapter, Rotations):
                where, kinds = arm.where, ", ".join(adapter.kinds).upper()
                for weight in choice.weights(arm.factor).values():
                    if weight not in (0, 1):
                        raise UserError(
                            f"{where}: {shown(choice.path)} is {kinds}, which turns weights: its own can be 0 or 1 only, got {weight:g}"
                        )
                if options.fuse == "no":
                    raise UserError(
                        f"{where}: {shown(choice.path)} is {kinds}, which is always worked into the weights; leave --fuse no out"
                    )


def table(arms: Sequence[Arm], adapters: dict[Path, Worn], how: apply.Fusing, dtype: torch.dtype) -> str:
    """What was read, line by line, and what the user should know of it."""
    lines = (
        [
            f"{'set':<16} {'adapter':<28} {'component':<16} {'kind':<6} {'modules':>7}  {'rank':<12} {'weight':<24}"
        ]
        if adapters
        else []
    )
    notes = []
    for arm in arms:
        worn = [adapters[choice.path] for choice in arm.choices]
        seen = [
            adapters[choice.path].adapter
            for choice in arm.choices
            if apply.is_worn(choice.weights(arm.factor))
        ]
        is_fused = apply.is_fused(seen, how, dtype)
        for choice, one in zip(arm.choices, worn, strict=True):
            weights = choice.weights(arm.factor)
            for component, kind, modules, ranks in _contents(one.adapter):
                own = {part: w for part, w in weights.items() if part.partition(".")[0] in ("", component)}
                said = ", ".join(f"{part + ' ' if part else ''}{w:g}" for part, w in own.items()) + (
                    " (fused)" if is_fused else ""
                )
                lines.append(
                    f"{arm.label[:16]:<16} {choice.name[:28]:<28} {component:<16} {kind:<6} {modules:>7}  {ranks[:12]:<12} {said}"
                )
        skips = {f"{one.label}: {one.clip_skip}" for one in worn}
        if len({one.clip_skip for one in worn}) > 1:
            notes.append(
                f"note: the adapters were trained with different clip_skip ({', '.join(sorted(skips))}); drawn with {arm.clip_skip}"
            )
    if len({arm.clip_skip for arm in arms}) > 1:
        notes.append(
            "note: the sets are drawn with different clip_skip, as their adapters were trained; --clip_skip sets one for all"
        )
    return "".join(f"{line.rstrip()}\n" for line in [*lines, *dict.fromkeys(notes)])


def _contents(adapter: Adapter | Rotations) -> list[tuple[str, str, int, str]]:
    """(component, kind, modules, ranks or sizes of blocks) for each line of the table."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for component, modules in adapter.components.items():
        for path in modules:
            if isinstance(adapter, Rotations):
                rows.setdefault((component, adapter.settings[component][0].lower()), []).append(
                    adapter.size(component, path)
                )
            else:
                module = adapter.components[component][path]
                rows.setdefault((component, deltas.kind(module)), []).append(
                    "dense" if module.rank is None else module.rank
                )
    return [
        (*key, len(ranks), ", ".join(str(rank) for rank in sorted(set(ranks), key=str)))
        for key, ranks in rows.items()
    ]


def draw_all(
    options: InferOptions,
    pipeline: Any,
    base: families.Base,
    arms: Sequence[Arm],
    adapters: dict[Path, Worn],
    peers: Peers,
    watch: Watch,
) -> list[dict[str, Any]]:
    """Draw and save this process's share; what images.json says of every picture, those of the other processes too.

    The last bits of a picture depend on those that it is drawn with: so chunks of --batch_size are fixed by number, chunk c is process
    c % processes' whole.
    """
    stack = apply.Stack({part: getattr(pipeline, part) for part in ("unet", *base.family.text)})
    for worn in adapters.values():
        stack.add(worn.key, worn.adapter)
    # by every process, those that draw no picture of some arm too: pictures must not depend on who has drawn what before
    stack.attach_all((arm.weights(adapters) for arm in arms), options.fuse)
    records: list[dict[str, Any]] = []
    chunk_number = 0
    count = sum(len(arm.jobs) for arm in arms)
    with tqdm(total=count, desc="pictures", unit="image", disable=not peers.is_main) as bar:
        for arm in arms:
            start = len(records)
            has_base = bool(adapters) and not arm.set
            records += [
                {
                    "file": f"{number:05d}_{seed}{'_base' if has_base else ''}.png",
                    "prompt": prompt,
                    "seed": seed,
                    **_settings(options, arm, adapters),
                }
                for number, (prompt, seed) in enumerate(arm.jobs, start)
            ]
            chunks = [
                records[first : first + options.batch_size]
                for first in range(start, len(records), options.batch_size)
            ]
            mine = [
                chunk
                for number, chunk in enumerate(chunks, chunk_number)
                if number % peers.world == peers.rank
            ]
            chunk_number += len(chunks)
            if not mine:
                continue
            with stack.worn(arm.weights(adapters), options.fuse), torch.no_grad():
                text = pipelines.text_of(pipeline, base, clip_skip=arm.clip_skip)
                prompt_cache = text.encode_all(
                    [*(record["prompt"] for chunk in mine for record in chunk), options.negative_prompt],
                    watch.check,
                )
                for chunk in mine:
                    images = pipelines.draw(
                        pipeline,
                        prompt_cache.of([record["prompt"] for record in chunk]),
                        prompt_cache.of([options.negative_prompt]),
                        [record["seed"] for record in chunk],
                        num_inference_steps=options.num_inference_steps,
                        guidance_scale=options.guidance_scale,
                        side=options.resolution,
                        check=watch.check,
                    )
                    for record, image in zip(chunk, images, strict=True):
                        settings = {key: value for key, value in record.items() if key != "file"}
                        path = Path(options.output_dir) / record["file"]
                        atomic.write(path, pictures.png(image, settings))
                    bar.update(min(len(chunk) * peers.world, count - bar.n))
    return records


def _settings(options: InferOptions, arm: Arm, adapters: dict[Path, Worn]) -> dict[str, Any]:
    """What all pictures of an arm share."""
    worn, names = [], []
    for choice in arm.choices:
        one, weights = adapters[choice.path], choice.weights(arm.factor)
        names += [one.label] if apply.is_worn(weights) else []
        parts = {part: weight for part, weight in weights.items() if part}
        worn.append(
            {"file": one.label, "sha256": one.sha256[:16], "weight": weights[""]}
            | ({"weights": parts} if parts else {})
        )
    return {
        "negative_prompt": options.negative_prompt,
        "steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "clip_skip": arm.clip_skip,
        "base": options.base.pretrained_model_name_or_path,
        "set": arm.set.name if arm.set else None,
        "adapter": " + ".join(names) or None,
        "adapters": worn,
    }


def collect(options: InferOptions, arms: Sequence[Arm], records: list[dict[str, Any]]) -> None:
    """Write the list of all pictures, and the sheet of them: a row for each prompt, under each seed a column for each arm."""
    folder = Path(options.output_dir)
    thumbnails: dict[tuple[int, str, int], Image.Image] = {}
    left = iter(records)
    for number, arm in enumerate(arms):
        for prompt, seed in arm.jobs:
            with Image.open(folder / next(left)["file"]) as image:
                # scaled at once: thousands of pictures at full size are gigabytes
                thumbnails[number, prompt, seed] = pictures.scaled(image.convert("RGB"), pictures.THUMBNAIL)
    asked = dict.fromkeys(prompt for arm in arms for prompt, _ in arm.jobs)
    rows = [
        (
            prompt,
            [thumbnails.get((number, prompt, seed)) for seed in options.seeds for number in range(len(arms))],
        )
        for prompt in asked
    ]
    columns = [f"seed {seed}" + f" {arm.label}" * (len(arms) > 1) for seed in options.seeds for arm in arms]
    atomic.write(folder / "contact_sheet.png", pictures.png(pictures.contact_sheet(rows, columns)))
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    atomic.write(folder / "images.json", text.encode())
    print(f"wrote {len(records)} pictures and contact_sheet.png to {folder}")


if __name__ == "__main__":
    startup.run(main, OPTIONS)
