"""Targets that the base itself predicts: for the class prompt (--prior_source base), and outside the masks of
photos (--unmasked_target base).

There the adapted model should draw as the base does: its prediction is compared with that of the base on the
same noisy latents, as in distillation. No class image is needed.
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
    """The target of each row, [B, C, h, w]: that of `task`, or the base's prediction, for which `inputs` have
    the base's prompt embeddings (`FrozenModels.base_prompt_inputs`).

    They are of the last rows, whose targets are the base's predictions; of the first rows as well if `inputs`
    have `inside`, how much of each latent the subject covers, [M, 1, h, w]. The base's prediction is then the
    target of these M rows outside the subject.

    `predict` gives the UNet's output; within `base_unet()` the UNet has no adapter. No random number is
    drawn: the dropout of the adapted model draws the same numbers as without this pass.
    """
    if "base_prompt_embeds" not in inputs:
        return task.target
    inside, prompt_embeds = (
        inputs.get("inside"),
        PromptEmbeds(inputs["base_prompt_embeds"], inputs.get("base_pooled_prompt_embeds")),
    )
    first = 0 if inside is not None else len(task.target) - len(prompt_embeds.embeds)
    part = slice(first, first + len(prompt_embeds.embeds))
    rows, time_ids = task.rows(part), inputs.get("time_ids")
    with base_unet():
        output = predict(rows, prompt_embeds, None if time_ids is None else time_ids[part])
    predicted = rows.prediction(output).float()
    if inside is not None:
        count = len(inside)
        masked = inside * task.target[:count] + (1 - inside) * predicted[:count]
        predicted = torch.cat([masked, predicted[count:]])
    return torch.cat([task.target[: part.start], predicted, task.target[part.stop :]])
