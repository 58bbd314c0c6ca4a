"""The pictures of the class prompt, for prior preservation: class images, or photos of the subject."""

from pathlib import Path

from dreambooth.bases import families
from dreambooth.data import class_images, photos
from dreambooth.data.batches import Source
from dreambooth.data.class_images import ClassImageSettings
from dreambooth.data.decode_cache import DecodeCache
from dreambooth.options.photos import PriorOptions
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.options.training import TrainOptions
from dreambooth.runtime.processes import Peers
from dreambooth.runtime.stops import Watch
from dreambooth.training.subjects import Subjects


def given(
    options: TrainOptions,
    subjects: Subjects,
    base: families.Base,
    decoded: DecodeCache | None,
    peers: Peers,
) -> list[Source]:
    """The source of the class rows with --prior_source base: the pictures of --class_data_dir, or else
    the instance photos. Without the flag there is none.

    Raises UserError as `photos.check_folder` does, and if a photo of the subject is among the class images.
    """
    prior = options.prior
    if not prior.has_base_targets:
        return []
    if prior.class_data_dir is None:
        return [subjects.prior_source(prior.class_prompt)]
    assert prior.class_prompt is not None  # checked with the flags
    folder = Path(prior.class_data_dir)
    checked = _checked(options, folder, subjects.photos + subjects.held_out, base, decoded)
    peers.say_notes(f"class images: {note}" for note in checked.notes)
    return [Source("class", checked.photos, [prior.class_prompt] * len(checked.photos))]


def count(prior: PriorOptions, priors: list[Source]) -> int:
    """The number of class images: those to be drawn, or those of `priors`, the sources of `given`."""
    if prior.draws_class_images:
        return prior.generation.num_class_images
    return sum(len(source.photos) for source in priors if source.purpose == "class")


def drawn(
    options: ResolvedTrainOptions,
    settings: ClassImageSettings,
    folder: Path,
    class_prompt: str,
    subject: list[photos.Photo],
    base: families.Base,
    decoded: DecodeCache | None,
    peers: Peers,
    watch: Watch,
) -> Source:
    """The class images in `folder`, of which missing ones are drawn with `settings`. `subject` are all photos
    of the subject. Raises UserError if one of them is among the class images."""
    count = options.prior.generation.num_class_images
    class_images.make(folder, settings, count, base, peers, watch, options.speed)
    checked = _checked(options, folder, subject, base, decoded)
    peers.say_notes(f"class images: {note}" for note in checked.notes)
    pictures = checked.photos[:count]
    return Source("class", pictures, [class_prompt] * len(pictures))


def _checked(
    options: TrainOptions,
    folder: Path,
    subject: list[photos.Photo],
    base: families.Base,
    decoded: DecodeCache | None,
) -> photos.Folder:
    """The checked class images in `folder`, none of which is a photo of `subject`."""
    instance = options.instance
    checked = photos.check_folder(
        folder,
        "--class_data_dir",
        max_pixels=instance.max_image_pixels,
        # pictures of a tiny base are smaller than photos may be
        allow_odd_photos=instance.allow_odd_photos or base.default_resolution < photos.ODD_SIDE,
        follow_symlinks=instance.follow_symlinks,
        cache=decoded,
        made=class_images.names_made(folder),
    )
    photos.check_disjoint(subject, checked.photos)
    return checked
