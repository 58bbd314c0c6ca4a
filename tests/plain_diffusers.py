"""What plain diffusers computes, by hand."""

from typing import Any

import torch

PROMPT = "a photo of sks dog"


def plain_clip(pipeline: Any, skip: int, prompt: str) -> torch.Tensor:
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
        return pipeline.text_encoder.final_layer_norm(hidden[-(skip + 1)])
