"""One forward pass of a base's UNet."""

import torch
from diffusers import UNet2DConditionModel

from dreambooth.bases.prompts import PromptEmbeds


def predict(
    unet: UNet2DConditionModel,
    model_input: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: PromptEmbeds,
    time_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The UNet's output, [B, C, h, w], without a predicted variance.

    `model_input` is [B, C, h, w] and `timesteps` [B], on the UNet's device. `time_ids`, float32 [B, 6], are
    for Stable Diffusion XL only.
    """
    prompt_embeds = prompt_embeds.to(model_input.device, unet.dtype)
    output = unet(
        model_input.to(unet.dtype).contiguous(memory_format=torch.channels_last),
        timesteps,
        prompt_embeds.embeds,
        added_cond_kwargs=prompt_embeds.added_cond_kwargs(time_ids),
    ).sample
    # the second half of the channels is the predicted variance, in a UNet that predicts it
    has_variance = unet.config.out_channels == 2 * unet.config.in_channels
    return output.chunk(2, dim=1)[0] if has_variance else output
