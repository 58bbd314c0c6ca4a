"""Kinds of adapters in training: what each adds, where, how much, and that every promise of a run holds for
each."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from dreambooth.adapters import inject
from dreambooth.bases import loading
from dreambooth.io.errors import UserError
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from tests.running import adapter_after, metrics, run_train

FILE = "pytorch_lora_weights.safetensors"
KINDS = {
    "lora": [],
    "dora": ["--use_dora", "--lora_alpha", "8"],
    "rslora": ["--use_rslora", "--rank", "8"],
    "loha": ["--adapter", "loha", "--lora_alpha", "6"],
    "loha cp": ["--adapter", "loha", "--use_effective_conv2d", "--target_preset", "full"],
    "lokr": ["--adapter", "lokr", "--lora_alpha", "6"],
    "lokr both": ["--adapter", "lokr", "--decompose_both", "--rank", "1", "--target_preset", "full"],
    "oft": ["--adapter", "oft", "--oft_block_size", "16"],
    "boft": ["--adapter", "boft"],
    "hra": ["--adapter", "hra"],
}
FULL_SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
# Trainable parameters on the UNet of Stable Diffusion 1.5, by kind, rank and layers.
COUNTS = {
    ("lora", 8, "attn_ff"): 3_391_488,
    ("lora", 4, "full"): 4_203_264,
    ("dora", 4, "attn"): 897_024,
    ("loha", 4, "attn"): 1_594_368,
    ("loha cp", 4, "full"): 4_877_888,
    ("lokr", 4, "attn"): 106_496,
    ("lokr cp", 8, "full"): 391_408,
    ("lokr both", 4, "attn"): 56_000,
    ("oft", None, "attn"): 1_541_568,
    ("hra", 8, "attn"): 795_648,
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def options_of(kind: str, **others) -> AdapterOptions:
    name = kind.split()[0]
    if name == "dora":
        return AdapterOptions(use_dora=True, **others)
    extra = (
        {"use_effective_conv2d": True}
        if kind.endswith("cp")
        else {"decompose_both": True}
        if kind.endswith("both")
        else {}
    )
    return AdapterOptions(adapter=name, **extra, **others)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sd15() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**FULL_SD15)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank", "preset"), COUNTS, ids=str)
def test_parameters_at_full_size_are_the_known_ones(kind, rank, preset):
    options = options_of(kind, target_preset=preset, **({} if rank is None else {"rank": rank}))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SD15)
        component = inject.inject("unet", unet, options, inject.unet_targets(options), seed=0)
    assert sum(p.numel() for _, p in component.named_parameters()) == COUNTS[kind, rank, preset]


@pytest.mark.parametrize(("preset", "modules"), [("attn", 128), ("attn_ff", 192), ("full", 278)])
def test_presets_have_the_known_layers(preset, modules, sd15):
    shapes = {
        name: tuple(m.weight.shape)
        for name, m in sd15.named_modules()
        if isinstance(getattr(m, "weight", None), torch.Tensor)
    }
    assert len(inject.layers_at(inject.unet_targets(AdapterOptions(target_preset=preset)), shapes)) == modules


@pytest.mark.trains
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_moves_and_resumes_exactly_and_a_dry_run_counts_what_it_trains(
    kind, tiny_base, photos_dir, tmp_path, capsys
):
    """That it starts as the base is the next test."""
    words = [*KINDS[kind], "--train_text_encoder", "--num_threads", "1", "--checkpointing_steps", "1"]
    run_train(tiny_base, photos_dir, tmp_path / "dry", *words, "--dry_run")
    counted = parameters_in(capsys.readouterr().out)
    whole = run_train(tiny_base, photos_dir, tmp_path / "whole", *words, "--max_train_steps", "3")
    assert parameters_in(capsys.readouterr().out) == counted
    assert len(counted) == 2
    resume = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")]
    resumed = run_train(
        tiny_base, photos_dir, tmp_path / "resumed", *words, "--max_train_steps", "3", *resume
    )
    assert digest(resumed) == digest(whole)
    before, after = load_file(adapter_after(tmp_path / "whole", 1)), load_file(whole)
    assert before.keys() == after.keys()
    for component in ("unet", "text_encoder"):
        assert any(
            not torch.equal(before[key], after[key]) for key in before if key.startswith(f"{component}.")
        ), component


def parameters_in(said: str) -> list[list[str]]:
    """Component, modules and parameters of each line of the table that a run prints at its start."""
    lines = [line.split() for line in said.splitlines() if line.startswith(("unet", "text_encoder"))]
    return [line[:3] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("oft", "boft", "hra"))])
def test_the_adapted_model_is_the_base_bit_for_bit_at_the_start(kind, tiny_base):
    parsed = parse(
        TrainOptions,
        "",
        [
            "--pretrained_model_name_or_path",
            "b",
            "--instance_data_dir",
            "d",
            "--instance_prompt",
            "p",
            *KINDS[kind],
        ],
    )
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet").eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.randn(2, 7, 32)
    with torch.no_grad():
        before = unet(*inputs).sample
        inject.inject("unet", unet, parsed.adapter, inject.unet_targets(parsed.adapter), seed=0)
        assert torch.equal(unet(*inputs).sample, before)


@pytest.mark.slow
def test_the_scale_is_worked_into_the_file_for_every_kind_that_has_one(tiny_base):
    for kind in ("lora", "dora", "loha", "lokr"):
        unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
        options = options_of(kind, lora_alpha=12)
        component = inject.inject("unet", unet, options, inject.unet_targets(options), seed=0)
        with torch.no_grad():
            for _, parameter in component.named_parameters():
                parameter.normal_()
        raw = {name: parameter.clone() for name, parameter in component.named_parameters()}
        state = {key: tensor.clone() for key, tensor in component.state_dict().items()}
        assert inject.metadata(component)["lora_alpha" if kind in ("lora", "dora") else "alpha"] == 4
        tripled = [
            key
            for key in state
            if any(
                torch.allclose(state[key], 3 * value)
                for value in raw.values()
                if value.shape == state[key].shape
            )
        ]
        assert len(tripled) == len({inject.module_of(key) for key in state}), kind  # one factor a layer
        component.load_state_dict(state)
        assert all(
            torch.allclose(parameter, raw[name], rtol=1e-6)
            for name, parameter in component.named_parameters()
        )


@pytest.mark.trains
def test_dora_of_unet_and_text_encoder_loads_in_plain_diffusers(tiny_base, photos_dir, tmp_path):
    path = run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        "--use_dora",
        "--train_text_encoder",
        "--max_train_steps",
        "2",
        "--learning_rate",
        "1e-2",
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    found = dict(pipeline.text_encoder.named_parameters()) | dict(pipeline.unet.named_parameters())
    magnitudes = {
        key: tensor for key, tensor in load_file(path).items() if key.endswith("lora_magnitude_vector.weight")
    }
    assert {key.split(".")[0] for key in magnitudes} == {"unet", "text_encoder"}
    for key, tensor in magnitudes.items():
        name = key.partition(".")[2].removeprefix("text_model.").removesuffix(".weight")
        (own,) = [value for other, value in found.items() if name in other]
        assert torch.equal(own.detach(), tensor), key


# --- parts


@pytest.mark.trains
def test_ranks_and_learning_rates_of_parts(tiny_base, photos_dir, tmp_path):
    words = [
        "--rank_pattern",
        "unet.up_blocks=8,text_encoder=2",
        "--lr_pattern",
        "mid_block=0,text_encoder=1e-6",
        "--train_text_encoder",
    ]
    path = run_train(tiny_base, photos_dir, tmp_path, *words, "--max_train_steps", "2")
    state = load_file(path)
    for key, tensor in state.items():
        if "lora_A" in key:
            assert tensor.shape[0] == (
                2 if key.startswith("text_encoder") else 8 if ".up_blocks." in key else 4
            ), key
    moved = {key: bool(tensor.any()) for key, tensor in state.items() if "lora_B" in key}
    assert not any(moved[key] for key in moved if ".mid_block." in key)
    assert all(moved[key] for key in moved if ".mid_block." not in key)
    assert metrics(tmp_path)[0]["lr_text_encoder:1e-06"] == 1e-6
    fields = json.loads(adapter_metadata(path)["lora_adapter_metadata"])
    assert set(fields["unet.rank_pattern"].values()) == {8}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)  # mixed ranks are read by plain diffusers


def adapter_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.trains
def test_the_text_encoder_has_its_own_rank_alpha_and_layers(tiny_base, photos_dir, tmp_path):
    words = [
        "--text_encoder_rank",
        "2",
        "--text_encoder_alpha",
        "4",
        "--text_encoder_layers",
        "q_proj,fc1",
        "--lora_layers",
        "to_q,attn2.to_k",
    ]
    state = load_file(
        run_train(tiny_base, photos_dir, tmp_path, *words, "--train_text_encoder", "--max_train_steps", "1")
    )
    assert {
        key.split(".lora_")[0].rpartition(".")[2] for key in state if key.startswith("text_encoder.")
    } == {"q_proj", "fc1"}
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in state if key.startswith("unet.")} == {
        "to_q",
        "to_k",
    }
    assert not any("attn1.to_k" in key for key in state)
    assert {
        tensor.shape[0]
        for key, tensor in state.items()
        if key.startswith("text_encoder.") and "lora_A" in key
    } == {2}


@pytest.mark.trains
def test_layers_of_the_text_encoder_that_are_not_used_are_left_out_however_they_are_named(
    tiny_xl, photos_dir, tmp_path
):
    """Of Stable Diffusion XL's first encoder the last layer changes nothing."""
    words = [
        "--train_text_encoder",
        "--text_encoder_layers",
        "self_attn.q_proj,fc1",
        "--max_train_steps",
        "1",
        "--resolution",
        "64",
    ]
    state = load_file(run_train(tiny_xl, photos_dir, tmp_path, *words))
    layers = {key.split(".lora_")[0] for key in state if key.startswith("text_encoder.")}
    first = "text_encoder.text_model.encoder.layers"
    assert layers == {f"{first}.{n}.{end}" for n in (0, 1) for end in ("self_attn.q_proj", "mlp.fc1")}
    assert sum(key.startswith("text_encoder_2.") and "lora_A" in key for key in state) == 6


def test_rslora_has_one_scale_for_all_ranks(tiny_base):
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    options = AdapterOptions(use_rslora=True, rank_pattern="to_q=16")
    inject.inject("unet", unet, options, inject.unet_targets(options), seed=0)
    assert {
        round(float(module.scaling["default"]), 6) for module in unet.modules() if hasattr(module, "scaling")
    } == {2.0}


# --- without weights


def test_a_dry_run_prints_the_counts_loads_no_weights_and_leaves_nothing(
    tiny_base, photos_dir, tmp_path, capsys, no_models
):
    out = tmp_path / "out"
    run_train(tiny_base, photos_dir, out, "--dry_run", "--train_text_encoder", "--rank", "2")
    said = capsys.readouterr().out
    assert "unet" in said
    assert "text_encoder" in said
    assert "adapter file" in said
    assert not out.exists()


# --- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--adapter", "oft", "--target_preset", "full"],
            "3 x 3 convolutions, which --adapter oft cannot rotate",
        ),
        (
            ["--adapter", "oft", "--rank", "8"],
            "--rank does not work with --adapter oft; give --oft_block_size",
        ),
        (["--adapter", "hra", "--rank", "3"], "--rank must be even with --adapter hra, got 3"),
        (["--adapter", "hra", "--apply_gs"], "--apply_gs cannot be trained: the product of"),
        (["--adapter", "lokr", "--use_dora"], "--use_dora only works with --adapter lora"),
        (
            ["--adapter", "boft", "--lora_alpha", "4"],
            "--lora_alpha only works with --adapter lora, loha or lokr",
        ),
        (["--decompose_factor", "4"], "--decompose_factor only works with --adapter lokr"),
        (
            ["--adapter", "lokr", "--decompose_factor", "0"],
            "--decompose_factor must be -1 or at least 1, got 0",
        ),
        (["--boft_block_size", "8"], "--boft_block_size only works with --adapter boft"),
        (["--text_encoder_rank", "2"], "--text_encoder_rank needs --train_text_encoder"),
        (
            ["--rank_pattern", "up_blocks"],
            "--rank_pattern must be PART=NUMBER, separated by commas, got 'up_blocks'",
        ),
        (["--rank_pattern", "up_blocks=1.5"], "--rank_pattern must be PART=NUMBER"),
        (["--lr_pattern", "up_blocks=-1"], "--lr_pattern must be PART=NUMBER"),
        (
            ["--adapter", "oft", "--output_kohya_format"],
            "--output_kohya_format only works with --adapter lora, loha or lokr",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_do_not_go_together_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(
            TrainOptions,
            "",
            [
                "--pretrained_model_name_or_path",
                "b",
                "--instance_data_dir",
                "d",
                "--instance_prompt",
                "p",
                *words,
            ],
        )
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--rank_pattern", "up_block=8"],
            "--rank_pattern: no trained layer has up_block in its name; there are up_blocks",
        ),
        (
            ["--lr_pattern", "unet.mid_blok=1e-4"],
            "--lr_pattern: no trained layer has unet.mid_blok in its name; there are unet.mid_block",
        ),
        (["--lora_layers", "to_qq"], "--lora_layers: no layer of unet ends with to_qq; there are to_q"),
        (
            ["--train_text_encoder", "--text_encoder_layers", "q_prj"],
            "--text_encoder_layers: no layer of text_encoder ends with q_prj; there are q_proj",
        ),
        (
            ["--adapter", "oft", "--lora_layers", "conv1"],
            "is a convolution of more than 1 x 1, which --adapter oft cannot rotate",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_names_that_no_layer_has_are_refused_with_near_ones(
    words, message, tiny_base, photos_dir, tmp_path, no_models
):
    with pytest.raises(UserError) as refused:
        run_train(tiny_base, photos_dir, tmp_path, *words)
    assert message in str(refused.value)


@pytest.mark.trains
def test_an_adapter_of_another_kind_is_not_started_from(tiny_base, photos_dir, tmp_path):
    run_train(tiny_base, photos_dir, tmp_path / "loha", "--adapter", "loha", "--max_train_steps", "1")
    with pytest.raises(UserError, match="is of loha; this run trains lora"):
        run_train(
            tiny_base,
            photos_dir,
            tmp_path / "lora",
            "--init_adapter",
            str(tmp_path / "loha"),
            "--max_train_steps",
            "1",
        )
    again = run_train(
        tiny_base,
        photos_dir,
        tmp_path / "again",
        "--adapter",
        "loha",
        "--init_adapter",
        str(tmp_path / "loha" / FILE),
        "--max_train_steps",
        "1",
    )
    assert again.is_file()


@pytest.mark.trains
def test_an_adapter_of_other_layers_or_of_another_rank_is_not_started_from(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    run_train(
        tiny_base, photos_dir, tmp_path / "wide", "--target_preset", "attn_ff", "--max_train_steps", "1"
    )
    run_train(
        tiny_base,
        photos_dir,
        tmp_path / "text",
        "--train_text_encoder",
        "--text_encoder_rank",
        "2",
        "--max_train_steps",
        "1",
    )
    for name in ("load_encoders", "load_vae", "load_unet"):
        monkeypatch.setattr(loading, name, None)  # found before a model is loaded
    with pytest.raises(
        UserError,
        match=r"--init_adapter: .*wide has 48 layers of unet and this run trains 32.*"
        r"give the same --target_preset",
    ):
        run_train(tiny_base, photos_dir, tmp_path / "new", "--init_adapter", str(tmp_path / "wide"))
    with pytest.raises(
        UserError,
        match=r"--init_adapter: .*text has text_encoder of rank 2; --text_encoder_rank must be the same",
    ):
        run_train(
            tiny_base,
            photos_dir,
            tmp_path / "new",
            "--init_adapter",
            str(tmp_path / "text"),
            "--train_text_encoder",
        )
    with pytest.raises(UserError, match=r"--init_adapter: .*nowhere: there is no such file"):
        run_train(tiny_base, photos_dir, tmp_path / "new", "--init_adapter", "nowhere", "--dry_run")


@pytest.mark.trains
def test_another_start_is_no_way_to_resume(tiny_base, photos_dir, tmp_path):
    words = ["--checkpointing_steps", "1"]
    for seed in ("1", "2"):
        run_train(tiny_base, photos_dir, tmp_path / seed, "--max_train_steps", "1", "--seed", seed)
    run_train(
        tiny_base,
        photos_dir,
        tmp_path / "run",
        *words,
        "--max_train_steps",
        "1",
        "--init_adapter",
        str(tmp_path / "1"),
    )
    more = [
        "--max_train_steps",
        "2",
        "--resume_from_checkpoint",
        "latest",
        "--init_adapter",
        str(tmp_path / "2"),
    ]
    with pytest.raises(UserError, match=r"the adapter of --init_adapter was another one"):
        run_train(tiny_base, photos_dir, tmp_path / "run", *words, *more)
