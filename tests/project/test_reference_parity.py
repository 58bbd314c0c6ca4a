"""Command lines of diffusers' DreamBooth-LoRA scripts work here unchanged, and their defects are mended.

docs/reference-parity.md names the test of each flag and each defect; tests of other files are not repeated.
"""

import ast
import dataclasses
import gc
import importlib.util
import json
import os
import re
import shutil
import types
import weakref
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, IFPipeline
from safetensors.torch import load_file

import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.bases import autoencoder, families, loading, pipelines, prompts
from dreambooth.data import batches, encoding_cache, encodings, photos
from dreambooth.data.crops import Crops
from dreambooth.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.resolved import resolve
from dreambooth.options.training import BaseOptions, TextOptions, TrainOptions, pictures_of_pass
from dreambooth.training import frozen_models, metrics, objectives
from tests import tiny
from tests.options.test_options import REFERENCE, TRAIN, flat, pretend_everything_is_installed

ROOT = Path(__file__).parent.parent.parent
COMMON = "--instance_prompt photo --resolution 64 --train_batch_size 1 --gradient_accumulation_steps 1"
TWO_STEPS = (
    "--max_train_steps 2 --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0"
)
PRIOR = "--with_prior_preservation --class_prompt dog --num_class_images 2 --class_data_dir"
DRAWN = "--validation_prompt dog --num_validation_images 1"


def run(base: Path, data: Path, out: Path, words: str, photos_flag: str = "--instance_data_dir") -> Path:
    """Train in this process with the words of a command line, and return the adapter file."""
    line = f"--pretrained_model_name_or_path {base} {photos_flag} {data} --output_dir {out} {COMMON} {words}"
    train.main(parse(TrainOptions, "", line.split()))
    return out / native.ADAPTER_NAME


def checkpoints_in(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if "checkpoint" in name}


def records(out: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "loss" in record]


def spy(monkeypatch, owner: Any, name: str, see: Any) -> None:
    """Call `see` with what `owner.name` is called with, and its result, each time."""
    real = getattr(owner, name)

    def watched(*args: Any, **others: Any) -> Any:
        result = real(*args, **others)
        see(result, *args, **others)
        return result

    monkeypatch.setattr(owner, name, watched)


def refuse(*args: Any, **others: Any) -> None:
    raise AssertionError("this is not to be called")


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
    spy(monkeypatch, frozen_models.FrozenModels, "encode", lambda result, self, asked: seen.extend(asked))
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
    spy(monkeypatch, prompts.TextParts, "tokens", lambda result, *asked: lengths.add(result[0].shape[1]))
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
    """Three photos, so a pass is three steps. Pictures come after the first pass and then after every second
    one, or every three steps.
    """
    run(tiny_base, photos_dir, tmp_path, f"--num_train_epochs 4 --validation_prompt dog {when}")
    steps, count = ((3, 9), 2) if "epochs" in when else ((3, 6, 9), 1)
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == [
        f"step-{s:06d}-0{n}.png" for s in steps for n in range(count)
    ]


@pytest.mark.trains
def test_trackers_write_to_the_logging_folder_and_never_the_token(
    tiny_base, photos_dir, tmp_path, monkeypatch, capfd
):
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        assert "tensorboard is not installed" in metrics.trackers("tensorboard")[1][0]
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


# --- defects: the script for Stable Diffusion


@pytest.mark.trains
@pytest.mark.parametrize("steps", [3, 4], ids=["after a whole pass", "within a pass"])
def test_a_run_resumed_at_its_end_trains_nothing_and_still_draws(steps, tiny_base, photos_dir, tmp_path):
    words = f"--max_train_steps {steps} --checkpointing_steps {steps}"
    before = run(tiny_base, photos_dir, tmp_path, words).read_bytes()
    after = run(
        tiny_base, photos_dir, tmp_path, f"{words} --resume_from_checkpoint latest {DRAWN}"
    ).read_bytes()
    assert after == before
    assert (tmp_path / "image_0.png").is_file()
    assert checkpoints_in(tmp_path) == {f"checkpoint-{steps}"}
    assert len(records(tmp_path)) == steps


@pytest.mark.trains
def test_the_launcher_s_precision_counts_and_what_is_trained_is_float32(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    """In bf16 most of Adam's steps on A would round to nothing."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    final = load_file(
        run(
            tiny_base,
            photos_dir,
            tmp_path,
            "--max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-4 --train_text_encoder",
        )
    )
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["mixed_precision"] == "bf16"
    halfway = load_file(tmp_path / "checkpoint-2" / native.ADAPTER_NAME)
    moments = load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in (*final.values(), *moments.values())} == {torch.float32}
    moved = torch.cat(
        [
            (final[key] != halfway[key]).flatten()
            for key in final
            if key.startswith("unet") and "lora_A" in key
        ]
    )
    assert moved.float().mean() > 0.99
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16 does not work on a CPU"):
        run(tiny_base, photos_dir, tmp_path / "fp16", TWO_STEPS)


@pytest.mark.trains
def test_gradient_checkpointing_trains_both_text_encoders_and_nothing_else_gets_a_gradient(
    tiny_xl, photos_dir, tmp_path, monkeypatch
):
    """And no save asks the hub for the text encoders' configurations."""
    astray: list[str] = []

    def look(result: Any, self: train.Training, *others: Any) -> None:
        for component in self.trainables.components:
            own = {id(parameter) for _, parameter in component.named_parameters()}
            astray.extend(
                name
                for name, p in component.model.named_parameters()
                if p.grad is not None and id(p) not in own
            )

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    spy(monkeypatch, train.Training, "micro_step", look)
    words = f"{TWO_STEPS} --checkpointing_steps 1 --train_text_encoder --seed 1"
    checkpointed = run(tiny_xl, photos_dir, tmp_path / "a", f"{words} --gradient_checkpointing")
    assert checkpointed.read_bytes() == run(tiny_xl, photos_dir, tmp_path / "b", words).read_bytes()
    assert all(tensor.abs().max() > 0 for key, tensor in load_file(checkpointed).items() if "lora_B" in key)
    assert astray == []


@pytest.mark.trains
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_pictures_are_drawn_in_eval_mode_by_the_models_in_memory(
    precision, tiny_base, photos_dir, tmp_path, monkeypatch
):
    """No dropout, no safety checker, autocast in the run's own type, no second pipeline, no UNet in another
    precision, not even at the end.
    """
    seen: list[tuple[Any, ...]] = []

    def look(result: Any, pipeline: Any, *others: Any, **more: Any) -> None:
        dropouts = [module for module in pipeline.unet.modules() if isinstance(module, torch.nn.Dropout)]
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append(
            (
                any(module.training for module in dropouts),
                pipeline.safety_checker,
                autocast,
                pipeline.unet.conv_in.weight.dtype,
            )
        )

    spy(monkeypatch, pipelines, "draw", look)
    monkeypatch.setattr(pipelines, "load_pipeline", refuse)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    loaded: list[Any] = []
    spy(monkeypatch, loading, "load_unet", lambda *args: loaded.append(1))
    words = f"--max_train_steps 4 --mixed_precision {precision} --lora_dropout 0.3 --train_text_encoder"
    run(tiny_base, photos_dir, tmp_path / "a", words)
    assert seen == []
    run(tiny_base, photos_dir, tmp_path / "b", f"{words} {DRAWN} --validation_epochs 1")
    expected = (
        False,
        None,
        *((torch.bfloat16, torch.bfloat16) if precision == "bf16" else (None, torch.float32)),
    )
    assert (seen, loaded) == ([expected, expected], [1, 1])


def test_revision_and_variant_hold_for_every_part(tiny_base, monkeypatch):
    """One snapshot is fetched, and every part is loaded from its folder."""
    asked: list[tuple[str, dict[str, Any]]] = []
    index = json.loads((tiny_base / "model_index.json").read_text())

    def fetch(name: str, **others: Any) -> Any:
        asked.append((name, others))
        return index if len(asked) == 1 else str(tiny_base)

    monkeypatch.setattr(DiffusionPipeline, "load_config", fetch)
    monkeypatch.setattr(DiffusionPipeline, "download", fetch)
    base = families.find(BaseOptions("someone/something", revision="v2"))
    assert [(name, others["revision"]) for name, others in asked] == [("someone/something", "v2")] * 2
    assert (base.folder, asked[1][1]["safety_checker"]) == (tiny_base, None)


def test_second_stage_bases_are_refused(photos_dir, tmp_path, no_models):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "IFSuperResolutionPipeline"}')
    with pytest.raises(UserError, match="IFSuperResolutionPipeline"):
        run(tmp_path / "base", photos_dir, tmp_path / "out", TWO_STEPS)


def test_deepfloyd_prompts_are_prepared_as_its_pipeline_does(tiny_if):
    base = families.find(BaseOptions(str(tiny_if)))
    text = loading.text_without_encoders(base, loading.load_tokenizers(base), TextOptions())
    text.encoders = loading.load_encoders(base, torch.float32, torch.device("cpu"))
    theirs = IFPipeline.from_pretrained(tiny_if, watermarker=None).encode_prompt(
        " A Photo of SKS dog ", do_classifier_free_guidance=False
    )[0]
    with torch.no_grad():
        assert torch.equal(text([" A Photo of SKS dog "]).embeds, theirs)


def test_nothing_asks_for_a_version_or_imports_a_tracker_at_the_start():
    optional = {
        "wandb",
        "comet_ml",
        "tensorboard",
        "bitsandbytes",
        "xformers",
        "prodigyopt",
        "schedulefree",
        "datasets",
    }
    for path in [*ROOT.glob("*.py"), *(ROOT / "dreambooth").glob("*.py")]:
        text = path.read_text()
        assert "check_min_version" not in text
        for node in ast.parse(text).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not optional & {name.split(".")[0] for name in names}, path


@pytest.mark.trains
@pytest.mark.parametrize(("world", "accumulation", "steps"), [(1, 1, 10), (2, 1, 6), (1, 3, 4), (2, 3, 2)])
def test_steps_of_a_pass_are_counted_once_for_all_processes(world, accumulation, steps):
    words = [
        "--train_batch_size",
        "1",
        "--num_train_epochs",
        "2",
        "--gradient_accumulation_steps",
        str(accumulation),
    ]
    run = parse(TrainOptions, "", [*TRAIN, *words]).run
    assert run.steps(10 if world == 1 else 11, world) == (steps, 2 * steps)
    assert pictures_of_pass([3, 50], repeats=100) == 300


# --- defects: the scripts for Stable Diffusion XL


def test_min_snr_of_0_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(TrainOptions, "", [*TRAIN, "--snr_gamma", "0"])
    assert "--snr_gamma must be over 0, got 0.0" in capsys.readouterr().err


@pytest.fixture
def dataset(tmp_path) -> batches.PhotoRows:
    """Three photos, mirrored or not, and five class images, none of them square."""
    folders = (
        tiny.make_photos(tmp_path / "wide", 3, (96, 64)),
        tiny.make_photos(tmp_path / "five", 5, (64, 80), seed=7),
    )
    mine, classes = (photos.check_folder(folder, "--instance_data_dir").photos for folder in folders)
    sources = [
        batches.Source("instance", mine, ["photo"] * 3, random_flip=True),
        batches.Source("class", classes, ["dog"] * 5),
    ]
    return batches.PhotoRows(sources, 1, Crops(64, "lanczos", True))


def test_cached_latents_are_those_of_the_pictures_at_every_step(tiny_base, dataset):
    """Over several passes, with more class images than photos: as without a cache."""
    base, cpu = families.find(BaseOptions(str(tiny_base))), torch.device("cpu")

    def means(encoded: encodings.EncodedPhotos | None, vae: AutoencoderKL | None) -> torch.Tensor:
        words: dict[str, Any] = {"slots": 1, "batch_size": 2, "rank": 0, "world": 1}
        return torch.stack(
            [
                batch.posterior.mean
                for batch in batches.micro_batches(dataset, encoded, vae, range(8), **words)
            ]
        )

    crops = dataclasses.replace(dataset.crops, stride=base.vae_stride)
    pictures = [picture for source in dataset.sources for picture in source.pictures()]
    alone: Any = types.SimpleNamespace(rank=0, world=1, is_main=True)
    cached = means(
        encodings.encode_photos(
            encoding_cache.EncodingCache(None, print), base, pictures, crops, cpu, alone, lambda: None
        ),
        None,
    )
    assert {dataset.photo(dataset.sources[1], row) for row in range(16)} == set(range(5))
    assert torch.equal(cached, means(None, loading.load_vae(base, cpu)))
    assert len(cached.flatten(2).flatten(0, 1).unique(dim=0)) > 8


def test_loader_processes_get_names_and_no_tensors(dataset):
    """So that they may be started anew, as on Windows and macOS, and need no GPU."""
    sent = bytes(ForkingPickler.dumps(dataset))
    assert len(sent) < 5000
    assert b"torch" not in sent


@pytest.mark.trains
def test_frozen_text_encoders_are_gone_once_the_prompts_are_encoded(
    tiny_xl, photos_dir, tmp_path, monkeypatch
):
    encoders: list[Any] = []
    spy(
        monkeypatch,
        loading,
        "load_encoders",
        lambda found, *args: encoders.extend(map(weakref.ref, found.values())),
    )
    left: list[int] = []

    def look(*args: Any) -> None:
        gc.collect()
        left.append(sum(ref() is not None for ref in encoders))

    spy(monkeypatch, train.Training, "step", look)
    run(tiny_xl, photos_dir, tmp_path, f"--max_train_steps 4 --validation_epochs 1 {DRAWN}")
    assert (len(encoders), left) == (2, [0, 0, 0, 0])


@pytest.mark.trains
@pytest.mark.parametrize(("base", "text"), [("tiny_base", {"te"}), ("tiny_xl", {"te1", "te2"})])
def test_the_kohya_file_is_whole_with_a_trained_text_encoder(base, text, photos_dir, tmp_path, request):
    ours = load_file(
        run(
            request.getfixturevalue(base),
            photos_dir,
            tmp_path,
            f"{TWO_STEPS} --train_text_encoder --output_kohya_format",
        )
    )
    kohya = load_file(tmp_path / "pytorch_lora_weights_kohya.safetensors")
    layers = {key.split(".")[0] for key in kohya}
    assert len(layers) == len(ours) / 2
    assert {
        key
        for layer in layers
        for key in (f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha")
    } == set(kohya)
    assert {layer.split("_")[1] for layer in layers} == {"unet", *text}
    assert all(
        "_text_model_encoder_layers_" in layer for layer in layers if not layer.startswith("lora_unet")
    )


def test_noise_levels_are_found_by_number_not_by_timestep():
    scheduler = EulerDiscreteScheduler()
    scheduler.timesteps = torch.full_like(scheduler.timesteps, 7.0)  # as if rounding had made them equal
    latents, noise, levels = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    task = objectives.make_task(scheduler, latents, noise, levels)
    assert torch.allclose(task.noisy_latents, latents + scheduler.sigmas[levels].view(3, 1, 1, 1) * noise)


@pytest.mark.trains
def test_constants_are_computed_once_and_records_are_one_an_update(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    classes = tiny.make_photos(tmp_path / "class", 2, (64, 80), seed=7)
    encoded: list[int] = []
    spy(monkeypatch, autoencoder, "encode", lambda result, vae, pixels: encoded.append(len(pixels)))
    asked: list[str] = []
    spy(monkeypatch, prompts.TextParts, "__call__", lambda result, self, words: asked.extend(words))
    run(
        tiny_base,
        photos_dir,
        tmp_path / "out",
        f"{PRIOR} {classes} --center_crop --max_train_steps 4 --gradient_accumulation_steps 2",
    )
    assert sum(encoded) == 3 + 2
    assert sorted(asked) == ["dog", "photo"]
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2, 3, 4]


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
