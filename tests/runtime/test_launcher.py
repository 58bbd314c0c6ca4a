"""Settings of the launcher: what cannot be followed is refused at once, what is ignored is said."""

import os
import subprocess
import sys

import pytest
import yaml

import generate_class_images
import infer
import train_dreambooth_lora as train
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from dreambooth.runtime import launcher, processes
from dreambooth.runtime.stops import Watch
from tests.running import ROOT, train_words

VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
REFUSED = {
    "ACCELERATE_MIXED_PRECISION": ("fp8", "FP8", "int8", ""),
    "ACCELERATE_USE_DEEPSPEED": ("true", "1"),
    "ACCELERATE_USE_FSDP": ("true", "YES"),
    "ACCELERATE_USE_MEGATRON_LM": ("true",),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true",),
    "ACCELERATE_USE_SAGEMAKER": ("true",),
    # what only accelerate itself notices
    "ACCELERATE_DYNAMO_BACKEND": ("no such backend",),
    "ACCELERATE_TORCH_DEVICE": ("no such device",),
    "ACCELERATE_USE_CPU": ("perhaps",),
    "LOCAL_RANK": ("2", "first"),
    "RANK": ("one",),
    "WORLD_SIZE": ("1.5",),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch):
    """No variable of a launcher is set; those that a test leaves behind are removed."""
    for name in {*VARIABLES, *REFUSED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DOWNCAST_BF16"}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in REFUSED.items() for v in values])
def test_a_setting_that_cannot_be_followed_is_refused(name: str, value: str, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        processes.join(Watch(), peer_timeout=4)
    assert name in str(raised.value) or "accelerate cannot start" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", ["false", "0", "no", ""])
def test_a_setting_that_is_off_is_no_fault(value: str, monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        monkeypatch.setenv(name, value)
    launcher.check(None)
    assert launcher.notes() == []


def test_the_precision_of_the_command_line_replaces_the_launchers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert (
        processes.join(Watch(), peer_timeout=4, mixed_precision="bf16").accelerator.mixed_precision == "bf16"
    )


@pytest.mark.parametrize(
    "script", [train, generate_class_images, infer], ids=["train", "class images", "infer"]
)
def test_every_script_refuses_before_a_model_is_loaded(
    script, tiny_base, photos_dir, tmp_path, no_models, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    out = tmp_path / "out"
    base = ["--pretrained_model_name_or_path", str(tiny_base)]
    options = {
        train: parse(TrainOptions, "", train_words(tiny_base, photos_dir, out)),
        infer: parse(InferOptions, "", [*base, "--prompt", "a dog", "--output_dir", str(out)]),
        generate_class_images: parse(
            ClassImageOptions, "", [*base, "--class_prompt", "a dog", "--class_data_dir", str(out)]
        ),
    }
    with pytest.raises(UserError, match="FSDP"):
        script.main(options[script])
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend INDUCTOR"),
        ("ACCELERATE_DYNAMO_BACKEND", "eager", "dynamo_backend eager"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "gradient_accumulation_steps auto"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "gradient_clipping 0.5"),
        ("ACCELERATE_DOWNCAST_BF16", "true", "downcast_bf16"),
    ],
)
def test_an_ignored_setting_is_said(name: str, value: str, said: str, monkeypatch):
    monkeypatch.setenv(name, value)
    (note,) = launcher.notes()
    assert note.startswith(f"ignored of the launcher's configuration: {said}")


def test_accumulation_that_the_run_has_too_is_not_noted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert launcher.notes(4) == []


def test_one_process_where_several_were_asked_for_is_noted(monkeypatch):
    assert launcher.notes() == []
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert launcher.notes() == []
    monkeypatch.setenv("MASTER_PORT", "29500")
    (note,) = launcher.notes()
    assert "should start several processes and started 1" in note


def test_local_rank_of_old_launchers_is_handed_on_but_never_wins(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    launcher.adopt_local_rank(-1)
    assert "LOCAL_RANK" not in os.environ
    launcher.adopt_local_rank(3)
    assert os.environ["LOCAL_RANK"] == "3"
    launcher.adopt_local_rank(1)
    assert os.environ["LOCAL_RANK"] == "3"


def test_local_rank_without_a_launcher_is_refused_but_for_the_first():
    launcher.adopt_local_rank(0)
    assert "LOCAL_RANK" not in os.environ
    with pytest.raises(UserError, match="--local_rank 3: no launcher started this process"):
        launcher.adopt_local_rank(3)


@pytest.mark.slow
def test_a_configuration_file_of_accelerate_is_told_what_is_ignored(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "NO",
                "mixed_precision": "no",
                "num_processes": 1,
                "use_cpu": True,
                "dynamo_config": {"dynamo_backend": "INDUCTOR"},
            }
        )
    )
    code = "from dreambooth.runtime import launcher\nlauncher.check(None)\nprint(launcher.notes())\n"
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "dynamo_backend INDUCTOR" in printed
