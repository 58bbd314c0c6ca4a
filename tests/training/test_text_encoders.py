"""Text encoders: which outputs are used, which layers are trained, for how long, and when they are freed."""

import dataclasses
import gc
import itertools
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import train_dreambooth_lora as train
from dreambooth.adapter_files.native import ADAPTER_NAME
from dreambooth.bases import families, loading
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions, TextOptions
from dreambooth.runtime.stops import Stop
from tests.plain_diffusers import PROMPT, plain_clip
from tests.running import digest, metrics, run_train


def text_parts(base: Path, skip: int) -> Any:
    found = families.find(BaseOptions(str(base)))
    text = TextOptions(clip_skip=skip)
    families.check_text(found, text)
    encoders = loading.load_encoders(found, torch.float32, torch.device("cpu"))
    return dataclasses.replace(
        loading.text_without_encoders(found, loading.load_tokenizers(found), text), encoders=encoders
    )


@pytest.mark.slow
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_takes_an_earlier_hidden_state(tiny_base, tiny_xl, skip):
    """As in diffusers: after the final norm for Stable Diffusion; for XL before it, one layer earlier."""
    with torch.no_grad():
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
        assert torch.allclose(
            text_parts(tiny_base, skip)([PROMPT]).embeds, plain_clip(pipeline, skip, PROMPT), atol=1e-6
        )
        if skip == 2:
            with pytest.raises(
                UserError, match="--clip_skip must be at most 1, text_encoder has no more layers; got 2"
            ):
                text_parts(tiny_xl, skip)
            return
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_xl)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            PROMPT, do_classifier_free_guidance=False, clip_skip=skip or None
        )
        found = text_parts(tiny_xl, skip)([PROMPT])
        hand = []
        for encoder, tokenizer in (
            (pipeline.text_encoder, pipeline.tokenizer),
            (pipeline.text_encoder_2, pipeline.tokenizer_2),
        ):
            ids = tokenizer(
                PROMPT, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
            ).input_ids
            hand.append(encoder(ids, output_hidden_states=True).hidden_states[-(skip + 2)])
    for own, expected in (
        (found.embeds, torch.cat(hand, dim=-1)),
        (found.embeds, embeds),
        (found.pooled, pooled),
    ):
        assert torch.allclose(own, expected, atol=1e-6)


@pytest.mark.trains
@pytest.mark.parametrize(
    ("base", "skip", "layers"),
    [
        ("tiny_base", 0, {"text_encoder": 3}),
        ("tiny_base", 1, {"text_encoder": 2}),
        ("tiny_xl", 0, {"text_encoder": 2, "text_encoder_2": 3}),
        ("tiny_xl", 1, {"text_encoder": 1, "text_encoder_2": 3}),
    ],
)
def test_layers_that_nobody_looks_at_get_no_lora_and_all_others_learn(
    request, photos_dir, tmp_path, monkeypatch, base, skip, layers
):
    """Three layers each: no parameter is without a gradient, which several processes would wait for."""
    real = train.Training.gather_gradients
    learning: set[str] = set()
    known: set[str] = set()

    def watched(self, total, gradients):
        names = {id(p): name for c in self.trainables.components for name, p in c.named_parameters()}
        known.update(names.values())
        parameters = self.trainables.parameters
        parts = gradients.split([parameter.numel() for parameter in parameters])
        learning.update(names[id(p)] for p, part in zip(parameters, parts, strict=True) if part.any())
        real(self, total, gradients)

    monkeypatch.setattr(train.Training, "gather_gradients", watched)
    words = [
        "--train_text_encoder",
        "--text_encoder_lr",
        "0.01",
        "--max_train_steps",
        "2",
        "--clip_skip",
        str(skip),
    ]
    state = load_file(run_train(request.getfixturevalue(base), photos_dir, tmp_path, *words))
    for component, count in layers.items():
        found = {key.split(".layers.")[1].split(".")[0] for key in state if key.startswith(f"{component}.")}
        assert found == {str(layer) for layer in range(count)}
    assert learning == known
    assert {name.split(".")[0] for name in known} == {"unet", *layers}


def text_encoders_freed(monkeypatch) -> list[bool]:
    """Whether they all were at the forward pass of each micro-step to come."""
    freed: list[bool] = []
    encoders: list[weakref.ref] = []
    real_load, real_predict = loading.load_encoders, train.Training.predict

    def load(*args):
        found = real_load(*args)
        encoders.extend(weakref.ref(encoder) for encoder in found.values())
        return found

    def predict(self, *args):
        gc.collect()
        freed.append(
            self.frozen.parts.text is None
            and bool(encoders)
            and all(encoder() is None for encoder in encoders)
        )
        return real_predict(self, *args)

    monkeypatch.setattr(loading, "load_encoders", load)
    monkeypatch.setattr(train.Training, "predict", predict)
    return freed


@pytest.mark.trains
@pytest.mark.parametrize(
    ("base", "more"),
    [("tiny_base", ""), ("tiny_xl", "--lora_alpha 8 --text_encoder_lr 0.01 --gradient_checkpointing")],
)
def test_the_text_encoder_stops_and_is_freed_and_resumes_across_the_stop(
    request, photos_dir, tmp_path, monkeypatch, base, more
):
    """After half the steps: with checkpoints before, at and after; with a scale worked into the file."""
    folder = request.getfixturevalue(base)
    words = [
        "--train_text_encoder",
        "--train_text_encoder_frac",
        "0.5",
        "--max_train_steps",
        "4",
        "--checkpointing_steps",
        "1",
        *more.split(),
    ]
    with monkeypatch.context() as patch:
        freed = text_encoders_freed(patch)
        whole = run_train(
            folder,
            photos_dir,
            tmp_path / "whole",
            *words,
            "--validation_prompt",
            "a dog",
            "--num_validation_images",
            "1",
        )
    assert freed == [False, False, True, True]
    states = [load_file(tmp_path / "whole" / f"checkpoint-{step}" / ADAPTER_NAME) for step in (1, 2, 3, 4)]
    for key in states[0]:
        moves = [not torch.equal(one[key], two[key]) for one, two in itertools.pairwise(states)]
        assert moves == ([True, False, False] if key.startswith("text_encoder") else [True, True, True]), key
    rates = [{name for name in record if name.startswith("lr")} for record in metrics(tmp_path / "whole")]
    assert rates == [{"lr", *(f"lr_{name}" for name in text_parts(folder, 0).encoders)}] * 2 + [{"lr"}] * 2
    for number in (1, 2, 3):
        resume = ["--resume_from_checkpoint", str(tmp_path / "whole" / f"checkpoint-{number}")]
        assert digest(run_train(folder, photos_dir, tmp_path / f"from-{number}", *words, *resume)) == digest(
            whole
        )


@pytest.mark.trains
def test_a_frozen_text_encoder_is_freed_before_the_first_step(tiny_xl, photos_dir, tmp_path, monkeypatch):
    freed = text_encoders_freed(monkeypatch)
    run_train(tiny_xl, photos_dir, tmp_path, "--max_train_steps", "1")
    assert freed == [True]


@pytest.mark.trains
def test_the_text_encoder_has_a_learning_rate_of_its_own(tiny_base, tiny_xl, photos_dir, tmp_path):
    words = "--train_text_encoder --max_train_steps 2 --learning_rate 0.01 --text_encoder_lr"
    state = load_file(run_train(tiny_base, photos_dir, tmp_path / "sd", *words.split(), "0"))
    assert [(record["lr"], record["lr_text_encoder"]) for record in metrics(tmp_path / "sd")] == [
        (0.01, 0)
    ] * 2
    assert not any(
        tensor.any() for key, tensor in state.items() if key.startswith("text_encoder") and "lora_B" in key
    )
    assert all(tensor.any() for key, tensor in state.items() if key.startswith("unet") and "lora_B" in key)
    run_train(tiny_xl, photos_dir, tmp_path / "xl", "--train_text_encoder", "--max_train_steps", "1")
    (record,) = metrics(tmp_path / "xl")
    assert [record[name] for name in ("lr", "lr_text_encoder", "lr_text_encoder_2")] == [
        1e-4,
        5e-6,
        5e-6,
    ]  # the defaults of this family


@pytest.mark.trains
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_cut_off_at_the_stop_of_the_text_encoder_resumes_exactly(
    moment, tiny_base, photos_dir, tmp_path, monkeypatch
):
    """Its checkpoint of that very step is from before the stop or from after it."""
    words = [
        "--train_text_encoder",
        "--train_text_encoder_frac",
        "0.5",
        "--max_train_steps",
        "4",
        "--checkpointing_steps",
        "50",
        "--lora_alpha",
        "6",
    ]
    words += ["--num_threads", "1"]
    whole = run_train(tiny_base, photos_dir, tmp_path / "whole", *words)
    real = train.Training.finish_text

    def cut(self):
        if moment == "after":
            real(self)
        raise Stop("cut off", 75, "stopped")

    monkeypatch.setattr(train.Training, "finish_text", cut)
    with pytest.raises(SystemExit):
        run_train(tiny_base, photos_dir, tmp_path / "cut", *words)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = run_train(tiny_base, photos_dir, tmp_path / "cut", *words, "--resume_from_checkpoint", "latest")
    assert digest(resumed) == digest(whole)


@pytest.mark.trains
def test_long_captions_are_cut_off_with_a_remark(tiny_base, photos_dir, tmp_path, capsys):
    """They are many, and often somebody else's; a prompt that was typed is refused instead."""
    folder = tmp_path / "photos"
    shutil.copytree(photos_dir, folder)
    (folder / "photo-1.txt").write_text("a photo of a sks dog " + "in the snow " * 40)
    words = ["--caption_column", "text", "--max_train_steps", "1"]
    run_train(tiny_base, folder, tmp_path / "out", *words)
    assert (
        "1 captions are longer than 77 tokens and are cut off there: photo-1.png" in capsys.readouterr().out
    )
