"""Masks: read and checked before any model is loaded, moved with their photos, and weighting the loss."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_dreambooth_lora as train
from dreambooth.data import batches, masks, photos
from dreambooth.data.buckets import Buckets
from dreambooth.data.crops import Crops
from dreambooth.data.masks import LatentMasks
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.masks import MaskOptions
from dreambooth.options.training import TrainOptions
from dreambooth.training import base_targets, objectives
from dreambooth.training.objectives import Task
from tests import tiny
from tests.running import digest, main_on_two_processes, metrics, run_train, train_words


def make_masks(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Save a mask for each name: its left half is white."""
    folder.mkdir(exist_ok=True)
    for name, (width, height) in sizes.items():
        image = Image.new("L", (width, height))
        image.paste(255, (0, 0, width // 2, height))
        image.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    return tiny.make_odd_photos(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def odd_masks(odd, tmp_path_factory) -> Path:
    sizes = {path.name: Image.open(path).size for path in odd.iterdir()}
    return make_masks(tmp_path_factory.mktemp("masks"), sizes)


@pytest.fixture
def mine(photos_dir, tmp_path) -> tuple[Path, Path]:
    """(photos, their masks)"""
    names = {path.name: (64, 64) for path in photos_dir.glob("*.png")}
    return Path(shutil.copytree(photos_dir, tmp_path / "mine")), make_masks(tmp_path / "masks", names)


def checked(photo_folder: Path, options: MaskOptions) -> dict[str, masks.Mask]:
    pictures = photos.check_folder(photo_folder, "--instance_data_dir").photos
    return masks.check(options, pictures, follow_symlinks=False)


# --- what is refused


def spoil(folder: Path, how: str) -> None:
    path = folder / "photo-1.png"
    if how == "missing":
        path.unlink()
    elif how == "several":
        Image.open(path).save(folder / "photo-1.bmp")
    elif how == "another size":
        Image.new("L", (64, 32), 255).save(path)
    elif how == "empty":
        Image.new("L", (64, 64)).save(path)
    elif how == "zeros and ones":
        Image.new("L", (64, 64), 1).save(path)
    elif how == "floats":
        path.unlink()
        Image.new("F", (64, 64), 1.0).save(path.with_suffix(".tif"))
    elif how == "transparent":
        Image.new("LA", (64, 64), (255, 0)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "there is no mask; its name must be that of the photo, as photo-1.png"),
        ("several", "there are several masks, photo-1.bmp, photo-1.png; keep one of them"),
        (
            "another size",
            "the mask has 64 x 32 pixels and the photo, held upright, 64 x 64; save the mask in the size of "
            "the photo",
        ),
        ("empty", "the mask is black everywhere; the subject must be white"),
        ("zeros and ones", "the mask is dark: its brightest pixel has 1 of 255; the subject must be white"),
        ("floats", "the mask is a picture of mode F, which has no known white"),
        ("transparent", "the mask has transparent parts; save it in black and white, without transparency"),
        ("damaged", "the mask is not a whole picture"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_with_its_name(mine, how, message):
    photo_folder, folder = mine
    spoil(folder, how)
    with pytest.raises(UserError) as refusal:
        checked(photo_folder, MaskOptions(mask_dir=str(folder)))
    assert str(refusal.value).startswith(f"--mask_dir: photo-1.png: {message}")


def test_photos_without_transparency_have_no_alpha_mask(mine):
    with pytest.raises(UserError, match=r"--alpha_mask: photo-0\.png: the photo has no transparent part"):
        checked(mine[0], MaskOptions(alpha_mask=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mask_dir m --alpha_mask", "--mask_dir and --alpha_mask both give the masks of photos"),
        ("--mask_dir photos", "--mask_dir and --instance_data_dir must be two folders, got photos for both"),
        ("--unmasked_weight 0.5", "--unmasked_weight: for photos with masks"),
        ("--unmasked_target base", "--unmasked_target: for photos with masks"),
        ("--alpha_mask --unmasked_target base --unmasked_weight 0", "has no effect with --unmasked_weight 0"),
        ("--alpha_mask --unmasked_weight 2", "--unmasked_weight must be at most 1, got 2.0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(TrainOptions, "", train_words(Path("base"), Path("photos"), Path("out"), *words.split()))
    assert message in capsys.readouterr().err


# --- what is read


def test_the_share_of_the_photos_is_reported(mine):
    photo_folder, folder = mine
    Image.new("L", (64, 64), 255).save(folder / "photo-2.png")
    options = MaskOptions(mask_dir=str(folder), unmasked_weight=0.25)
    assert masks.notes(checked(photo_folder, options), options) == [
        "masks of 3 photos cover 67% of their area, from 50% (photo-0.png) to 100% (photo-2.png); the loss "
        "outside has the weight 0.25",
        "the masks of photo-2.png cover the full photo",
    ]


def test_the_alpha_mask_is_the_opacity_of_the_upright_photo(tmp_path):
    """The photo is stored lying on its side."""
    image = Image.new("RGBA", (96, 64), "red")
    image.putalpha(Image.new("L", (96, 64), 0))
    image.paste((0, 255, 0, 255), (0, 0, 48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: its left becomes its top
    image.save(tmp_path / "photo.png", exif=exif)
    mask = masks.load(checked(tmp_path, MaskOptions(alpha_mask=True))["photo.png"])
    expected = np.zeros((96, 64), np.uint8)
    expected[:48] = 255
    assert np.array_equal(np.asarray(mask), expected)


def test_a_mask_moves_with_its_photo(tmp_path):
    """Through resizing, mirroring, random crops and buckets: here a photo is its own mask."""
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(96, 64), (70, 101), (64, 64)]):
        grey = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
        grey.convert("RGB").save(tmp_path / f"{number}.png")
    pictures = photos.check_folder(tmp_path, "--instance_data_dir").photos
    options = MaskOptions(mask_dir=str(tmp_path))
    source = batches.Source("instance", pictures, [""] * 3, random_flip=True)
    crops = Crops(64, "bilinear", center_crop=False, stride=8)
    dataset = batches.PhotoRows([source], 1, crops, Buckets((48, 64), 16), batch_size=2)
    latent_masks = LatentMasks(dataset, checked(tmp_path, options), options)
    seen = set()
    for batch in range(12):
        rows = range(2 * batch, 2 * batch + 2)
        pixels = torch.stack([dataset[row][0] for row in rows]).mean(dim=1, keepdim=True) / 2 + 0.5
        expected = F.avg_pool2d(pixels, 8)
        height, width = expected.shape[2:]
        assert torch.allclose(latent_masks.of_rows(rows, (height, width)), expected, atol=1e-5)
        seen |= {(dataset.photo(source, row), dataset.is_mirrored(source, row)) for row in rows}
    assert seen == set(itertools.product(range(3), (False, True)))


# --- the loss


def task_of(rows: int) -> Task:
    draw = torch.Generator().manual_seed(0)
    latents = [torch.randn(rows, 4, 4, 4, generator=draw) for _ in range(3)]
    return Task(latents[0], latents[1], torch.arange(rows), latents[2], torch.rand(rows, generator=draw))


def test_the_loss_is_the_mean_over_the_area_of_the_subject():
    """Of three masked rows, with weights of rows: a half, a part in grey, and nothing at all. A fourth row is
    one of a class image, with the plain loss."""
    task = task_of(4)
    assert task.weights is not None
    inside = torch.zeros(3, 1, 4, 4)
    inside[0, :, :, :2], inside[1, :, 1, 1] = 1, 0.5
    errors = torch.rand(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    losses = objectives.row_losses(errors, objectives.with_masks(task, inside, 0.0).weights)
    # a mean weight of 1/32 counts as 1/20
    expected = [errors[0, :, :, :2].mean(), errors[1, :, 1, 1].mean() / 32 * 20, 0.0, errors[3].mean()]
    assert torch.allclose(losses, torch.tensor(expected) * task.weights)
    weighted = objectives.row_losses(errors, objectives.with_masks(task, inside, 0.5).weights)[0]
    means = errors[0, :, :, :2].mean(), errors[0, :, :, 2:].mean()
    assert torch.allclose(weighted, (means[0] + 0.5 * means[1]) / 1.5 * task.weights[0])


@pytest.mark.parametrize("base_rows", [2, 4])
def test_outside_the_subject_the_target_is_the_bases_prediction(base_rows):
    """With class rows whose targets are the base's predictions, or their own."""
    task, calls = task_of(4), []

    def predict(rows: Task, prompt_embeds: object, time_ids: object) -> torch.Tensor:
        calls.append(len(rows.target))
        return 2 * rows.model_input

    inside = torch.zeros(2, 1, 4, 4)
    inside[:, :, :, :2] = 1
    inputs = {"base_prompt_embeds": torch.zeros(base_rows, 77, 8), "inside": inside}
    target = base_targets.of_task(task, inputs, predict, torch.no_grad)
    assert calls == [base_rows]
    assert torch.equal(target[:2, :, :, :2], task.target[:2, :, :, :2])
    assert torch.equal(target[:2, :, :, 2:], 2 * task.model_input[:2, :, :, 2:])
    assert torch.equal(target[2:], 2 * task.model_input[2:] if base_rows == 4 else task.target[2:])


# --- runs


@pytest.mark.trains
def test_two_processes_and_a_resumed_run_learn_what_one_learns(tiny_xl, odd, odd_masks, tmp_path, capsys):
    """With buckets, mirrored photos, and both kinds of the base's own predictions as targets."""
    words = ["--mask_dir", str(odd_masks), "--unmasked_target", "base", "--buckets", "--random_flip"]
    words += ["--with_prior_preservation", "--prior_source", "base", "--class_prompt", "a photo of dog"]
    words += ["--max_train_steps", "3", "--checkpointing_steps", "1", "--train_text_encoder"]
    words += ["--train_text_encoder_frac", "0.67"]
    alone = [*words, "--gradient_accumulation_steps", "2"]
    one = run_train(tiny_xl, odd, tmp_path / "one", *alone)
    assert "note: masks of 5 photos cover 50% of their area" in capsys.readouterr().out
    resume = ["--resume_from_checkpoint", str(tmp_path / "one" / "checkpoint-1")]
    resumed = run_train(tiny_xl, odd, tmp_path / "resumed", *alone, *resume)
    two = parse(TrainOptions, "", train_words(tiny_xl, odd, tmp_path / "two", *words))
    main_on_two_processes(train.main, two)
    assert digest(one) == digest(resumed) == digest(tmp_path / "two" / one.name)


@pytest.mark.trains
def test_masks_change_the_loss_and_no_encoding_and_their_change_is_noticed(tiny_base, mine, tmp_path):
    photo_folder, folder = mine
    common = ["--max_train_steps", "1", "--checkpointing_steps", "1", "--cache_latents", "disk"]
    common += ["--encoded_dir", str(tmp_path / "kept")]
    losses = []
    for name, words in (
        ("without", []),
        ("everywhere", ["--mask_dir", str(folder), "--unmasked_weight", "1"]),
        ("masked", ["--mask_dir", str(folder)]),
    ):
        run_train(tiny_base, photo_folder, tmp_path / name, *common, *words)
        losses.append(metrics(tmp_path / name)[0]["loss"])
        entries = sorted(path.name for path in (tmp_path / "kept").iterdir())
        if name == "without":
            before = entries
        assert entries == before
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-3
    Image.new("L", (64, 64), 255).save(folder / "photo-0.png")
    resume = ["--mask_dir", str(folder), "--resume_from_checkpoint", "latest", "--max_train_steps", "2"]
    with pytest.raises(UserError, match="1 mask pictures changed"):
        run_train(tiny_base, photo_folder, tmp_path / "masked", *common, *resume)
    with pytest.raises(UserError, match="3 mask pictures removed"):
        run_train(tiny_base, photo_folder, tmp_path / "masked", *common, *resume[2:])


@pytest.mark.trains
def test_subjects_have_masks_of_their_own_or_none(tiny_base, mine, tmp_path, monkeypatch):
    photo_folder, folder = mine
    rows = [
        {"photos": str(photo_folder), "masks": str(folder), "prompt": "sks dog", "class_prompt": "dog"},
        {
            "photos": str(tiny.make_photos(tmp_path / "cat", 2, seed=5)),
            "prompt": "cat",
            "class_prompt": "cat",
        },
    ]
    table = tmp_path / "subjects.yaml"
    table.write_text(json.dumps(rows))
    covered: list[tuple[str, float]] = []
    of_rows = LatentMasks.of_rows

    def seen(self: LatentMasks, rows: range, shape: tuple[int, int]) -> torch.Tensor:
        inside = of_rows(self, rows, shape)
        source = self.dataset.sources[0]
        covered.append(
            (source.photos[self.dataset.photo(source, rows[0])].path.parent.name, inside.mean().item())
        )
        return inside

    monkeypatch.setattr(LatentMasks, "of_rows", seen)
    words = train_words(tiny_base, photo_folder, tmp_path / "out", "--subjects", str(table))
    for flag in ("--instance_data_dir", "--instance_prompt"):
        del words[words.index(flag) : words.index(flag) + 2]
    train.main(parse(TrainOptions, "", [*words, "--max_train_steps", "4", "--unmasked_target", "base"]))
    assert sorted(set(covered)) == [("cat", 1.0), ("mine", 0.5)]
    del rows[0]["masks"]
    table.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="--unmasked_target: for photos with masks; give `masks` in a row"):
        train.main(parse(TrainOptions, "", [*words, "--unmasked_target", "base"]))
