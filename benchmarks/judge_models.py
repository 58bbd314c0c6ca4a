"""Trains small judges of the drawn world: a ViTModel and a CLIPModel, saved as facebook/dino-vits16 and
openai/clip-vit-base-patch32 are saved. A few minutes each on one thread.

The ViT learns which of its pictures show the same individual; the CLIP learns which caption is of which
picture. Both minimise the same loss, cross entropy over cosines of a batch (InfoNCE, arXiv 1807.03748).
"""

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

from dreambooth.evaluation.judges import Kind
from picturebook.draw import SIDE, draw
from picturebook.tokenizer import build_tokenizer
from picturebook.world import (
    ACCESSORIES,
    ACCESSORY_COLOURS,
    BACKDROPS,
    PLACES,
    Scene,
    caption,
    random_pose,
    random_scene,
)

MODEL_SIDE = 56  # pixels: of a picture of 64, resized to 64, the centre is left
WIDTH, LAYERS, HEADS, PATCH = 96, 4, 4, 8
TEMPERATURE, RATE, WARM_UP = 0.1, 1e-3, 20
STEPS, BATCH = 240, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as dreambooth/evaluation/judges.py has them
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Batches = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Two unit embeddings of each row of batch number `step`, [B, D] each."""


def trained(kind: Kind, work: Path) -> Path:
    """The folder of a judge, with a report of its training in training.json. It is trained unless it is
    there."""
    folder = work / kind
    report = folder / "training.json"
    if not report.exists():
        started = time.process_time()
        loss = train_dino(folder) if kind == "dino" else train_clip(folder)
        seconds = round(time.process_time() - started, 1)
        about = {"steps": STEPS, "batch": BATCH, "last_loss": loss, "cpu_seconds": seconds}
        report.write_text(json.dumps(about, indent=1) + "\n")
    return folder


def train_dino(folder: Path) -> float:
    """Save a ViTModel that was trained on pairs of renders of one individual, in other places and poses, one
    with and one without an accessory. Returns the mean loss of the last 50 steps."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        image_size=MODEL_SIDE,
        patch_size=PATCH,
    )
    model = ViTModel(config, add_pooling_layer=False)

    def embedded(scenes: list[Scene], rng: random.Random) -> torch.Tensor:
        return F.normalize(model(pixels(scenes, rng, MEAN, STD)).last_hidden_state[:, 0], dim=-1)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"dino {step}")
        first = [random_scene(rng) for _ in range(BATCH)]
        second = [_elsewhere(scene, rng) for scene in first]
        return embedded(first, rng), embedded(second, rng)

    loss = _train(model, batch)
    model.save_pretrained(folder)
    return loss


def train_clip(folder: Path) -> float:
    """Save a CLIPModel that was trained on scenes and their captions, with tokenizer and image processor.
    Returns the mean loss of the last 50 steps."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shared = {"intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS, "hidden_size": WIDTH}
    vision = CLIPVisionConfig(num_hidden_layers=LAYERS, image_size=MODEL_SIDE, patch_size=PATCH, **shared)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    model: Any = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    )

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"clip {step}")
        scenes = [random_scene(rng) for _ in range(BATCH)]
        captions = [caption(scene, rng) for scene in scenes]
        tokens = tokenizer(captions, padding=True, return_tensors="pt").input_ids
        images = model.get_image_features(pixels(scenes, rng, CLIP_MEAN, CLIP_STD)).pooler_output
        texts = model.get_text_features(tokens).pooler_output
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    loss = _train(model, batch)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": MODEL_SIDE, "width": MODEL_SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    return loss


def pixels(
    scenes: list[Scene], rng: random.Random, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Renders of scenes, half of them a little blurred, as generated pictures are: float32 [B, 3, H, W]."""
    margin = (SIDE - MODEL_SIDE) // 2
    box = (margin, margin, margin + MODEL_SIDE, margin + MODEL_SIDE)
    images: list[Image.Image] = []
    for scene in scenes:
        image = draw(scene)
        if rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
        images.append(image.crop(box))
    values = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    shape = (1, 3, 1, 1)
    return (values - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def _elsewhere(scene: Scene, rng: random.Random) -> Scene:
    """The same individual in another scene."""
    accessory = rng.choice(ACCESSORIES) if scene.accessory is None else None
    return dataclasses.replace(
        scene,
        place=rng.choice(tuple(PLACES)),
        accessory=accessory,
        accessory_colour=rng.choice(tuple(ACCESSORY_COLOURS)) if accessory else None,
        pose=random_pose(rng),
        backdrop=rng.randrange(BACKDROPS),
    )


def _train(model: torch.nn.Module, batch: Batches) -> float:
    """Train for STEPS steps on the pairs of `batch`. Returns the mean loss of the last 50."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    losses = []
    model.train()
    for step in range(STEPS):
        factor = min((step + 1) / WARM_UP, (STEPS - step) / (STEPS / 2), 1)
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        one, other = batch(step)
        cosines = one @ other.T / TEMPERATURE
        rows = torch.arange(len(cosines))
        loss = (F.cross_entropy(cosines, rows) + F.cross_entropy(cosines.T, rows)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"{type(model).__name__}: step {step + 1}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    model.eval()
    return sum(losses[-50:]) / 50
