"""What is wrong in diffusers' DreamBooth-LoRA scripts is right here."""

import ast
import dataclasses
import gc
import json
import types
import weakref
from multiprocessing.reduction import ForkingPickler
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
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.training import BaseOptions, TextOptions, TrainOptions, pictures_of_pass
from dreambooth.training import objectives
from tests import tiny
from tests.options.reference import TRAIN
from tests.project.reference_runs import ROOT, TWO_STEPS, checkpoints_in, records, run, spy

PRIOR = "--with_prior_preservation --class_prompt dog --num_class_images 2 --class_data_dir"


DRAWN = "--validation_prompt dog --num_validation_images 1"


def refuse(*args: Any, **others: Any) -> None:
    raise AssertionError("this is not to be called")


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
    assert (tmp_path / "validation" / "image_0.png").is_file()
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
    # before the first step, after the first pass, at the end, and at three other weights
    assert (seen, loaded) == ([expected] * 6, [1, 1])


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
    alone: Any = types.SimpleNamespace(rank=0, world=1, is_main=True)

    def means(encoded: encodings.EncodedPhotos | None, vae: AutoencoderKL | None) -> torch.Tensor:
        words: dict[str, Any] = {"slots": 1, "batch_size": 2, "peers": alone}
        return torch.stack(
            [
                batch.posterior.mean
                for batch in batches.micro_batches(dataset, encoded, vae, range(8), **words)
            ]
        )

    dataset.crops = dataclasses.replace(dataset.crops, stride=base.vae_stride)
    pictures = dataset.pictures(dataset.sources)
    cached = means(
        encodings.encode_photos(
            encoding_cache.EncodingCache(None, print), base, pictures, cpu, alone, lambda: None
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
