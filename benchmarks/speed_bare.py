"""The bare training step of torch and peft: forward, backward and AdamW of a UNet with LoRA in channels_last.

    python benchmarks/speed_bare.py BASE SIDE BATCH PRECISION STEPS

PRECISION is fp32 or bf16. All steps have the same input. Nothing is printed; speed_probe.py records the
steps.
"""

import sys
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig


def unet_with_lora(
    base: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Any, list[torch.nn.Parameter]]:
    """(UNet of a base in channels_last with peft's LoRA of rank 4, the parameters of LoRA in float32)."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype)
    unet.requires_grad_(False)
    for parameter in unet.parameters():
        if (
            parameter.data_ptr() % 64
        ):  # weights of a mapped file may be unaligned, which makes products slower
            parameter.data = parameter.data.clone()
    unet.to(device, memory_format=torch.channels_last)
    unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=4,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return unet.train(), trained


def main(base: str, side: int, batch: int, precision: str, steps: int) -> None:
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    unet, trained = unet_with_lora(base, dtype)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    latents = (
        torch.randn(batch, 4, side // 8, side // 8).to(dtype).contiguous(memory_format=torch.channels_last)
    )
    target = torch.randn_like(latents).float()
    embeds = torch.randn(batch, 77, unet.config.cross_attention_dim).to(dtype)
    timesteps = torch.full((batch,), 500)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prediction = unet(latents, timesteps, embeds).sample
        torch.nn.functional.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
