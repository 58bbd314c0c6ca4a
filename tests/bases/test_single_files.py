"""A base in a single file is the same base as its folder: configurations, weights, tokenizers, pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.adapter_files import layer_names
from dreambooth.bases import configs, families, file_kinds, folders, loading, noise_levels, single_files
from dreambooth.bases.families import Base
from dreambooth.bases.weights import Weight
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions
from tests import single_files as made

CPU = torch.device("cpu")
LAYOUTS = pytest.mark.parametrize(
    ("kind", "kohya"), [*((kind, False) for kind in made.KINDS), ("sd1", True), ("sd2", True), ("sdxl", True)]
)
OF_KINDS = pytest.mark.parametrize("kind", made.KINDS)


@pytest.fixture
def bases(file_bases) -> dict[str, Path]:
    return file_bases


@pytest.fixture(autouse=True)
def shipped(file_configs, monkeypatch) -> Path:
    """The configurations that ship. Single files are of the shapes of the tiny bases here."""
    folder = single_files.CONFIGS
    monkeypatch.setattr(single_files, "CONFIGS", file_configs)
    return folder


def find(path: Path, **flags: Any) -> Base:
    return families.find(BaseOptions(str(path), **flags))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    tensors, others = one.state_dict(), other.state_dict()
    return tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in others)


def marks(kind: str) -> dict[str, Any]:
    """What makes a file say what its folder's scheduler says."""
    return {"metadata": {"modelspec.prediction_type": "v" if kind == "sd2_v" else "epsilon"}}


@LAYOUTS
def test_every_part_equals_that_of_the_folder(bases, tmp_path, kind, kohya):
    file = made.write(bases[kind], kind, tmp_path / "base.safetensors", kohya=kohya, **marks(kind))
    base, folder = find(file), find(bases[kind])
    for part in folder.family.kinds:
        models = [loading.load_part(each, part, torch.float32, CPU) for each in (base, folder)]
        assert same(*models), part
    assert layer_names.plain_layers(base.layers()) == layer_names.plain_layers(folder.layers())
    assert base.prediction_type == folder.prediction_type
    assert (base.kohya_family, base.default_resolution) == (folder.kohya_family, folder.default_resolution)


def test_tokenizers_equal_those_of_the_folder(bases, tmp_path):
    words = ["a photo of sks dog", "\u00c9t\u00e9, 3 caf\u00e9s"]
    file = made.write(bases["sdxl"], "sdxl", tmp_path / "base.safetensors")
    pairs = zip(
        loading.load_tokenizers(find(file)), loading.load_tokenizers(find(bases["sdxl"])), strict=True
    )
    for ours, theirs in pairs:
        assert ours(words, padding="max_length").input_ids == theirs(words, padding="max_length").input_ids
        assert ours.model_max_length == theirs.model_max_length == 77


def test_a_file_in_float16_equals_a_folder_in_float16(bases, tmp_path):
    file = made.write(bases["sd1"], "sd1", tmp_path / "base.safetensors", dtype=torch.float16)
    unet = loading.load_part(find(file), "unet", torch.float32, CPU)
    expected = load_file(bases["sd1"] / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(unet.state_dict()[key], value.half().float()) for key, value in expected.items())


def test_the_averaged_weights_are_a_variant(bases, tmp_path):
    """`v1-5-pruned.safetensors` has both: the plain ones are used, as by every program, or by the flag the
    averaged ones."""
    plain = load_file(made.write(bases["sd1"], "sd1", tmp_path / "plain.safetensors"))
    prefix = "model.diffusion_model."
    averaged = {key: value + 1 for key, value in plain.items() if key.startswith(prefix)}
    ema = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": value for key, value in averaged.items()
    }
    save_file(plain | ema, tmp_path / "both.safetensors")
    both = tmp_path / "both.safetensors"
    base, ema_base = find(both), find(both, variant="ema")
    units = [loading.load_part(each, "unet", torch.float32, CPU) for each in (base, ema_base)]
    assert same(units[0], loading.load_part(find(bases["sd1"]), "unet", torch.float32, CPU))
    assert torch.equal(units[1].conv_in.weight, units[0].conv_in.weight + 1)
    assert base.fingerprint() != ema_base.fingerprint()
    assert base.part_digest("unet") != ema_base.part_digest("unet")
    assert base.part_digest("vae") == ema_base.part_digest("vae")
    assert "of its two UNets the plain one is used" in base.notes()[0]
    with pytest.raises(
        UserError, match=r"^--variant fp16: .* can have the variant ema only; leave it out, or"
    ):
        find(both, variant="fp16")
    with pytest.raises(UserError, match=r"^--variant ema: .* and this one has not; leave it out$"):
        find(tmp_path / "plain.safetensors", variant="ema")


def test_the_fingerprint_is_that_of_the_weights(bases, tmp_path):
    file = made.write(bases["sd1"], "sd1", tmp_path / "base.safetensors")
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(file.read_bytes())
    other = made.write(bases["sd1"], "sd1", tmp_path / "other.safetensors", dtype=torch.float16)
    assert find(file).fingerprint() == find(moved).fingerprint() != find(other).fingerprint()
    assert find(file).part_digest("vae") == find(moved).part_digest("vae")


def test_the_file_is_hashed_once_and_ahead(bases, tmp_path):
    file = made.write(bases["sd1"], "sd1", tmp_path / "base.safetensors")
    vae = tmp_path / "vae.safetensors"
    vae.write_bytes(b"x")
    assert list(folders._weights_on_disk(BaseOptions(str(file)))) == [file]
    options = BaseOptions(str(file), pretrained_vae_model_name_or_path=str(vae))
    assert list(folders._weights_on_disk(options)) == [file, vae]
    assert {path for part in ("unet", "vae", "text_encoder") for path in find(file).weight_files(part)} == {
        file
    }


# ---- prediction and noise levels


def key(name: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(0)}


@pytest.mark.parametrize(
    ("kind", "more", "metadata", "said", "scheduler"),
    [
        ("sd1", {}, {}, "noise (it has no mark", {"prediction_type": "epsilon"}),
        ("sdxl", key("v_pred"), {}, "velocity (its key v_pred)", {"prediction_type": "v_prediction"}),
        (
            "sdxl",
            key("v_pred") | key("ztsnr"),
            {},
            "velocity (its key v_pred), zero terminal SNR (its key ztsnr)",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
        ("sdxl", key("ztsnr"), {}, "noise (it has no mark", {"prediction_type": "epsilon"}),
        ("sd1", {}, {"modelspec.prediction_type": "v"}, "velocity (its metadata)", {}),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "velocity (its metadata)", {}),
        (
            "sd1",
            {},
            {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
            "velocity (its metadata), zero terminal SNR (its metadata)",
            {"_class_name": "EulerDiscreteScheduler"},
        ),
    ],
)
def test_marks_are_read_and_said_in_one_line(bases, tmp_path, kind, more, metadata, said, scheduler):
    file = made.write(bases[kind], kind, tmp_path / "base.safetensors", more=more, metadata=metadata)
    base = find(file)
    (note,) = base.notes()
    name = file_kinds.NAMES[kind]
    assert note.startswith(f"{file}: a single file of {name}, predicts {said}")
    assert scheduler.items() <= base.config("scheduler").items()
    assert base.prediction_type == ("v_prediction" if "velocity" in said else "epsilon")


@pytest.mark.parametrize(("spread", "kind"), [(0.01, "sd2"), (0.2, "sd2_v")])
def test_stable_diffusion_2_without_marks_is_told_by_one_weight(bases, tmp_path, monkeypatch, spread, kind):
    key = f"{single_files.UNET}output_blocks.0.1.transformer_blocks.0.norm1.bias"  # of few
    monkeypatch.setattr(single_files, "_SPREAD_KEY", key)
    more = {single_files._SPREAD_KEY: torch.linspace(-2, 2, 64) * spread}
    file = made.write(bases["sd2"], "sd2", tmp_path / "base.safetensors", more=more)
    base = find(file)
    assert base.prediction_type == ("v_prediction" if kind == "sd2_v" else "epsilon")
    assert base.folder.name == kind
    assert "no mark; the spread of norm1.bias" in base.notes()[0]
    given = find(file, prediction_type="epsilon")
    assert (given.folder.name, given.prediction_type) == ("sd2", "epsilon")
    assert "(--prediction_type)" in given.notes()[0]


# ---- other VAEs


@pytest.mark.parametrize("layout", ["original", "original without prefix", "diffusers", "folder"])
def test_a_lacking_vae_is_taken_from_the_flag(bases, tmp_path, layout):
    file = made.write(bases["sd1"], "sd1", tmp_path / "base.safetensors", without=("vae",))
    with pytest.raises(
        UserError, match=r"has no VAE \(first_stage_model\.\*\); give one with --pretrained_vae"
    ):
        find(file)
    vae_folder = bases["sd1"] / "vae"
    vae = vae_folder if layout == "folder" else tmp_path / "vae.safetensors"
    state = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    if layout != "folder":
        config = folders.read_json(vae_folder / "config.json")
        original = made.original("sd1", "vae", state, config)
        bare = {key.removeprefix("first_stage_model."): value for key, value in original.items()}
        save_file({"original": original, "diffusers": state}.get(layout, bare), vae)
    base = find(file, pretrained_vae_model_name_or_path=str(vae))
    model = loading.load_part(base, "vae", torch.float32, CPU)
    assert same(model, loading.load_part(find(bases["sd1"]), "vae", torch.float32, CPU))
    of_folder = find(bases["sd1"], pretrained_vae_model_name_or_path=str(vae))
    assert same(model, loading.load_part(of_folder, "vae", torch.float32, CPU))


def test_a_vae_of_another_shape_is_refused(bases, tmp_path):
    file = made.write(bases["sd1"], "sd1", tmp_path / "base.safetensors")
    save_file({"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    for name, said in (
        ("odd", "its weights do not fit the VAE of the base: they lack"),
        ("none", "holds no VAE"),
        ("absent", "there is no file"),
    ):
        with pytest.raises(UserError, match=f"^--pretrained_vae_model_name_or_path: .*{said}"):
            find(file, pretrained_vae_model_name_or_path=str(tmp_path / f"{name}.safetensors"))


# ---- what is refused


def zeros(*names: str, shape: tuple[int, ...] = (1,)) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name in names}


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (zeros("lora_unet_down_blocks_0.lora_down.weight"), "is an adapter, not a base"),
        (zeros("unet.down_blocks.0.attn1.to_k.lora_A.weight"), "is an adapter, not a base"),
        (zeros("emb_params", shape=(2, 768)), "is an embedding of textual inversion"),
        (zeros("control_model.time_embed.0.weight"), "is a ControlNet"),
        (
            zeros("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight", shape=(4, 4)),
            "flux-schnell",
        ),
        (zeros("joint_blocks.37.x_block.mlp.fc1.weight"), "is a model of another family, sd35_large"),
        (zeros("edm_vpred.sigma_max"), "CosXL"),
        (zeros("edm_mean"), "is a Playground 2.5"),
        (zeros("first_stage_model.encoder.conv_in.weight"), "is a VAE alone, which --pretrained_vae"),
        (zeros("down_blocks.0.resnets.0.conv1.weight"), "is the UNet alone of a diffusers folder"),
        (zeros("input_blocks.0.0.weight"), "is a UNet alone"),
        (zeros("text_model.encoder.layers.0.mlp.fc1.weight"), "is a text encoder alone"),
        (zeros("conditioner.embedders.0.model.text_projection"), "is the refiner of Stable Diffusion XL"),
        (zeros("x"), "is no base that is known here"),
        (zeros(CONV_IN, shape=(8, 9, 3, 3)), "takes 9 channels and not 4, a base for inpainting"),
        (zeros(CONV_IN, shape=(8, 8, 3, 3)), "takes 8 channels and not 4, a base for editing"),
        (zeros(CONV_IN, shape=(8, 5, 3, 3)), "takes 5 channels and not 4, a base for depth"),
        (zeros(CONV_IN, shape=(8, 4, 3, 3)), "is no base that is known here"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, tensors, said):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as error:
        find(tmp_path / "x.safetensors")
    message = str(error.value)
    assert message.startswith(f"--pretrained_model_name_or_path: {tmp_path}/x.safetensors ")
    assert said in message
    assert "\n" not in message


@OF_KINDS
def test_a_file_without_text_encoder_is_refused(bases, tmp_path, kind):
    file = made.write(bases[kind], kind, tmp_path / "x.safetensors", without=("text_encoder",))
    with pytest.raises(
        UserError, match=rf"is a {file_kinds.NAMES[kind]} without text_encoder \(.*; take a file"
    ):
        find(file)


def test_a_unet_with_weights_of_another_model_is_refused(bases, tmp_path):
    more = zeros("model.diffusion_model.input_blocks.1.9.alpha")
    file = made.write(bases["sd1"], "sd1", tmp_path / "x.safetensors", more=more)
    with pytest.raises(
        UserError, match=r"Stable Diffusion 1\.x has no model\.diffusion_model\.input_blocks\.1\.9"
    ):
        find(file)


def test_a_file_of_another_shape_is_refused_with_its_first_weight(bases, tmp_path, shipped, monkeypatch):
    """As SSD-1B, an XL with fewer layers."""
    file = made.write(bases["sdxl"], "sdxl", tmp_path / "x.safetensors")
    monkeypatch.setattr(single_files, "CONFIGS", shipped)
    with pytest.raises(UserError) as error:
        find(file)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert all("do not fit Stable Diffusion XL: they" in line for line in lines)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt", "SAFETENSORS"])
def test_the_name_of_a_file_is_never_asked_of_a_hub(tmp_path, monkeypatch, ending):
    def ask(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(families, "_download", ask)
    monkeypatch.setattr(families.huggingface_hub, "snapshot_download", ask)
    with pytest.raises(UserError, match=r"there is no file .*; such a name is not looked for on the hub"):
        find(Path(f"someone/model.{ending}"))


def test_files_that_can_carry_code_are_refused(tmp_path):
    for name, content in (
        ("x.ckpt", b"PK\x03\x04" + b"x" * 90),
        ("x.safetensors", b"PK\x03\x04" + b"x" * 90),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="can carry code"):
            find(tmp_path / name)


# ---- full size


def full_size(folder: Path) -> tuple[families.Family, dict[str, dict[str, torch.Tensor]]]:
    """(family, the weights of each part by key, without data) of the published base in `folder`."""
    family = families.FAMILIES[folders.read_json(folder / "model_index.json")["_class_name"]]
    parts = {}
    for part, kind in family.kinds.items():
        with torch.device("meta"):
            model = configs.build(kind, configs.read(kind, folder / part / "config.json"))
        parts[part] = model.state_dict()
    return family, parts


# Tensors and numbers of the published files, without position_ids, logit_scale and EMA.
PUBLISHED = {
    "sd1": (1130, 1_066_235_307),
    "sd2": (1214, 1_289_952_427),
    "sd2_v": (1214, 1_289_952_427),
    "sdxl": (2513, 3_468_837_867),
}


@OF_KINDS
def test_shipped_configurations_are_those_of_full_size_files(shipped, kind):
    """Every key of a full-size file becomes the weight of a full-size model."""
    folder = shipped / kind
    family, parts = full_size(folder)
    count = numbers = 0
    shapes: dict[str, tuple[int, ...]] = {}
    for part, state in parts.items():
        config = folders.read_json(folder / part / "config.json")
        original = made.original(kind, part, state, config)
        stored = {
            key: Weight(Path("x"), key, "F16", 0, tuple(value.shape)) for key, value in original.items()
        }
        prefix = {"unet": file_kinds.UNET, "vae": file_kinds.VAE, **file_kinds.TEXT[kind]}[part]
        converted = single_files._converted(Path("x"), prefix, stored, config)
        assert {made.plain(key): weight.shape for key, weight in converted.items()} == {
            made.plain(key): tuple(value.shape) for key, value in state.items()
        }
        count += len(original)
        numbers += sum(value.numel() for value in original.values())
        shapes |= {key: weight.shape for key, weight in stored.items()}
    assert (count, numbers) == PUBLISHED[kind]
    assert file_kinds.of("x", shapes) == kind.removesuffix("_v")
    index = folders.read_json(folder / "model_index.json")
    folders.check(folder, kind, index, {p: k.__name__ for p, k in family.kinds.items()}, family.folders)
    noise_levels.check(folder, kind, index)
    kinds = {part: configs.read(each, folder / part / "config.json") for part, each in family.kinds.items()}
    assert configs._misfits(kinds, kind) == []


def test_the_tokenizers_are_clips(shipped):
    """Tokens of OpenAI's CLIP: begin, words, end, and the padding of each version."""
    expected = [49406, 320, 1125, 539, 48136, 1929, 49407]
    for kind, name, padding in (
        ("sd1", "tokenizer", 49407),
        ("sd2", "tokenizer", 0),
        ("sdxl", "tokenizer_2", 0),
    ):
        tokenizer = single_files.SingleFile(Path("x"), kind, True, False, {}, "").tokenizer(name)
        tokens = tokenizer("a photo of sks dog", padding="max_length").input_ids
        assert tokens == expected + [padding] * (77 - len(expected))
