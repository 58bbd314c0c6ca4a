"""Judges are loaded from the formats of their models, embed as the models do, and are refused with one
message."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, ViTModel

from dreambooth.evaluation import judges
from dreambooth.io.errors import UserError
from tests import tiny_judges


def pictures(count: int = 3, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def dino(tiny_dino) -> judges.Judge:
    return judges.load(judges.find("dino", str(tiny_dino)))


@pytest.fixture(scope="module")
def clip(tiny_clip) -> judges.Judge:
    return judges.load(judges.find("clip", str(tiny_clip)))


def unit(rows: torch.Tensor) -> np.ndarray:
    return (rows / rows.norm(dim=-1, keepdim=True)).numpy()


@torch.no_grad()
def test_dino_is_the_class_token_of_the_cropped_picture(tiny_dino, dino):
    """Resized to 32, cropped to 28: as 256 and 224 of the model for which the protocol was written."""
    images = pictures(size=(80, 64))
    cut = [image.resize((40, 32), Image.Resampling.BICUBIC).crop((6, 2, 34, 30)) for image in images]
    values = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in cut])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = (values - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = unit(ViTModel.from_pretrained(tiny_dino)(values).last_hidden_state[:, 0])
    rows = dino.embed_images(images)
    assert (rows.shape, rows.dtype) == ((3, dino.width), np.float32)
    assert rows == pytest.approx(expected, abs=1e-5)


def test_the_squashed_picture_is_another_one(tiny_dino, dino):
    squashed = judges.load(judges.find("dino", str(tiny_dino)), "squash")
    assert "28 x 28" in squashed.settings["transform"] != dino.settings["transform"]
    assert not np.allclose(squashed.embed_images(pictures()), dino.embed_images(pictures()), atol=1e-3)


@torch.no_grad()
def test_clip_embeds_as_its_model_and_processor_do(tiny_clip, clip):
    model = CLIPModel.from_pretrained(tiny_clip)
    values = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images=pictures(), return_tensors="pt")
    texts = ["a dog in the snow", "a cat"]
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)(texts, padding=True, return_tensors="pt")
    outputs = model(**values, input_ids=tokens.input_ids)
    assert clip.embed_images(pictures()) == pytest.approx(outputs.image_embeds.numpy(), abs=1e-5)
    assert clip.embed_texts(texts) == pytest.approx(outputs.text_embeds.numpy(), abs=1e-5)


def test_features_of_both_forms_are_read(clip):
    """transformers 5 returns an output with `pooler_output`, earlier versions the tensor."""
    tensor = torch.ones(1, 3)
    assert judges._pooled(tensor) is tensor
    assert judges._pooled(type("Output", (), {"pooler_output": tensor})) is tensor


def test_long_texts_are_cut(clip):
    assert clip.embed_texts(["dog " * 200]) == pytest.approx(clip.embed_texts(["dog " * 75]), abs=1e-6)


def test_an_embedding_depends_on_nothing_but_its_picture(dino, clip):
    images = pictures()
    for judge in (dino, clip):
        together = judge.embed_images(images)
        apart = np.concatenate([judge.embed_images([image]) for image in images])
        assert np.array_equal(together, apart)
        assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-6)
        assert judge.embed_images([]).shape == (0, judge.width)


def test_failed_pictures_have_a_row_of_zeros(dino):
    rows = dino.embed_images([Image.new("RGB", (64, 64)), None, *pictures(1)])
    assert (np.abs(rows).sum(axis=1) > 0).tolist() == [False, False, True]


def test_the_settings_name_the_weights(tiny_dino, dino):
    digest = hashlib.sha256((tiny_dino / "model.safetensors").read_bytes()).hexdigest()
    assert dino.settings["sha256"] == digest
    assert {"model", "transform", "dtype", "versions"} <= dino.settings.keys()
    assert judges.find("dino", f"{tiny_dino}@sha256:{digest.upper()}").sha256 == digest


def test_weights_in_older_and_split_files_give_the_same_embeddings(tiny_dino, dino, tmp_path):
    model = ViTModel.from_pretrained(tiny_dino)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(judges.find("dino", str(tmp_path / "shards")).weights) > 1
    shutil.copytree(tiny_dino, tmp_path / "older")
    (tmp_path / "older" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "older" / "pytorch_model.bin")
    for name in ("shards", "older"):
        judge = judges.load(judges.find("dino", str(tmp_path / name)))
        assert np.array_equal(judge.embed_images(pictures()), dino.embed_images(pictures()))


# --- refused


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def refusal(kind: judges.Kind, given: object) -> str:
    """The one line with which a judge is refused before it is loaded."""
    with pytest.raises(UserError) as error:
        judges.find(kind, str(given))
    message = str(error.value)
    assert message.startswith(f"{judges.FLAGS[kind]}: ")
    assert "\n" not in message
    return message


def test_another_model_is_refused(tiny_dino, tiny_clip, tiny_base, tmp_path):
    assert 'holds a clip; it must be a model of the type "vit"' in refusal("dino", tiny_clip)
    assert 'holds a vit; it must be a model of the type "clip"' in refusal("clip", tiny_dino)
    assert "is a diffusers pipeline" in refusal("dino", tiny_base)
    assert "holds a UNet2DConditionModel" in refusal("clip", tiny_base / "unet")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refusal("dino", tmp_path)


def test_a_missing_judge_is_refused(tmp_path):
    for name in (tmp_path / "nothing", "nobody/nothing"):
        assert "there is no folder" in refusal("dino", name)
    with pytest.raises(UserError, match="it is no hub id"):
        judges.check_given("clip", str(tmp_path / "nothing"))
    judges.check_given("clip", "nobody/nothing")  # the form of a hub id: nothing is asked
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal("dino", tmp_path / "file")


def test_an_incomplete_judge_is_refused(tiny_clip, tmp_path):
    bare = copied(tiny_clip, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    (bare / "tokenizer.json").unlink()
    assert "lacks preprocessor_config.json, tokenizer.json" in refusal("clip", bare)
    (bare := copied(tiny_clip, tmp_path / "weights")).joinpath("model.safetensors").unlink()
    assert "has no weights" in refusal("clip", bare)


def test_other_weights_than_the_pinned_ones_are_refused(tiny_dino):
    assert f"not {'0' * 64}" in refusal("dino", f"{tiny_dino}@sha256:{'0' * 64}")
    assert "64 hexadecimal digits" in refusal("dino", f"{tiny_dino}@sha256:abc")


def test_shards_outside_of_the_folder_are_refused(tiny_dino, tmp_path):
    odd = copied(tiny_dino, tmp_path / "odd")
    (odd / "model.safetensors").rename(odd / "model.safetensors.index.json")
    for name in ("../weights.safetensors", "missing.safetensors"):
        (odd / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        assert f"names {name}" in refusal("dino", odd)


def test_damaged_weights_are_refused(tiny_dino, tmp_path):
    cut, other = copied(tiny_dino, tmp_path / "cut"), tiny_judges.build_dino(tmp_path / "other", width=32)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^--judge_dino: ") as error:
        judges.load(judges.find("dino", str(cut)))
    assert "\n" not in str(error.value)
    shutil.copy(tiny_dino / "model.safetensors", other)
    with pytest.raises(UserError, match=r"^--judge_dino: "):
        judges.load(judges.find("dino", str(other)))


@pytest.mark.parametrize("kind", ["dino", "clip"])
@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_weights_that_embed_nothing_are_refused(kind, factor, tiny_dino, tiny_clip, tmp_path):
    spoiled = copied(tiny_dino if kind == "dino" else tiny_clip, tmp_path / "spoiled")
    weights = spoiled / "model.safetensors"
    tensors = {name: tensor * factor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=rf"^--judge_{kind}: .*spoiled cannot be loaded: .*0 or not finite"):
        judges.load(judges.find(kind, str(spoiled)))


def test_a_preprocessor_of_another_model_is_refused(tiny_clip, tmp_path):
    other = copied(tiny_clip, tmp_path / "other")
    (other / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^--judge_clip: .*other cannot be loaded: .*image size"):
        judges.load(judges.find("clip", str(other)))
