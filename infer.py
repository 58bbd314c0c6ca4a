"""Draw pictures with adapters, or with the base alone: sets of adapters x weights x prompts x seeds -> PNG
files that contain their settings, and a contact sheet. Launch with `accelerate launch` to share the work
among processes: any number of processes draws the same pictures."""

from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions, Sampling
from dreambooth.runtime import startup, stops

if __name__ == "__main__":  # before the slow imports, see runtime/startup.py
    startup.begin()
    OPTIONS = parse(InferOptions, __doc__)

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dreambooth.adapters import apply, hub_adapters, variants
from dreambooth.adapters.variants import Loaded, Variant
from dreambooth.bases import families, pipelines, prompt_weights, schedulers
from dreambooth.bases.prompts import PromptCache
from dreambooth.data import captions, output_pictures, replayed_unet
from dreambooth.files import pictures
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console, reader
from dreambooth.io.errors import reason_of, shown
from dreambooth.options import adapter_sets
from dreambooth.runtime import processes
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Stop, Watch

LIST, SHEET = "images.json", "contact_sheet.png"


def read_prompts(options: InferOptions) -> list[str]:
    """The prompts of --prompt or --prompts_file. Raises UserError if the file cannot be read or is empty."""
    if not options.prompts_file:
        return list(options.prompt)
    return captions.read_prompts(options.prompts_file, "--prompts_file")


def main(options: InferOptions) -> None:
    """Draw and save every picture, then write `images.json` and `contact_sheet.png`. Raises UserError for a
    user's mistake, SystemExit if a signal ends the program."""
    with stops.stoppable(advice="images.json is written at the end, and was not") as watch:
        infer(options, watch)


def infer(options: InferOptions, watch: Watch) -> None:
    """`main` without its handling of signals."""
    peers = processes.join(watch, threads=options.num_threads, peer_timeout=600)
    device = peers.accelerator.device
    dtype = pipelines.dtype_of(options.drawing.mixed_precision, device)
    # what to draw
    output_dir = output_pictures.checked_folder(options.output_dir, options.base)
    prompts = read_prompts(options)
    sets = adapter_sets.of(options.adapter, options.adapter_weights, options.adapters_file)
    peers.on_main(lambda: families.find(options.base).folder)  # a base on the hub is downloaded once
    base = families.find(options.base)
    peers.on_main(lambda: hub_adapters.fetched(sets))
    sets = hub_adapters.fetched(sets)
    peers.say_notes(base.notes())
    loaded = variants.read_adapters(sets, base, options.drawing.clip_skip)
    columns = variants.plan(options, sets, loaded, prompts)
    sampling = options.sampling(base.default_resolution)
    has_weights = options.prompt_weights
    steps = sampling.num_inference_steps
    variants.check(options.drawing, steps, columns, loaded, base, has_weights=has_weights)
    if options.scheduler is not None:
        schedulers.check_named(options.scheduler, steps, base)
    content = repr((columns, [adapter.identity.sha256 for adapter in loaded.values()]))
    peers.check_same({"prompts and adapters": hashlib.sha256(content.encode()).hexdigest()})
    records = all_records(options, sampling, columns, loaded)
    # the output folder
    names = [LIST, SHEET, *(record["file"] for chunk in records for record in chunk)]
    with output_pictures.held(output_dir, names, peers) as files:
        if peers.is_main:
            if table := variants.table(columns, loaded, options.drawing.fuse, dtype):
                console.say(table)
            console.notes(variants.notes(options.drawing, columns, loaded, base, has_weights=has_weights))
            for name in (LIST, SHEET):  # of earlier pictures, which will be replaced
                files.remove(name)
        peers.barrier()
        # draw
        pipeline = pipelines.load_pipeline(base, dtype, device, options.scheduler)
        draw_all(options, sampling, pipeline, base, columns, records, loaded, files, peers, watch)
        peers.barrier()
        if peers.is_main:
            collect(options, columns, [record for chunk in records for record in chunk], files)


# ---- drawing


def draw_all(
    options: InferOptions,
    sampling: Sampling,
    pipeline: Any,
    base: families.Base,
    columns: Sequence[Variant],
    records: Sequence[list[dict[str, Any]]],
    loaded: Loaded,
    files: WrittenFiles,
    peers: Peers,
    watch: Watch,
) -> None:
    """Draw and save this process's share of the pictures. Raises OSError if one cannot be written.

    `columns` are the variants to draw, each a column of the contact sheet; `records` are their pictures. A
    variant's pictures are drawn in chunks of --batch_size. The last bits of a picture depend on the other
    pictures of its chunk, so the chunks are the same on any number of processes: process c % processes draws
    chunk c.
    """
    stack = apply.Stack({part: getattr(pipeline, part) for part in ("unet", *base.family.text)})
    for adapter in loaded.values():
        stack.add(adapter.key, adapter.adapter)
    # every process attaches the adapters of all variants: last bits must not depend on which variants a
    # process draws
    stack.attach_all((variant.weights(loaded) for variant in columns), options.drawing.fuse)
    graphs = replayed_unet.graphs_of(options.speed, pipeline.unet.device, console.warn)
    chunk_number = 0
    count = sum(map(len, records))
    with tqdm(total=count, desc="pictures", unit="image", disable=not peers.is_main) as bar:
        for variant, variant_records in zip(columns, records, strict=True):
            # this process's chunks
            firsts = range(0, len(variant_records), options.drawing.batch_size)
            chunks = [variant_records[first : first + options.drawing.batch_size] for first in firsts]
            chunks_here = [c for n, c in enumerate(chunks, chunk_number) if n % peers.world == peers.rank]
            chunk_number += len(chunks)
            if not chunks_here:
                continue
            # draw them with the variant's adapters
            with stack.activated(variant.weights(loaded), options.drawing.fuse), torch.no_grad():
                text = pipelines.text_of(pipeline, base, clip_skip=variant.clip_skip)
                if options.prompt_weights:  # those of the whole run, which all become as long as the longest
                    texts = [record["prompt"] for of_variant in records for record in of_variant]
                    texts.append(options.drawing.negative_prompt)
                    prompt_cache = prompt_weights.encode_all(text, texts, watch.check)
                else:
                    texts = [record["prompt"] for chunk in chunks_here for record in chunk]
                    prompt_cache = text.encode_all([*texts, options.drawing.negative_prompt], watch.check)
                with replayed_unet.replaying(pipeline, graphs):
                    for chunk in chunks_here:
                        _draw(options, sampling, pipeline, prompt_cache, chunk, files, watch)
                        bar.update(min(len(chunk) * peers.world, count - bar.n))


def all_records(
    options: InferOptions, sampling: Sampling, columns: Sequence[Variant], loaded: Loaded
) -> list[list[dict[str, Any]]]:
    """For each variant the records of its pictures, as images.json lists them."""
    records: list[list[dict[str, Any]]] = []
    for variant in columns:
        suffix = "_base" if loaded and not variant.set else ""
        settings = _settings(options, sampling, variant, loaded)
        records.append(
            [
                {"file": f"{number:05d}_{seed}{suffix}.png", "prompt": prompt, "seed": seed, **settings}
                for number, (prompt, seed) in enumerate(variant.jobs, sum(map(len, records)))
            ]
        )
    return records


def _settings(options: InferOptions, sampling: Sampling, variant: Variant, loaded: Loaded) -> dict[str, Any]:
    """The settings that all pictures of a variant share."""
    adapters, labels = [], []
    for weighted in variant.adapters:
        identity, weights = loaded[weighted.path].identity, weighted.weights
        labels += [identity.label] if apply.is_active(weights) else []
        parts = {part: weight for part, weight in weights.items() if part}
        adapters.append(
            {"file": identity.label, "sha256": identity.sha256[:16], "weight": weights[""]}
            | ({"weights": parts} if parts else {})
        )
    return {
        "base": options.base.name(),
        "negative_prompt": options.drawing.negative_prompt,
        "steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        **({"scheduler": options.scheduler} if options.scheduler else {}),
        **({"prompt_weights": True} if options.prompt_weights else {}),
        **({"size": list(sampling.size or ())} if options.width or options.height else {}),
        "clip_skip": variant.clip_skip,
        "set": variant.set.name if variant.set else None,
        "adapter": " + ".join(labels) or None,
        "adapters": adapters,
    }


def _draw(
    options: InferOptions,
    sampling: Sampling,
    pipeline: Any,
    prompt_cache: PromptCache,
    chunk: list[dict[str, Any]],
    files: WrittenFiles,
    watch: Watch,
) -> None:
    """Draw the pictures of the records in `chunk` in one batch, and save each. Raises OSError."""
    prompts, seeds = [record["prompt"] for record in chunk], [record["seed"] for record in chunk]
    negative_prompt = options.drawing.negative_prompt
    images = pipelines.draw_as(sampling, negative_prompt, pipeline, prompt_cache, prompts, seeds, watch.check)
    for record, image in zip(chunk, images, strict=True):
        settings = {key: value for key, value in record.items() if key != "file"}
        output_pictures.save(files, record["file"], image, settings)


def collect(
    options: InferOptions, columns: Sequence[Variant], records: list[dict[str, Any]], files: WrittenFiles
) -> None:
    """Write the records as images.json, and the contact sheet: a row for each prompt, and for each seed a
    column for each variant. Raises OSError."""
    folder = files.folder
    thumbnails: dict[tuple[int, str, int], Image.Image] = {}
    remaining = iter(records)
    for number, variant in enumerate(columns):
        for prompt, seed in variant.jobs:
            path = folder / next(remaining)["file"]
            try:
                with reader.opened(path) as file, Image.open(file) as image:
                    # scaled at once: thousands of pictures at full size are gigabytes
                    thumbnails[number, prompt, seed] = pictures.scaled(
                        image.convert("RGB"), pictures.THUMBNAIL
                    )
            except OSError as error:
                raise Stop(f"{shown(path)}, drawn by this run, cannot be read: {reason_of(error)}") from None
    sheet_columns = [(number, seed) for seed in options.seeds for number in range(len(columns))]
    rows = [
        (prompt, [thumbnails.get((number, prompt, seed)) for number, seed in sheet_columns])
        for prompt in dict.fromkeys(prompt for variant in columns for prompt, _ in variant.jobs)
    ]
    labels = [f" {variant.label}" if len(columns) > 1 else "" for variant in columns]
    headings = [f"seed {seed}{labels[number]}" for number, seed in sheet_columns]
    sheet = pictures.contact_sheet(rows, headings)
    files.write(SHEET, pictures.png(sheet, {"contact_sheet": len(records)}))
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    files.write(LIST, text.encode())
    console.say(f"wrote {len(records)} pictures and {SHEET} to {folder}")


if __name__ == "__main__":
    startup.run(main, OPTIONS)
