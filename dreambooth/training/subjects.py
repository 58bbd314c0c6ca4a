"""The subjects of a run, as they were checked: one by flags, or several by --subjects."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from dreambooth.data import captions, masks, photo_sets, photos, subject_table, tags
from dreambooth.data.batches import Share, Source
from dreambooth.data.decode_cache import DecodeCache
from dreambooth.data.masks import Mask
from dreambooth.data.photos import Photo
from dreambooth.data.subject_table import Row
from dreambooth.io.errors import UserError, few
from dreambooth.options.evaluation import MeterOptions
from dreambooth.options.photos import InstanceOptions
from dreambooth.runtime.processes import Peers

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Subject:
    """The checked photos of one subject, and their captions."""

    options: InstanceOptions
    """Those of this subject."""
    row: Row | None
    """Of --subjects; None without the flag."""
    checked: photos.Folder
    """The photos that are trained on, and what was found out about them."""
    held_out: list[photos.Photo]
    """Other photos, which are not trained on."""
    captions: dict[str, str]
    """By file name, for the photos that are trained on and have one."""
    held_out_captions: dict[str, str]
    """As `captions`, for those that are held out."""
    masks: dict[str, Mask]
    """By file name, of the photos that are trained on; {} without masks."""
    notes: list[str]

    def prompts(self) -> list[str]:
        """The prompt of each photo that is trained on: its caption, or else --instance_prompt."""
        return self._prompts(self.checked.photos, self.captions)

    def held_out_prompts(self) -> list[str]:
        """As `prompts`, of those that are held out."""
        return self._prompts(self.held_out, self.held_out_captions)

    def _prompts(self, pictures: list[photos.Photo], texts: dict[str, str]) -> list[str]:
        return [texts.get(photo.path.name, self.options.instance_prompt) for photo in pictures]


@dataclasses.dataclass(frozen=True)
class Subjects:
    """All subjects of a run, in the order of --subjects."""

    each: tuple[Subject, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows of --subjects; [] without the flag."""
        return [subject.row for subject in self.each if subject.row is not None]

    @property
    def photos(self) -> list[Photo]:
        """The photos that are trained on, subject by subject."""
        return [photo for subject in self.each for photo in subject.checked.photos]

    @property
    def held_out(self) -> list[Photo]:
        """Photos that are not trained on."""
        return [photo for subject in self.each for photo in subject.held_out]

    @property
    def notes(self) -> list[str]:
        if not self.rows:
            return self.each[0].notes
        return [f"{row.where}: {n}" for row, s in zip(self.rows, self.each, strict=True) for n in s.notes]

    @property
    def captions(self) -> dict[str, str]:
        """The captions of photos that are trained on, by their `Source.names`."""
        return self._by_name(lambda subject: subject.captions)

    @property
    def all_captions(self) -> dict[str, str]:
        """As `captions`, with those of held-out photos."""
        return self._by_name(lambda subject: subject.held_out_captions | subject.captions)

    @property
    def masks(self) -> dict[str, Mask]:
        """By the `Source.names` of photos that are trained on; subjects without masks have none."""
        return self._by_name(lambda subject: subject.masks)

    def _by_name(self, table_of: Callable[[Subject], Mapping[str, T]]) -> dict[str, T]:
        """One table of all subjects: with --subjects the names of photos begin with the subject's number."""
        return {
            (f"{number}/{name}" if self.rows else name): value
            for number, subject in enumerate(self.each, 1)
            for name, value in table_of(subject).items()
        }

    def shares(self, counts: Sequence[int]) -> tuple[Share, ...]:
        """The subjects of a source that has `counts` photos of each; () without --subjects."""
        return tuple(
            Share(row.prompt, row.class_prompt, count, row.repeats, row.weight)
            for row, count in zip(self.rows, counts, strict=bool(self.rows))
        )

    @property
    def rows_of_pass(self) -> int:
        """As `Source.rows_of_pass`."""
        return self.source(0).rows_of_pass

    def source(self, seed: int) -> Source:
        """The photos that are trained on, with their prompts. `seed` decides the variants of a prompt whose
        tags are shuffled or dropped."""
        options = self.each[0].options
        prompts = [prompt for subject in self.each for prompt in subject.prompts()]
        drawn = {prompt: tags.variants(prompt, seed, options.captions) for prompt in prompts}
        return Source(
            "instance",
            self.photos,
            prompts,
            random_flip=options.random_flip,
            caption_dropout=options.caption_dropout,
            variants={prompt: variants for prompt, variants in drawn.items() if variants},
            shares=self.shares([len(subject.checked.photos) for subject in self.each]),
        )

    def prior_source(self, class_prompt: str | None) -> Source:
        """The photos that are trained on, each with the class prompt of its subject."""
        source = self.source(0)
        by_subject = [row.class_prompt for row in self.rows] or [class_prompt or ""]
        prompts = [p for p, s in zip(by_subject, self.each, strict=True) for _ in s.checked.photos]
        return dataclasses.replace(source, purpose="prior", prompts=prompts, caption_dropout=0.0, variants={})

    def held_out_source(self) -> Source:
        """The photos that are held out, with their prompts."""
        prompts = [prompt for subject in self.each for prompt in subject.held_out_prompts()]
        shares = self.shares([len(subject.held_out) for subject in self.each])
        return Source("held_out", self.held_out, prompts, shares=shares)


def check(
    options: InstanceOptions, measured: MeterOptions, decoded: DecodeCache | None, peers: Peers
) -> Subjects:
    """Decode and check instance photos, held-out photos and captions of all subjects. `decoded` holds the
    photos that earlier runs decoded. Raises UserError if the table of --subjects is wrong, a held-out photo
    is trained on too, or no photo of a subject is left to train on."""
    if options.subjects is None:
        return Subjects((_check_photos(options, None, measured, decoded, peers),))
    rows = subject_table.read(options.subjects)
    _check_masks(options, rows)
    checked = []
    for row in rows:
        try:
            checked.append(_check_photos(row.instance(options), row, measured, decoded, peers))
        except UserError as error:
            lines = [f"{row.where}: {line}" for line in str(error).splitlines()]
            raise UserError("\n".join(lines)) from None
    subjects = Subjects(tuple(checked))
    photos.check_apart(subjects.held_out, subjects.photos, "--holdout")
    return subjects


def _check_masks(options: InstanceOptions, rows: Sequence[Row]) -> None:
    """Raise UserError if masks are named twice, or if flags need masks and there are none."""
    masked = [row for row in rows if row.masks is not None]
    if options.masks.alpha_mask and masked:
        raise UserError(f"{masked[0].where}: masks and --alpha_mask both give masks: leave one of them out")
    if not masked and not options.masks.is_given and (given := options.masks.given_for_masks()):
        raise UserError(
            f"{', '.join(given)}: for photos with masks; give `masks` in a row of --subjects, or --alpha_mask"
        )


def _check_photos(
    options: InstanceOptions,
    row: Row | None,
    measured: MeterOptions,
    decoded: DecodeCache | None,
    peers: Peers,
) -> Subject:
    """The checked photos of one subject."""
    peers.on_main(lambda: photo_sets.find(options).flag)  # a data set of the hub is downloaded once
    photo_set = photo_sets.find(options)
    folder, texts, notes = _check_photo_folder(photo_set.folder, photo_set.flag, options, decoded)
    trained, held_out = photos.split(folder, measured.holdout, photo_set.flag)
    flag, held_out_texts = "--holdout", texts
    if measured.holdout_data_dir is not None:
        flag, directory = "--holdout_data_dir", Path(measured.holdout_data_dir)
        others, held_out_texts, other_notes = _check_photo_folder(directory, flag, options, decoded)
        held_out, notes = others.photos, [*notes, *(f"held-out photos: {note}" for note in other_notes)]
    photos.check_apart(held_out, trained, flag)
    if held_out:
        notes = [*notes, f"held out, not trained on: {few([photo.path.name for photo in held_out])}"]
    masked = masks.check(options.masks, trained, follow_symlinks=options.follow_symlinks)
    trained_names = {photo.path.name for photo in trained}
    return Subject(
        options,
        row,
        photos.Folder(trained, folder.notes),
        held_out,
        {name: text for name, text in texts.items() if name in trained_names},
        held_out_texts,
        masked,
        [*photo_set.notes, *notes, *masks.notes(masked, options.masks)],
    )


def _check_photo_folder(
    directory: Path, flag: str, options: InstanceOptions, decoded: DecodeCache | None
) -> tuple[photos.Folder, dict[str, str], list[str]]:
    """(the checked photos, their captions by file name, notes) of a folder that `flag` named."""
    folder = photos.check_folder(
        directory,
        flag,
        max_pixels=options.max_image_pixels,
        allow_odd_photos=options.allow_odd_photos,
        follow_symlinks=options.follow_symlinks,
        cache=decoded,
    )
    names = [photo.path.name for photo in folder.photos]
    texts, caption_notes = captions.read(directory, flag, names, options)
    return folder, texts, [*folder.notes, *caption_notes]
