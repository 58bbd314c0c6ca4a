"""Gradient checkpointing: activations are computed again in the backward pass instead of being kept."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint


def enable(unet: Any, text_encoders: Iterable[Any]) -> None:
    """Checkpoint the blocks of the UNet and of the text encoders.

    A model with dropout needs the random state of the forward pass again in the backward pass. That state is
    on the host, and cannot be read while a CUDA graph is recorded. Without dropout it is not kept.
    """

    def settings(model: torch.nn.Module) -> dict[str, Any]:
        return {"use_reentrant": False, "preserve_rng_state": has_dropout(model)}

    unet.enable_gradient_checkpointing(functools.partial(checkpoint, **settings(unet)))
    for encoder in text_encoders:
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings(encoder))


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether the model or its adapter has dropout in training mode."""
    is_dropped = any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules())
    config: Any = model.config
    return is_dropped or getattr(config, "attention_dropout", 0) > 0  # CLIP drops inside of its attention
