"""What is encoded once: found again by its content, made anew where anything it follows from has changed, and never something else than it was."""

import dataclasses
import errno
import gc
import hashlib
import json
import os
import shutil
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import train_dreambooth_lora as train
from dreambooth.bases import autoencoder, families, loading, prompts
from dreambooth.data import decode_cache, encoding_cache, encodings, photos
from dreambooth.data.crops import Crops
from dreambooth.data.decode_cache import DecodeCache
from dreambooth.data.encoding_cache import EncodingCache, Entry
from dreambooth.errors import UserError
from dreambooth.files import atomic, checkpoint_folders
from dreambooth.files import digests as file_digests
from dreambooth.options.training import BaseOptions
from dreambooth.runtime import processes
from tests import tiny
from tests.running import digest, prior_words, run_train, together

FLAG = "--instance_data_dir"
CPU = torch.device("cpu")
ALONE: Any = types.SimpleNamespace(rank=0, world=1, is_main=True)
ON_DISK = ["--cache_latents", "disk", "--encoded_dir"]


@dataclasses.dataclass
class Work:
    """What was done: sizes of the pictures encoded, prompts encoded, parts loaded, files of pictures decoded."""

    pictures: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    prompts: list[str] = dataclasses.field(default_factory=list)
    loaded: list[str] = dataclasses.field(default_factory=list)
    decoded: list[str] = dataclasses.field(default_factory=list)


def spy(monkeypatch, owner: Any, name: str, see: Callable[..., Any]) -> None:
    real = getattr(owner, name)

    def watched(*args, **others):
        see(*args, **others)
        return real(*args, **others)

    monkeypatch.setattr(owner, name, watched)


@pytest.fixture
def work(monkeypatch) -> Work:
    done = Work()
    spy(
        monkeypatch,
        autoencoder,
        "encode",
        lambda vae, pixels: done.pictures.extend(tuple(one.shape[1:]) for one in pixels),
    )
    spy(monkeypatch, prompts.TextParts, "__call__", lambda self, words: done.prompts.extend(words))
    spy(monkeypatch, photos, "_decode", lambda path, *others, **more: done.decoded.append(path.name))
    for part in ("load_vae", "load_encoders", "load_unet"):
        spy(
            monkeypatch,
            loading,
            part,
            lambda *args, part=part: done.loaded.append(part.removeprefix("load_")),
        )
    return done


def train_nothing(training: train.Training) -> None:
    """No step."""


@pytest.fixture
def start(monkeypatch, work) -> Callable[..., Work]:
    """Everything of a run but its steps; what was done in it."""
    monkeypatch.setattr(train.Training, "train", train_nothing)

    def run(*args: Any) -> Work:
        for field in dataclasses.fields(Work):
            getattr(work, field.name).clear()
        run_train(*args)
        return dataclasses.replace(
            work, **{field.name: list(getattr(work, field.name)) for field in dataclasses.fields(Work)}
        )

    return run


@pytest.fixture
def mine(tmp_path) -> Path:
    """Three pictures, two of them with captions; one is not square."""
    folder = tiny.make_photos(tmp_path / "photos")
    tiny.make_photos(folder, 1, (96, 64))
    (folder / "photo-0.txt").write_text("sks dog in the snow")
    (folder / "photo-1.txt").write_text("sks dog on a mat")
    return folder


CAPTIONED = ["--caption_column", "text"]
ALL_PROMPTS = ["a photo of sks dog", "sks dog in the snow", "sks dog on a mat"]
WHOLE, SQUARE = (64, 96), (64, 64)


def entries_in(folder: Path, kind: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{kind}*.safetensors"))}


# --- what is encoded anew


@pytest.mark.trains
def test_a_second_run_encodes_nothing_and_loads_the_unet_alone(tiny_base, mine, tmp_path, work):
    """In another output folder, with mirror images; the adapter is the same to the last byte."""
    words = [*ON_DISK, str(tmp_path / "kept"), *CAPTIONED, "--random_flip", "--max_train_steps", "2"]
    first = run_train(tiny_base, mine, tmp_path / "first", *words)
    assert sorted(work.pictures) == [SQUARE] * 4 + [WHOLE] * 2
    assert sorted(work.prompts) == ALL_PROMPTS
    assert work.loaded == ["encoders", "vae", "unet"]
    for seen in (work.pictures, work.prompts, work.loaded, work.decoded):
        seen.clear()
    second = run_train(tiny_base, mine, tmp_path / "second", *words)
    assert (work.pictures, work.prompts, work.loaded, work.decoded) == ([], [], ["unet"], [])
    assert digest(first) == digest(second)
    assert not list(mine.glob("*.safetensors"))


def other_vae(folder: Path, base: Path) -> list[str]:
    torch.manual_seed(7)
    tiny.build_vae().save_pretrained(folder / "vae")
    return ["--pretrained_vae_model_name_or_path", str(folder / "vae")]


def same_vae_elsewhere(folder: Path, base: Path) -> list[str]:
    shutil.copytree(base / "vae", folder / "vae")
    return ["--pretrained_vae_model_name_or_path", str(folder / "vae")]


def edit_picture(folder: Path, base: Path) -> list[str]:
    tiny.make_photos(folder / "photos", 1, (96, 64), seed=9)
    return []


def edit_caption(folder: Path, base: Path) -> list[str]:
    (folder / "photos" / "photo-1.txt").write_text("sks dog on a sofa")
    return []


def rename(folder: Path, base: Path) -> list[str]:
    for name in ("photo-0.png", "photo-0.txt"):
        (folder / "photos" / name).rename(folder / "photos" / f"z-{name}")
    return []


def words(*given: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, base: list(given)


EVERY_PICTURE = [SQUARE, SQUARE, WHOLE]
CHANGES: dict[str, tuple[Callable[[Path, Path], list[str]], list[tuple[int, int]], list[str]]] = {
    "nothing": (words(), [], []),
    "another name of a picture": (rename, [], []),
    "the same VAE elsewhere": (same_vae_elsewhere, [], []),
    "what is no part of it": (words("--learning_rate", "0.1", "--seed", "2"), [], []),
    "one picture": (edit_picture, [WHOLE], []),
    "one word of a caption": (edit_caption, [], ["sks dog on a sofa"]),
    "the VAE": (other_vae, EVERY_PICTURE, []),
    "the resolution": (words("--resolution", "72"), [(72, 72), (72, 72), (72, 104)], []),
    "the interpolation": (words("--image_interpolation_mode", "bicubic"), EVERY_PICTURE, []),
    "the crop of what is not square": (words("--center_crop"), [SQUARE], []),
    "mirror images": (words("--random_flip"), EVERY_PICTURE, []),
    "the layer that is read": (words("--clip_skip", "1"), [], ALL_PROMPTS),
    "the padding": (words("--tokenizer_max_length", "40"), [], ALL_PROMPTS),
    "the mask": (words("--text_encoder_use_attention_mask"), [], ALL_PROMPTS),
    "the precision of the text encoder": (words("--mixed_precision", "bf16"), [], ALL_PROMPTS),
    "the threads": (words("--num_threads", "2"), EVERY_PICTURE, ALL_PROMPTS),
    "one more prompt": (words("--validation_prompt", "a dog"), [], ["", "a dog"]),
}


@pytest.fixture(scope="module")
def kept(tiny_base, tmp_path_factory) -> Path:
    """The folder of encodings that a run of `mine` leaves."""
    folder = tmp_path_factory.mktemp("kept")
    pictures = tiny.make_photos(folder / "photos")
    tiny.make_photos(pictures, 1, (96, 64))
    (pictures / "photo-0.txt").write_text("sks dog in the snow")
    (pictures / "photo-1.txt").write_text("sks dog on a mat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "train", train_nothing)
        run_train(
            tiny_base,
            pictures,
            folder / "run",
            *ON_DISK,
            str(folder / "encoded"),
            *CAPTIONED,
            "--num_threads",
            "1",
        )
    return folder / "encoded"


@pytest.mark.trains
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_anew_exactly_what_follows_from_it(change, kept, tiny_base, mine, tmp_path, start):
    make, pictures, texts = CHANGES[change]
    shutil.copytree(kept, tmp_path / "kept")
    more = make(tmp_path, tiny_base)
    done = start(
        tiny_base,
        mine,
        tmp_path / "run",
        *ON_DISK,
        str(tmp_path / "kept"),
        *CAPTIONED,
        "--num_threads",
        "1",
        *more,
    )
    assert sorted(done.pictures) == sorted(pictures)
    assert sorted(done.prompts) == sorted(texts)
    assert set(done.loaded) == {"unet", *(["encoders"] if texts else []), *(["vae"] if pictures else [])}
    assert (
        entries_in(kept).items() <= entries_in(tmp_path / "kept").items()
    )  # the old ones stay, for who goes back
    assert len(entries_in(tmp_path / "kept")) == 6 + len(pictures) + len(texts)


@pytest.mark.trains
def test_other_weights_of_the_text_encoder_or_another_tokenizer_make_the_prompts_anew(
    kept, tiny_base, mine, tmp_path, start
):
    shutil.copytree(kept, tmp_path / "kept")
    common = [*ON_DISK, str(tmp_path / "kept"), *CAPTIONED, "--num_threads", "1"]
    base = shutil.copytree(tiny_base, tmp_path / "base")
    assert start(base, mine, tmp_path / "moved", *common).prompts == []
    data = bytearray((base / "text_encoder" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "text_encoder" / "model.safetensors").write_bytes(bytes(data))
    done = start(base, mine, tmp_path / "weights", *common)
    assert (done.pictures, sorted(done.prompts)) == ([], ALL_PROMPTS)
    tokenizer = json.loads((base / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[4:6]
    assert start(base, mine, tmp_path / "same", *common).prompts == []
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (base / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    read = loading.load_tokenizers(families.find(BaseOptions(str(base))))[0]
    plain = loading.load_tokenizers(families.find(BaseOptions(str(tiny_base))))[0]
    others = [prompt for prompt in ALL_PROMPTS if read(prompt).input_ids != plain(prompt).input_ids]
    assert sorted(start(base, mine, tmp_path / "tokenizer", *common).prompts) == others


def test_weights_are_hashed_once_in_a_process_and_anew_when_they_change(tiny_base, tmp_path, monkeypatch):
    base = families.find(BaseOptions(str(shutil.copytree(tiny_base, tmp_path / "base"))))
    read: list[str] = []
    spy(monkeypatch, file_digests, "_computed", lambda path, size: read.append(path.parent.name))
    base.fingerprint()
    assert {"vae", "unet", "text_encoder"} <= set(read)
    read.clear()
    before = base.part_digest("vae"), base.part_digest("text_encoder")
    assert read == []
    path = tmp_path / "base" / "vae" / "config.json"
    path.write_text(path.read_text().replace('"sample_size": 64', '"sample_size": 128'))
    after = base.part_digest("vae"), base.part_digest("text_encoder")
    assert (read, before[0] != after[0], before[1] == after[1]) == (["vae"], True, True)


# --- the same samples, wherever they are kept


@pytest.mark.trains
@pytest.mark.parametrize(
    ("base", "more"),
    [("tiny_base", ["--center_crop", "--random_flip"]), ("tiny_xl", ["--center_crop"]), ("tiny_if", [])],
)
def test_a_run_is_the_same_with_its_encodings_in_memory_on_disk_or_nowhere(
    request, mine, tmp_path, base, more
):
    """Wherever crops are fixed; and random ones of a base in pixels, which has no grid. With class images, and prompts on disk."""
    common = [
        *prior_words(tmp_path / "class"),
        "--max_train_steps",
        "2",
        "--caption_dropout",
        "0.3",
        *CAPTIONED,
        *more,
    ]
    if base == "tiny_if":
        common += ["--resolution", "32"]
    digests = set()
    for mode in ("memory", "disk", "disk", "off"):
        out = tmp_path / f"{mode}-{len(list(tmp_path.iterdir()))}"
        digests.add(
            digest(run_train(request.getfixturevalue(base), mine, out, *common, "--cache_latents", mode))
        )
        assert (out / "encoded").is_dir() == (mode == "disk")
    assert len(digests) == 1


@pytest.mark.trains
def test_random_crops_resume_and_do_not_depend_on_where_they_are_kept(tiny_base, mine, tmp_path):
    common = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--random_flip"]
    whole = run_train(tiny_base, mine, tmp_path / "whole", *common, "--cache_latents", "memory")
    resume = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")]
    on_disk = run_train(tiny_base, mine, tmp_path / "disk", *common, "--cache_latents", "disk", *resume)
    assert digest(whole) == digest(on_disk)
    said = "random crops were cut from latents and are cut from pixels: --cache_latents off cuts pixels, any other latents"
    with pytest.raises(UserError, match=said):
        run_train(tiny_base, mine, tmp_path / "off", *common, "--cache_latents", "off", *resume)
    with pytest.raises(UserError, match=said):
        run_train(tiny_base, mine, tmp_path / "whole", *common, "--cache_latents", "off")
    pixels = run_train(tiny_base, mine, tmp_path / "off", *common, "--cache_latents", "off")
    assert digest(pixels) != digest(whole)


@pytest.mark.trains
def test_where_all_crops_are_fixed_a_run_may_go_on_without_a_cache(tiny_base, mine, photos_dir, tmp_path):
    for name, folder, more in (("square", photos_dir, []), ("center", mine, ["--center_crop"])):
        common = ["--max_train_steps", "2", "--checkpointing_steps", "1", *more]
        whole = run_train(tiny_base, folder, tmp_path / name, *common)
        assert json.loads((tmp_path / name / "run.json").read_text())["flags"]["crops"] == "fixed"
        resume = ["--resume_from_checkpoint", str(tmp_path / name / "checkpoint-1"), "--cache_latents", "off"]
        assert digest(run_train(tiny_base, folder, tmp_path / f"{name}-off", *common, *resume)) == digest(
            whole
        )


@pytest.mark.trains
def test_class_images_of_other_sizes_do_not_stand_in_the_way_of_going_on(tiny_base, photos_dir, tmp_path):
    """Whether a crop varies is known once they are there; photos alone are compared before."""
    tiny.make_photos(tmp_path / "class", 3, (96, 64), seed=3)
    common = [*prior_words(tmp_path / "class"), "--max_train_steps", "2", "--checkpointing_steps", "1"]
    whole = run_train(tiny_base, photos_dir, tmp_path / "run", *common)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["flags"]["crops"] == "latents"
    resume = ["--resume_from_checkpoint", "checkpoint-1"]
    assert digest(run_train(tiny_base, photos_dir, tmp_path / "run", *common, *resume)) == digest(whole)


def photo_of(folder: Path, size: tuple[int, int]) -> photos.Photo:
    return photos.check_folder(tiny.make_photos(folder, 1, size), FLAG).photos[0]


def encoded_photo(
    base: families.Base, photo: photos.Photo, *, resolution: int = 64, mirrored: bool = False
) -> encodings.EncodedPhotos:
    crops = Crops(resolution, "lanczos", False, base.vae_stride)
    cache = EncodingCache(None, print)
    return encodings.encode_photos(cache, base, [(photo, mirrored)], crops, CPU, ALONE, lambda: None)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_crop_on_the_grid_is_a_slice_of_the_whole_pictures_latents(tiny_base, tmp_path, mirrored):
    """Of the picture cut to full latents; the crop that begins at a pixel begins at its eighth."""
    photo = photo_of(tmp_path, (101, 64))
    encoded = encoded_photo(families.find(BaseOptions(str(tiny_base))), photo, mirrored=mirrored)
    vae = loading.load_vae(families.find(BaseOptions(str(tiny_base))), torch.device("cpu"))
    assert vae is not None
    image: Image.Image = Image.open(photo.path)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
    pixels = (
        torch.tensor(list(image.crop((0, 0, 96, 64)).tobytes())).view(64, 96, 3).permute(2, 0, 1).contiguous()
        / 127.5
        - 1
    )
    with torch.no_grad():
        plain = vae.encode(pixels[None].contiguous(memory_format=torch.channels_last)).latent_dist
    for left in (0, 8, 16, 24, 32):
        found = encoded.posterior(photo, (left, 0), is_mirrored=mirrored)
        assert torch.equal(found.mean, plain.mean[..., left // 8 : left // 8 + 8])
        assert torch.equal(found.std, plain.std[..., left // 8 : left // 8 + 8])


@pytest.mark.parametrize("resolution", [64, 72])
@pytest.mark.parametrize("size", [(700, 64), (64, 333), (200, 64), (193, 64)])
@pytest.mark.parametrize("grid", [1, 4, 8, 16])
def test_every_crop_of_a_long_picture_lies_whole_in_one_of_its_pieces(size, resolution, grid):
    """None of them longer than three crops, so that a panorama does not ask for the memory of one."""
    crops = Crops(resolution, "lanczos", False, grid)
    room = crops.room(size)
    boxes = crops.encoded_boxes(size)
    used = set()
    for left in range(0, room[0] + 1, grid):
        for top in range(0, room[1] + 1, grid):
            box = crops.encoded_box(size, (left, top))
            used.add(box)
            inside = crops.latent_side * grid
            assert box[0] <= left <= left + inside <= box[2] <= crops.resized_size(size)[0]
            assert box[1] <= top <= top + inside <= box[3] <= crops.resized_size(size)[1]
            assert all(edge % grid == 0 for edge in box)
    assert used == set(boxes)
    assert max(max(box[2] - box[0], box[3] - box[1]) for box in boxes) <= 3 * resolution
    assert len(boxes) > 1 or max(size) < 3 * min(size) + grid + 8


@pytest.mark.trains
def test_each_photo_is_whole_or_not_by_its_own_size(tiny_base, mine, tmp_path, start):
    """A wide one among square ones is encoded whole, and the others as they are trained on."""
    assert sorted(start(tiny_base, mine, tmp_path / "a").pictures) == [SQUARE, SQUARE, WHOLE]
    assert start(tiny_base, mine, tmp_path / "b", "--center_crop").pictures == [SQUARE] * 3
    assert start(tiny_base, mine, tmp_path / "c", "--cache_latents", "off").pictures == []


# --- files that are not as they were written


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    others = sorted(
        other
        for other in path.parent.glob("*.safetensors")
        if other != path and other.name[:4] == path.name[:4]
    )
    header = int.from_bytes(data[:8], "little")
    content = {
        "cut off": data[: len(data) // 2],
        "empty": b"",
        "one bit": data[:-1] + bytes([data[-1] ^ 1]),
        "one bit of the header": data[:20] + bytes([data[20] ^ 1]) + data[21:],
        "another file": others[0].read_bytes(),
        "no hash": data.replace(b'"sha256"', b'"sha257"'),
        "text": b"<!DOCTYPE html>",
        "zeros": data[: 8 + header] + bytes(len(data) - 8 - header),
    }
    path.write_bytes(content[how])


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["latents", "prompt"])
@pytest.mark.parametrize(
    "how",
    ["cut off", "empty", "one bit", "one bit of the header", "another file", "no hash", "text", "zeros"],
)
def test_a_damaged_entry_is_encoded_anew_and_it_alone(
    kept, tiny_base, mine, tmp_path, start, capsys, how, kind
):
    shutil.copytree(kept, tmp_path / "kept")
    whole = entries_in(kept, kind)
    victim = sorted(whole)[-1]
    damage(tmp_path / "kept" / victim, how)
    assert entries_in(tmp_path / "kept", kind) != whole
    done = start(
        tiny_base, mine, tmp_path / "run", *ON_DISK, str(tmp_path / "kept"), *CAPTIONED, "--num_threads", "1"
    )
    assert (len(done.pictures), len(done.prompts)) == ((1, 0) if kind == "latents" else (0, 1))
    assert entries_in(tmp_path / "kept", kind) == whole
    assert (
        f"1 files in {tmp_path / 'kept'} were damaged and have been made anew: {victim}"
        in capsys.readouterr().out
    )


def test_an_entry_of_another_shape_is_encoded_anew_though_its_hash_holds(tmp_path):
    told: list[str] = []
    entry = Entry("latents-a", {"mean": (2, 2)})
    cache = EncodingCache(tmp_path, told.append)
    assert not cache.has(entry)
    cache.store(entry, {"mean": torch.ones(2, 2)})
    assert EncodingCache(tmp_path, told.append).has(entry)
    for shapes in ({"mean": (4,)}, {"mean": (2, 2), "std": (2, 2)}, {"std": (2, 2)}):
        assert not EncodingCache(tmp_path, told.append).has(Entry("latents-a", shapes))
    (tmp_path / "latents-b.safetensors").write_bytes((tmp_path / "latents-a.safetensors").read_bytes())
    assert not cache.has(Entry("latents-b", {"mean": (2, 2)}))
    assert (cache.damaged, told, cache.in_memory) == (["latents-b.safetensors"], [], {})


@pytest.mark.trains
def test_a_file_that_breaks_during_training_ends_the_run_by_name_and_it_goes_on(
    tiny_base, photos_dir, tmp_path, monkeypatch, capsys
):
    common = [*ON_DISK, str(tmp_path / "kept"), "--max_train_steps", "6"]
    whole = run_train(tiny_base, photos_dir, tmp_path / "whole", *common)
    real, steps = train.Training.step, []

    def step(self, number, *others):
        real(self, number, *others)
        steps.append(number)
        if number == 1:
            for path in (tmp_path / "kept").glob("latents-*"):
                path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(train.Training, "step", step)
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path / "cut", *common)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "kept" / "latents-") in said
    assert "With --resume_from_checkpoint latest the run goes on and encodes it anew" in said
    assert steps == [0, 1]
    assert [step for step, _ in checkpoint_folders.list_checkpoints(tmp_path / "cut")] == [2]
    monkeypatch.undo()
    assert digest(
        run_train(tiny_base, photos_dir, tmp_path / "cut", *common, "--resume_from_checkpoint", "latest")
    ) == digest(whole)


def test_a_photo_that_changes_after_it_was_checked_is_not_taken_for_the_one_that_was(tiny_base, tmp_path):
    """Else its latents would be found under the other's name ever after."""
    photo = photo_of(tmp_path, (64, 64))
    tiny.make_photos(tmp_path, 1, seed=5)
    with pytest.raises(UserError, match=r"photo-0\.png has changed since the run was started; start again"):
        encoded_photo(families.find(BaseOptions(str(tiny_base))), photo)
    photo.path.unlink()
    with pytest.raises(UserError, match=r"photo-0\.png cannot be read: No such file"):
        encoded_photo(families.find(BaseOptions(str(tiny_base))), photo)


def test_a_photo_that_cannot_be_unpacked_any_more_is_named(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"no picture")
    photo = photos.Photo(path, (64, 64), hashlib.sha256(b"no picture").hexdigest(), "")
    with pytest.raises(UserError) as refusal:
        photos.load_checked(photo)
    assert (
        str(refusal.value)
        == f"{path}: not a whole picture (cannot identify image file); save it again or remove it"
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_base_that_changes_while_it_is_read_gives_no_entry(
    tiny_base, photos_dir, tmp_path, monkeypatch, part
):
    """Else what the new weights make would be found under the name of the old ones ever after."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (path,) = (base / part).glob("*.safetensors")

    def change(*args: Any) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))

    spy(monkeypatch, loading, "load_vae" if part == "vae" else "load_encoders", change)
    with pytest.raises(
        UserError, match=rf"the base has changed while it was read: {base / part}; start again"
    ):
        run_train(base, photos_dir, tmp_path / "run", *ON_DISK, str(tmp_path / "kept"))
    assert entries_in(tmp_path / "kept", "latents" if part == "vae" else "prompt") == {}


def test_other_pixels_of_the_same_file_and_other_arithmetic_are_other_entries(
    tiny_base, tmp_path, monkeypatch
):
    base, photo = families.find(BaseOptions(str(tiny_base))), photo_of(tmp_path, (64, 64))
    names = set()
    for changed in (photo, photo, dataclasses.replace(photo, pixels_sha256="other")):
        names |= set(encoded_photo(base, changed).cache.in_memory)
    assert len(names) == 2
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx2": True, "cpu_name": "another"}
    )
    assert not names & set(encoded_photo(base, photo).cache.in_memory)


@pytest.mark.trains
def test_each_entry_that_is_looked_for_can_be_the_last(tiny_base, tmp_path):
    """A stop that is asked for is not kept waiting by thousands of files."""
    base, photo = families.find(BaseOptions(str(tiny_base))), photo_of(tmp_path, (64, 64))
    crops = Crops(64, "lanczos", False, base.vae_stride)
    (tmp_path / "kept").mkdir()
    for expected in (2, 1):  # looked for and encoded; looked for
        check = Mock()
        encodings.encode_photos(
            EncodingCache(tmp_path / "kept", print), base, [(photo, False)], crops, CPU, ALONE, check
        )
        assert check.call_count == expected


# --- folders


@pytest.mark.parametrize("where", ["a file", "beside the photos", "beside the class images"])
def test_a_folder_that_cannot_hold_encodings_is_refused_before_models_load(
    tiny_base, mine, tmp_path, no_models, where
):
    (tmp_path / "file").write_text("")
    (tmp_path / "class").mkdir()
    folder = {
        "a file": tmp_path / "file" / "kept",
        "beside the photos": mine,
        "beside the class images": tmp_path / "class" / ".." / "class",
    }[where]
    before = sorted(mine.iterdir())
    with pytest.raises(
        UserError, match=r"--encoded_dir: .* (cannot be made|is a folder of pictures; name one of its own)"
    ):
        run_train(tiny_base, mine, tmp_path / "run", *ON_DISK, str(folder), *prior_words(tmp_path / "class"))
    assert sorted(mine.iterdir()) == before
    assert list((tmp_path / "class").iterdir()) == []


@pytest.mark.parametrize("where", ["the same", "a link", "a loop"])
def test_encodings_have_a_folder_of_their_own(tiny_base, mine, tmp_path, no_models, where):
    out, folder = tmp_path / "run", tmp_path / "run"
    if where != "the same":
        folder = tmp_path / "kept"
        folder.symlink_to(out if where == "a link" else folder)
    with pytest.raises(
        UserError,
        match=r"--encoded_dir: .* cannot be made"
        if where == "a loop"
        else "--encoded_dir and --output_dir must be two",
    ):
        run_train(tiny_base, mine, out, *ON_DISK, str(folder))


def test_somebody_else_s_entry_that_may_not_be_read_stays_as_it_is(tmp_path, monkeypatch):
    entries = [Entry(name, {"mean": (2,)}) for name in ("latents-a", "latents-b")]
    for entry in entries:
        EncodingCache(tmp_path, print).store(entry, {"mean": torch.ones(2)})
    before, real = entries_in(tmp_path), os.open

    def refused(path, flags, *others):
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *others)

    monkeypatch.setattr(os, "open", refused)
    told: list[str] = []
    cache = EncodingCache(tmp_path, told.append)
    for entry in entries:
        assert not cache.has(entry)
        cache.store(entry, {"mean": torch.zeros(2)})
        assert cache.has(entry)
        assert cache.read(entry)["mean"].tolist() == [0, 0]
    assert (entries_in(tmp_path), cache.damaged) == (before, [])
    said = "latents-a.safetensors cannot be read (Permission denied): what it and others like it may hold is encoded anew, and kept in memory"
    assert len(told) == 1
    assert said in told[0]


def test_what_dead_runs_left_is_removed_after_a_day_and_nothing_else(tmp_path):
    cache = EncodingCache(tmp_path, print)
    name = encoding_cache.name_of("latents", {})
    left: list[str] = []
    with pytest.MonkeyPatch.context() as patch:  # killed before the file has its name
        patch.setattr(
            os, "replace", lambda source, target: left.append(shutil.copy(source, f"{source}.kept"))
        )
        cache.store(Entry(name, {"mean": (2,)}), {"mean": torch.ones(2)})
        atomic.write(tmp_path / decode_cache.NAME, b"{}")
        atomic.write(tmp_path / decode_cache.NAME, b"{}")
    mine = {Path(copy).rename(copy.removesuffix(".kept")) for copy in left}
    assert len(mine) == 3
    others = {tmp_path / f"{name}.safetensors", tmp_path / "notes.tmp", tmp_path / ".notes.1.tmp"}
    for path in others:
        path.write_text("")
    assert encoding_cache.sweep(tmp_path) == []
    for path in mine | others:
        os.utime(path, (0, 0))
    assert set(encoding_cache.sweep(tmp_path)) == {path.name for path in mine}
    assert set(tmp_path.iterdir()) == others


@pytest.mark.trains
def test_a_full_disk_costs_the_cache_and_not_the_run(tiny_base, mine, tmp_path, monkeypatch, capsys):
    common = ["--max_train_steps", "3", *CAPTIONED]
    whole = run_train(tiny_base, mine, tmp_path / "whole", *common)
    real, written = atomic.write, []

    def fills_up(path, data):
        if path.parent.name == "kept":
            written.append(path.name)
            if len(written) > 4:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(atomic, "write", fills_up)
    found = run_train(tiny_base, mine, tmp_path / "full", *ON_DISK, str(tmp_path / "kept"), *common)
    assert digest(found) == digest(whole)
    said = capsys.readouterr().out
    assert (
        said.count(
            f"warning: {tmp_path / 'kept'} cannot be written to (No space left on device): what is encoded from here on"
        )
        == 1
    )
    assert len(entries_in(tmp_path / "kept")) == 3  # after the pictures' own file
    assert len(written) == 5


def test_with_a_folder_nothing_stays_in_memory(tiny_base, tmp_path):
    base = families.find(BaseOptions(str(tiny_base)))
    found = photos.check_folder(tiny.make_photos(tmp_path / "photos", 3, (96, 64)), FLAG).photos
    crops = Crops(64, "lanczos", False, base.vae_stride)
    (tmp_path / "kept").mkdir()
    cache = EncodingCache(tmp_path / "kept", print)
    encoded = encodings.encode_photos(
        cache, base, [(photo, False) for photo in found], crops, CPU, ALONE, lambda: None
    )
    assert cache.in_memory == {}
    assert encoded.posterior(found[0], (8, 0), is_mirrored=False).mean.shape == (1, 4, 8, 8)
    assert cache.in_memory == {}


def test_few_prompts_wait_on_the_device_and_many_are_read_at_each_visit():
    read: list[str] = []

    def one(prompt: str) -> prompts.PromptEmbeds:
        read.append(prompt)
        return prompts.PromptEmbeds(torch.full((1, 2, 3), float(prompt)))

    few, many = ([str(number) for number in range(count)] for count in (64, 65))
    prompt_cache = prompts.prompt_cache(one, few, CPU)
    assert read == few
    assert prompt_cache.of(["7", "7", "3"]).embeds[:, 0, 0].tolist() == [7, 7, 3]
    assert read == few
    read.clear()
    prompt_cache = prompts.prompt_cache(one, many, CPU)
    assert read == []
    assert prompt_cache.of(["7", "64"]).embeds[:, 0, 0].tolist() == [7, 64]
    assert read == ["7", "64"]


def test_auto_is_memory_for_up_to_64_pictures_and_disk_above_or_with_a_folder_named():
    assert encodings.mode_of("auto", 64, is_folder_given=False) == "memory"
    assert encodings.mode_of("auto", 65, is_folder_given=False) == "disk"
    assert encodings.mode_of("auto", 1, is_folder_given=True) == "disk"
    for mode in ("memory", "disk", "off"):
        assert {
            encodings.mode_of(mode, count, is_folder_given=given)
            for count in (1, 100)
            for given in (True, False)
        } == {mode}


@pytest.mark.trains
def test_loader_processes_that_load_nothing_are_said(tiny_base, photos_dir, tmp_path, start, capsys):
    said = "note: You need not use --dataloader_num_workers without --cache_latents off."
    for mode, expected in (("memory", True), ("off", False)):
        start(
            tiny_base, photos_dir, tmp_path / mode, "--cache_latents", mode, "--dataloader_num_workers", "1"
        )
        assert (said in capsys.readouterr().out) == expected


@pytest.mark.trains
def test_a_folder_that_is_named_for_nothing_is_said(tiny_base, photos_dir, tmp_path, start, capsys):
    for mode in ("memory", "off"):
        start(
            tiny_base,
            photos_dir,
            tmp_path / mode,
            "--cache_latents",
            mode,
            "--encoded_dir",
            str(tmp_path / "kept"),
        )
        assert f"note: You need not use --encoded_dir with --cache_latents {mode}." in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()
    start(tiny_base, photos_dir, tmp_path / "auto", "--encoded_dir", str(tmp_path / "kept"))
    assert len(entries_in(tmp_path / "kept")) == 4
    start(tiny_base, photos_dir, tmp_path / "own", "--cache_latents", "disk")
    assert entries_in(tmp_path / "own" / "encoded") == entries_in(tmp_path / "kept")


# --- what comes first


@pytest.mark.trains
def test_all_photos_are_encoded_before_the_first_step_by_a_vae_without_its_decoder(
    tiny_base, mine, tmp_path, monkeypatch
):
    """The decoder is most of a VAE's weights."""
    seen: list[str] = []
    spy(
        monkeypatch,
        autoencoder,
        "encode",
        lambda vae, pixels: seen.append("photo" if vae.decoder is None else "photo, by a whole VAE"),
    )
    spy(monkeypatch, train.Training, "step", lambda *args: seen.append("step"))
    run_train(tiny_base, mine, tmp_path / "run", "--max_train_steps", "2")
    assert seen == ["photo"] * 3 + ["step"] * 2


# --- several processes


@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "folders of their own"])
def test_processes_share_the_encoding_and_write_what_one_would(tiny_base, tmp_path, shared):
    """Where nodes have no folder in common each makes what it lacks."""
    base = families.find(BaseOptions(str(tiny_base)))
    found = photos.check_folder(tiny.make_photos(tmp_path / "photos", 5, (96, 64)), FLAG).photos
    crops = Crops(64, "lanczos", False, base.vae_stride)
    for name in ("alone", "0", "1"):
        (tmp_path / name).mkdir()

    def encode(folder: Path, peers: processes.Peers) -> int:
        calls: list[int] = []

        def in_place_of_a_vae(vae: Any, pixels: torch.Tensor) -> autoencoder.Posterior:
            """These processes are forks, in which the threads of a real one's layers are gone."""
            calls.append(1)
            small = pixels[:, [0, 1, 2, 0], ::8, ::8].clone()
            return autoencoder.Posterior(small, small.abs())

        torch.set_num_threads(
            1
        )  # accelerate gives each of several processes another number, and what they encode another name
        cache = EncodingCache(folder, print)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "load_vae", lambda *args: None)
            patch.setattr(autoencoder, "encode", in_place_of_a_vae)
            encodings.encode_photos(
                cache, base, [(photo, False) for photo in found], crops, CPU, peers, lambda: None
            )
        return len(calls)

    def work(peers: processes.Peers) -> int:
        return encode(tmp_path / ("0" if shared else str(peers.rank)), peers)

    assert together(work) == ([3, 2] if shared else [5, 5])
    encode(tmp_path / "alone", ALONE)
    assert len(entries_in(tmp_path / "alone")) == 5
    for name in ["0"] if shared else ["0", "1"]:
        assert entries_in(tmp_path / name) == entries_in(tmp_path / "alone")


# --- models that are not needed


@pytest.mark.trains
def test_models_leave_memory_once_all_is_encoded_and_the_vae_comes_back_for_pictures(
    tiny_xl, photos_dir, tmp_path, monkeypatch, work
):
    alive: dict[str, list[weakref.ref]] = {"vae": [], "encoders": []}
    real_vae, real_encoders, real_unet = loading.load_vae, loading.load_encoders, loading.load_unet
    at_step: list[tuple[int, int]] = []

    def count() -> tuple[int, int]:
        return tuple(sum(ref() is not None for ref in alive[part]) for part in ("vae", "encoders"))  # type: ignore[return-value]

    def load_vae(*args):
        assert count() == (0, 0)
        vae = real_vae(*args)
        alive["vae"].append(weakref.ref(vae))
        return vae

    def load_encoders(*args):
        found = real_encoders(*args)
        alive["encoders"] += map(weakref.ref, found.values())
        return found

    def load_unet(*args):
        at_step.append(
            count()
        )  # without a garbage collection: they are gone before there is room for the UNet
        return real_unet(*args)

    monkeypatch.setattr(loading, "load_vae", load_vae)
    monkeypatch.setattr(loading, "load_encoders", load_encoders)
    monkeypatch.setattr(loading, "load_unet", load_unet)
    spy(monkeypatch, train.Training, "step", lambda *args: at_step.append(count()))
    validation = ["--validation_prompt", "a dog", "--num_validation_images", "1", "--validation_steps", "1"]
    gc.disable()
    try:
        run_train(tiny_xl, photos_dir, tmp_path, "--max_train_steps", "2", *validation)
    finally:
        gc.enable()
    assert at_step == [(0, 0)] * 3
    assert (len(alive["vae"]), len(alive["encoders"])) == (1 + 2, 2)  # for photos, and twice for pictures
    assert work.loaded[:3] == ["encoders", "vae", "unet"]


@pytest.mark.trains
def test_without_a_cache_the_vae_stays_and_a_trained_text_encoder_always(
    tiny_base, photos_dir, tmp_path, work
):
    for mode, kept in (("off", ["vae", "text"]), ("memory", ["text"])):
        held: list[list[str]] = []
        with pytest.MonkeyPatch.context() as patch:
            spy(
                patch,
                train.Training,
                "step",
                lambda self, *args, held=held: held.append(
                    [p for p in ("vae", "text") if getattr(self.parts, p)]
                ),
            )
            run_train(
                tiny_base,
                photos_dir,
                tmp_path / mode,
                "--max_train_steps",
                "1",
                "--train_text_encoder",
                "--cache_latents",
                mode,
            )
        assert held == [kept]


# --- pictures that were decoded before


def check(folder: Path, kept: Path, **limits: Any) -> photos.Folder:
    known = DecodeCache(kept)
    found = photos.check_folder(folder, FLAG, known=known, **limits)
    assert known.save() == []
    return found


@pytest.mark.trains
def test_pictures_are_decoded_once_and_hashed_at_each_start(tmp_path, work):
    folder = tiny.make_photos(tmp_path / "photos", 3)
    Image.new("L", (80, 70), 9).save(folder / "grey.png")
    first = check(folder, tmp_path)
    assert (len(work.decoded), first.notes) == (4, ["without colour: grey.png"])
    assert check(folder, tmp_path) == first == photos.check_folder(folder, FLAG)
    work.decoded.clear()
    (folder / "grey.png").rename(folder / "renamed.png")
    tiny.make_photos(folder, 1, seed=8)
    assert check(folder, tmp_path).notes == ["without colour: renamed.png"]
    assert work.decoded == ["photo-0.png"]


@pytest.mark.trains
def test_what_is_remembered_lifts_no_limit(tmp_path):
    """A picture that was good enough yesterday is refused today as if it had never been seen."""
    folder = tiny.make_photos(tmp_path / "photos", 1, (40, 300))
    assert len(check(folder, tmp_path, allow_odd_photos=True).photos) == 1
    limits: list[tuple[dict[str, Any], str]] = [
        ({}, "40 x 300 pixels is small"),
        ({"allow_odd_photos": True, "max_pixels": 5000}, "over 5,000 pixels"),
    ]
    for given, said in limits:
        messages = []
        for known in (DecodeCache(tmp_path), None):
            with pytest.raises(UserError, match=said) as refusal:
                photos.check_folder(folder, FLAG, known=known, **given)
            messages.append(str(refusal.value))
        assert messages[0] == messages[1]
    (folder / "photo-0.png").write_bytes((folder / "photo-0.png").read_bytes()[:-50])
    with pytest.raises(UserError, match="not a whole picture"):
        check(folder, tmp_path, allow_odd_photos=True)


@pytest.mark.trains
@pytest.mark.parametrize(
    "how", ["cut off", "one number", "no table", "another version of Pillow", "nonsense", "a folder"]
)
def test_a_damaged_memory_of_pictures_is_no_memory(tmp_path, work, monkeypatch, how):
    folder = tiny.make_photos(tmp_path / "photos", 2)
    first = check(folder, tmp_path)
    path = tmp_path / decode_cache.NAME
    text = path.read_text()
    if how == "another version of Pillow":
        monkeypatch.setattr(decode_cache.PIL, "__version__", "0.1")
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        content = {
            "cut off": text[:-20],
            "one number": text.replace("[64,64]", "[64,65]", 1),
            "no table": "[]",
            "nonsense": '{"layout": 1}',
        }
        path.write_text(content[how])
    work.decoded.clear()
    known = DecodeCache(tmp_path)
    assert photos.check_folder(folder, FLAG, known=known) == first
    assert len(work.decoded) == 2
    assert len(known.save()) == (how == "a folder")  # it cannot be written, which is said
