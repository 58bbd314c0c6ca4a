"""Models read from their files: the same numbers as `from_pretrained` gives, once in memory."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from dreambooth.bases import families, folders, loading, weights
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
MODELS = [
    *(("tiny_base", part, kind) for part, kind in {**KINDS, "text_encoder": CLIPTextModel}.items()),
    ("tiny_v_base", "unet", UNet2DConditionModel),
    *(
        ("tiny_xl", part, kind)
        for part, kind in {
            **KINDS,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
        }.items()
    ),
    ("tiny_edm", "vae", AutoencoderKL),
    ("tiny_if", "unet", UNet2DConditionModel),
    ("tiny_if", "text_encoder", T5EncoderModel),
]


def ours(
    base: Path, part: str, kind: type, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    files = folders.weight_files(base, part, variant)
    return loading.load_model(kind, base / part, weights.of_files(files), dtype=dtype, device=CPU)


def theirs(
    base: Path, part: str, kind: Any, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    model = kind.from_pretrained(base, subfolder=part, dtype=dtype, variant=variant, use_safetensors=True)
    return model.to(memory_format=torch.channels_last) if part in KINDS else model


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def assert_same(model: Any, other: Any) -> None:
    """Parameters and buffers, bit for bit, their layout in memory and what is one tensor under two names; and
    the configuration."""
    found, wanted = tensors(model), tensors(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape, found[name].stride()) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        ), name
        assert torch.equal(found[name], tensor), name
    assert len({id(t) for t in found.values()}) == len({id(t) for t in wanted.values()})
    assert model.state_dict().keys() == other.state_dict().keys()
    configs = [
        {**m.config.to_dict()} if hasattr(m.config, "to_dict") else dict(m.config) for m in (model, other)
    ]
    for config in configs:
        for field in ("_name_or_path", "architectures", "use_attention_mask"):
            config.pop(field, None)
    assert configs[0] == configs[1]


def asked(part: str, model: Any) -> torch.Tensor:
    """What the model answers to some input."""
    dtype, draw = next(model.parameters()).dtype, torch.Generator().manual_seed(0)
    with torch.no_grad():
        if part == "vae":
            return model.decode(
                model.encode(torch.randn(1, 3, 32, 32, generator=draw).to(dtype)).latent_dist.mean
            ).sample
        if part != "unet":
            return model(torch.arange(1, 8)[None], output_hidden_states=True)[0]
        c = model.config
        text = torch.randn(1, 7, c.encoder_hid_dim or c.cross_attention_dim, generator=draw).to(dtype)
        added = {
            "text_embeds": torch.randn(1, 24, generator=draw).to(dtype),
            "time_ids": torch.ones(1, 6, dtype=dtype),
        }
        sample = torch.randn(1, c.in_channels, 16, 16, generator=draw).to(dtype)
        return model(sample, torch.tensor(3), text, added_cond_kwargs=added).sample


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("base", "part", "kind"), MODELS)
def test_every_model_is_bit_for_bit_that_of_from_pretrained(request, base, part, kind, dtype):
    """T5's `wo` in float32 beside float16 too; and so are its answers. Nothing asks for a gradient, and
    nothing is at an odd address."""
    folder = request.getfixturevalue(base)
    before = torch.get_default_dtype()
    model, other = ours(folder, part, kind, dtype), theirs(folder, part, kind, dtype)
    assert_same(model, other)
    assert not model.training
    assert not any(tensor.requires_grad for tensor in tensors(model).values())
    assert {tensor.data_ptr() % 64 for tensor in tensors(model).values()} == {0}
    assert torch.get_default_dtype() == before
    if dtype != torch.float16 or part.startswith("text"):  # a CPU does not convolve in float16 everywhere
        for tensor in tensors(
            other
        ).values():  # where it lies in the file, its products may have other last bits
            tensor.data = tensor.data.clone()
        assert torch.equal(asked(part, model), asked(part, other))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "part", "kind"), [m for m in MODELS if m[0] in ("tiny_xl", "tiny_if")])
@pytest.mark.parametrize(("variant", "pieces"), [("fp16", False), (None, True), ("fp16", True)])
def test_variants_and_files_in_pieces_are_read_as_from_pretrained_reads_them(
    request, tmp_path, base, part, kind, variant, pieces
):
    """Beside the plain file, which has other numbers."""
    folder = request.getfixturevalue(base)
    shutil.copytree(folder / part, tmp_path / part)
    model = kind.from_pretrained(folder, subfolder=part)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    if pieces and variant is None:
        for path in (tmp_path / part).glob("*.safetensors"):
            path.unlink()
    (model.half() if variant else model).save_pretrained(
        tmp_path / part, variant=variant, max_shard_size="20KB" if pieces else "1GB"
    )
    assert (len(folders.weight_files(tmp_path, part, variant)) > 1) == pieces
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(ours(tmp_path, part, kind, dtype, variant), theirs(tmp_path, part, kind, dtype, variant))


@pytest.mark.parametrize(("part", "kind"), [("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)])
def test_of_a_whole_file_and_pieces_the_one_is_taken_that_from_pretrained_takes(
    tiny_base, tmp_path, part, kind
):
    shutil.copytree(tiny_base / part, tmp_path / part)
    model = kind.from_pretrained(tiny_base, subfolder=part)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    model.save_pretrained(tmp_path / "new", max_shard_size="100KB")
    for path in (tmp_path / "new").glob("*-of-*"):
        shutil.copy(path, tmp_path / part)
    shutil.copy(next((tmp_path / "new").glob("*.index.json")), tmp_path / part)
    assert_same(ours(tmp_path, part, kind), theirs(tmp_path, part, kind))


def rewritten(
    tiny: Path, folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """A copy of a part with other tensors in its file."""
    shutil.copytree(tiny / part, folder / part)
    (path,) = (folder / part).glob("*.safetensors")
    save_file(
        {key: tensor.contiguous() for key, tensor in change(load_file(path)).items()},
        path,
        metadata={"format": "pt"},
    )
    return folder


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_the_attention_of_older_vaes_is_found_under_its_old_names(tiny_base, tmp_path):
    def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            re.sub(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)", lambda m: m[1] + OLD[m[2]], key): tensor
            for key, tensor in state.items()
        }

    folder = rewritten(tiny_base, tmp_path, "vae", renamed)
    assert any(
        ".proj_attn." in key for key in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    )
    assert_same(ours(folder, "vae", AutoencoderKL), theirs(folder, "vae", AutoencoderKL))
    assert_same(ours(folder, "vae", AutoencoderKL), ours(tiny_base, "vae", AutoencoderKL))


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoders_of_older_and_newer_libraries_are_the_same(tiny_xl, tmp_path, kind, prefix):
    """With text_model. before their keys and without, with the numbers of positions, and with the rest of the
    CLIP that they were part of."""
    part = "text_encoder" if kind is CLIPTextModel else "text_encoder_2"

    def older(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        named = {
            key if key.startswith("text_projection") else prefix + key: tensor for key, tensor in bare.items()
        }
        rest = {"vision_model.embeddings.class_embedding": torch.zeros(8), "logit_scale": torch.zeros(1)}
        return named | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]} | (rest if prefix else {})

    folder = rewritten(tiny_xl, tmp_path, part, older)
    assert_same(ours(folder, part, kind), theirs(folder, part, kind))
    assert_same(ours(folder, part, kind), ours(tiny_xl, part, kind))


def test_t5_is_found_under_either_of_the_two_names_of_its_embedding(tiny_if, tmp_path):
    for number, name in enumerate(("shared.weight", "encoder.embed_tokens.weight")):

        def named(state: dict[str, torch.Tensor], name: str = name) -> dict[str, torch.Tensor]:
            return {
                name if key in ("shared.weight", "encoder.embed_tokens.weight") else key: tensor
                for key, tensor in state.items()
            }

        folder = rewritten(tiny_if, tmp_path / str(number), "text_encoder", named)
        assert_same(
            ours(folder, "text_encoder", T5EncoderModel), ours(tiny_if, "text_encoder", T5EncoderModel)
        )


SPOILT: list[tuple[str, type, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = []
for own_part, own_kind, own_key in (
    ("unet", UNet2DConditionModel, "conv_in.bias"),
    ("text_encoder", CLIPTextModel, "final_layer_norm.bias"),
):

    def without(state: dict[str, torch.Tensor], end: str = own_key) -> dict[str, torch.Tensor]:
        return {key: tensor for key, tensor in state.items() if not key.endswith(end)}

    def longer(state: dict[str, torch.Tensor], end: str = own_key) -> dict[str, torch.Tensor]:
        return {
            key: torch.cat([tensor, tensor]) if key.endswith(end) else tensor for key, tensor in state.items()
        }

    SPOILT += [
        (own_part, own_kind, without, rf"they lack \S*{re.escape(own_key)}$"),
        (
            own_part,
            own_kind,
            longer,
            rf"they have \S*{re.escape(own_key)} of shape \(64,\), which must be \(32,\)$",
        ),
        (own_part, own_kind, lambda state: {"a.b": torch.ones(2)}, r"they lack \S+ and \d+ more$"),
    ]


@pytest.mark.parametrize(("part", "kind", "change", "said"), SPOILT)
def test_weights_that_do_not_fit_are_refused_in_one_line(tiny_base, tmp_path, part, kind, change, said):
    """`from_pretrained` makes up those that are missing."""
    with pytest.raises(UserError, match=said) as refusal:
        ours(rewritten(tiny_base, tmp_path, part, change), part, kind)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "kind"),
    [("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)],
)
def test_what_a_file_has_besides_is_left_out_without_a_word(tiny_base, tmp_path, capfd, part, kind):
    folder = rewritten(
        tiny_base,
        tmp_path,
        part,
        lambda state: state | {"odd.one": torch.ones(2), "model_ema.decay": torch.ones(())},
    )
    assert_same(ours(folder, part, kind), ours(tiny_base, part, kind))
    assert capfd.readouterr() == ("", "")


def test_the_message_names_flag_and_folder(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    shutil.rmtree(folder / "unet")
    rewritten(
        tiny_base, folder, "unet", lambda state: {key: state[key] for key in state if key != "conv_out.bias"}
    )
    with pytest.raises(
        UserError,
        match=(
            r"^--pretrained_model_name_or_path: \S*/unet: its weights do not fit its config.json: they lack "
            r"conv_out.bias$"
        ),
    ):
        families.find(BaseOptions(str(folder)))


def test_a_file_that_was_cut_after_its_check_is_refused(tiny_base, tmp_path, monkeypatch):
    shutil.copytree(tiny_base / "unet", tmp_path / "unet")
    (path,) = (tmp_path / "unet").glob("*.safetensors")
    real = weights.of_files

    def cut(files: Any) -> Any:
        found = real(files)
        path.write_bytes(path.read_bytes()[:-1000])
        return found

    monkeypatch.setattr(weights, "of_files", cut)
    with pytest.raises(UserError, match="ends within"):
        ours(tmp_path, "unet", UNet2DConditionModel)


PEAK = """
import resource, sys, torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from dreambooth.bases import folders, loading, weights

torch.set_num_threads(1)
folder = Path(sys.argv[1])
def load(part):
    files = weights.of_files(folders.weight_files(folder, part, None))
    place = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    return loading.load_model(UNet2DConditionModel, folder / part, files, **place)
load("small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load("large")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
def test_a_model_is_in_memory_once_while_it_is_loaded(tiny_base, tmp_path):
    """In its final dtype: at the peak little more than its weights is resident, mapped files counted in."""
    config = json.loads((tiny_base / "unet" / "config.json").read_text()) | {
        "block_out_channels": [160, 320],
        "layers_per_block": 3,
    }
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "large")
    shutil.copytree(tiny_base / "unet", tmp_path / "small")
    root = Path(__file__).parent.parent.parent
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    grown, weights = map(int, result.stdout.split()[-2:])
    assert weights > 40 * 2**20
    assert grown < 1.5 * weights  # mapped and cast, it would be three times as much
