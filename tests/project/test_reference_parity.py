"""Command lines of diffusers' DreamBooth-LoRA scripts work here unchanged.

docs/reference-parity.md names the test of each flag and each defect; tests of other files are not repeated.
"""

import importlib.util
import json
import re
import shutil
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dreambooth.bases import prompts
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.resolved import resolve
from dreambooth.options.training import TrainOptions
from dreambooth.training import frozen_models, trackers
from tests import tiny
from tests.options.reference import REFERENCE, TRAIN, flat, pretend_everything_is_installed
from tests.project.reference_runs import ROOT, TWO_STEPS, checkpoints_in, records, run, spy

# --- the reference's own tests, command line for command line


@pytest.mark.trains
@pytest.mark.parametrize(
    ("base", "words", "parts"),
    [
        ("tiny_base", TWO_STEPS, "unet"),
        ("tiny_base", f"{TWO_STEPS} --train_text_encoder", "text_encoder unet"),
        (
            "tiny_base",
            f"{TWO_STEPS} --train_text_encoder --text_encoder_use_attention_mask",
            "text_encoder unet",
        ),
        (
            "tiny_if",
            f"{TWO_STEPS} --pre_compute_text_embeddings --tokenizer_max_length=77"
            " --text_encoder_use_attention_mask",
            "unet",
        ),
        ("tiny_xl", TWO_STEPS, "unet"),
        ("tiny_xl", f"{TWO_STEPS} --train_text_encoder", "text_encoder text_encoder_2 unet"),
        ("tiny_xl", f"--do_edm_style_training {TWO_STEPS}", "unet"),
        ("tiny_edm", TWO_STEPS, "unet"),
    ],
)
def test_each_family_trains_an_adapter_that_plain_diffusers_loads(
    base, words, parts, photos_dir, tmp_path, request
):
    folder = request.getfixturevalue(base)
    state = load_file(run(folder, photos_dir, tmp_path, words))
    assert all("lora" in key for key in state)
    assert sorted({key.split(".")[0] for key in state}) == parts.split()
    assert all(tensor.abs().max() > 0 for tensor in state.values())
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    assert sorted(name for name, there in pipeline.get_list_adapters().items() if there) == parts.split()


@pytest.mark.trains
@pytest.mark.parametrize("more", ["", "--train_text_encoder"])
def test_captions_of_a_data_set_are_trained_on(more, tiny_xl, tmp_path, monkeypatch):
    data = tiny.make_photos(tmp_path / "data" / "train")
    rows = [{"file_name": f"photo-{n}.png", "text": f"dog number {n}"} for n in range(3)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[str] = []
    spy(
        monkeypatch,
        frozen_models.FrozenModels,
        "prompt_inputs",
        lambda result, self, asked: seen.extend(asked),
    )
    words = f"--caption_column text {TWO_STEPS} --train_batch_size 3 {more}"
    run(tiny_xl, tmp_path / "data", tmp_path / "out", words, "--dataset_name")
    assert set(seen) == {row["text"] for row in rows}


@pytest.mark.trains
@pytest.mark.parametrize(
    ("base", "steps", "words", "draws"),
    [
        ("tiny_base", 6, "", 0),
        ("tiny_xl", 6, "--learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0", 1),
        (
            "tiny_xl",
            7,
            "--train_text_encoder --learning_rate 5.0e-04 --scale_lr"
            " --lr_scheduler constant --lr_warmup_steps 0",
            2,
        ),
    ],
)
def test_the_limit_on_checkpoints_keeps_the_last_two(
    base, steps, words, draws, photos_dir, tmp_path, request
):
    folder = request.getfixturevalue(base)
    run(
        folder,
        photos_dir,
        tmp_path,
        f"--max_train_steps={steps} --checkpointing_steps=2 --checkpoints_total_limit=2 {words}",
    )
    assert checkpoints_in(tmp_path) == {"checkpoint-4", "checkpoint-6"}
    if draws:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(tmp_path)
        assert len(pipeline("a prompt", num_inference_steps=draws, output_type="latent").images) == 1


@pytest.mark.trains
def test_a_resumed_run_with_a_lower_limit_removes_several_checkpoints(tiny_base, photos_dir, tmp_path):
    run(tiny_base, photos_dir, tmp_path, "--max_train_steps=4 --checkpointing_steps=2")
    assert checkpoints_in(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    more = "--max_train_steps=8 --resume_from_checkpoint=checkpoint-4 --checkpoints_total_limit=2"
    run(tiny_base, photos_dir, tmp_path, f"{more} --checkpointing_steps=2")
    assert checkpoints_in(tmp_path) == {"checkpoint-6", "checkpoint-8"}


# --- flags


@pytest.mark.parametrize(
    "words",
    [
        "--resolution=512 --train_batch_size=1 --checkpointing_steps=100 --learning_rate=1e-4"
        " --report_to=wandb --seed=0 --push_to_hub",
        "--report_to wandb --resolution=64 --train_batch_size=4 --learning_rate=5e-6 --scale_lr"
        " --validation_prompt=dog --validation_epochs=25"
        " --pre_compute_text_embeddings --tokenizer_max_length=77 --text_encoder_use_attention_mask",
        "--pretrained_vae_model_name_or_path=vae --mixed_precision=fp16 --resolution=1024"
        " --gradient_accumulation_steps=4 --use_8bit_adam",
        "--optimizer=prodigy --learning_rate=1.0 --text_encoder_lr=1.0 --train_text_encoder"
        " --prodigy_safeguard_warmup True --snr_gamma=5.0",
    ],
)
def test_documented_command_lines_are_taken(words, monkeypatch):
    """Those of the reference's README files, without their paths and prompts."""
    pretend_everything_is_installed(monkeypatch)
    assert parse(TrainOptions, "", [*TRAIN, *words.split()])


def test_the_flags_of_the_xl_script_have_its_defaults():
    ours = flat(
        resolve(
            parse(TrainOptions, "", [*TRAIN, "--train_text_encoder"]), "sdxl", seed=0, mixed_precision="no"
        )
    )
    theirs: dict[str, Any] = {
        "resolution": 1024,
        "repeats": 1,
        "image_column": "image",
        "learning_rate": 1e-4,
        "text_encoder_lr": 5e-6,
    }
    theirs |= {"adam_weight_decay": 1e-4, "adam_weight_decay_text_encoder": 1e-3}
    theirs |= dict.fromkeys(
        ("prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"), True
    )
    theirs |= dict.fromkeys(
        ("random_flip", "do_edm_style_training", "output_kohya_format", "use_dora"), False
    )
    theirs |= dict.fromkeys(
        [
            "pretrained_vae_model_name_or_path",
            "dataset_name",
            "cache_dir",
            "caption_column",
            "snr_gamma",
            "prodigy_beta3",
        ]
    )
    assert {name: ours[name] for name in theirs} == theirs
    spoken = parse(TrainOptions, "", [*TRAIN, "--optimizer", "AdamW", "--prodigy_decouple", "False"])
    assert (ours["optimizer"], spoken.optimization.optimizer, spoken.optimization.prodigy_decouple) == (
        "adamw",
        "adamw",
        False,
    )
    assert resolve(spoken, "if", seed=0, mixed_precision="no").instance.resolution == 64


@pytest.mark.trains
@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ("--lr_scheduler constant_with_warmup --lr_warmup_steps 2", [0, 0.5, 1, 1]),
        ("--lr_scheduler polynomial --lr_power 2 --lr_warmup_steps 0", [1, 0.5625, 0.25, 0.0625]),
        ("--lr_scheduler cosine_with_restarts --lr_num_cycles 2 --lr_warmup_steps 0", [1, 0.5, 1, 0.5]),
    ],
)
def test_the_schedule_s_flags_give_its_rates(words, rates, tiny_base, photos_dir, tmp_path):
    run(tiny_base, photos_dir, tmp_path, f"--max_train_steps 4 --learning_rate 1 {words}")
    assert [record["lr"] for record in records(tmp_path)] == pytest.approx(rates, abs=1e-6)


@pytest.mark.trains
def test_variant_tokenizer_and_vae_come_from_where_the_flags_say(tiny_base, photos_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    shutil.move(base / "tokenizer", tmp_path / "words")
    shutil.copytree(base / "vae", tmp_path / "vae")
    for path in [
        path for part in ("unet", "text_encoder", "vae") for path in (base / part).glob("*.safetensors")
    ]:
        path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(UserError, match="tokenizer"):
        run(base, photos_dir, tmp_path / "out", f"{TWO_STEPS} --variant fp16")
    named = f"--variant fp16 --tokenizer_name {tmp_path / 'words'} --seed 1"
    named += f" --pretrained_vae_model_name_or_path {tmp_path / 'vae'}"
    there = load_file(run(base, photos_dir, tmp_path / "out", f"{TWO_STEPS} {named}"))
    plain = load_file(run(tiny_base, photos_dir, tmp_path / "plain", f"{TWO_STEPS} --seed 1"))
    assert all(torch.equal(there[key], plain[key]) for key in plain)


@pytest.mark.trains
def test_numbers_reach_what_they_are_for(tiny_base, photos_dir, tmp_path, monkeypatch, capsys):
    norms: list[float] = []

    def note_norm(result: Any, optimizer: torch.optim.Optimizer) -> None:
        norms.append(
            float(
                torch.nn.utils.get_total_norm(
                    [p.grad for group in optimizer.param_groups for p in group["params"]]
                )
            )
        )

    spy(monkeypatch, torch.optim.AdamW, "step", note_norm)
    lengths: set[int] = set()
    spy(monkeypatch, prompts.TextParts, "tokenize", lambda result, *asked: lengths.add(result[0].shape[1]))
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        run(
            tiny_base,
            photos_dir,
            tmp_path,
            "--max_train_steps 1 --max_grad_norm 0.001 --tokenizer_max_length 10 --resolution 72"
            " --allow_tf32",
        )
        assert norms == [pytest.approx(0.001, rel=1e-3)]
        assert (lengths, matmul.allow_tf32) == ({10}, True)
    finally:
        matmul.allow_tf32 = before
    assert "3 of 3 photos are smaller than --resolution 72" in capsys.readouterr().out


@pytest.mark.trains
@pytest.mark.parametrize(
    "when",
    ["--validation_epochs 2 --num_validation_images 2", "--validation_steps 3 --num_validation_images 1"],
)
def test_validation_comes_when_the_flags_say(when, tiny_base, photos_dir, tmp_path):
    """Three photos, so a pass is three steps. Pictures come before the first step; then after the first pass
    and every second one from there, or every three steps.
    """
    run(tiny_base, photos_dir, tmp_path, f"--num_train_epochs 4 --validation_prompt dog {when}")
    steps, count = ((0, 3, 9), 2) if "epochs" in when else ((0, 3, 6, 9), 1)
    assert sorted(path.name for path in (tmp_path / "validation").glob("step-*")) == [
        f"step-{s:06d}-0{n}.png" for s in steps for n in range(count)
    ]


@pytest.mark.trains
def test_trackers_write_to_the_logging_folder_and_never_the_token(
    tiny_base, photos_dir, tmp_path, monkeypatch, capfd
):
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        assert "tensorboard is not installed" in trackers.installed("tensorboard")[1][0]
    pytest.importorskip("tensorboard", reason="tensorboard is an optional extra")
    run(
        tiny_base,
        photos_dir,
        tmp_path,
        f"{TWO_STEPS} --logging_dir records --report_to tensorboard --hub_token hf_SeCrEt",
    )
    assert list((tmp_path / "records" / "dreambooth-lora").rglob("events*"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_SeCrEt" in path.read_bytes()]
    assert "hf_SeCrEt" not in "".join(capfd.readouterr())


def test_the_page_has_every_flag_and_every_defect_and_names_tests_that_exist():
    page = (ROOT / "docs" / "reference-parity.md").read_text()
    flags, _, defects = page.partition("\n## Defects")
    assert set(REFERENCE) <= set(re.findall(r"^\| `--(\w+)` \|.*::test_", flags, re.MULTILINE))
    assert re.findall(r"^\| (\d+) \|", defects, re.MULTILINE) == [str(number) for number in range(1, 36)]
    rows = [
        line
        for line in defects.splitlines()
        if re.match(r"\| \d+ \||\| [a-z]", line) and "::test_" not in line
    ]
    assert rows == []
    named = set(re.findall(r"`(tests/\w+/test_\w+\.py)::(test_\w+)`", page))
    assert len(named) > 60
    assert page.count("::test_") == len(re.findall(r"`tests/\w+/test_\w+\.py::test_\w+`", page))
    for file, test in sorted(named):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"
