"""The evaluation of the DreamBooth paper in one command: pictures of subjects, drawn with their adapters and
with the base from the same noise, and scored beside the subjects' photos.

Judges are DINO and CLIP models, and the reader of the embedded base's world. A picture that exists is not
drawn again. Launch with `accelerate launch` to share the drawing among processes: any number of processes
draws the same pictures."""

from dreambooth.options.command_line import parse
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.runtime import startup, stops

if __name__ == "__main__":  # before the slow imports, see runtime/startup.py
    startup.begin()
    OPTIONS = parse(EvaluateOptions, __doc__)

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dreambooth.adapters import apply, variants
from dreambooth.adapters.variants import Variant
from dreambooth.bases import families, pipelines
from dreambooth.data import output_pictures, photos, replayed_unet, sampling_order
from dreambooth.evaluation import plan, protocol, reader_judge, results, subjects
from dreambooth.evaluation.plan import Picture, PictureSet, Row
from dreambooth.evaluation.subjects import Case
from dreambooth.io import console
from dreambooth.io.errors import UserError, shown
from dreambooth.options.photos import MOST_PIXELS
from dreambooth.runtime import processes
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Watch

Save = Callable[[str, Image.Image, dict[str, Any]], None]


def main(options: EvaluateOptions) -> None:
    """Draw the missing pictures, score all, and write the tables. Raises UserError for a user's mistake,
    SystemExit if a signal ends the program."""
    with stops.stoppable(advice="the same command draws the missing pictures") as watch:
        evaluate(options, watch)


def evaluate(options: EvaluateOptions, watch: Watch) -> None:
    """`main` without its handling of signals."""
    peers = processes.join(watch, threads=options.num_threads, peer_timeout=600)
    device = peers.accelerator.device
    dtype = pipelines.dtype_of(options.drawing.mixed_precision, device)

    # what to evaluate, and with which judges
    cases = subjects.of(options.subject, options.judges.judge_reader)
    prompts = protocol.read_prompts(Path(options.prompts_file)) if options.prompts_file else None
    rows = plan.rows_of(
        cases,
        prompts,
        options.num_images,
        options.class_prompt,
        options.num_class_images,
        lambda template, k: sampling_order.key(options.seed, "evaluation", template, k),
    )
    judges = peers.on_main(lambda: results.Judges.find(options, cases))
    photos_of = peers.on_main(lambda: check_photos(cases))
    inputs = {flag: str(folder) for case in cases for flag, folder in case.folders.items()}
    output_dir = output_pictures.checked_folder(options.output_dir, options.base, inputs)
    drawing = None if options.tables_only else Drawing(options, rows, judges, dtype, peers, watch)
    if options.tables_only:
        peers.on_main(lambda: check_complete(output_dir, rows))

    if drawing is not None:  # a damaged judge is named before hours of drawing
        peers.on_main(lambda: judges.check(options.judges.judge_dino_transform))
    names = [*results.names_of(rows), *(drawing.settings if drawing else ())]
    with output_pictures.held(output_dir, names, peers) as files:
        if drawing is not None:
            missing = peers.on_main(lambda: results.missing(output_dir, drawing.settings))
            peers.say(f"{len(missing)} of {len(drawing.settings)} pictures are still to be drawn")
            drawing.draw(missing, functools.partial(output_pictures.save, files))
            peers.barrier()
        if peers.is_main:

            def load(subject: str) -> list[results.Photos]:
                return [
                    results.Photos([photo.sha256 for photo in checked], [photos.load(p) for p in checked])
                    for checked in photos_of[subject]
                ]

            scoring = results.Scoring(options, rows, judges, output_dir, watch.check)
            results.say(scoring.write(load, files, device), output_dir)
        peers.barrier()


# --- checks


def check_photos(cases: Sequence[Case]) -> dict[str, list[list[photos.Photo]]]:
    """The photos of each subject, and those that were trained on if they are others. Raises UserError, naming
    the row, if they cannot be used."""
    photos_of: dict[str, list[list[photos.Photo]]] = {}
    for case in cases:
        if case.subject in photos_of:
            continue
        photos_of[case.subject] = []
        for flag, path in case.folders.items():
            folder = photos.check_folder(
                path, flag, max_pixels=MOST_PIXELS, allow_odd_photos=True, follow_symlinks=True
            )
            console.notes(folder.notes)
            if case.reader:
                reader_judge.check_photos(flag, {photo.path.name: photo.size for photo in folder.photos})
            photos_of[case.subject].append(folder.photos)
    return photos_of


def check_complete(output_dir: Path, rows: Sequence[Row]) -> None:
    """Raise UserError if a picture that the table needs is not in the folder."""
    needed = [picture.file for each in plan.sets_of(rows) for picture in each.pictures]
    missing = [name for name in needed if not os.path.lexists(output_dir / name)]
    if missing:
        raise UserError(
            f"--tables_only: {len(missing)} of {len(needed)} pictures are not in {shown(output_dir)}, the"
            f" first {missing[0]}; leave the flag out to draw them"
        )


# --- drawing


class Drawing:
    """Base and adapters, checked with nothing loaded but the adapters, and the pictures to draw with them."""

    def __init__(
        self,
        options: EvaluateOptions,
        rows: Sequence[Row],
        judges: results.Judges,
        dtype: torch.dtype,
        peers: Peers,
        watch: Watch,
    ):
        """Raises UserError if the base cannot be used, or an adapter or a prompt does not fit it."""
        self.options, self.drawing, self.dtype = options, options.drawing, dtype
        self.peers, self.watch = peers, watch
        self.sets = plan.sets_of(rows)
        peers.on_main(lambda: families.find(options.base).folder)  # a base on the hub is downloaded once
        self.base = families.find(options.base)
        peers.say_notes(self.base.notes())
        adapter_sets = [each.adapters for each in self.sets if each.adapters is not None]
        self.loaded = variants.read_adapters(adapter_sets, self.base, self.drawing.clip_skip)
        self.variants = {each.folder: self._variant(each) for each in self.sets}
        columns = list(self.variants.values())
        self.sampling = self.drawing.sampling()
        variants.check(self.drawing, self.sampling.num_inference_steps, columns, self.loaded, self.base)
        peers.say_notes(variants.notes(self.drawing, columns, self.loaded, self.base))
        if judges.readers:
            reader_judge.check_side(self.drawing.resolution or self.base.default_resolution)
        self.settings = self._settings()
        digest = hashlib.sha256(repr(self.settings).encode()).hexdigest()
        peers.check_same({"base, adapters or prompts": digest})

    def _variant(self, pictures: PictureSet) -> Variant:
        """The set as infer.py draws one. The base has the clip_skip of the first adapter."""
        jobs = tuple((picture.prompt, picture.seed) for picture in pictures.pictures)
        paths = [adapter.path for adapter in pictures.adapters.adapters] if pictures.adapters else []
        clip_skip = self.loaded[paths[0]] if paths else next(iter(self.loaded.values()))
        return Variant(pictures.folder, pictures.adapters, clip_skip.clip_skip, jobs)

    def _settings(self) -> dict[str, dict[str, Any]]:
        """By file, the settings that the picture is drawn with, as its PNG file has them."""
        shared = {
            "base": self.options.base.name(),
            "base_sha256": self.base.fingerprint(),
            "resolution": self.drawing.resolution or self.base.default_resolution,
            **{name: getattr(self.drawing, name) for name in results.SAMPLER},
            "num_inference_steps": self.sampling.num_inference_steps,
            "guidance_scale": self.sampling.guidance_scale,
        }
        settings = {}
        for each in self.sets:
            variant = self.variants[each.folder]
            adapters = [(a, self.loaded[a.path].identity) for a in variant.adapters]
            of_set = {
                "adapter": adapters[0][1].label if adapters else None,
                "adapter_sha256": adapters[0][1].sha256 if adapters else None,
                "weight": adapters[0][0].weight if adapters else None,
                "clip_skip": variant.clip_skip,
            }
            for chunk in plan.chunks_of(each.pictures, self.drawing.batch_size):
                for picture in chunk:
                    of_picture = {"prompt": picture.prompt, "seed": picture.seed, "drawn_at_once": len(chunk)}
                    settings[picture.file] = {**shared, **of_set, **of_picture}
        return settings

    def draw(self, missing: set[str], save: Save) -> None:
        """Draw and save this process's share of the missing pictures. Raises OSError if one cannot be
        written."""
        chunks = [
            (each, chunk)
            for each in self.sets
            for chunk in plan.chunks_of(each.pictures, self.drawing.batch_size)
            if any(picture.file in missing for picture in chunk)
        ]
        chunks_here = chunks[self.peers.rank :: self.peers.world]
        if not chunks_here:
            return
        device = self.peers.accelerator.device
        pipeline = pipelines.load_pipeline(self.base, self.dtype, device)
        stack = apply.Stack({part: getattr(pipeline, part) for part in ("unet", *self.base.family.text)})
        for adapter in self.loaded.values():
            stack.add(adapter.key, adapter.adapter)
        graphs = replayed_unet.graphs_of(self.options.speed, device, console.warn)
        with tqdm(total=len(chunks), desc="pictures", unit="batch", disable=not self.peers.is_main) as bar:
            for each in self.sets:
                of_set = [chunk for pictures_, chunk in chunks_here if pictures_ is each]
                if not of_set:
                    continue
                variant = self.variants[each.folder]
                with stack.activated(variant.weights(self.loaded), self.drawing.fuse), torch.no_grad():
                    text = pipelines.text_of(pipeline, self.base, clip_skip=variant.clip_skip)
                    prompts = [picture.prompt for chunk in of_set for picture in chunk]
                    cache = text.encode_all([*prompts, self.drawing.negative_prompt], self.watch.check)
                    with replayed_unet.replaying(pipeline, graphs):
                        for chunk in of_set:
                            self._draw_chunk(pipeline, cache, chunk, missing, save)
                            bar.update(min(self.peers.world, len(chunks) - bar.n))

    def _draw_chunk(
        self, pipeline: Any, cache: Any, chunk: Sequence[Picture], missing: set[str], save: Save
    ) -> None:
        """Draw the pictures in one batch, and save those that are missing."""
        prompts, seeds = [picture.prompt for picture in chunk], [picture.seed for picture in chunk]
        negative_prompt = self.drawing.negative_prompt
        images = pipelines.draw_as(
            self.sampling, negative_prompt, pipeline, cache, prompts, seeds, self.watch.check
        )
        for picture, image in zip(chunk, images, strict=True):
            if picture.file in missing:
                save(picture.file, image, self.settings[picture.file])


if __name__ == "__main__":
    startup.run(main, OPTIONS)
