"""Configurations of bases: those of published bases pass, odd values are refused before a model is built."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from dreambooth.bases import configs, families, loading
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions
from tests.faults import base_config_faults

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
# As their authors published them, with fields of libraries of that time.
SD15_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL_UNET = SD21_UNET | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "upcast_attention": None,
}
SIMPLE = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
IF_UNET = SDXL_UNET | {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_time_embed_dim": None,
    "attention_head_dim": 64,
    "block_out_channels": [704, 1408, 2112, 2816],
    "cross_attention_dim": 2816,
    "cross_attention_norm": "group_norm",
    "down_block_types": ["ResnetDownsampleBlock2D", SIMPLE[0], SIMPLE[0], SIMPLE[0]],
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "in_channels": 3,
    "layers_per_block": 3,
    "mid_block_scale_factor": 1.41421356237,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.41421356237,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
    "time_embedding_act_fn": "gelu",
    "timestep_post_act": "gelu",
    "transformer_layers_per_block": 1,
    "up_block_types": [SIMPLE[1], SIMPLE[1], SIMPLE[1], "ResnetUpsampleBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": False,
}
SD_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PLAYGROUND_VAE = SD_VAE | {
    "force_upcast": True,
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "sample_size": 1024,
    "scaling_factor": 0.5,
    "shift_factor": None,
}
CLIP_L = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
CLIP_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "torch_dtype": "float16",
}
T5_XXL = {
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 32128,
}
PUBLISHED: dict[str, tuple[Any, dict[str, Any]]] = {
    "SD 1.5 unet": (UNet2DConditionModel, SD15_UNET),
    "SD 2.1 unet": (UNet2DConditionModel, SD21_UNET),
    "SDXL unet": (UNet2DConditionModel, SDXL_UNET),
    "IF unet": (UNet2DConditionModel, IF_UNET),
    "SD vae": (AutoencoderKL, SD_VAE),
    "Playground vae": (AutoencoderKL, PLAYGROUND_VAE),
    "CLIP L": (CLIPTextModel, CLIP_L),
    "CLIP G": (CLIPTextModelWithProjection, CLIP_G),
    "T5 XXL": (T5EncoderModel, T5_XXL),
}


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("what", PUBLISHED)
def test_configurations_of_published_bases_make_their_models(what: str, tmp_path: Path):
    kind, config = PUBLISHED[what]
    read = configs.read(kind, written(tmp_path, config))
    assert {field: read[field] for field in config if field in read} == {
        field: value for field, value in config.items() if field in read
    }
    with torch.device("meta"):
        model = configs.build(kind, read)
    assert sum(weight.numel() for weight in model.parameters()) > 50_000_000


ODD: list[tuple[str, str, Any]] = [
    ("SD 1.5 unet", "layers_per_block", 10**7),
    ("SD 1.5 unet", "layers_per_block", [10**5] * 4),
    ("SD 1.5 unet", "block_out_channels", [32] * 5000),
    ("SD 1.5 unet", "transformer_layers_per_block", [[1, 400], 400, 1, 1]),
    ("SD 1.5 unet", "block_out_channels", [10**12] * 4),
    ("SD 1.5 unet", "norm_eps", float("nan")),
    ("SD 1.5 unet", "mid_block_scale_factor", float("inf")),
    ("SD 1.5 unet", "dropout", 1e308),
    ("SD 1.5 unet", "sample_size", [64, 64]),
    ("SD 1.5 unet", "flip_sin_to_cos", 1),
    ("SD 1.5 unet", "act_fn", "x" * 201),
    ("SD 1.5 unet", "_class_name", "AutoencoderKL"),
    ("SD vae", "scaling_factor", None),
    ("SD vae", "scaling_factor", 0),
    ("SD vae", "layers_per_block", True),
    ("SD vae", "latents_std", [1.0, 2.0]),
    ("SD vae", "in_channels", 4),
    ("CLIP L", "vocab_size", 10**12),
    ("CLIP L", "num_hidden_layers", 10**7),
    ("CLIP L", "layer_norm_eps", -1e-5),
    ("CLIP L", "eos_token_id", [2]),
    ("T5 XXL", "num_layers", 513),
    ("T5 XXL", "dropout_rate", "0.1"),
    ("T5 XXL", "use_attention_mask", "yes"),
]


@pytest.mark.parametrize(("what", "field", "value"), ODD, ids=lambda value: ascii(value)[:30])
def test_an_odd_value_is_refused_with_file_field_and_value(what: str, field: str, value: Any, tmp_path: Path):
    kind, config = PUBLISHED[what]
    path = written(tmp_path, config | {field: value})
    with pytest.raises(UserError) as refusal:
        configs.read(kind, path)
    (message,) = str(refusal.value).splitlines()
    assert message.startswith(f"--pretrained_model_name_or_path: {path}: ")
    assert field == "_class_name" or field in message or field.startswith("latents")
    assert len(message) < 600


def test_fields_that_steer_a_library_do_not_reach_it(tmp_path: Path):
    odd = {"attn_implementation": "someone/kernel", "dtype": "x", "return_dict": False, "id2label": 3}
    read = configs.read(CLIPTextModel, written(tmp_path, CLIP_L | odd | {"quantization_config": {"bits": 4}}))
    assert not odd.keys() & read.keys()
    assert "quantization_config" not in read


def test_a_fuzzed_base_is_refused_or_loaded(tiny_base: Path, tiny_if: Path, tmp_path: Path):
    """A sample of `python -m tests.faults.base_config_faults`."""
    bases = {
        "sd": shutil.copytree(tiny_base, tmp_path / "sd"),
        "if": shutil.copytree(tiny_if, tmp_path / "if"),
    }
    drawn = random.Random(1).sample(list(base_config_faults.cases(bases)), 6)
    counts, wrong = base_config_faults.count(bases, drawn)
    assert not wrong
    assert counts["refused"]


@pytest.fixture
def spoilt(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of a base, to damage."""
    return shutil.copytree(tiny_base, tmp_path / "base")


WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def of_numbers(path: Path) -> None:
    save_file({key: tensor.to(torch.int32) for key, tensor in load_file(path).items()}, path)


DAMAGES = {
    "a folder": as_folder,
    "a pipe": as_pipe,
    "a loop of links": as_loop,
    "no bytes": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "whole numbers": of_numbers,
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_odd_weight_files_are_refused_with_their_name(spoilt: Path, name: str, damage: str):
    DAMAGES[damage](spoilt / name)
    with pytest.raises(UserError, match=name.split("/")[0]) as refusal:
        families.find(BaseOptions(str(spoilt)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["", "[]", "7", '{"model": 3}', '{"model": {"type": "BPE"}}', "{"])
def test_odd_tokenizer_files_are_refused_in_one_line(spoilt: Path, content: str):
    (spoilt / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer of .* cannot be loaded") as refusal:
        loading.load_tokenizers(families.find(BaseOptions(str(spoilt))))
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_with_more_tokens_than_its_encoder_is_refused(spoilt: Path):
    path = spoilt / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["id"] += 10**6
    content["model"]["vocab"] = {word: number + 10**6 for word, number in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"it has a token 10006.., and its text encoder has 640 tokens"):
        loading.load_tokenizers(families.find(BaseOptions(str(spoilt))))
