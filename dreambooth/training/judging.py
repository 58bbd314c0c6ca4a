"""Judges of a run's pictures: what is checked before any model is loaded, and the scores in metrics.jsonl.

A record has `judge`, the scores by name; `pictures`, their number; `failed`, those that count as wrong; and
`judges`, the settings of each judge. The first record has `base`, the scores of class pictures drawn without
the adapter. They stand in later records too, with names that end with `_base`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreambooth.data import photos
from dreambooth.data.photos import Photo
from dreambooth.evaluation import judges, reader_judge, scores
from dreambooth.evaluation.judges import Judge, JudgeFiles
from dreambooth.evaluation.reader_judge import Reader
from dreambooth.io.errors import UserError, raise_all, shortened
from dreambooth.options.evaluation import JudgeOptions
from dreambooth.options.training import TrainOptions
from dreambooth.runtime.processes import Peers
from dreambooth.training import metrics

Images = Mapping[str, Sequence[Image.Image]]
"""Pictures by prompt."""
_LIKENESS = {"dino": "DINO", "clip": "CLIP-I"}  # the names of the judges' scores


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the judges of a run need; the same on every process."""

    options: JudgeOptions
    class_prompt: str
    words: tuple[str, ...]
    """The words of prompts that name the subject."""
    subject: reader_judge.Subject | None
    """For the reader."""
    other_prompts: tuple[str, ...]
    """For the reader: prompts of other kinds, with one picture each."""
    files: tuple[JudgeFiles, ...] = ()
    """Set by `find_judges`."""

    @property
    def extra_prompts(self) -> dict[str, int]:
        """The prompts that are drawn for the judges alone, with the number of pictures of each."""
        return {self.class_prompt: self.options.judge_class_images, **dict.fromkeys(self.other_prompts, 1)}

    def record(self) -> dict[str, Any]:
        """What the scores depend on, for the record of the run: a run is not resumed with another judge."""
        record: dict[str, Any] = {files.kind: files.sha256 for files in self.files}
        if "dino" in record:
            record["dino_transform"] = self.options.judge_dino_transform
        if "clip" in record:
            record["keep_rare_word"] = self.options.judge_keep_rare_word
        if self.subject is not None:
            record["reader"] = self.subject.sha256
        return record


def plan(options: TrainOptions, prompts: Sequence[str], side: int) -> Plan | None:
    """Check the flags of judges, and the judges that are local. None without judges. Hub ids are only looked
    at: `find_judges` downloads them.

    `prompts` are those of the validation pictures, and `side` is that of the pictures. Raises UserError if a
    judge is missing or another model, or a prompt does not name the subject.
    """
    if not options.judges.is_given:
        return None
    class_prompt = options.prior.class_prompt
    assert class_prompt is not None  # checked with the flags
    words = scores.subject_words(options.instance.instance_prompt, class_prompt)
    if not words:
        raise UserError(
            "--class_prompt has every word of --instance_prompt, so that no word names the subject, which"
            " judges tell from its class: leave the rare word out of --class_prompt"
        )
    raise_all(
        f"validation prompt {shortened(prompt)}: it lacks the subject's word, {' '.join(words)} (of"
        " --instance_prompt, not of --class_prompt): judges compare its pictures with the subject"
        for prompt in prompts
        if not scores.names_subject(prompt, words)
    )
    for kind, given in _given(options.judges):
        judges.check_given(kind, given)
    subject, others = None, []
    if options.judges.judge_reader is not None:
        subject = reader_judge.find(options.judges.judge_reader)
        reader_judge.check_side(side)
        others = reader_judge.prompts_of_other_kinds(class_prompt, subject.kind)
    return Plan(options.judges, class_prompt, words, subject, tuple(others))


def find_judges(planned: Plan) -> Plan:
    """The plan with the files of all judges; a hub id is downloaded. Raises UserError as `judges.find`."""
    found = tuple(judges.find(kind, given) for kind, given in _given(planned.options))
    return dataclasses.replace(planned, files=found)


def _given(options: JudgeOptions) -> list[tuple[judges.Kind, str]]:
    given: dict[judges.Kind, str | None] = {"dino": options.judge_dino, "clip": options.judge_clip}
    return [(kind, name) for kind, name in given.items() if name is not None]


class Judging:
    """Judges the pictures of one run, on the main process."""

    def __init__(
        self, planned: Plan, device: torch.device, trained: Iterable[Photo], held_out: Iterable[Photo]
    ):
        """Loads the judges and embeds the photos. The models are on `device` only while they judge. Raises
        UserError if a judge is damaged, or a photo has changed since it was checked."""
        self.plan, self.device = planned, device
        self.judges = [judges.load(files, planned.options.judge_dino_transform) for files in planned.files]
        trained_photos, held_out_photos = list(map(photos.load, trained)), list(map(photos.load, held_out))
        subject = planned.subject
        self.reader = Reader(subject, trained_photos) if subject is not None else None
        self.trained = {judge.name: self._embedded(judge, trained_photos) for judge in self.judges}
        self.held_out = {judge.name: self._embedded(judge, held_out_photos) for judge in self.judges}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of each judge, by its name."""
        settings = {judge.name: judge.settings for judge in self.judges}
        if "clip" in settings:
            removed = [] if self.plan.options.judge_keep_rare_word else list(self.plan.words)
            settings["clip"] = {**settings["clip"], "words_removed": removed}
        return settings | ({self.reader.name: self.reader.settings} if self.reader else {})

    def judge(
        self, step: int, images: Images, base_images: Images | None, progress: metrics.Progress
    ) -> None:
        """Write the record of `step`. `images` are of the validation prompts and of the plan's extra prompts,
        drawn after that step. `base_images` are of the extra prompts, drawn without the adapter; None where
        an earlier record has their scores, or where the base cannot be drawn any more."""
        base = self._recorded_base(progress)
        of_class = self.scores_of_class(images)
        values = self.scores_of_subject(images) | {name: of_class[name] for name in self._names_of_class}
        more: dict[str, Any] = {}
        if base_images is not None:
            more["base"] = base = self.scores_of_class(base_images)
        if base is not None:
            values |= {f"{name}_base": base[name] for name in self._names_of_class}
            if self.reader is not None:
                values["PRIOR_TV"] = reader_judge.prior_tv(of_class["identities"], base["identities"])
        more["pictures"] = sum(map(len, images.values()))
        more["failed"] = [
            {"prompt": prompt, "number": number, "reason": reason}
            for prompt, of_prompt in images.items()
            for number, reason in enumerate(map(scores.failure, of_prompt))
            if reason is not None
        ]
        progress.evaluation(step, "judge", values, **more, judges=self.settings)

    def scores_of_subject(self, images: Images) -> dict[str, float]:
        """The scores of the pictures whose prompts name the subject."""
        extra = self.plan.extra_prompts
        prompts = [prompt for prompt, drawn in images.items() if prompt not in extra for _ in drawn]
        pictures = [image for prompt, drawn in images.items() if prompt not in extra for image in drawn]
        values: dict[str, float] = {}
        for judge in self.judges:
            rows = self._embedded(judge, pictures)
            name, trained, held_out = (
                _LIKENESS[judge.name],
                self.trained[judge.name],
                self.held_out[judge.name],
            )
            values |= scores.likeness_scores(name, rows, prompts, trained, held_out)
            if judge.name == "clip":
                words = () if self.plan.options.judge_keep_rare_word else self.plan.words
                with judge.on(self.device):
                    texts = judge.embed_texts([scores.without_words(prompt, words) for prompt in prompts])
                values["CLIP-T"] = float(scores.text_cosines(rows, texts).mean())
        return values | (self.reader.of_subject(pictures, prompts) if self.reader else {})

    def scores_of_class(self, images: Images) -> dict[str, Any]:
        """The scores of the pictures of the plan's extra prompts, and the `identities` that the reader reads
        in those of the class prompt."""
        of_class = images[self.plan.class_prompt]
        values: dict[str, Any] = {
            f"{_LIKENESS[judge.name]}_PRES": scores.mean_cosine(
                self._embedded(judge, of_class), self.trained[judge.name]
            )
            for judge in self.judges
        }
        if self.reader is not None:
            values["PRES"], values["identities"] = self.reader.of_class(of_class)
            others = [image for prompt in self.plan.other_prompts for image in images[prompt]]
            values["LEAK"] = self.reader.of_others(others)
        return values

    @property
    def _names_of_class(self) -> list[str]:
        """The names of the scores that `scores_of_class` returns."""
        names = [f"{_LIKENESS[judge.name]}_PRES" for judge in self.judges]
        return [*names, *(["PRES", "LEAK"] if self.reader else [])]

    def has_base(self, progress: metrics.Progress) -> bool:
        """Whether a record has the base's scores by all judges."""
        return self._recorded_base(progress) is not None

    def _recorded_base(self, progress: metrics.Progress) -> dict[str, Any] | None:
        """The base's scores in the first record that has those of all judges; None without one."""
        needed = {*self._names_of_class, *(["identities"] if self.reader else [])}
        bases = (record.get("base", {}) for record in progress.evaluations)
        return next((base for base in bases if needed <= base.keys()), None)

    def _embedded(self, judge: Judge, pictures: Sequence[Image.Image]) -> np.ndarray:
        with judge.on(self.device):
            return judge.embed_images(pictures)


def prepared(
    planned: Plan | None, peers: Peers, trained: Iterable[Photo], held_out: Iterable[Photo]
) -> Judging | None:
    """The judges of a run, on the main process; None on the others, and without judges. Raises UserError on
    every process, as `Judging` does."""
    if planned is None:
        return None
    made: list[Judging] = []
    device = peers.accelerator.device
    peers.on_main(lambda: made.append(Judging(planned, device, trained, held_out)))
    return made[0] if made else None
