"""Writes `report.html`, the page of a run, from the files of the output folder: see evaluation/report.py.

The page is written whole or not at all, at the start, as the run goes on, and at its end, however it ends. It
can be made again from the folder alone, but for photos and facts about the machine.
"""

import dataclasses
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dreambooth.adapter_files import native
from dreambooth.data import buckets, masks, photos
from dreambooth.data.batches import PhotoRows, Source
from dreambooth.data.crops import Crops
from dreambooth.evaluation import report, report_data
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console, reader
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import fields_of
from dreambooth.options.training import TrainOptions
from dreambooth.training import metrics, model_card, run_folder
from dreambooth.training.start import Start

# Seconds between two pages, as a multiple of the seconds that the last one took, and at least.
_PAUSE_FACTOR, _SHORTEST_PAUSE = 30, 5.0
_FRAMED_SIDE = 384  # longest side of a photo with frames, in pixels
_USES: dict[str, report.Use] = {"instance": "trained", "held_out": "held out", "class": "class"}


class RunReport:
    """Writes the page of one run, on the main process. The others do nothing."""

    def __init__(self, start: Start, max_steps: int):
        self.start, self.max_steps = start, max_steps
        self.sources = [source for source in (*start.sources, start.held_out) if source.purpose in _USES]
        self.files = WrittenFiles(start.output_dir)
        self.thumbnails = report.Thumbnails()
        self.photos: list[report.Photo] | None = None  # read when the first page is written
        self.next_time = 0.0
        self.has_failed = False

    def begin(self) -> None:
        """Write the first page, now that run.json and run.yaml are written. The last one follows once the end
        of the run is recorded."""
        if self.start.peers.is_main:
            self.write()
            self.start.status.at_end = self.write

    def update(self, *, always: bool = False) -> None:
        """Write the page on the main process, unless one was written a short time ago."""
        if self.start.peers.is_main and (always or time.monotonic() >= self.next_time):
            self.write()

    def write(self) -> None:
        """Write the page. A failure, such as a full disk or a damaged file of the run, is printed as a
        warning, once."""
        began = time.monotonic()
        try:
            self.files.write(run_folder.REPORT, self._page().encode())
        except (OSError, UserError) as error:
            if not self.has_failed:
                reason = getattr(error, "strerror", None) or error
                console.warn(f"{run_folder.REPORT} cannot be written: {reason}")
            self.has_failed = True
        took = time.monotonic() - began
        self.next_time = time.monotonic() + max(_SHORTEST_PAUSE, _PAUSE_FACTOR * took)

    def say(self) -> None:
        """Print where the page is, unless it cannot be written."""
        if not self.has_failed:
            self.start.peers.say(f"page of the run: {self.files.folder / run_folder.REPORT}")

    def _page(self) -> str:
        start = self.start
        if self.photos is None:
            self.photos = list(photos_of(self.sources, start.photo_rows(), start.masks))
        counts: dict[report.Use, int] = {_USES[source.purpose]: len(source.photos) for source in self.sources}
        run = dataclasses.replace(
            # people show the page to others, who need not see where its files are
            read(
                start.output_dir,
                model_card.public_flags(start.flags, start.base.place).values,
                [share.prompt for share in start.shares],
            ),
            photos=self.photos,
            counts=counts,
            prompts=start.first_prompts(report.MOST_PHOTOS["trained"]),
            buckets=bucket_rows(start),
            max_steps=self.max_steps,
            about=about(start),
        )
        return report.page(run, self.thumbnails, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def read(folder: Path, flags: Mapping[str, Any], subjects: Sequence[str] = ()) -> report.Run:
    """What the files of an output folder hold of a run with these flags. `subjects` are the prompts of
    --subjects. Raises OSError or UserError if a file cannot be read."""
    status = reader.read_json_table(folder / run_folder.STATUS, run_folder.STATUS)
    identity = run_folder.read_identity(folder)
    slots = identity["slots"] if identity else 1
    records = list(_records(folder / run_folder.METRICS))
    validation = folder / run_folder.VALIDATION
    names = os.listdir(validation) if validation.is_dir() else []
    is_named = report_data.Measured.of(records).best is not None
    name = Path(folder.absolute().name)
    adapter = name / run_folder.BEST / native.ADAPTER_NAME if is_named else name
    return report.Run(
        folder=folder,
        flags=flags,
        status=status,
        records=records,
        pictures=report_data.drawn(f"{run_folder.VALIDATION}/{name}" for name in names),
        rows_per_step=slots * flags["train_batch_size"],
        command=train_command(flags),
        draw_command=draw_command(flags, adapter, [*subjects, flags["instance_prompt"]][0]),
        subjects=subjects,
    )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl, without half a line at the end."""
    if path.exists():
        *complete, _ = reader.read_bytes(path, path.name, reader.LARGEST_LOG).split(b"\n")
        for number, line in enumerate(complete, 1):
            record = metrics.record_of(line)
            if record is None:
                raise UserError(f"{path.name}: line {number} is no record of a run: it was edited")
            yield record


# --- photos


def photos_of(
    sources: Sequence[Source], dataset: PhotoRows, masks_of: Mapping[str, masks.Mask]
) -> Iterator[report.Photo]:
    """The first photos of each source as the page shows them.

    A photo is cut to its crop if that is fixed. With buckets it is shown in full, with a frame around each of
    its crops. A photo that is trained on is pale outside its mask. One that cannot be read any more is left
    out."""
    crops = dataset.crops
    for source in sources:
        use = _USES[source.purpose]
        pairs = zip(source.photos, source.names, source.prompts, strict=True)
        for (photo, name, prompt), _ in zip(pairs, range(report.MOST_PHOTOS[use]), strict=False):
            try:
                image = photos.load(photo)
                if use == "trained" and name in masks_of:
                    image = masks.shown_on(image, masks_of[name])
            except UserError:  # training notices it if it needs the photo
                continue
            shapes = dataset.crops_of_photo(source, photo) if dataset.buckets else []
            if shapes:
                image = _framed(image, shapes)
            elif crops.is_fixed(image.size) and not dataset.buckets:
                image = image.resize(crops.resized_size(image.size)).crop(
                    crops.box(crops.middle_corner(image.size))
                )
            words = ", ".join(" x ".join(map(str, crops.shape)) for crops in shapes)
            yield report.Photo(photo.path.name, prompt, use, report.thumbnail(image), words)


def _framed(image: Image.Image, shapes: Sequence[Crops]) -> Image.Image:
    """The photo, made small, with a frame around each of its crops from the middle."""
    scale = min(1.0, _FRAMED_SIDE / max(image.size))
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(small)
    for crops in shapes:
        factor = small.width / crops.resized_size(image.size)[0]
        left, top, right, bottom = (
            round(edge * factor) for edge in crops.box(crops.middle_corner(image.size))
        )
        draw.rectangle((left, top, right - 1, bottom - 1), outline="white", width=4)
        draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline="#1d5fd1", width=2)
    return small


def bucket_rows(start: Start) -> Sequence[Sequence[str]]:
    """The table of buckets for the page, its headings first; () without buckets."""
    if start.buckets is None:
        return ()
    sizes = [photo.size for photo in start.sources[0].photos]
    return (buckets.HEADINGS, *buckets.rows(start.buckets.filled(sizes), sizes))


# --- facts and commands


def about(start: Start) -> list[tuple[str, str]]:
    """Facts about the run for the page."""
    options, environment = start.options, start.environment
    adapter = options.adapter.adapter
    rank = f" of rank {options.adapter.rank}" if adapter not in ("oft", "boft") else ""
    text = "UNet and text encoder" if options.text.train_text_encoder else "UNet"
    versions = [f"{name} {value}" for name, value in environment.items()]
    return [
        ("Base", options.base.name()),
        ("Licence of the base", model_card.licence_of_folder(start.base.place)),
        ("Adapter", f"{adapter}{rank}, on {text}"),
        ("Seed", str(options.run.seed)),
        ("Machine", ", ".join(versions)),
    ]


def train_command(flags: Mapping[str, Any]) -> str:
    """The command that starts the run again: the flags whose values are no defaults."""
    words = [
        words
        for name, field in fields_of(TrainOptions).items()
        if name in flags and _plain(field.default) != flags[name]
        for words in [_words(name, flags[name])]
    ]
    return _command("accelerate launch train_dreambooth_lora.py", words)


def draw_command(flags: Mapping[str, Any], adapter: Path, instance_prompt: str) -> str:
    """A command that draws with the adapter."""
    prompt = flags.get("validation_prompt") or instance_prompt
    base = flags["pretrained_model_name_or_path"]
    words = {"pretrained_model_name_or_path": base, "adapter": str(adapter), "prompt": prompt}
    return _command("python infer.py", [_words(name, value) for name, value in words.items()])


def _plain(default: object) -> object:
    return list(default) if isinstance(default, tuple) else default


def _words(name: str, value: Any) -> str:
    """A flag and its value for a shell."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    if isinstance(value, list):
        return " ".join([f"--{name}", *(shlex.quote(str(item)) for item in value)])
    separator = "=" if str(value).startswith("-") else " "
    return f"--{name}{separator}{shlex.quote(str(value))}"


def _command(program: str, words: Iterable[str]) -> str:
    return " \\\n  ".join([program, *words])
