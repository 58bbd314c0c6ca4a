"""Look at a folder of photos before anything is trained on it: near-duplicates, mirror images, blur, photos
that are too small or too long, captions that are cut off or lack the subject's word, class images that show
the subject, and, with masks, a subject that is cut off or small.

The findings are printed, the most important first, and written to a page with small pictures. Nothing in the
photos' folder is changed.
"""

from dreambooth.options.command_line import parse
from dreambooth.options.photo_check import PhotoCheckOptions
from dreambooth.runtime import startup

if __name__ == "__main__":  # before the slow imports, see runtime/startup.py
    startup.begin()
    OPTIONS = parse(PhotoCheckOptions, __doc__)

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dreambooth.bases import families, loading, prompts
from dreambooth.data import captions, photo_findings, photo_looks, photos
from dreambooth.data.crops import Crops
from dreambooth.data.photo_findings import Finding
from dreambooth.data.photo_looks import Look
from dreambooth.data.photos import Photo
from dreambooth.evaluation import photo_page, report, scores
from dreambooth.files.ownership import WrittenFiles, check_apart
from dreambooth.io import console, writer
from dreambooth.io.errors import UserError, shown
from dreambooth.options.resolved import resolution_of
from dreambooth.options.training import BaseOptions

PAGE = "photos.html"


def main(options: PhotoCheckOptions) -> None:
    """Print the findings and write the page. Raises UserError for a user's mistake."""
    inputs = {
        "--instance_data_dir": options.instance_data_dir,
        "--class_data_dir": options.class_data_dir,
        "--mask_dir": options.mask_dir,
    }
    name = options.pretrained_model_name_or_path
    check_apart({"--output_dir": options.output_dir}, inputs, {"--pretrained_model_name_or_path": name})
    assert options.instance_data_dir is not None
    directory = Path(options.instance_data_dir)
    folder = checked(directory, "--instance_data_dir", options)
    texts, notes = captions.read(
        directory, "--instance_data_dir", [photo.path.name for photo in folder.photos], options.instance()
    )
    class_images = []
    if options.class_data_dir is not None:
        class_images = checked(Path(options.class_data_dir), "--class_data_dir", options).photos
    base = families.find(BaseOptions(name)) if name is not None else None
    resolution = resolution_of(options.instance(), base.family.key if base else "sd")
    crops = Crops(resolution, "lanczos", center_crop=True)
    masks = read_masks(options, folder.photos)

    looks = looks_of(folder.photos, "photos")
    findings = photo_findings.ranked(
        [
            *photo_findings.of_looks(looks),
            *photo_findings.of_class_images(looks, looks_of(class_images, "class images")),
            *photo_findings.of_sizes(folder.photos, crops, is_square=not options.buckets),
            *photo_findings.of_masks(folder.photos, masks, crops, is_square=not options.buckets),
            *photo_findings.of_captions(texts, subject_words(options), cut_captions(texts, base)),
        ]
    )
    notes = [*folder.notes, *notes]
    facts = f"{len(folder.photos)} photos, seen at {resolution} pixels"
    say(findings, notes, facts)
    write(options, photo_page.Page(directory.absolute().name, facts, findings, notes, texts), folder.photos)


def checked(directory: Path, flag: str, options: PhotoCheckOptions) -> photos.Folder:
    """The photos in a folder. Raises UserError as `photos.check_folder` does."""
    return photos.check_folder(
        directory,
        flag,
        max_pixels=options.max_image_pixels,
        allow_odd_photos=True,
        follow_symlinks=options.follow_symlinks,
    )


def looks_of(pictures: Sequence[Photo], what: str) -> dict[str, Look]:
    """The pictures in small, by file name. `what` is shown beside the progress bar."""
    bar = tqdm(pictures, desc=what, unit="picture", delay=2)
    return {photo.path.name: photo_looks.look_at(photo) for photo in bar}


def read_masks(options: PhotoCheckOptions, pictures: Sequence[Photo]) -> dict[str, Image.Image]:
    """The masks in --mask_dir by file name of the photo. Raises UserError if one cannot be read, is missing,
    or has another shape than its photo."""
    if options.mask_dir is None:
        return {}
    folder = checked(Path(options.mask_dir), "--mask_dir", options)
    by_stem = {mask.path.stem: mask for mask in folder.photos}
    masks, problems = {}, []
    for photo in pictures:
        mask = by_stem.get(photo.path.stem)
        if mask is None:
            problems.append(
                f"--mask_dir: no mask for {shown(photo.path.name)}; give it a picture of its name"
            )
        elif abs(mask.size[0] * photo.size[1] / (mask.size[1] * photo.size[0]) - 1) > 0.02:
            sizes = f"{mask.size[0]} x {mask.size[1]} for a photo of {photo.size[0]} x {photo.size[1]}"
            problems.append(f"--mask_dir: {shown(mask.path.name)} has another shape than its photo: {sizes}")
        else:
            masks[photo.path.name] = photos.load(mask)
    if problems:
        raise UserError("\n".join(problems))
    return masks


def subject_words(options: PhotoCheckOptions) -> Sequence[str]:
    """The words that name the subject: --trigger_word, or those of --instance_prompt that --class_prompt
    lacks."""
    if options.captions.trigger_word is not None:
        return [options.captions.trigger_word]
    if options.instance_prompt is None or options.class_prompt is None:
        return []
    return scores.subject_words(options.instance_prompt, options.class_prompt)


def cut_captions(texts: Mapping[str, str], base: families.Base | None) -> list[str]:
    """The names of the photos whose captions are longer than the base's text encoders read."""
    if base is None:
        return []
    tokenizers, limit = loading.load_tokenizers(base), families.max_tokens(base)
    return [
        name
        for name, text in texts.items()
        if any(prompts.words_cut(tokenizer, text, limit) for tokenizer in tokenizers)
    ]


def say(findings: Sequence[Finding], notes: Sequence[str], facts: str) -> None:
    """Print the findings and the notes."""
    console.say(f"{facts}: {photo_page.headline(findings)}")
    for finding in findings:
        console.say(f"{finding.title}: {finding.note}")
    console.notes(notes)


def write(options: PhotoCheckOptions, page: photo_page.Page, pictures: Sequence[Photo]) -> None:
    """Write the page. Raises UserError if the folder cannot be written to, or if another program's file has
    the name of the page."""
    folder = Path(options.output_dir)
    writer.make_output_folder(folder, "--output_dir")
    files = WrittenFiles(folder)
    files.check_free([PAGE], "--output_dir")
    named = {name for finding in page.entries for name in finding.photos}
    thumbnails = {
        photo.path.name: report.thumbnail(photos.load(photo))
        for photo in pictures
        if photo.path.name in named
    }
    written_at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    files.write(PAGE, photo_page.html(page, thumbnails, written_at).encode())
    console.say(f"page: {folder / PAGE}")


if __name__ == "__main__":
    startup.run(main, OPTIONS)
