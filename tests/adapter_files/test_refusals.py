"""Adapter files that are damaged or not understood: refused with one message, nothing half read."""

import random

import pytest
import torch
from safetensors.torch import save_file

from dreambooth.adapter_files import reading, writing
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import Lora
from dreambooth.io.errors import UserError
from tests.adapter_files.files_made import SOME, peft_file, peft_state, rewritten

# ---- refusals


@pytest.fixture(scope="module")
def lora_tensors(adapted) -> dict[str, torch.Tensor]:
    return peft_state(adapted("lora"))


def broken(case: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    a, b = f"{SOME}.lora_A.weight", f"{SOME}.lora_B.weight"
    if case == "half":
        del tensors[b]
    elif case == "not finite":
        tensors[a] = torch.full_like(tensors[a], float("nan"))
    elif case == "unknown key":
        tensors[f"{SOME}.lora_C.weight"] = torch.ones(2)
    elif case == "oft":
        tensors = {f"{SOME}.oft_R.weight": torch.ones(2, 2)}
    elif case == "bias":
        tensors[f"{SOME}.lora_B.bias"] = torch.ones(2)
    elif case == "other component":
        tensors = {key.replace("unet.", "transformer.", 1): tensor for key, tensor in tensors.items()}
    elif case == "other layer":
        tensors = {key.replace("down_blocks.1", "down_blocks.7"): tensor for key, tensor in tensors.items()}
    elif case == "second text encoder":
        tensors = {
            key.replace("text_encoder.", "text_encoder_2.", 1): tensor for key, tensor in tensors.items()
        }
    elif case == "twice":
        tensors[f"{SOME}.lora.down.weight"] = tensors[a].clone()
    elif case == "two kinds":
        tensors[f"{SOME}.hada_w1_a"] = torch.ones(64, 2)
    elif case == "other rank":
        tensors[b] = torch.ones(64, 3)
    elif case == "stable diffusion 2":
        is_cross = [key for key in tensors if "attn2.to_k.lora_A" in key or "attn2.to_v.lora_A" in key]
        tensors |= {key: torch.ones(4, 1024) for key in is_cross}
    elif case == "alpha 0":
        tensors[f"{SOME}.alpha"] = torch.zeros(())
    elif case == "magnitude of inputs":
        tensors[f"{SOME}.dora_scale"] = torch.ones(1, 32)
    elif case == "an embedding":
        tensors["string_to_param.*"] = torch.ones(2, 32)
    elif case == "a star in a layer":
        tensors |= {
            key.replace("to_k", "*"): tensor.clone() for key, tensor in tensors.items() if "to_k" in key
        }
    elif case == "whole numbers":
        tensors[a] = tensors[a].long()
    return tensors


REFUSALS = {
    "half": rf"{SOME} has only down; that is not a complete LoRA",
    "not finite": rf"{SOME}\.lora_A\.weight has values that are not finite",
    "unknown key": r"1 of \d+ keys belong to no kind of adapter that is supported, e\.g\. .*lora_C",
    "oft": "OFT",
    "bias": "a trained bias",
    "other component": "keys are for no layer of this base",
    "other layer": "keys are for no layer of this base",
    "second text encoder": "it has no text_encoder_2",
    "twice": r"has its \w+ twice, in two spellings",
    "two kinds": "is not a complete LoRA, LoHa or LoKr",
    "other rank": r"its up has shape \(64, 3\); for this layer of \(64, 32\) it must be of shape \(64, 4\)",
    "stable diffusion 2": (
        r"another base: its UNet takes text of width 1024 \(Stable Diffusion 2\.x\), this one's 32"
    ),
    "alpha 0": "alpha must be one number other than 0, up to a million",
    "magnitude of inputs": "magnitudes of inputs",
    "whole numbers": "has dtype I64; it must be one of BF16, F16",
    "an embedding": r"e\.g\. string_to_param\.\*: an embedding \(textual inversion\)",
    "a star in a layer": r"belong to no kind of adapter that is supported, e\.g\. .*\*",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_file_is_taken_whole_or_refused_in_one_line(case, lora_tensors, base, tmp_path):
    save_file(broken(case, lora_tensors), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=REFUSALS[case]) as caught:
        reading.read_additive(tmp_path / "a.safetensors", base)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_file_without_tensors_is_no_adapter(base, tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the adapter is empty"):
        reading.read_additive(tmp_path / "a.safetensors", base)
    with pytest.raises(UserError, match="the adapter is empty"):
        writing.write_native(Adapter({}, {}), {})


def test_a_folder_without_an_adapter_says_what_it_holds(base, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no adapter is in this folder, which holds notes\.txt"):
        reading.read_additive(tmp_path, base)
    with pytest.raises(UserError, match="there is no such file"):
        reading.read_additive(tmp_path / "absent.safetensors", base)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json and no adapter_model\.safetensors"):
        reading.read_additive(tmp_path, base)


METADATA = {
    "no JSON": ("[", "its metadata about the LoRA: not JSON: "),
    "other kind": ('{"unet.peft_type": "OFT"}', "has peft_type = 'OFT'"),
    "other rank": ('{"unet.r": 5, "unet.lora_alpha": 5}', "has rank 4, but its metadata has 5"),
    "odd alpha": (
        '{"unet.r": 4, "unet.lora_alpha": "much"}',
        "has lora_alpha = 'much'; it must be a number other than 0",
    ),
    "pissa": ('{"unet.r": 4, "unet.init_lora_weights": "pissa"}', "leaves the base's weights alone"),
    "trained biases": ('{"unet.r": 4, "unet.bias": "all"}', "bias = 'all'"),
    "a pattern": ('{"unet.r": 4, "unet.rank_pattern": {"(a+)+b": 4}}', "only names of layers are read"),
    "missing layers": (
        '{"unet.r": 4, "unet.target_modules": ["to_k", "conv1"]}',
        r"lacks \d+ of the \d+ layers of unet .*conv1",
    ),
    "half an adapter": (
        '{"unet.r": 4, "unet.lora_alpha": 6, "text_encoder.r": 4, "text_encoder_2.r": 4}',
        "has metadata about a text_encoder_2 but no tensor of it; the adapter is incomplete",
    ),
    "no component": (
        '{"r": 4, "lora_alpha": 6}',
        "its metadata has r, which is for no part of this adapter of text_encoder and unet",
    ),
    "another component": (
        '{"unet.r": 4, "transformer.lora_alpha": 6}',
        r"its metadata has transformer\.lora_alpha, which is for no part",
    ),
    "transposed": ('{"unet.fan_in_fan_out": true}', "fan_in_fan_out"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_change_the_meaning_are_refused(case, lora_tensors, base, tmp_path):
    text, message = METADATA[case]
    save_file(lora_tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=message):
        reading.read_additive(tmp_path / "a.safetensors", base)


def test_values_that_half_precision_cannot_hold_are_not_written():
    adapter = Adapter({"unet": {"conv_in": Lora(torch.full((1, 4), 1e6), torch.ones(4, 1))}}, {})
    with pytest.raises(UserError, match="not finite in float16"):
        writing.write_kohya(adapter, "sd1", {}, torch.float16)


def test_damaged_files_are_refused_or_read_and_never_crash(adapted, base, tmp_path):
    """A hundred files with bytes changed, mostly in the header, which names and measures everything."""
    source = reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted("lokr cp")), base)
    whole = [rewritten(source, layout) for layout in ("native", "kohya")]
    draw = random.Random(0)
    outcomes = {True: 0, False: 0}
    for n in range(100):
        data = bytearray(whole[n % 2])
        header = int.from_bytes(data[:8], "little")
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(8 + header) if draw.random() < 0.9 else draw.randrange(len(data))
            data[place] = draw.choice(
                (data[place] ^ 1 << draw.randrange(8), ord(draw.choice('019{}[]",:._ab')))
            )
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
        (tmp_path / "damaged.safetensors").write_bytes(data)
        message = ""
        try:
            reading.read_additive(tmp_path / "damaged.safetensors", base)
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        outcomes[not message] += 1
    assert outcomes[False] > 60  # most damage is found, and not because everything is refused:
    assert reading.read_additive(peft_file(tmp_path / "peft.safetensors", adapted("lora")), base)
