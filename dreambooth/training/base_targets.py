"""Targets of prior preservation that the base itself predicts (--prior_source base).

The adapted model should draw the class as the base does: its prediction for the class prompt is compared with
that of the base on the same noisy latents, as in distillation. No class image is needed.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from dreambooth.bases.prompts import PromptEmbeds
from dreambooth.runtime.graphs import Tensors
from dreambooth.training.objectives import Task

Predict = Callable[[Task, PromptEmbeds, torch.Tensor | None], torch.Tensor]


@torch.no_grad()
def of_task(
    task: Task,
    inputs: Tensors,
    predict: Predict,
    base_unet: Callable[[], contextlib.AbstractContextManager[Any]],
) -> torch.Tensor:
    """The target of each row, [2B, C, h, w]: that of `task`, and for the second half of the rows the base's
    prediction if `inputs` have the base's prompt embeddings (`FrozenModels.base_prompt_inputs`).

    `predict` gives the UNet's output; within `base_unet()` the UNet has no adapter. No random number is
    drawn: the dropout of the adapted model draws the same numbers as without this pass.
    """
    if "base_prompt_embeds" not in inputs:
        return task.target
    count = len(task.target) // 2
    half, time_ids = task.rows(slice(count, None)), inputs.get("time_ids")
    prompt_embeds = PromptEmbeds(inputs["base_prompt_embeds"], inputs.get("base_pooled_prompt_embeds"))
    with base_unet():
        output = predict(half, prompt_embeds, None if time_ids is None else time_ids[count:])
    return torch.cat([task.target[:count], half.prediction(output).float()])
