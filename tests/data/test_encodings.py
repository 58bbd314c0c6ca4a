"""What is encoded once: found again by its content, and made anew where anything it follows from has
changed."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train_dreambooth_lora as train
from dreambooth.bases import autoencoder, families, loading
from dreambooth.data import encodings, photos
from dreambooth.data.crops import Crops
from dreambooth.data.encoding_cache import EncodingCache
from dreambooth.files import digests as file_digests
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions
from dreambooth.runtime import processes
from tests import tiny
from tests.data.encoding import (
    ALONE,
    CAPTIONED,
    CPU,
    FLAG,
    ON_DISK,
    encoded_photo,
    entries_in,
    photo_of,
    spy,
    words,
)
from tests.running import digest, prior_words, run_train, together

ALL_PROMPTS = ["a photo of sks dog", "sks dog in the snow", "sks dog on a mat"]


WHOLE, SQUARE = (64, 96), (64, 64)


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
    assert (work.pictures, work.prompts, work.loaded) == ([], [], ["unet"])
    assert len(work.decoded) == len(list(mine.glob("*.png")))  # once each, for the thumbnails of the page
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
    spy(monkeypatch, file_digests, "_sha256", lambda path, size: read.append(path.parent.name))
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
    """Wherever crops are fixed; and random ones of a base in pixels, which has no grid. With class images,
    and prompts on disk. In the second run of a mode the class images are there."""
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
    for mode in ("disk", "memory", "off"):
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
    said = (
        "random crops were cut from latents and are cut from pixels: --cache_latents off cuts "
        "pixels, any other latents"
    )
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


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_crop_on_the_grid_is_a_slice_of_the_whole_pictures_latents(tiny_base, tmp_path, mirrored):
    """Of the picture cut to full latents; the crop that begins at a pixel begins at its eighth."""
    photo = photo_of(tmp_path, (101, 64))
    crops = Crops(64, "lanczos", False, 8)
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
        found = encoded.posterior(photo, crops, (left, 0), is_mirrored=mirrored)
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
            inside = crops.latent_shape[0] * grid
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
                cache, base, [(photo, False, crops) for photo in found], CPU, peers, lambda: None
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
    assert (len(alive["vae"]), len(alive["encoders"])) == (1 + 3, 2)  # photos, and pictures three times
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
                    [p for p in ("vae", "text") if getattr(self.frozen.parts, p)]
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
