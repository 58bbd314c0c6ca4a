"""Command lines, and the reference script's flags."""

import dataclasses
import importlib.util
from typing import Any

import pytest

from dreambooth.options import command_line
from dreambooth.options.resolved import ResolvedTrainOptions, resolve
from dreambooth.options.training import TrainOptions

TRAIN = [
    "--pretrained_model_name_or_path",
    "base",
    "--instance_data_dir",
    "photos",
    "--instance_prompt",
    "a photo of sks dog",
]


CLASS_IMAGES = [
    "--pretrained_model_name_or_path",
    "base",
    "--class_data_dir",
    "pictures",
    "--class_prompt",
    "dog",
]


INFER = ["--pretrained_model_name_or_path", "base"]


EVALUATE = [*INFER, "--adapter", "a", "--photos", "p", "--class_noun", "dog", "--rare_word", "sks"]
EVALUATE += ["--judge_dino", "dino"]


PRIOR = ["--with_prior_preservation", "--class_data_dir", "pictures", "--class_prompt", "dog"]


REQUIRED = object()


BARE = None  # a flag without a value


# Every flag of diffusers' train_dreambooth_lora.py: its default, a word that may follow it, and its value.
REFERENCE: dict[str, tuple[Any, str | None, Any]] = {
    "pretrained_model_name_or_path": (REQUIRED, "other", "other"),
    "revision": (None, "main", "main"),
    "variant": (None, "fp16", "fp16"),
    "tokenizer_name": (None, "words", "words"),
    "instance_data_dir": (REQUIRED, "other", "other"),
    "class_data_dir": (None, "pictures", "pictures"),
    "instance_prompt": (REQUIRED, "a zwx cat", "a zwx cat"),
    "class_prompt": (None, "a photo of dog", "a photo of dog"),
    "validation_prompt": (None, "a sks dog in the snow", "a sks dog in the snow"),
    "num_validation_images": (4, "2", 2),
    "validation_epochs": (50, "10", 10),
    "with_prior_preservation": (False, BARE, True),
    "prior_loss_weight": (1.0, "0.5", 0.5),
    "num_class_images": (100, "200", 200),
    "output_dir": ("lora-dreambooth-model", "out", "out"),
    "seed": (None, "7", 7),
    "resolution": (512, "64", 64),
    "center_crop": (False, BARE, True),
    "train_text_encoder": (False, BARE, True),
    "train_batch_size": (4, "1", 1),
    "sample_batch_size": (4, "8", 8),
    "num_train_epochs": (1, "3", 3),
    "max_train_steps": (None, "800", 800),
    "checkpointing_steps": (500, "100", 100),
    "checkpoints_total_limit": (None, "2", 2),
    "resume_from_checkpoint": (None, "latest", "latest"),
    "gradient_accumulation_steps": (1, "2", 2),
    "gradient_checkpointing": (False, BARE, True),
    "learning_rate": (5e-4, "1e-4", 1e-4),
    "scale_lr": (False, BARE, True),
    "lr_scheduler": ("constant", "cosine", "cosine"),
    "lr_warmup_steps": (500, "0", 0),
    "lr_num_cycles": (1, "2", 2),
    "lr_power": (1.0, "2", 2.0),
    "dataloader_num_workers": (0, "2", 2),
    "use_8bit_adam": (False, BARE, True),
    "adam_beta1": (0.9, "0.8", 0.8),
    "adam_beta2": (0.999, "0.99", 0.99),
    "adam_weight_decay": (1e-2, "0", 0.0),
    "adam_epsilon": (1e-8, "1e-6", 1e-6),
    "max_grad_norm": (1.0, "0.5", 0.5),
    "push_to_hub": (False, BARE, True),
    "hub_token": (None, "secret", "secret"),
    "hub_model_id": (None, "me/dog", "me/dog"),
    "logging_dir": ("logs", "records", "records"),
    "allow_tf32": (False, BARE, True),
    "report_to": ("tensorboard", "wandb", "wandb"),
    "mixed_precision": (None, "bf16", "bf16"),
    "prior_generation_precision": (None, "fp32", "fp32"),
    "local_rank": (-1, "1", 1),
    "enable_xformers_memory_efficient_attention": (False, BARE, True),
    "pre_compute_text_embeddings": (False, BARE, True),
    "tokenizer_max_length": (None, "77", 77),
    "text_encoder_use_attention_mask": (False, BARE, True),
    "validation_images": (None, "first.png", ("first.png",)),
    "class_labels_conditioning": (None, "timesteps", "timesteps"),
    "rank": (4, "16", 16),
    "lora_dropout": (0.0, "0.1", 0.1),
    "image_interpolation_mode": ("lanczos", "bicubic", "bicubic"),
}


def resolved(options: TrainOptions, family: str) -> ResolvedTrainOptions:
    return resolve(options, family, seed=0, mixed_precision="no")


def flat(group: Any) -> dict[str, Any]:
    """Every flag and its value, None included."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        table |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return table


def refusal(kind: type, words: list[str], capsys) -> str:
    """The one message with which the command line is refused, its frame taken off."""
    with pytest.raises(SystemExit) as refused:
        command_line.parse(kind, "a script", words)
    out, err = capsys.readouterr()
    assert refused.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.translate({ord(c): " " for c in "╭╮╰╯│─"}).split())


def pretend_everything_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
