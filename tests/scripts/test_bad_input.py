"""Bad input of every kind meets one clear message and exit status 2, before a model is loaded and before
anything is written."""

import dataclasses
import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load, save

import infer
import train_dreambooth_lora as train
from dreambooth.adapter_files import native, reading
from dreambooth.adapters import inject
from dreambooth.bases import families, loading, pipelines
from dreambooth.data import class_images, photos
from dreambooth.data.crops import Crops
from dreambooth.files import pictures, safetensors_files
from dreambooth.io.errors import UserError
from dreambooth.options import training
from dreambooth.options.command_line import fail, parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import BaseOptions, TrainOptions
from tests import tiny
from tests.data.bad_pictures import BAD as BAD_PICTURES
from tests.data.bad_pictures import encoded, noise

ESCAPE = "\x1b[2J"


@dataclasses.dataclass(frozen=True)
class Bad:
    """One kind of bad input: `make` spoils what it is given and returns words to add to the command line; the
    message has `said` in it."""

    group: str
    make: Callable[..., Any]
    said: tuple[str, ...]


BAD_INPUTS: dict[str, Bad] = {}
TALLY: Counter[str] = Counter()  # for the report on faults: files fuzzed, payloads executed


def bad(group: str, what: str, make: Callable[..., Any], *said: str) -> None:
    assert f"{group}: {what}" not in BAD_INPUTS
    BAD_INPUTS[f"{group}: {what}"] = Bad(group, make, said)


def rows(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", [row for row, case in BAD_INPUTS.items() if case.group == group])


# --- flags: (words) -> refused by `parse`


def flags(what: str, words: list[str], *said: str) -> None:
    bad("flags", what, lambda folder: words, *said)


flags("unknown", ["--rnk", "3"], "--rnk", "--rank")
flags("abbreviated", ["--max_train", "7"], "--max_train", "--max_train_steps")
flags("word without a flag", ["stray"], "stray")
flags("no value", ["--rank"], "--rank")
flags("text for a number", ["--rank", "many"], "--rank", "'many'")
flags("fraction for a count", ["--max_train_steps", "1.5"], "--max_train_steps", "'1.5'")
flags("number of 6000 digits", ["--rank", "9" * 6000], "--rank")
flags("no such choice", ["--lr_scheduler", "sine"], "'sine'", "cosine")
flags("not a number", ["--learning_rate", "nan"], "--learning_rate must be at least 0, got nan")
flags("infinite", ["--learning_rate", "inf"], "--learning_rate must be at most 1000000000, got inf")
flags("negative", ["--max_grad_norm", "-1"], "--max_grad_norm must be at least 0, got -1.0")
flags("no steps", ["--max_train_steps", "0"], "--max_train_steps must be at least 1, got 0")
flags("rank 0", ["--rank", "0"], "--rank must be at least 1, got 0")
flags("rank past every layer", ["--rank", "100000"], "--rank must be at most 1024, got 100000")
flags(
    "measurements without a class prompt", ["--meter_steps", "5"], "--meter_steps compares", "--class_prompt"
)
flags("a negative holdout", ["--holdout", "-1"], "--holdout must be at least 0, got -1")
flags(
    "two kinds of held-out photos",
    ["--holdout", "1", "--holdout_data_dir", "more"],
    "--holdout keeps instance photos back and --holdout_data_dir names others",
)
flags("share over 1", ["--lora_dropout", "1"], "--lora_dropout must be under 1, got 1.0")
flags(
    "resolution between pixels of latents",
    ["--resolution", "100"],
    "--resolution must be a positive multiple of 8, got 100",
)
flags("resolution past all memory", ["--resolution", "80000"], "--resolution must be at most 8192, got 80000")
flags(
    "limit on pixels past Pillow's",
    ["--max_image_pixels", "9000000000"],
    "--max_image_pixels must be at most 1000000000, got 9000000000",
)
flags(
    "empty name of the base",
    ["--pretrained_model_name_or_path", ""],
    "--pretrained_model_name_or_path must be the name of a file or folder, got ''",
)
flags(
    "empty name of the photos",
    ["--instance_data_dir", " "],
    "--instance_data_dir must be the name of a file or folder, got ' '",
)
flags(
    "empty name of an adapter",
    ["--init_adapter", ""],
    "--init_adapter must be the name of a file or folder, got ''",
)
flags("path for a variant", ["--variant", "../fp16"], "--variant must be letters and digits", "'../fp16'")
flags("blank prompt", ["--instance_prompt", " \n"], "--instance_prompt must not be empty")
flags("blank validation prompt", ["--validation_prompt", ""], "--validation_prompt must not be empty")
flags("prior without a folder", ["--with_prior_preservation", "--class_prompt", "dog"], "--class_data_dir")
flags("prior without a prompt", ["--with_prior_preservation", "--class_data_dir", "d"], "--class_prompt")
flags(
    "photos and class images in one folder",
    ["--with_prior_preservation", "--class_prompt", "dog", "--class_data_dir", "photos/."],
    "--class_data_dir and --instance_data_dir must be two folders, got photos/.",
)
flags(
    "text encoder trained and freed",
    ["--train_text_encoder", "--pre_compute_text_embeddings"],
    "--train_text_encoder cannot be used with",
)
flags(
    "second stage",
    ["--class_labels_conditioning", "timesteps"],
    "--class_labels_conditioning is for second-stage",
)
flags("upload", ["--push_to_hub"], "--push_to_hub needs the hub, but HF_HUB_OFFLINE")
flags(
    "several at once",
    [
        "--rank",
        "0",
        "--resolution",
        "30",
        "--learning_rate",
        "nan",
        "--train_text_encoder",
        "--pre_compute_text_embeddings",
        "--adam_beta1",
        "2",
    ],
    "--rank must be at least 1, got 0",
    "--resolution must be a positive multiple of 8, got 30",
    "--learning_rate must be at least 0, got nan",
    "--train_text_encoder cannot be used with --pre_compute_text_embeddings",
    "--adam_beta1 must be under 1, got 2.0",
)
flags("escapes in a flag", [f"--rank{ESCAPE}", "3"], r"--rank\x1b[2J")
flags("escapes in a value", ["--lr_scheduler", f"{ESCAPE}sine"], r"\x1b[2Jsine")


def config(what: str, content: bytes, *said: str) -> None:
    def make(folder: Path) -> list[str]:
        (folder / "flags.yaml").write_bytes(content)
        return ["--config", str(folder / "flags.yaml")]

    bad("flags", f"config, {what}", make, *said)


config(
    "of an unknown flag",
    b"lerning_rate: 1\n",
    "flags.yaml: no flag 'lerning_rate'; did you mean 'learning_rate'?",
)
config("that is a list", b"- rank\n", "must be a table of `flag: value` lines, got list")
config("that is a picture", encoded(noise(), "PNG"), "not UTF-8 text (byte 0, in line 1: 89 50 4e 47)")
config("with code", b"seed: !!python/object/apply:os.getpid []\n", "not a YAML file")
config("with a table for a value", b"rank: {of: 4}\n", "'rank' must be a value or a list, got a table")
config(
    "with lists in a list",
    b"validation_images: [[a], [b]]\n",
    "'validation_images' must be a value or a list of values",
)
config("with a date that cannot be", b"output_dir: 2026-02-31\n", "not a YAML file")
config("of 256 KiB", b"# " + b"x" * 2**18 + b"\n", "over 262,144 bytes")
config(
    "with a name that ends early",
    b'init_adapter: "a\\0b"\n',
    "--init_adapter: character 2 is NUL or not UTF-8",
)
config("with escapes in a key", b'"\\e[2Jrank": 1\n', r"no flag ''\x1b[2Jrank''")
bad(
    "flags",
    "config, missing",
    lambda folder: ["--config", str(folder / "none.yaml")],
    "none.yaml: No such file",
)


def config_pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe")
    return ["--config", str(folder / "pipe")]


bad("flags", "config, a pipe", config_pipe, "pipe: not a regular file")


# --- photos: (folder with one good photo) -> refused by training


def add(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        make(folder / name)

    return spoil


for what, (name, make, reason) in BAD_PICTURES.items():
    bad("photos", what, add(name, make), f"--instance_data_dir: {name}: ", reason)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def as_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def several(folder: Path) -> None:
    (folder / "a.png").write_text("no picture")
    (folder / "b.jpg").write_bytes(b"")


def outside(path: Path) -> None:
    path.symlink_to(noise_elsewhere(path))


def noise_elsewhere(path: Path) -> Path:
    other = path.parent.parent / "elsewhere.png"
    noise().save(other)
    return other


bad(
    "photos",
    "small",
    add("small.png", lambda path: noise(40, 64).save(path)),
    "small.png: 40 x 64 pixels is small",
    "--allow_odd_photos",
)
bad(
    "photos",
    "strip",
    add("strip.png", lambda path: noise(3000, 40).save(path)),
    "strip.png: 3000 x 40 pixels",
    "--allow_odd_photos",
)
bad(
    "photos",
    "link out of the folder",
    add("link.png", outside),
    "link.png: cannot be read: a link to ",
    "elsewhere.png, outside the folder",
    "--follow_symlinks",
)
bad(
    "photos",
    "several at once",
    several,
    "--instance_data_dir: a.png: by its content a text file, which is not read",
    "--instance_data_dir: b.jpg: by its content an empty file, which is not read",
)
bad(
    "photos",
    "escapes in a name",
    add(f"{ESCAPE}.png", lambda path: path.write_bytes(b"")),
    r"--instance_data_dir: '\x1b[2J.png': by its content an empty file, which is not read",
)
bad(
    "photos",
    "a line in a name",
    add("x\nerror: y.png", lambda path: path.write_bytes(b"")),
    r"'x\nerror: y.png': by its content an empty file, which is not read",
)
bad("photos", "no folder", lambda folder: shutil.rmtree(folder), "--instance_data_dir: there is no folder ")
bad("photos", "empty folder", emptied, "--instance_data_dir: no picture in ", "it is empty")
bad("photos", "a file for a folder", as_a_file, "is not a folder")
bad(
    "photos",
    "pictures that phones write",
    lambda folder: (
        (folder / "good.png").unlink(),
        (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
    ),
    "no picture in ",
    "a HEIC picture (IMG_1.HEIC): convert it to JPEG or PNG",
)


# --- prompts: (words) -> refused by training

LONG = "a photo of sks dog " + "in the snow " * 25 + "wearing a yellow scarf"


def prompts(what: str, words: list[str], *said: str) -> None:
    bad("prompts", what, lambda folder: words, *said)


prompts(
    "cut off",
    ["--instance_prompt", LONG],
    "--instance_prompt is longer than 77 tokens",
    "wearing a yellow scarf",
)
prompts(
    "cut off at another length",
    ["--tokenizer_max_length", "4"],
    "--instance_prompt is longer than 4 tokens",
    "sks dog",
)
prompts(
    "more tokens than positions",
    ["--tokenizer_max_length", "900"],
    "--tokenizer_max_length must be at most 77",
    "got 900",
)
prompts(
    "a megabyte", ["--instance_prompt", "dog " * 250_000], "--instance_prompt: a text of 1,000,000 characters"
)
prompts(
    "bytes that are no text",
    ["--instance_prompt", "a \udcff dog"],
    "--instance_prompt: character 3 is NUL or not UTF-8",
)
prompts("validation cut off", ["--validation_prompt", LONG], "--validation_prompt is longer than 77 tokens")


def validation_prompts(what: str, content: str | None, *said: str) -> None:
    def words(folder: Path) -> list[str]:
        if content is not None:
            (folder / "prompts.txt").write_text(content)
        return ["--validation_prompts_file", str(folder / "prompts.txt")]

    bad("prompts", what, words, *said)


validation_prompts("no file of prompts", None, "--validation_prompts_file", "prompts.txt")
validation_prompts("no prompt in the file", "# none\n", "--validation_prompts_file", "no prompt in it")
validation_prompts(
    "a prompt of the file cut off", f"a dog\n{LONG}", "--validation_prompts_file: prompt 2 is longer than 77"
)
prompts(
    "two cut off",
    ["--instance_prompt", LONG, "--validation_prompt", LONG],
    "--instance_prompt is longer",
    "--validation_prompt is longer",
)
prompts(
    "no such tokenizer",
    ["--tokenizer_name", "./nowhere"],
    "--tokenizer_name: it of ./nowhere cannot be loaded",
)


# --- bases: (copy of a good base) -> refused by infer


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def only(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"something")

    return spoil


def pickled(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps(Payload(folder.parent / "executed"))
    )


def sharded(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"conv_in.weight": name}})
        )

    return spoil


UNET, TEXT, VAE = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
bad("bases", "no folder", lambda folder: shutil.rmtree(folder), "there is no folder ")
bad("bases", "empty folder", only(), "it has no model_index.json; it holds nothing")
bad("bases", "file that is no base", as_a_file, "not a complete safetensors file")
bad(
    "bases",
    "folder of a single file",
    only("v1-5-pruned.safetensors"),
    "no model_index.json",
    "A base in a single .safetensors file is named by its path",
)
bad(
    "bases",
    "folder of an adapter",
    only("pytorch_lora_weights.safetensors"),
    "That is an adapter, not a base",
)
bad("bases", "index that is no JSON", replaced("model_index.json", b"{"), "model_index.json: not JSON")
bad("bases", "index that is a list", replaced("model_index.json", b"[1]"), "must be a JSON object, got list")
bad(
    "bases",
    "index nested without end",
    replaced("model_index.json", b"[" * 100_000),
    "model_index.json: not JSON",
)
bad(
    "bases",
    "no class",
    replaced("model_index.json", b"{}"),
    "is a None; this version trains StableDiffusionPipeline",
)
for kind, script in (("StableDiffusion3Pipeline", "sd3"), ("FluxPipeline", "flux")):
    bad(
        "bases",
        kind,
        edited("model_index.json", _class_name=kind),
        f"is a {kind}",
        f"train_dreambooth_lora_{script}.py trains it",
    )
bad("bases", "class with escapes", edited("model_index.json", _class_name=ESCAPE), r"is a '\x1b[2J'")
bad("bases", "missing part", lambda folder: shutil.rmtree(folder / "vae"), "lacks the folders vae")
bad(
    "bases",
    "library of its own",
    edited("model_index.json", unet=["evil", "UNet"]),
    "unet comes from evil; only diffusers and transformers",
)
bad(
    "bases",
    "code for an unused part",
    edited("model_index.json", extra=["os", "system"]),
    "extra comes from os",
)
bad(
    "bases",
    "other class of a part",
    edited("model_index.json", unet=["diffusers", "FluxTransformer2DModel"]),
    "unet is a FluxTransformer2DModel",
)
bad("bases", "part left out", edited("model_index.json", vae=[None, None]), "leaves out vae")
bad(
    "bases",
    "code named by a part",
    edited("text_encoder/config.json", auto_map={"AutoModel": "evil.Model"}),
    "text_encoder",
    "auto_map",
)
bad(
    "bases",
    "code named by the tokenizer",
    edited("tokenizer/tokenizer_config.json", auto_map={"A": ["evil.T", None]}),
    "tokenizer",
    "auto_map",
)
bad(
    "bases",
    "part without a config",
    lambda folder: (folder / "vae" / "config.json").unlink(),
    "vae/config.json: No such file or directory",
)
bad(
    "bases",
    "config that is no JSON",
    replaced("unet/config.json", b"\xff\xfe"),
    "unet/config.json: not JSON",
)
bad(
    "bases",
    "text of another width",
    edited("text_encoder/config.json", hidden_size=48),
    "takes 32 wide text and its text encoder gives 48",
)
bad(
    "bases",
    "latents of other channels",
    edited("vae/config.json", latent_channels=16),
    "takes 4 channels and its VAE gives 16",
)
bad(
    "bases",
    "text for a width",
    edited("unet/config.json", cross_attention_dim="32"),
    "cross_attention_dim is '32'; it must be a whole number",
)
bad(
    "bases",
    "no blocks",
    edited("vae/config.json", block_out_channels=[]),
    "block_out_channels is []; it must be a list",
)
bad(
    "bases",
    "unknown prediction",
    edited("scheduler/scheduler_config.json", prediction_type="sample"),
    "Unknown prediction type sample",
)
bad(
    "bases",
    "flow matching",
    edited("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
    "names FlowMatchEulerDiscreteScheduler, a scheduler of flow matching",
)
bad(
    "bases",
    "endless noise levels",
    edited("scheduler/scheduler_config.json", num_train_timesteps=10**10),
    "num_train_timesteps is 10000000000",
)
bad(
    "bases",
    "no weights",
    lambda folder: (folder / UNET).unlink(),
    "has no weights",
    "diffusion_pytorch_model.safetensors",
)
bad(
    "bases",
    "pickled weights",
    pickled,
    "diffusion_pytorch_model.bin only, serialized Python objects, which can carry code",
    "safe_serialization=True",
)
bad("bases", "truncated weights", cut(UNET), UNET, "cut off")
bad(
    "bases",
    "weights of git-lfs",
    replaced(TEXT, b"version https://git-lfs.github.com/spec/v1\n"),
    TEXT,
    "git lfs pull",
)
bad("bases", "weights that are a web page", replaced(VAE, b"<!DOCTYPE html><html>" * 9), VAE, "a web page")
bad(
    "bases",
    "weights of something else",
    replaced(UNET, save({"a.weight": torch.zeros(1)})),
    "unet: its weights do not fit its config.json: they lack conv_in.bias and 207 more",
)
bad(
    "bases",
    "weights of another width",
    replaced(TEXT, save({"embeddings.token_embedding.weight": torch.zeros(2, 8)})),
    "they have embeddings.token_embedding.weight of shape (2, 8), which must be (640, 32)",
)
bad(
    "bases",
    "shards outside the folder",
    sharded("../../secret.safetensors"),
    "which is no safetensors file beside it",
)
bad("bases", "missing shard", sharded("part-1.safetensors"), "lacks part-1.safetensors")


# --- adapters: (path of a good adapter) -> refused by infer


class Payload:
    """Unpickling it leaves a marker behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def raw(header: object, body: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def tensor(
    begin: int = 0, end: int = 16, shape: tuple[int, ...] = (4,), dtype: object = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


K, K2 = "unet.to_q.lora_A.weight", "unet.to_k.lora_A.weight"
ONE = {K: tensor()}


def million() -> bytes:
    entries = (
        b'"unet.%d.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n
        for n in range(1_000_000)
    )
    return raw(b"{" + b",".join(entries) + b"}")


def header(what: str, data: bytes | Callable[[], bytes], *said: str, is_complete: bool = False) -> None:
    damage = () if is_complete else ("not a complete safetensors file",)
    bad(
        "adapters",
        what,
        lambda path: path.write_bytes(data if isinstance(data, bytes) else data()),
        *damage,
        *said,
    )


header("no bytes", b"", "it has 0 bytes")
header("five bytes", b"12345", "it has 5 bytes")
header("header of 2^40 bytes", raw(ONE, bytes(16), size=2**40), "1,099,511,627,776 bytes")
header("header of 10^9 bytes", raw(ONE, bytes(16), size=10**9), "1,000,000,000 bytes")
header("header of 2^64-1 bytes", raw(ONE, bytes(16), size=2**64 - 1), "18,446,744,073,709,551,615 bytes")
header("short body", raw(ONE, bytes(8)), "cut off")
header("bytes left over", raw(ONE, bytes(24)), "bytes left over")
header("header that is no JSON", raw(b"{" * 64), "its header: not JSON")
header("header that is a list", raw([1]), "its header: must be a JSON object")
header("header nested without end", raw(b"[" * 200_000), "its header: not JSON")
header("header that is no text", raw(b"\xff" * 64), "its header: not JSON")
header("tensors that overlap", raw({K: tensor(), K2: tensor(8, 24)}, bytes(24)), "overlaps")
header("gap between tensors", raw({K: tensor(), K2: tensor(24, 40)}, bytes(40)), "gap")
header(
    "sizes that overflow",
    raw({K: tensor(shape=(2**62, 2**62))}, bytes(16)),
    "has an impossible shape or data_offsets",
)
header("negative offsets", raw({K: tensor(-16, 0)}, bytes(16)), "has an impossible shape or data_offsets")
header(
    "negative sides", raw({K: tensor(shape=(-2, -2))}, bytes(16)), "has an impossible shape or data_offsets"
)
header(
    "no offsets", raw({K: {"dtype": "F32", "shape": [4]}}, bytes(16)), "lacks dtype, shape or data_offsets"
)
header("a number for a tensor", raw({K: 7}, bytes(16)), "lacks dtype, shape or data_offsets")
header(
    "shape that does not fill its place",
    raw({K: tensor(shape=(5,))}, bytes(16)),
    "does not fill its 16 bytes",
)
header("unknown dtype", raw({K: tensor(dtype="F99")}, bytes(16)), "dtype 'F99'")
header("dtype that is a list", raw({K: tensor(dtype=["F32"])}, bytes(16)), "dtype ['F32']")
header(
    "truths for weights",
    raw({K: tensor(0, 4, dtype="BOOL")}, bytes(4)),
    "dtype BOOL; it must be one of BF16, F16, F32, F64",
    is_complete=True,
)
header(
    "metadata that is no text",
    raw(ONE | {"__metadata__": {"r": 4}}, bytes(16)),
    "metadata is not a table of strings",
)
header("tensor without values", raw({K: tensor(0, 0, (0, 4))}), "has no values", is_complete=True)
header("a million tensors", million, "its header describes more than 20,000 tensors", is_complete=True)
header(
    "30,000 tensors",
    lambda: raw({f"u{n}": 0 for n in range(30_000)}),
    "its 30,000 tensors are over 20,000, the most that is read here; the format itself has no such limit",
    is_complete=True,
)
header("half of a text", lambda: raw(b'{"' + 4_000_000 * rb"\"", size=8_000_002), "its header: not JSON")
header(
    "metadata in a million fields",
    lambda: raw({"__metadata__": {f"{n}": "" for n in range(300_000)}}),
    "its header describes more than 20,000 tensors",
    is_complete=True,
)
header(
    "a key twice",
    raw(f'{{"{K}": {json.dumps(tensor())}, "{K}": {json.dumps(tensor())}}}'.encode(), bytes(16)),
    f"{K} appears twice",
)
header(
    "a path for a key",
    raw({"unet.lora/../../etc/x": tensor()}, bytes(16)),
    "belong to no kind of adapter that is supported, e.g. unet.lora/../../etc/x",
    is_complete=True,
)
header(
    "escapes in a key",
    raw({f"unet.lora{ESCAPE}": tensor()}, bytes(16)),
    r"e.g. 'unet.lora\x1b[2J",
    is_complete=True,
)
header(
    "a key of a thousand characters",
    raw({"unet." + 1000 * "a": tensor()}, bytes(16)),
    "of 1,005 characters is over 512, the most that is read here",
    is_complete=True,
)
header(
    "renamed zip of PyTorch",
    lambda: zipped(),
    "a zip archive, as torch.save writes it; such files can carry code",
)
header("a web page", b"<!DOCTYPE html><html>Not found</html>", "a web page")
header(
    "a pointer to the file",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a pointer of git-lfs",
    "`git lfs pull`",
)
header(
    "weights of eight bits",
    raw({K: tensor(0, 4, dtype="I8")}, bytes(4)),
    "dtype I8; it must be one of BF16, F16, F32",
    is_complete=True,
)


def zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({K: torch.zeros(4)}, buffer)
    return buffer.getvalue()


def as_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    """Over the limit, with no bytes on the disk for most of it."""
    os.truncate(path, 2 * 2**30 + 1)


def evil(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.parent / "executed")))


def renamed(suffix: str) -> Callable[[Path], list[str]]:
    def spoil(path: Path) -> list[str]:
        evil(path)
        path.rename(path.with_suffix(suffix))
        return ["--adapter", str(path.with_suffix(suffix))]

    return spoil


def of(change: Callable[[dict[str, torch.Tensor]], object], **metadata: object) -> Callable[[Path], None]:
    """The good adapter with its tensors changed, or with fields in its metadata."""

    def spoil(path: Path) -> None:
        tensors = dict(sorted(load(path.read_bytes()).items()))  # the library's order varies from run to run
        old = safetensors_files.read(path, safetensors_files.ADAPTER).metadata
        change(tensors)
        fields = json.loads(old["lora_adapter_metadata"]) | {
            f"unet.{name}": value for name, value in metadata.items()
        }
        path.write_bytes(save(tensors, old | {"lora_adapter_metadata": json.dumps(fields)}))

    return spoil


def kept(state: dict[str, torch.Tensor]) -> None:
    pass


def half(state: dict[str, torch.Tensor]) -> None:
    for key in sorted(state)[::2]:
        del state[key]


def half_the_layers(state: dict[str, torch.Tensor]) -> None:
    for key in sorted(state)[: len(state) // 4 * 2]:
        del state[key]


def spoiled_with(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: next(iter(state.values())).view(-1).__setitem__(0, value)


def prefixed(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            state[prefix + key.removeprefix("unet.")] = state.pop(key)

    return change


def widened(state: dict[str, torch.Tensor]) -> None:
    for key in [key for key in state if "lora_A" in key]:
        state[key] = torch.zeros(state[key].shape[0], 1024)


def odd_ranks(state: dict[str, torch.Tensor]) -> None:
    key = next(key for key in state if "lora_A" in key)
    state[key] = torch.zeros(3, state[key].shape[1])


def whole_numbers(state: dict[str, torch.Tensor]) -> None:
    key = next(iter(state))
    state[key] = state[key].int()


def metadata(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(save(load(path.read_bytes()), {"lora_adapter_metadata": text}))


def weighed(weight: str) -> Callable[[Path], list[str]]:
    return lambda path: ["--adapter", f"{path}:{weight}"]


def turning(
    change: Callable[[dict[str, torch.Tensor]], object] = lambda state: None, **metadata: object
) -> Callable[[Path], None]:
    """An OFT of one layer, its tensors changed, or fields of its metadata; None takes one away."""

    def make(path: Path) -> None:
        tensors = {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.oft_R.weight": torch.full(
                (8, 28), 0.1
            )
        }
        change(tensors)
        fields = {
            "peft_type": "OFT",
            "oft_block_size": 8,
            "target_modules": ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
        } | metadata
        text = json.dumps({f"unet.{name}": value for name, value in fields.items() if value is not None})
        path.write_bytes(save(tensors, {"lora_adapter_metadata": text}))

    return make


def turning_with(*words: str) -> Callable[[Path], list[str]]:
    def make(path: Path) -> list[str]:
        turning()(path)
        return [word.replace("FILE", str(path)) for word in words]

    return make


def shortened(state: dict[str, torch.Tensor]) -> None:
    for key in state:
        state[key] = state[key][1:]


bad("adapters", "missing", lambda path: path.unlink(), "--adapter: ", "there is no such file")
bad(
    "adapters",
    "name of 5000 letters",
    lambda path: ["--adapter", "x" * 5000],
    "--adapter must be a path of at most 3500 bytes",
)
bad(
    "adapters",
    "folder without one",
    lambda path: ["--adapter", str(path.parent)],
    "no adapter is in this folder",
    "name the .safetensors file itself",
)
bad("adapters", "pipe", as_a_pipe, "it cannot be read: not a regular file")
bad(
    "adapters",
    "over two gibibytes",
    endless,
    "2,147,483,649 bytes are over 2,147,483,648, the most that is read here",
)
bad(
    "adapters",
    "evil pickle",
    evil,
    "not a complete safetensors file",
    "serialized Python objects, which can carry code",
)
for suffix in (".bin", ".pt", ".ckpt"):
    bad(
        "adapters",
        f"evil {suffix}",
        renamed(suffix),
        f"{suffix} is not a .safetensors file; other formats can carry code",
    )
bad("adapters", "empty", lambda path: path.write_bytes(save({}, {"format": "pt"})), "the adapter is empty")
bad(
    "adapters",
    "half of the keys",
    of(half),
    "that is not a complete LoRA, LoHa or LoKr; the adapter is incomplete",
)
bad(
    "adapters",
    "half of the layers",
    of(half_the_layers),
    "layers of unet that it was trained on",
    "the adapter is incomplete",
)
bad("adapters", "not a number in it", of(spoiled_with(float("nan"))), "has values that are not finite")
bad("adapters", "infinite", of(spoiled_with(float("inf"))), "has values that are not finite")
bad("adapters", "whole numbers for weights", of(whole_numbers), "it must be one of BF16, F16, F32")
bad(
    "adapters",
    "half of another program's prefix",
    of(prefixed("lora_other_")),
    "keys are for no layer of this base",
    "lora_other_",
    "the layer with the most similar name is unet.",
)
bad(
    "adapters",
    "key of no adapter",
    of(lambda state: state.update({"unet.conv_in.weight": torch.zeros(4)})),
    "belong to no kind of adapter",
)
bad(
    "adapters",
    "prefix of no component",
    of(prefixed("transformer.")),
    "keys are for no layer of this base",
    "transformer.",
)
bad(
    "adapters",
    "layers that are not there",
    of(prefixed("unet.other.")),
    "keys are for no layer of this base",
    "unet.other.",
)
bad(
    "adapters",
    "for a base of another width",
    of(widened),
    "the adapter is for another base",
    "its UNet takes text of width 1024 (Stable Diffusion 2.x)",
)
bad(
    "adapters",
    "factors that do not multiply",
    of(odd_ranks, r=4, rank_pattern={"x": 3}),
    "its up has shape",
    "it must be of shape",
)
bad("adapters", "metadata of another rank", of(kept, r=8), "has rank 4, but its metadata has 8")
bad("adapters", "huge rank", of(kept, r=10**9), "has r = 1000000000; it must be a whole number over 0")
bad(
    "adapters",
    "alpha that is no number",
    of(kept, lora_alpha="1"),
    "has lora_alpha = '1'; it must be a number other than 0",
)
bad(
    "adapters",
    "infinite alpha",
    of(kept, lora_alpha=float("inf")),
    "has lora_alpha = inf; it must be a number other than 0",
)
bad(
    "adapters",
    "pattern that is no table",
    of(kept, rank_pattern=7),
    "has rank_pattern = 7; it must be a table of at most",
)
bad(
    "adapters",
    "pattern with an expression",
    of(kept, alpha_pattern={"(a+)+$": 1}),
    "in alpha_pattern; only names of layers are read",
)
bad(
    "adapters",
    "rsLoRA that is neither",
    of(kept, use_rslora="yes"),
    "has use_rslora = 'yes'; it must be true or false",
)
bad(
    "adapters",
    "DoRA without its lengths",
    of(kept, use_dora=True),
    "is a DoRA and has no magnitudes",
    "the adapter is incomplete",
)
bad("adapters", "LoRA with biases", of(kept, bias="all"), "has bias = 'all'; it must be none")
bad(
    "adapters",
    "metadata nested without end",
    metadata("[" * 200_000),
    "its metadata about the LoRA: not JSON: ",
)
bad(
    "adapters",
    "number of 6000 digits in the metadata",
    metadata('{"unet.r": ' + "9" * 6000 + "}"),
    "its metadata about the LoRA: not JSON: a number of 6000 digits",
)
bad(
    "adapters",
    "metadata that is no table",
    metadata("[" * 9),
    "its metadata about the LoRA: not JSON: ",
)
bad(
    "adapters",
    "weight that is no number",
    weighed("strong"),
    "--adapter: the weight of ",
    "must be a number from -100 to 100, got 'strong'",
)
bad("adapters", "endless weight", weighed("inf"), "must be a number from -100 to 100, got 'inf'")
bad("adapters", "weight of an escape", weighed(ESCAPE), "must be a number from -100 to 100, got ")
bad(
    "adapters",
    "one adapter twice",
    lambda path: ["--adapter", str(path), f"{path}:2"],
    "is named twice; name it once, with the sum of the weights",
)
bad(
    "adapters",
    "OFT at half its weight",
    turning_with("--adapter", "FILE:0.5"),
    "is OFT, which rotates weights: its own weight must be 0 or 1, got 0.5",
)
bad(
    "adapters",
    "OFT within a sweep",
    turning_with("--adapter", "FILE", "--sweep", "0,0.5,1"),
    "must be 0 or 1, got 0.5",
)
bad(
    "adapters",
    "OFT at half weight in a block",
    turning_with("--adapter", "FILE", "--adapter_weights", "unet.mid_block=0.5"),
    "must be 0 or 1, got 0.5",
)
bad(
    "adapters",
    "OFT that is not fused",
    turning_with("--adapter", "FILE", "--fuse", "no"),
    "is always fused; leave --fuse no out",
)
bad(
    "adapters",
    "OFT without settings",
    turning(peft_type=None),
    "unet.peft_type = None; it must be one of OFT, BOFT, HRA",
)
bad(
    "adapters",
    "OFT that is said to be HRA",
    turning(peft_type="HRA"),
    "is of OFT, but in its metadata unet has HRA",
)
bad("adapters", "OFT with odd settings", turning(coft="yes"), "unet.coft = 'yes'; it must be true or false")
bad("adapters", "OFT with biases", turning(bias="all"), "unet.bias = 'all'; it must be none")
bad(
    "adapters",
    "OFT of another width",
    turning(shortened),
    "does not rotate 64 inputs; the adapter is for another base, or broken",
)
bad(
    "adapters",
    "OFT that is not whole",
    turning(target_modules=["to_q"]),
    "layers of unet that it was trained on",
    "the adapter is incomplete",
)
bad(
    "adapters",
    "OFT of a layer that is not there",
    turning(prefixed("unet.other.")),
    "is not a layer of this base; the adapter is for another base",
)
bad(
    "adapters",
    "OFT among other tensors",
    turning(lambda state: state.update({K: torch.zeros(4, 4)})),
    "is not one of peft's keys (unet.*, text_encoder.*) of OFT, BOFT or HRA",
)
bad(
    "adapters",
    "OFT that is not finite",
    turning(spoiled_with(float("nan"))),
    "has values that are not finite",
)
bad(
    "adapters",
    "factor for no part",
    lambda path: ["--adapter", str(path), "--adapter_weights", "unet.up_block=1"],
    "--adapter_weights: this base has no unet.up_block; there are unet.up_blocks",
)
bad(
    "adapters",
    "factor that is no number",
    lambda path: ["--adapter", str(path), "--adapter_weights", "unet=0.8,text_encoder=much"],
    "--adapter_weights must be PART=NUMBER",
    "got 'text_encoder=much'",
)
bad(
    "adapters",
    "factor for no adapter",
    lambda path: ["--adapter", str(path), "--adapter_weights", "cat:unet=0.8"],
    "--adapter_weights: no adapter is called 'cat'; there are adapter",
)


# --- infer: (folder) -> words refused by infer


def prompts_file(content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "prompts.txt").write_bytes(content)
        return ["--prompts_file", str(folder / "prompts.txt")]

    return make


bad(
    "infer",
    "prompt cut off",
    lambda folder: ["--prompt", LONG],
    "is longer than 77 tokens",
    "wearing a yellow scarf",
)
bad(
    "infer",
    "negative prompt cut off",
    lambda folder: ["--prompt", "dog", "--negative_prompt", LONG],
    "--negative_prompt is longer than 77 tokens",
)
bad("infer", "escapes in a prompt cut off", lambda folder: ["--prompt", f"{ESCAPE}{LONG}"], r"\x1b[2J")
bad(
    "infer",
    "no file of prompts",
    lambda folder: ["--prompts_file", str(folder / "none.txt")],
    "none.txt: No such file",
)
bad(
    "infer",
    "prompts in a file that is no text",
    prompts_file(b"\xff\xfea dog"),
    "prompts.txt: not UTF-16 text (byte 6, in line 1: 67); save it as UTF-8",
)
bad("infer", "no prompt in the file", prompts_file(b"# nothing\n\n"), "prompts.txt: no prompt in it")
bad(
    "infer",
    "prompt and file",
    lambda folder: ["--prompt", "dog", "--prompts_file", "x"],
    "give either --prompt or --prompts_file",
)
bad(
    "infer",
    "seed past the generator's",
    lambda folder: ["--prompt", "dog", "--seeds", str(2**64)],
    "--seeds must be at most 18446744073709551615, got 18446744073709551616",
)
bad(
    "infer",
    "more steps than the base has timesteps",
    lambda folder: ["--prompt", "dog", "--num_inference_steps", "1001"],
    "--num_inference_steps must be at most 1000, the timesteps of the base; got 1001",
)
bad(
    "infer",
    "compare without an adapter",
    lambda folder: ["--prompt", "dog", "--compare"],
    "--compare needs an --adapter",
)
bad(
    "infer",
    "sweep without an adapter",
    lambda folder: ["--prompt", "dog", "--sweep", "0,1"],
    "--sweep needs an --adapter whose weight it changes",
)
bad(
    "infer",
    "sweep of words",
    lambda folder: ["--prompt", "dog", "--adapter", "a", "--sweep", "0,all"],
    "--sweep must be different numbers",
    "'0,all'",
)
bad(
    "infer",
    "factors without an adapter",
    lambda folder: ["--prompt", "dog", "--adapter_weights", "unet=1"],
    "--adapter_weights needs --adapter",
)


def sets_file(content: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "sets.yaml").write_text(content)
        return ["--prompt", "dog", "--adapters_file", str(folder / "sets.yaml")]

    return make


def sets_alone(content: str) -> Callable[[Path], list[str]]:
    return lambda folder: sets_file(content)(folder)[2:]


bad(
    "infer",
    "no file of sets",
    lambda folder: ["--prompt", "dog", "--adapters_file", str(folder / "none.yaml")],
    "none.yaml: No such file",
)
bad(
    "infer",
    "sets and an adapter",
    lambda folder: [*sets_file("a: []")(folder), "--adapter", "x"],
    "give either --adapter or --adapters_file",
)
bad("infer", "sets that are a list", sets_file("- a.safetensors\n"), "must be a table of sets", "got list")
bad("infer", "sets that are no YAML", sets_file("a: [\n"), "not a YAML file")
bad("infer", "a set twice", sets_file("a: []\nb: []\na: []\n"), "line 3: a is given twice")
bad(
    "infer",
    "unknown key of a set",
    sets_file("a:\n  adapter: [x]\n"),
    "set a has 'adapter'; did you mean adapters?",
)
bad(
    "infer",
    "a number for adapters",
    sets_file("a: 7\n"),
    "set a: adapters must be a text or a list of texts, got 7",
)
bad(
    "infer",
    "a set's adapter that is missing",
    sets_file("dog: [/nowhere/dog.safetensors]\n"),
    "set dog: /nowhere/dog.safetensors: there is no such file",
)
bad(
    "infer",
    "set without prompts",
    sets_alone("a: {adapters: [], prompts: [a cat]}\nb: []\n"),
    "set b has no prompts; give it some, or --prompt for all sets",
)
bad(
    "infer",
    "fp16 on a CPU",
    lambda folder: ["--prompt", "dog", "--mixed_precision", "fp16"],
    "fp16 does not work on a CPU",
)


# --- how each is refused


@pytest.fixture(autouse=True)
def _at_the_door(monkeypatch):
    """Loading a model fails the test, and so does executing a pickle; accelerate starts anew."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("load_encoders", "load_vae", "load_unet"):
        monkeypatch.setattr(loading, name, refuse)
    monkeypatch.setattr(pipelines, "load_pipeline", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def good_adapter(tiny_base, tmp_path_factory) -> Path:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    component = tiny.inject_lora("unet", unet, rank=4, dropout=0, targets=inject.UNET_TARGETS, seed=0)
    path = tmp_path_factory.mktemp("adapter") / "good.safetensors"
    path.write_bytes(native.pack({"unet": component.state_dict()}, {"unet": inject.metadata(component)}, {}))
    return path


def as_a_script(script: Any, kind: type, words: list[str]) -> None:
    """What the last lines of every script do."""
    try:
        script.main(parse(kind, "", words))
    except UserError as error:
        fail(error)


def check_refused(row: str, script: Any, kind: type, words: list[str], out: Path, capsys) -> None:
    """One message, status 2. Nothing may be left in the output folder."""
    capsys.readouterr()
    started = time.process_time()
    with pytest.raises(SystemExit) as stopped:
        as_a_script(script, kind, words)
    took = time.process_time() - started
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in message
    text = " ".join(message.translate({ord(c): " " for c in "╭╮╰╯│─"}).split())
    for fragment in BAD_INPUTS[row].said:
        assert fragment in text, text
    by_tyro = "For full helptext" in message
    assert sum(line.startswith("error: ") for line in message.split("\n")) == (0 if by_tyro else 1)
    assert all(line == "" or line.isprintable() for line in message.split("\n")), ascii(message)
    assert not out.exists()
    assert took < 2


def train_words(base: Path | str, photos_dir: Path | str, out: Path, *more: str) -> list[str]:
    words = [
        "--pretrained_model_name_or_path",
        str(base),
        "--instance_data_dir",
        str(photos_dir),
        "--output_dir",
        str(out),
    ]
    return [
        *words,
        "--instance_prompt",
        "a photo of sks dog",
        "--resolution",
        "64",
        "--report_to",
        "none",
        *more,
    ]


def infer_words(base: Path, out: Path, *more: str) -> list[str]:
    return ["--pretrained_model_name_or_path", str(base), "--output_dir", str(out), *more]


@rows("flags")
def test_wrong_flags_are_refused(row, tmp_path, capsys):
    words = BAD_INPUTS[row].make(tmp_path)
    check_refused(
        row,
        train,
        TrainOptions,
        train_words("base", "photos", tmp_path / "out", *words),
        tmp_path / "out",
        capsys,
    )


@rows("photos")
def test_bad_photos_are_refused(row, tiny_base, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    noise(seed=9).save(folder / "good.png")
    BAD_INPUTS[row].make(folder)
    check_refused(
        row, train, TrainOptions, train_words(tiny_base, folder, tmp_path / "out"), tmp_path / "out", capsys
    )


@rows("prompts")
def test_bad_prompts_are_refused(row, tiny_base, photos_dir, tmp_path, capsys):
    words = train_words(tiny_base, photos_dir, tmp_path / "out", *BAD_INPUTS[row].make(tmp_path))
    check_refused(row, train, TrainOptions, words, tmp_path / "out", capsys)


@rows("bases")
def test_broken_bases_are_refused(row, tiny_base, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    BAD_INPUTS[row].make(base)
    check_refused(
        row,
        infer,
        InferOptions,
        infer_words(base, tmp_path / "out", "--prompt", "a dog"),
        tmp_path / "out",
        capsys,
    )
    assert_not_executed(tmp_path)


@rows("adapters")
def test_bad_adapters_are_refused(row, tiny_base, good_adapter, tmp_path, capsys):
    path = tmp_path / "adapter.safetensors"
    shutil.copy(good_adapter, path)
    words = BAD_INPUTS[row].make(path)
    words = words if isinstance(words, list) else ["--adapter", str(path)]
    check_refused(
        row,
        infer,
        InferOptions,
        infer_words(tiny_base, tmp_path / "out", "--prompt", "a dog", *words),
        tmp_path / "out",
        capsys,
    )
    assert_not_executed(tmp_path)


@rows("infer")
def test_bad_prompts_and_settings_of_pictures_are_refused(row, tiny_base, tmp_path, capsys):
    words = infer_words(tiny_base, tmp_path / "out", *BAD_INPUTS[row].make(tmp_path))
    check_refused(row, infer, InferOptions, words, tmp_path / "out", capsys)


def test_there_are_sixty_kinds_and_each_is_in_a_group_that_is_tested():
    assert len(BAD_INPUTS) >= 60
    assert {case.group for case in BAD_INPUTS.values()} == {
        "flags",
        "photos",
        "prompts",
        "bases",
        "adapters",
        "infer",
    }


def test_the_payload_would_leave_its_mark(tmp_path):
    """Else the tests above prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()


@pytest.mark.trains
def test_good_input_reaches_the_models(tiny_base, good_adapter, photos_dir, tmp_path):
    """Else everything could be refused."""
    with pytest.raises(AssertionError, match="a model was loaded"):
        infer.main(
            parse(
                InferOptions,
                "",
                infer_words(tiny_base, tmp_path / "a", "--prompt", "dog", "--adapter", str(good_adapter)),
            )
        )
    with pytest.raises(AssertionError, match="a model was loaded"):
        train.main(
            parse(
                TrainOptions,
                "",
                train_words(tiny_base, photos_dir, tmp_path / "b", "--max_train_steps", "1", "--seed", "1"),
            )
        )


def test_files_of_other_programs_that_are_good_are_read(tiny_base, good_adapter, tmp_path):
    """Metadata as diffusers writes it: every field of a LoraConfig, most of them null."""
    layers = families.find(BaseOptions(str(tiny_base))).layers()
    path = tmp_path / "theirs.safetensors"
    shutil.copy(good_adapter, path)
    of(
        kept,
        task_type=None,
        auto_mapping=None,
        base_model_name_or_path=None,
        megatron_core="evil",
        layers_pattern=None,
        runtime_config={},
    )(path)
    ours, theirs = (reading.read(file, layers).components["unet"] for file in (good_adapter, path))
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(vars(ours[name])[factor], vars(theirs[name])[factor])
        for name in ours
        for factor in ("down", "up")
    )


def test_expressions_for_targets_are_not_run(tiny_base, good_adapter, tmp_path):
    """peft would: (a+)+$ takes it for ever. What a file holds its keys tell."""
    layers = families.find(BaseOptions(str(tiny_base))).layers()
    for expression in ("(a+)+$", ["(a+)+$"]):
        path = tmp_path / "adapter.safetensors"
        shutil.copy(good_adapter, path)
        of(kept, target_modules=expression)(path)
        assert reading.read(path, layers).components.keys() == {"unet"}


# --- fuzz


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled, zeroed or put in."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(found) + 1), draw.randint(1, 40)
        what = draw.randrange(6)
        if what == 0 and found:
            found[at % len(found)] ^= 1 << draw.randrange(8)
        elif what == 1:
            del found[at : at + length]
        elif what == 2:
            found[at:at] = found[at : at + length]
        elif what == 3:
            found[at : at + length] = bytes(len(found[at : at + length]))
        elif what == 4:
            found[at:at] = draw.randbytes(length)
        elif draw.random() < 0.3:
            del found[at:]
    return bytes(found)


def recompressed(data: bytes, draw: random.Random) -> bytes:
    """A PNG whose chunks are mutated and have good checksums again, so that the fault lies deeper."""
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    number = draw.randrange(len(chunks))
    chunks[number] = (chunks[number][0], mutated(chunks[number][1], draw))
    return data[:8] + b"".join(
        struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks
    )


def assert_not_executed(folder: Path) -> None:
    TALLY["payloads_executed"] += (folder / "executed").exists()
    assert not (folder / "executed").exists()


def outcomes(
    count: int, data: bytes, name: str, folder: Path, use: Callable[[Path], object], mutate=mutated
) -> dict[str, int]:
    """How many of `count` mutations were accepted and refused. Anything but UserError or status 2 fails the
    test."""
    found = {"accepted": 0, "refused": 0}
    for number in range(count):
        TALLY["fuzzed_files"] += 1
        case = folder / str(number)
        case.mkdir()
        (case / name).write_bytes(mutate(data, random.Random(f"{name} {number}")))
        started = time.process_time()
        try:
            use(case / name)
            found["accepted"] += 1
        except UserError:
            found["refused"] += 1
        except SystemExit as stopped:
            if stopped.code != 2:
                raise
            found["refused"] += 1
        assert time.process_time() - started < 2
    return found


def checked_and_loaded(path: Path) -> None:
    (photo,) = photos.check_folder(path.parent, "--instance_data_dir").photos
    crops = Crops(32, "lanczos", center_crop=True)
    box = crops.box(crops.middle_corner(photo.size))
    assert crops.pixel_values(photos.load(photo), box).isfinite().all()


@pytest.mark.parametrize(
    ("name", "kind", "mutate"),
    [
        ("a.png", "PNG", mutated),
        ("b.png", "PNG", recompressed),
        ("a.jpg", "JPEG", mutated),
        ("a.webp", "WEBP", mutated),
    ],
)
def test_fuzz_pictures(name, kind, mutate, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(72, 64), kind, exif=exif)
    found = outcomes(55, data, name, tmp_path, checked_and_loaded, mutate)
    assert found["refused"] > 5


@pytest.mark.parametrize(("kind", "count"), [("lora", 140), ("oft", 60)])
def test_fuzz_adapters(kind, count, tiny_base, good_adapter, tmp_path):
    path = tmp_path / "adapter.safetensors"
    shutil.copy(good_adapter, path)
    if kind == "oft":
        turning()(path)
    data, layers = path.read_bytes(), families.find(BaseOptions(str(tiny_base))).layers()
    (size,) = struct.unpack("<Q", data[:8])

    def mutate(data: bytes, draw: random.Random) -> bytes:
        """Three times in four within the header, which is a small part of the file, with its length put
        right."""
        if draw.random() < 0.25:
            return mutated(data, draw)
        header = mutated(data[8 : 8 + size], draw)
        return struct.pack("<Q", len(header)) + header + data[8 + size :]

    found = outcomes(
        count, data, "adapter.safetensors", tmp_path, lambda path: reading.read(path, layers), mutate
    )
    assert found["refused"] > count // 2


def test_fuzz_configs(tmp_path):
    text = (
        b"rank: 8\nlearning_rate: 1e-4\ninstance_prompt: 'a photo of sks dog'\nseed: "
        b"null\ncenter_crop: true\nvalidation_epochs: 3\n"
    )
    words = ["--pretrained_model_name_or_path", "b", "--instance_data_dir", "p", "--instance_prompt", "x"]
    found = outcomes(
        80,
        text,
        "flags.yaml",
        tmp_path,
        lambda path: parse(TrainOptions, "", [*words, "--config", str(path)]),
    )
    assert found["refused"] > 20


def test_fuzz_manifests(tmp_path):
    settings = class_images.ClassImageSettings(
        "0123456789abcdef", "a photo of dog", 5, 20, 7.5, 4, 64, "fp32", "dpm"
    )
    manifest = {
        "settings": dataclasses.asdict(settings),
        "sha256": {class_images.file_name(k): f"{k:064x}" for k in range(3)},
    }

    def use(path: Path) -> None:
        class_images.made_with(path.parent)
        class_images.missing_numbers(path.parent, settings, 3)

    found = outcomes(60, json.dumps(manifest).encode(), class_images.MANIFEST, tmp_path, use)
    assert found["refused"] > 20


# --- what is written and printed


FORGERIES = [
    'dog\nSteps: 1, Seed: 2", "seed": 2',
    ESCAPE + "red",
    '"><img src=x onerror=alert(1)>',
    "<script>x</script>",
    "\x00",
    "狗",
]


@pytest.mark.parametrize("prompt", FORGERIES)
def test_a_prompt_cannot_forge_another_field_of_a_picture(prompt):
    """One text chunk, of JSON."""
    data = pictures.png(Image.new("RGB", (8, 8)), {"prompt": prompt, "seed": 1})
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert set(picture.info) == {"dreambooth"}
    assert json.loads(picture.info["dreambooth"]) == {"prompt": prompt, "seed": 1}


@pytest.mark.parametrize("text", [ESCAPE, "\r", "\x07", "\u202e", "\udcff", "\x9b31m"])
def test_messages_have_no_escapes(text, capsys):
    with pytest.raises(SystemExit):
        fail(f"--instance_data_dir: {text}\nsecond line")
    first, second, rest = capsys.readouterr().err.split("\n")
    assert first.isprintable()
    assert first.startswith("error: --instance_data_dir: \\")
    assert (second, rest) == ("second line", "")


def test_the_limits_on_headers_are_those_promised():
    limits = safetensors_files.ADAPTER
    assert (limits.tensors, limits.file_bytes) == (20_000, 2 * 2**30)
    assert safetensors_files.LARGEST_HEADER == 100_000_000


def test_rules_outside_of_parse_raise_at_once():
    with pytest.raises(ValueError, match="--rank must be at least 1, got 0"):
        training.AdapterOptions(rank=0)
    assert np.isfinite(training.AdapterOptions().rank)
