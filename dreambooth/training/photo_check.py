"""What may be wrong with the photos of a subject: all findings and their page for check_photos.py, and the
most telling ones as notes at the start of a run."""

import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dreambooth.bases import families, loading, prompts
from dreambooth.data import captions, class_images, masks, photo_findings, photo_looks, photos
from dreambooth.data.crops import Crops
from dreambooth.data.masks import Mask
from dreambooth.data.photo_findings import Finding
from dreambooth.data.photo_looks import Look
from dreambooth.data.photos import Photo
from dreambooth.evaluation import photo_page, report, scores
from dreambooth.files.ownership import WrittenFiles, check_apart
from dreambooth.io import console, writer
from dreambooth.options.photo_check import PhotoCheckOptions
from dreambooth.options.resolved import resolution_of
from dreambooth.options.training import BaseOptions, TrainOptions
from dreambooth.training import rare_words
from dreambooth.training.subjects import Subject, Subjects

PAGE = "photos.html"
_MOST = 100  # photos that a run looks at: each takes some 20 ms


# --- check_photos.py


def check(options: PhotoCheckOptions) -> None:
    """Print the findings about a folder of photos and write the page. Raises UserError for a user's
    mistake."""
    inputs = {f"--{name}": getattr(options, name) for name in ("instance_data_dir", "class_data_dir")}
    inputs["--mask_dir"] = options.mask_dir
    name = options.pretrained_model_name_or_path
    base = families.find(BaseOptions(name), needs_vae=False) if name is not None else None
    check_apart({"--output_dir": options.output_dir}, inputs, {"--pretrained_model_name_or_path": name})
    if options.instance_data_dir is None:
        _tables_of_words(options, base)
        return
    directory = Path(options.instance_data_dir)
    folder = _checked(directory, "--instance_data_dir", options)
    names = [photo.path.name for photo in folder.photos]
    texts, notes = captions.read(directory, "--instance_data_dir", names, options.instance())
    of_class: list[Photo] = []
    if options.class_data_dir is not None:
        drawn = class_images.names_made(Path(options.class_data_dir))
        of_class = _checked(Path(options.class_data_dir), "--class_data_dir", options, drawn).photos
    resolution = resolution_of(options.instance(), base.family.key if base else "sd")
    masked = masks.check(options.masks(), folder.photos, follow_symlinks=options.follow_symlinks)
    files = _files_to_write(Path(options.output_dir))

    looks = _looks_of(folder.photos, "photos")
    words = _subject_words(options.instance_prompt, options.class_prompt, options.captions.trigger_word)
    tables = _tables_of_words(options, base)
    findings = photo_findings.ranked(
        [
            *photo_findings.of_looks(looks),
            *photo_findings.of_class_images(looks, _looks_of(of_class, "class images")),
            *_of_shapes(folder.photos, masked, resolution, is_square=not options.buckets),
            *photo_findings.of_captions(texts, words, _cut_captions(texts, base)),
        ]
    )
    facts = f"{len(folder.photos)} photos, seen at {resolution} pixels"
    page = photo_page.Page(directory.absolute().name, facts, findings, [*folder.notes, *notes], texts, tables)
    console.say(f"{facts}: {photo_page.headline(findings)}")
    for finding in findings:
        console.say(f"{finding.title}: {finding.note}")
    console.notes(page.notes)
    _write(files, page, folder.photos)


def _tables_of_words(options: PhotoCheckOptions, base: families.Base | None) -> list[photo_page.Table]:
    """The table of --find_rare_word, which is also printed; [] without the flag. Raises UserError if the base
    cannot be loaded, or a prompt is too long."""
    if not options.find_rare_word:
        return []
    assert base is not None
    assert options.class_prompt is not None
    subject = _rare_words(options.instance_prompt, options.class_prompt, options.captions.trigger_word)
    given = {"--instance_prompt": options.instance_prompt, "--class_prompt": options.class_prompt}
    prompts.check(loading.load_tokenizers(base), given, families.max_tokens(base))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure = rare_words.Measure(base, options.class_prompt, device)
    candidates = [*measure.candidates(), *subject]
    of_word = {
        word: rare_words.prompt_with(word, options.class_prompt, options.instance_prompt, subject)
        for word in candidates
    }
    with tqdm(total=len(of_word), desc="words", unit="word") as bar:
        words = sorted(measure.of(of_word, bar.update), key=lambda word: word.effect)
    table = rare_words.table(words, subject)
    console.say(photo_page.text_of(table))
    doubt = rare_words.doubt(measure.tokenizer, subject)
    warnings = [word.warning for word in words if word.word in subject and word.warning]
    console.notes([*([f"{doubt}: take a word from the top of the table"] if doubt else []), *warnings])
    return [table]


def _checked(
    directory: Path, flag: str, options: PhotoCheckOptions, drawn: Collection[str] = ()
) -> photos.Folder:
    """The photos in a folder, and those of its class images that this program has `drawn`. Raises UserError
    as `photos.check_folder` does."""
    return photos.check_folder(
        directory,
        flag,
        max_pixels=options.max_image_pixels,
        allow_odd_photos=True,
        follow_symlinks=options.follow_symlinks,
        made=drawn,
    )


def _looks_of(pictures: Sequence[Photo], what: str) -> dict[str, Look]:
    """The pictures in small, by file name. `what` is shown beside the progress bar."""
    bar = tqdm(pictures, desc=what, unit="picture", delay=2)
    return {photo.path.name: photo_looks.look_at(photo) for photo in bar}


def _of_shapes(
    pictures: Sequence[Photo], masked: Mapping[str, Mask], resolution: int, *, is_square: bool
) -> Iterator[Finding]:
    """Findings on sizes and shapes of photos, and on the subject's place in the crop where masks show it."""
    crops = Crops(resolution, "lanczos", center_crop=True)
    yield from photo_findings.of_sizes(pictures, crops, is_square=is_square)
    yield from photo_findings.of_masks(_with_masks(pictures, masked), crops, is_square=is_square)


def _with_masks(pictures: Sequence[Photo], masked: Mapping[str, Mask]) -> Iterator[tuple[Photo, Image.Image]]:
    """The photos that have a mask, with it: one at a time, since a large mask takes megabytes."""
    for photo in pictures:
        if photo.path.name in masked:
            yield photo, masks.load(masked[photo.path.name])


def _cut_captions(texts: Mapping[str, str], base: families.Base | None) -> list[str]:
    """The names of the photos whose captions are longer than the base's text encoders read."""
    if base is None:
        return []
    tokenizers, limit = loading.load_tokenizers(base), families.max_tokens(base)
    return [
        name
        for name, text in texts.items()
        if any(prompts.words_cut(tokenizer, text, limit) for tokenizer in tokenizers)
    ]


def _files_to_write(folder: Path) -> WrittenFiles:
    """The files of the folder for the page, which is made. Raises UserError if it cannot be written to, or if
    another program's file has the name of the page."""
    writer.make_output_folder(folder, "--output_dir")
    files = WrittenFiles(folder)
    files.check_free([PAGE], "--output_dir")
    return files


def _write(files: WrittenFiles, page: photo_page.Page, pictures: Sequence[Photo]) -> None:
    """Write the page, with small pictures of the photos that findings name."""
    named = {name for finding in page.entries for name in finding.photos}
    shown = [photo for photo in pictures if photo.path.name in named]
    thumbnails = {photo.path.name: report.thumbnail(photos.load(photo)) for photo in shown}
    written_at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    files.write(PAGE, photo_page.html(page, thumbnails, written_at).encode())
    console.say(f"page: {files.folder / PAGE}")


# --- at the start of a run


def notes(
    options: TrainOptions, subjects: Subjects, resolution: int, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Notes on photos that show the same or are blurred, on captions without the subject's word, on subjects
    that are cut off or small, and on a word for the subject that is split or common. Other checks of a run
    note the rest. Raises UserError if a photo has changed since it was checked."""
    lines = []
    for subject in subjects.each:
        row = subject.row
        class_prompt = row.class_prompt if row else options.prior.class_prompt
        trigger = subject.options.captions.trigger_word
        prompt = subject.options.instance_prompt
        findings = _of_subject(subject, _subject_words(prompt, class_prompt, trigger), resolution)
        where = f"{row.where}: " if row else ""
        if doubt := rare_words.doubt(tokenizer, _rare_words(prompt, class_prompt, trigger)):
            lines.append(f"{where}{doubt}: another word is learned more easily; check_photos.py finds one")
        lines += [where + finding.note for finding in photo_findings.ranked(findings)]
    return lines


def _of_subject(subject: Subject, words: Sequence[str], resolution: int) -> list[Finding]:
    """The findings that a run notes of one subject. Captions should hold one of `words`."""
    instance, pictures = subject.options, subject.checked.photos
    # of photos with the same pixels the first: the check of the folder names the others
    first = {photo.pixels_sha256: photo for photo in reversed(pictures)}
    looks = {photo.path.name: photo_looks.look_at(photo) for photo in [*first.values()][::-1][:_MOST]}
    masked = itertools.islice(_with_masks(pictures, subject.masks), _MOST)
    crops = Crops(resolution, "lanczos", center_crop=True)
    return [
        *photo_findings.of_looks(looks),
        *photo_findings.of_captions(subject.captions, words, cut=()),
        *photo_findings.of_masks(masked, crops, is_square=not instance.buckets),
    ]


# --- both


def _subject_words(
    instance_prompt: str | None, class_prompt: str | None, trigger_word: str | None
) -> Sequence[str]:
    """What captions should hold: --trigger_word, or else one of `_rare_words`."""
    if trigger_word is not None:
        return [trigger_word]
    return _rare_words(instance_prompt, class_prompt, trigger_word)


def _rare_words(
    instance_prompt: str | None, class_prompt: str | None, trigger_word: str | None
) -> Sequence[str]:
    """The words that stand for the subject and not for its class: those of --trigger_word, or else of
    --instance_prompt, that --class_prompt lacks."""
    prompt = trigger_word or instance_prompt
    if prompt is None or class_prompt is None:
        return []
    return scores.subject_words(prompt, class_prompt)
