"""Warnings about photos at the start of a run: a part of what check_photos.py finds, without its page."""

from collections.abc import Mapping, Sequence

from dreambooth.data import photo_findings, photo_looks
from dreambooth.data.photos import Photo
from dreambooth.evaluation import scores
from dreambooth.options.training import TrainOptions

_MOST = 100  # photos that are looked at: each takes some 20 ms, and each pair of them less than 1 ms


def of(options: TrainOptions, pictures: Sequence[Photo], captions: Mapping[str, str]) -> list[str]:
    """Notes on photos that show the same or are blurred, and on captions without the subject's word.

    `captions` are by file name. Raises UserError if a photo has changed since it was checked.
    """
    looks = {photo.path.name: photo_looks.look_at(photo) for photo in _distinct(pictures)[:_MOST]}
    words: Sequence[str] = ()
    if options.prior.class_prompt is not None:
        words = scores.subject_words(options.instance.instance_prompt, options.prior.class_prompt)
    findings = [*photo_findings.of_looks(looks), *photo_findings.of_captions(captions, words, cut=())]
    return [finding.note for finding in photo_findings.ranked(findings)]


def _distinct(pictures: Sequence[Photo]) -> list[Photo]:
    """The photos, of those with the same pixels the first: the check of the folder names the others."""
    return list({photo.pixels_sha256: photo for photo in reversed(pictures)}.values())[::-1]
