"""Small judges of the drawn world, in the formats of DINO and CLIP, and how far they agree with its reader.

    python -m benchmarks.judge_stand_ins train --output_dir runs/judges
    python evaluate.py ... --judge_dino runs/judges/dino --judge_clip runs/judges/clip --judge_reader ...
    python -m benchmarks.judge_stand_ins compare --evaluation evaluation

The first is a ViT that learns to tell the attributes of a scene, the second a CLIP that learns which caption
belongs to which picture. `compare` prints correlations over the pictures of an evaluation: DINO with the
reader's ID, CLIP-T with its PA.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

from picturebook.draw import draw
from picturebook.tokenizer import build_tokenizer
from picturebook.world import COLOURS, IDENTITY_SIZES, KINDS, Scene, caption, random_scene

SIDE, CROP, PATCH, WIDTH = 64, 56, 7, 96  # DINO sees the middle 56 pixels of 64, as 224 of 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def pixels_of(scenes: list[Scene]) -> torch.Tensor:
    """The pictures, values from 0 to 1, float32 [B, 3, 64, 64]."""
    return torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes])).permute(0, 3, 1, 2) / 255


def normalized(pixels: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def run(
    steps: int, batch: int, loss_of: Callable[[list[Scene]], torch.Tensor], parameters: list[Any]
) -> None:
    """Minimize the loss of batches of random scenes with AdamW, over the first tenth with a rising rate."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    rng = random.Random("scenes of the judges")
    for step in range(steps):
        rate = min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        loss = loss_of([random_scene(rng) for _ in range(batch)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def train_dino(folder: Path, steps: int, batch: int) -> None:
    """Save a ViT whose class token tells kind, colour and identity."""
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=CROP, patch_size=PATCH, **SIZE), add_pooling_layer=False)
    sizes = {"kind": len(KINDS), "colour": len(COLOURS), **IDENTITY_SIZES}
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(WIDTH, size) for name, size in sizes.items()})
    edge = (SIDE - CROP) // 2

    def loss_of(scenes: list[Scene]) -> torch.Tensor:
        middle = pixels_of(scenes)[..., edge : edge + CROP, edge : edge + CROP]
        token = model(normalized(middle, MEAN, STD)).last_hidden_state[:, 0]
        values = {
            "kind": [KINDS.index(scene.kind) for scene in scenes],
            "colour": [tuple(COLOURS).index(scene.colour) for scene in scenes],
            **{name: [getattr(scene.identity, name) for scene in scenes] for name in IDENTITY_SIZES},
        }
        losses = [
            F.cross_entropy(heads[name](token), torch.tensor(wanted)) for name, wanted in values.items()
        ]
        return torch.stack(losses).sum()

    run(steps, batch, loss_of, [*model.parameters(), *heads.parameters()])
    model.save_pretrained(folder)


def train_clip(folder: Path, steps: int, batch: int) -> None:
    """Save a CLIP that tells which caption belongs to which picture of a batch (arXiv 2103.00020)."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=8, **SIZE)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZE,
    )
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )
    square = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    rng = random.Random("captions of the judges")

    def loss_of(scenes: list[Scene]) -> torch.Tensor:
        texts = [caption(scene, rng) for scene in scenes]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        pixels = normalized(pixels_of(scenes), processor.image_mean, processor.image_std)
        output = model(pixel_values=pixels, return_loss=True, **tokens)
        return output.loss

    run(steps, batch, loss_of, list(model.parameters()))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass
class Train:
    """Train both judges and save them."""

    output_dir: Path
    """Folder for `dino` and `clip`."""
    steps: int = 600
    """Steps of each."""
    batch: int = 64
    """Scenes in a step."""
    num_threads: int = 2
    """CPU threads."""


@dataclass
class Compare:
    """Correlate the judges' scores of the pictures of an evaluation with the reader's."""

    evaluation: Path
    """Output folder of evaluate.py, with --judge_dino, --judge_clip and --judge_reader."""


def compare(options: Compare) -> dict[str, Any]:
    """Pearson correlations over the pictures of prompts, of all methods and of the base."""
    lines = (options.evaluation / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [json.loads(line)["scores"] for line in lines]
    scores = [of for of in scores if "reader ID" in of]
    result: dict[str, Any] = {"pictures": len(scores)}
    for judged, read in (("DINO", "reader ID"), ("CLIP-T", "reader PA"), ("CLIP-I", "reader ID")):
        pairs = np.array([[of[judged], of[read]] for of in scores])
        result[f"{judged} with {read}"] = float(np.corrcoef(pairs.T)[0, 1])
    print(json.dumps(result, indent=1))
    return result


def train(options: Train) -> None:
    torch.set_num_threads(options.num_threads)
    train_dino(options.output_dir / "dino", options.steps, options.batch)
    train_clip(options.output_dir / "clip", options.steps, options.batch)


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Compare, tyro.conf.subcommand("compare")],  # type: ignore[arg-type]
        use_underscores=True,
    )
    train(chosen) if isinstance(chosen, Train) else compare(chosen)
