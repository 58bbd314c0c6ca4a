"""From the pictures of an evaluation to its files: a record for each picture, results.json and tables.md.

The files hold no times and no absolute paths of photos: the same pictures and judges give the same bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dreambooth.evaluation import embedding_files, judges, picture_scores, plan, reader_judge, tables
from dreambooth.evaluation.judges import Judge, JudgeFiles
from dreambooth.evaluation.picture_scores import ByReader, Embedded
from dreambooth.evaluation.plan import PictureSet, Row
from dreambooth.evaluation.subjects import BASE, Case
from dreambooth.files import pictures
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io import console, reader, writer
from dreambooth.io.errors import UserError, shown
from dreambooth.options.evaluate import NO_JUDGE, EvaluateOptions

RECORDS, RESULTS, MARKDOWN = "pictures.jsonl", "results.json", "tables.md"
SAMPLER = ("num_inference_steps", "guidance_scale", "negative_prompt", "mixed_precision", "fuse")
# Settings in the PNG files: those of all pictures of a table, and those of all pictures of a set.
SHARED = ("base", "base_sha256", "resolution", *SAMPLER)
OF_SET = ("adapter", "adapter_sha256", "weight", "clip_skip")
_LARGEST = 2**28  # bytes of a picture's file


@dataclasses.dataclass(frozen=True)
class Judges:
    """The judges on disk, checked, with nothing loaded."""

    dino: JudgeFiles | None
    clip: JudgeFiles | None
    readers: Mapping[str, reader_judge.Subject]
    """By subject."""

    @classmethod
    def find(cls, options: EvaluateOptions, cases: Sequence[Case]) -> "Judges":
        """Raises UserError if a judge cannot be used, or none is given."""
        given = options.judges
        readers = {}
        for case in cases:
            if case.reader is not None and case.subject not in readers:
                readers[case.subject] = reader_judge.find(str(case.reader))
        if not (given.judge_dino or given.judge_clip or readers):
            raise UserError(NO_JUDGE)
        return cls(
            judges.find("dino", given.judge_dino) if given.judge_dino else None,
            judges.find("clip", given.judge_clip) if given.judge_clip else None,
            readers,
        )

    def check(self, transform: judges.Transform) -> None:
        """Load each judge and give it up again. Raises UserError if one is damaged."""
        for files in filter(None, (self.dino, self.clip)):
            judges.load(files, transform)

    def skipped(self, num_class_images: int, *, has_held_out: bool) -> dict[str, str]:
        """By score that is not computed, why."""
        given = {"dino": self.dino, "clip": self.clip, "reader": self.readers or None}
        return picture_scores.skipped(given, num_class_images, has_held_out=has_held_out)


@dataclasses.dataclass(frozen=True)
class Photos:
    """The photos of a subject, upright and RGB."""

    sha256: list[str]
    """Of the files."""
    images: list[Image.Image]


@dataclasses.dataclass
class Subject:
    """What was computed of a subject's photos."""

    case: Case
    photos: Photos
    embedded: Embedded
    trained_photos: Photos | None
    """The photos that were trained on; None if they are `photos`."""
    trained: Embedded | None
    reader: reader_judge.Reader | None


def names_of(rows: Sequence[Row]) -> list[str]:
    """The files that scoring writes."""
    return [RECORDS, RESULTS, MARKDOWN, *map(embedding_files.name_of, plan.sets_of(rows))]


def check_settings(path: Path, present: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError if the settings in a picture's file are not those `wanted`."""
    if not present:
        raise UserError(
            f"--output_dir: {shown(path)} is no picture of this program; name another folder, or remove it"
        )
    differences = [
        f"{name} is {present.get(name)!r} there and {value!r} now"
        for name, value in wanted.items()
        if present.get(name) != value
    ]
    if differences:
        raise UserError(
            f"--output_dir: {shown(path)} was drawn with other settings: {'; '.join(differences)}. Name"
            " another folder, or remove this one"
        )


def missing(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Those of the pictures that are not in the folder; `settings` has by file how each is drawn. Raises
    UserError if one was drawn with other settings."""
    names = set()
    for file, wanted in settings.items():
        path = folder / file
        if os.path.lexists(path):
            data = reader.read_bytes(path, f"--output_dir: {shown(path)}", _LARGEST)
            check_settings(path, pictures.read(data)[1], wanted)
        else:
            names.add(file)
    return names


class Scoring:
    """Scores the pictures in a folder."""

    def __init__(
        self,
        options: EvaluateOptions,
        rows: Sequence[Row],
        given: Judges,
        folder: Path,
        check: Callable[[], None],
    ):
        """`check` is called before each picture; what it raises ends the work."""
        self.options, self.rows, self.judges = options, rows, given
        self.folder, self.check = folder, check
        self.shared: dict[str, Any] = {}  # settings of all pictures
        self.of_set: dict[str, dict[str, Any]] = {}  # by folder, settings of a set's pictures
        self.sha256: dict[str, str] = {}  # by file of a picture

    def write(
        self, photos_of: Callable[[str], Sequence[Photos]], files: WrittenFiles, device: torch.device
    ) -> dict[str, Any]:
        """Score every picture, and write the files. Returns the content of results.json.

        `photos_of` loads a subject's photos and, if the adapters were trained on others, those. Raises
        UserError if a judge is damaged or a picture has other settings, OSError if a file cannot be written.
        """
        transform = self.options.judges.judge_dino_transform
        dino = judges.load(self.judges.dino, transform) if self.judges.dino else None
        clip = judges.load(self.judges.clip) if self.judges.clip else None
        subjects: dict[str, Subject] = {}
        with contextlib.ExitStack() as stack:
            for judge in filter(None, (dino, clip)):
                stack.enter_context(judge.on(device))
            try:
                for row in self.rows:
                    if row.method == BASE:
                        subjects[row.case.subject] = self._subject(row.case, photos_of, dino, clip)
            except FloatingPointError as error:
                raise UserError(
                    f"--judge_dino, --judge_clip: {error} for a photo; give another one"
                ) from None
            drawn = {
                each.folder: self._embedded(each, dino, clip, files)
                for each in tqdm(plan.sets_of(self.rows), desc="scores", unit="set")
            }
        records, content = self._content(subjects, drawn, [dino, clip])
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files.write(RECORDS, lines.encode())
        files.write(RESULTS, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        files.write(MARKDOWN, tables.markdown(content).encode())
        return content

    def _subject(
        self,
        case: Case,
        photos_of: Callable[[str], Sequence[Photos]],
        dino: Judge | None,
        clip: Judge | None,
    ) -> Subject:
        self.check()
        photos, *trained = photos_of(case.subject)
        drawn_world = self.judges.readers.get(case.subject)
        return Subject(
            case,
            photos,
            picture_scores.of_photos(photos.images, dino, clip),
            trained[0] if trained else None,
            picture_scores.of_photos(trained[0].images, dino, clip) if trained else None,
            reader_judge.Reader(drawn_world, [photos, *trained][-1].images) if drawn_world else None,
        )

    def _embedded(
        self, of: PictureSet, dino: Judge | None, clip: Judge | None, files: WrittenFiles
    ) -> Embedded:
        """The embeddings of a set of pictures, from their file if it has them; else they are computed, and
        written there."""
        images = list(self._images(of))
        if dino is None and clip is None:
            return picture_scores.embedded(of.pictures, map(pictures.pixels, images), None, None, self.check)
        key = embedding_files.key_of(of.pictures, [self.sha256[p.file] for p in of.pictures], [dino, clip])
        name = embedding_files.name_of(of)
        if files.is_written(name) and (saved := embedding_files.read(self.folder / name, key)):
            return saved
        decoded = map(pictures.pixels, images)
        embedded = picture_scores.embedded(of.pictures, decoded, dino, clip, self.check)
        writer.make_folder((self.folder / name).parent, parents=True)
        files.write(name, embedding_files.content(embedded, key))
        return embedded

    def _images(self, of: PictureSet) -> Iterator[Image.Image | None]:
        """The pictures of a set, not decoded yet; None for one that is damaged. Raises UserError if one is
        missing, or was drawn with other settings."""
        for picture in of.pictures:
            path = self.folder / picture.file
            data = reader.read_bytes(path, f"--output_dir: {shown(path)}", _LARGEST)
            self.sha256[picture.file] = hashlib.sha256(data).hexdigest()
            image, settings = pictures.read(data)
            if image is None:
                yield None
                continue
            if settings:
                self.shared = self.shared or {name: settings.get(name) for name in SHARED}
                self.of_set.setdefault(of.folder, {name: settings.get(name) for name in OF_SET})
            of_picture = {"prompt": picture.prompt, "seed": picture.seed}
            check_settings(path, settings, {**self.shared, **self.of_set.get(of.folder, {}), **of_picture})
            yield image

    def _content(
        self,
        subjects: Mapping[str, Subject],
        drawn: Mapping[str, Embedded],
        loaded: Sequence[Judge | None],
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(the records of the pictures, the content of results.json)."""
        records: list[dict[str, Any]] = []
        of_subjects: dict[str, dict[str, Any]] = {
            name: self._of_photos(subject) for name, subject in subjects.items()
        }
        by_base: dict[str, ByReader] = {}
        for row in self.rows:
            subject, embedded = subjects[row.case.subject], drawn[row.pictures.folder]
            by_reader = self._by_reader(row, subject)
            if by_reader is not None and row.method == BASE:
                by_base[row.case.subject] = by_reader
            of_row = self._records(row, subject, embedded, by_reader)
            records += of_row
            values = picture_scores.means(
                row.pictures.pictures,
                [record["scores"] for record in of_row],
                embedded,
                len(subject.photos.images),
                skip_failed=self.options.failed_pictures == "skip",
            )
            if by_reader is not None:
                values |= picture_scores.of_reader_sets(by_reader, by_base[row.case.subject])
            of_subjects[row.case.subject]["methods"][row.method] = {
                **self.of_set.get(row.pictures.folder, {}),
                "pictures": len(of_row),
                "failed": sum(record["failure"] is not None for record in of_row),
                "values": values,
            }
        methods = list(dict.fromkeys(row.method for row in self.rows if row.method != BASE))
        rows = tables.table(of_subjects, methods)
        has_held_out = any(subject.trained is not None for subject in subjects.values())
        failed = {record["file"]: record["failure"] for record in records if record["failure"]}
        for entry in of_subjects.values():
            entry["methods"] = {
                method: {**of, "scores": {name: value for name, (value, _) in of.pop("values").items()}}
                for method, of in entry["methods"].items()
            }
            entry["real"] = {
                row: {name: value for name, (value, _) in of.items()} for row, of in entry["real"].items()
            }
        return records, {
            "settings": self._settings(subjects, loaded),
            "definitions": {name: text for name, (_, text) in picture_scores.SCORES.items()},
            "skipped": self.judges.skipped(self.options.num_class_images, has_held_out=has_held_out),
            "table": rows,
            "subjects": of_subjects,
            "failures": [{"file": file, "failure": failure} for file, failure in failed.items()],
        }

    def _of_photos(self, subject: Subject) -> dict[str, Any]:
        """The entry of a subject in results.json, without its methods."""
        return {
            "class_noun": subject.case.class_noun,
            "rare_word": subject.case.rare_word,
            "live": subject.case.is_live,
            "photos": subject.photos.sha256,
            "trained_photos": subject.trained_photos.sha256 if subject.trained_photos else None,
            "real": picture_scores.real_rows(
                subject.embedded, subject.trained, subject.reader, subject.photos.images
            ),
            "methods": {},
        }

    def _by_reader(self, row: Row, subject: Subject) -> ByReader | None:
        if subject.reader is None:
            return None
        images = [pictures.pixels(image) for image in self._images(row.pictures)]
        for image in filter(None, images):
            reader_judge.check_side(image.width)
        return picture_scores.by_reader(row.pictures.pictures, images, subject.reader)

    def _records(
        self, row: Row, subject: Subject, embedded: Embedded, by_reader: ByReader | None
    ) -> list[dict[str, Any]]:
        """The lines of a row's pictures in pictures.jsonl."""
        of_set = self.of_set.get(row.pictures.folder, {})
        scores = picture_scores.of_pictures(
            row.pictures.pictures, embedded, subject.embedded, subject.trained
        )
        return [
            {
                "file": picture.file,
                "sha256": self.sha256[picture.file],
                "subject": row.case.subject,
                "method": row.method,
                "adapter_sha256": of_set.get("adapter_sha256"),
                "prompt": picture.prompt,
                "text": picture.text,
                "seed": picture.seed,
                "failure": embedded.failures[number],
                "scores": {**scores[number], **(by_reader.records[number] if by_reader else {})},
            }
            for number, picture in enumerate(row.pictures.pictures)
        ]

    def _settings(self, subjects: Mapping[str, Subject], loaded: Sequence[Judge | None]) -> dict[str, Any]:
        """How the pictures were drawn and scored: what published evaluators differ in."""
        options = self.options
        readers = {name: subject.reader.settings for name, subject in subjects.items() if subject.reader}
        return {
            **self.shared,
            "seed": options.seed,
            "num_images": options.num_images,
            "num_class_images": options.num_class_images,
            "prompts": "--prompts_file" if options.prompts_file else "DreamBooth paper",
            "class_prompt": options.class_prompt,
            "failed_pictures": options.failed_pictures,
            "averages": "macro: mean over subjects; micro: mean over all pairs or pictures",
            "interval": "95 %, percentile bootstrap over subjects, 10,000 resamples, seed 0",
            "judges": {judge.name: judge.settings for judge in loaded if judge} | {"reader": readers},
        }


def say(content: Mapping[str, Any], folder: Path) -> None:
    """Print the table, which scores are missing, and where the files are."""
    console.say(tables.terminal_text(content["table"]))
    console.notes(tables.not_computed(content["skipped"]))
    if content["failures"]:
        rule = "count 0" if content["settings"]["failed_pictures"] == "zero" else "are left out"
        console.say(f"note: {len(content['failures'])} pictures failed, and {rule}; {MARKDOWN} lists them")
    console.say(f"wrote {RESULTS}, {MARKDOWN} and {RECORDS} to {folder}")
