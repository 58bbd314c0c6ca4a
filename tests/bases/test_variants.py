"""Bases with weights in variants: loaded as diffusers loads them, and the advice of each refusal is true."""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from safetensors.torch import load_file, save_file

from dreambooth.bases import families, loading, weight_names
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions
from tests.scripts.converting import run

PARTS = ("unet", "vae", "text_encoder")


def base_with(tiny_base: Path, folder: Path, **variants: str) -> Path:
    """A copy of the base in which each named part has its weights as these variants, separated by spaces;
    "plain" stands for none. The values differ from variant to variant."""
    shutil.copytree(tiny_base, folder)
    for part, names in variants.items():
        plain = folder / part / weight_names.single(part, "")
        tensors = load_file(plain)
        plain.unlink()
        for number, name in enumerate(names.split()):
            changed = {key: tensor * (1 + number / 64) for key, tensor in tensors.items()}
            path = folder / part / weight_names.single(part, "" if name == "plain" else name)
            save_file(changed, path, {"format": "pt"})
    return folder


def find(folder: Path, variant: str | None = None, **options: Any) -> families.Base:
    return families.find(BaseOptions(str(folder), variant=variant, **options))


def refusal(folder: Path, variant: str | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        find(folder, variant, **options)
    return str(refused.value)


def file_names(base: families.Base) -> dict[str, list[str]]:
    return {part: [path.name for path in base.weight_files(part)] for part in PARTS}


MIXED = {
    "all fp16": dict.fromkeys(PARTS, "fp16"),
    "UNet fp16 only": {"unet": "fp16"},
    "text encoder fp16 only": {"text_encoder": "fp16", "unet": "plain fp16"},
    "VAE fp16 only": {"vae": "fp16"},
    "UNet in two variants": {"unet": "non_ema fp16", "text_encoder": "plain"},
    "VAE plain, the others both": {"unet": "plain fp16", "text_encoder": "fp16 plain"},
}


@pytest.mark.parametrize("what", MIXED)
def test_a_mixed_base_is_loaded_as_diffusers_loads_it(what, tiny_base, tmp_path):
    folder = base_with(tiny_base, tmp_path / "base", **MIXED[what])
    base = find(folder, "fp16")
    theirs = StableDiffusionPipeline.from_pretrained(folder, variant="fp16", safety_checker=None)
    for part in PARTS:
        ours = loading.load_part(base, part, torch.float32, torch.device("cpu")).state_dict()
        expected = getattr(theirs, part).state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("what", ["all fp16", "UNet fp16 only", "text encoder fp16 only", "VAE fp16 only"])
def test_a_base_with_variants_only_names_the_flag_that_loads_it(what, tiny_base, tmp_path):
    folder = base_with(tiny_base, tmp_path / "base", **MIXED[what])
    parts = ", ".join(part for part in PARTS if MIXED[what].get(part) == "fp16")
    assert (
        refusal(folder)
        == f"--pretrained_model_name_or_path: {folder} has weights of {parts} as a variant only; "
        "give --variant fp16"
    )
    assert refusal(folder, "bf16") == f"--variant: {folder} has no bf16 weights; give --variant fp16"
    find(folder, "fp16")


def test_parts_that_are_not_loaded_in_the_variant_are_noted(tiny_base, tmp_path):
    folder = base_with(tiny_base, tmp_path / "base", unet="fp16")
    assert find(folder, "fp16").notes() == [
        "there are no fp16 weights of text_encoder, vae: the plain ones are loaded"
    ]
    assert find(tiny_base).notes() == []


def test_a_variant_that_no_part_has_is_refused_with_those_that_there_are(tiny_base, tmp_path):
    assert refusal(tiny_base, "fp16") == f"--variant: {tiny_base} has no fp16 weights; leave --variant out"
    folder = base_with(tiny_base, tmp_path / "base", unet="plain fp16 non_ema")
    assert refusal(folder, "bf16") == (
        f"--variant: {folder} has no bf16 weights; leave --variant out or give --variant fp16 or give "
        "--variant non_ema"
    )


def test_variants_of_which_none_has_every_part_are_listed(tiny_base, tmp_path):
    folder = base_with(tiny_base, tmp_path / "base", unet="fp16", text_encoder="bf16")
    for variant in (None, "fp16", "bf16"):
        message = refusal(folder, variant)
        assert "no choice of --variant gives every part: unet has fp16; text_encoder has bf16." in message
    renamed = re.search(r"as (\S+) to (\S+)$", message)
    assert renamed
    (folder / "unet" / renamed[1]).rename(folder / "unet" / renamed[2])
    find(folder, "bf16")


def test_advice_is_true_and_the_files_are_those_of_diffusers():
    """For every way in which three parts may hold plain weights and two variants."""
    kinds = [set(held) for held in (("",), ("a",), ("b",), ("", "a"), ("a", "b"), ("", "a", "b"))]
    for held in itertools.product(kinds, repeat=3):
        available = dict(zip(PARTS, held, strict=True))
        paths = [
            f"{part}/{weight_names.single(part, kind)}" for part, names in available.items() for kind in names
        ]
        works = {kind: weight_names.problem(available, kind) is None for kind in ("", "a", "b")}
        for kind in ("", "a", "b", "c"):
            message = weight_names.problem(available, kind)
            if message is None:
                loaded, _ = variant_compatible_siblings(paths, variant=kind or None)
                assert {path.partition("/")[0] for path in loaded} == set(PARTS)
                continue
            advised = set(re.findall(r"give --variant (\w)", message))
            advised |= {""} if "leave --variant out" in message else set()
            assert advised == {kind for kind, loads in works.items() if loads}, message
            assert advised or "no choice of --variant" in message


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("{}.safetensors.index.fp16.json", "{}.fp16-{:05}-of-00002.safetensors"),
        ("{}.safetensors.fp16.index.json", "{}-{:05}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_of_a_variant_are_found_under_todays_names_and_older_ones(index, shard, tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    shutil.rmtree(folder / "unet")
    pipeline.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="300KB")
    stem = weight_names.stem("unet")
    today = folder / "unet" / f"{stem}.safetensors.index.fp16.json"
    text = today.read_text()
    pieces = sorted({*re.findall(r"[\w.-]+\.safetensors", text)})
    today.unlink()
    for number, piece in enumerate(pieces, 1):
        name = shard.format(stem, number)
        (folder / "unet" / piece).rename(folder / "unet" / name)
        text = text.replace(piece, name)
    (folder / "unet" / index.format(stem)).write_text(text)
    assert refusal(folder).endswith("give --variant fp16")
    base = find(folder, "fp16")
    assert file_names(base)["unet"] == [shard.format(stem, number) for number in range(1, len(pieces) + 1)]
    ours = loading.load_part(base, "unet", torch.float32, torch.device("cpu")).state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in pipeline.unet.state_dict().items())


def test_the_fingerprint_follows_the_files_that_are_loaded(tiny_base, tmp_path):
    folder = base_with(tiny_base, tmp_path / "base", unet="plain fp16")
    plain, fp16 = find(folder).fingerprint(), find(folder, "fp16").fingerprint()
    assert len({plain, fp16, find(tiny_base).fingerprint()}) == 2
    path = folder / "unet" / weight_names.single("unet", "fp16")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert find(folder).fingerprint() == plain
    assert find(folder, "fp16").fingerprint() != fp16


def test_a_given_vae_is_loaded_in_the_only_variant_that_it_has(tiny_base, tmp_path):
    folder = base_with(tiny_base, tmp_path / "base", vae="fp16")
    vae = str(folder / "vae")
    files = find(tiny_base, pretrained_vae_model_name_or_path=vae).weight_files("vae")
    assert [path.name for path in files] == ["diffusion_pytorch_model.fp16.safetensors"]
    shutil.copy(files[0], folder / "vae" / "diffusion_pytorch_model.bf16.safetensors")
    message = refusal(tiny_base, pretrained_vae_model_name_or_path=vae)
    assert "has several variants, bf16, fp16; copy the wanted weights to diffusion_pytorch_model" in message
    shutil.copy(files[0], folder / "vae" / message.rsplit(" ", 1)[1])
    find(tiny_base, pretrained_vae_model_name_or_path=vae)


def test_a_base_of_the_hub_names_the_variants_that_it_has(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Could not find the necessary safetensors weights")

    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    names = ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors", "a.md"]
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: index)
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: names)
    with pytest.raises(
        UserError, match=r"me/dog has weights of unet, text_encoder as a variant only; give --v"
    ):
        find(Path("me/dog"))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    with pytest.raises(UserError, match="as a hub id it cannot be read: Could not find"):
        find(Path("me/dog"))


def test_adapters_are_extracted_from_bases_of_which_one_has_the_variant(tiny_base, tmp_path, capsys):
    fp16 = base_with(tiny_base, tmp_path / "fp16", unet="fp16")
    tensors = load_file(fp16 / "unet" / weight_names.single("unet", "fp16"))
    changed = {key: tensor + 0.01 * ("to_q" in key) for key, tensor in tensors.items()}
    save_file(changed, fp16 / "unet" / weight_names.single("unet", "fp16"), {"format": "pt"})
    for number, (base, tuned) in enumerate([(tiny_base, fp16), (fp16, tiny_base)]):
        words = ["extract", tuned, "--pretrained_model_name_or_path", base, "--rank", 1, "--output"]
        path = tmp_path / f"{number}.safetensors"
        with pytest.raises(UserError, match="give --variant fp16"):
            run(*words, path)
        run(*words, path, "--variant", "fp16")
        assert path.is_file()


def test_a_mixed_base_is_baked_into_a_plain_one(tiny_base, tmp_path, capsys):
    folder = base_with(tiny_base, tmp_path / "base", unet="non_ema fp16", vae="fp16", text_encoder="plain")
    tuned = base_with(tiny_base, tmp_path / "tuned", unet="plain")
    path = tuned / "unet" / weight_names.single("unet", "")
    tensors = {key: tensor + 0.01 * ("to_q" in key) for key, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    words = [
        "--pretrained_model_name_or_path",
        tiny_base,
        "--rank",
        1,
        "--output",
        tmp_path / "a.safetensors",
    ]
    run("extract", tuned, *words)
    words = ["--pretrained_model_name_or_path", folder, "--variant", "fp16", "--merge_to", tmp_path / "new"]
    run("bake", tmp_path / "a.safetensors", *words)
    assert not list((tmp_path / "new").rglob("*fp16*"))
    new = StableDiffusionPipeline.from_pretrained(tmp_path / "new", safety_checker=None)
    old = StableDiffusionPipeline.from_pretrained(folder, variant="fp16", safety_checker=None)
    for part in PARTS:
        found, before = getattr(new, part).state_dict(), getattr(old, part).state_dict()
        changed = {key for key, tensor in before.items() if not torch.equal(found[key], tensor)}
        assert bool(changed) == (part == "unet")
        assert all(key.endswith("to_q.weight") for key in changed)
