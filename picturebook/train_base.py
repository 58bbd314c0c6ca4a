"""Train the embedded base: a small Stable Diffusion that knows the drawn world.

    python -m picturebook.train_base --work_dir runs/picturebook

There are four stages. `vae` trains the autoencoder, `latents` encodes a large set of scenes once, `unet`
trains UNet and text encoder together on them, `export` writes `picturebook/model/`, a Stable Diffusion
folder. A stage that was interrupted is resumed. Every sample is a pure function of (seed, stage, number), so
a resumed run has the same samples as an uninterrupted one.
"""

import dataclasses
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel

from picturebook.draw import draw
from picturebook.tokenizer import MAX_TOKENS, build_tokenizer
from picturebook.world import Scene, caption, random_scene

MODEL_DIR = Path(__file__).parent / "model"
WIDTH = 128  # of the text encoder, and so of cross attention


@dataclasses.dataclass
class Options:
    """Settings of the training. The model card says how the committed base was trained."""

    work_dir: Path = Path("runs/picturebook")
    """Folder of checkpoints, cached latents and metrics.jsonl."""
    model_dir: Path = MODEL_DIR
    """Folder of the finished pipeline."""
    stage: Literal["vae", "latents", "unet", "export", "all"] = "all"
    """Stage to stop after; earlier ones are resumed first. `export` writes the present weights, untrained
    further."""
    seed: int = 0
    """Seed of every scene, caption, noise and timestep."""
    num_threads: int = 2
    """CPU threads."""
    vae_steps: int = 4000
    """Steps of the autoencoder, 16 pictures each."""
    num_scenes: int = 40_000
    """Pictures in the training set of the UNet; each use of a picture has another caption."""
    unet_steps: int = 17_000
    """Steps of UNet and text encoder."""
    unet_batch_size: int = 32
    """Pictures in each step of UNet and text encoder."""
    learning_rate: float = 1e-3
    """Peak rate of UNet and text encoder: 200 steps of warm-up, a linear fall over the last `decay_share`."""
    decay_share: float = 0.45
    """Share of the run over which the learning rate falls to zero."""
    save_every: int = 250
    """Steps between checkpoints."""


# Larger than Stable Diffusion's: a small UNet cannot draw latents whose last digits matter to the decoder.
# With 1e-4 the posterior's standard deviation was 0.7 % of the latents', and flat colours were mottled.
KL_WEIGHT = 5e-3


def build_vae() -> AutoencoderKL:
    """The autoencoder, in channels_last. It encodes 64 x 64 pictures to latents of [4, 16, 16]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def build_unet() -> UNet2DConditionModel:
    """The UNet, in channels_last. It has many channels at the latents' size, 16 x 16, for lines and eyes.

    A UNet with half the channels at that size and a third level took two thirds of the time a step. It
    learned colours and places as soon, but its areas stayed mottled.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(4, 6),  # diffusers' name for the number of heads: 32 channels each
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


# v-prediction, and a larger beta_end than Stable Diffusion's 0.012. With latents of 16 x 16 the last step of
# the usual schedule still shows the mean colour of the picture, which sampling, as it starts from pure noise,
# would miss.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
}


def to_tensor(scenes: list[Scene]) -> torch.Tensor:
    """The pictures of the scenes, float32 [B, 3, 64, 64] in [-1, 1], channels last."""
    pixels = torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def training_scene(seed: int, stage: str, number: int) -> Scene:
    return random_scene(random.Random(f"{seed} {stage} {number}"))


class Log:
    """Writes each record as a JSON line to `metrics.jsonl`, and prints it."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()

    def __call__(self, **record) -> None:
        record = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in record.items()} | {
            "seconds": round(time.monotonic() - self.start, 1)
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)


def save_checkpoint(
    path: Path,
    model: torch.nn.Module,
    ema: AveragedModel,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    rate: float,
) -> None:
    """Write the checkpoint to a temporary file and rename it, so that an interruption leaves no partial one.

    `rate` is the learning rate of the last step.
    """
    tensors = {f"model|{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema|{name}": tensor for name, tensor in ema.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, fields in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer|{number}|{parameter}|{field}": tensor for field, tensor in fields.items()}
    temporary = path.with_suffix(".tmp")
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        temporary,
        {"step": str(step), "learning_rate": str(rate)},
    )
    os.replace(temporary, path)


class MuonAdamW:
    """Muon (Jordan et al. 2024) for the weight matrices; AdamW for embeddings, biases, norms and end layers.

    torch's Muon takes matrices only, so each kernel gets a parameter [out, in * kh * kw] that shares its
    memory.
    """

    def __init__(self, model: torch.nn.Module, learning_rate: float):
        self.kernels: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        for_adamw = []
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or any(part in name for part in ("embeddings", "conv_in", "conv_out")):
                for_adamw.append(parameter)
            else:
                self.kernels.append((parameter, torch.nn.Parameter(self.matrix(parameter.data))))
        matrices = [matrix for _, matrix in self.kernels]
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
        self.optimizers = [
            muon,
            torch.optim.AdamW(for_adamw, lr=learning_rate, weight_decay=1e-2, betas=(0.9, 0.99)),
        ]

    @staticmethod
    def matrix(tensor: torch.Tensor) -> torch.Tensor:
        """The kernel as [out, in * kh * kw], a view of its channels-last memory."""
        return tensor.permute(0, 2, 3, 1).flatten(1) if tensor.ndim == 4 else tensor

    def step(self) -> None:
        for parameter, matrix in self.kernels:
            assert parameter.grad is not None
            assert matrix.data_ptr() == parameter.data_ptr()
            matrix.grad = self.matrix(parameter.grad)
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for parameter, matrix in self.kernels:
            parameter.grad = matrix.grad = None
        self.optimizers[1].zero_grad()


def resume(
    path: Path, model: torch.nn.Module, ema: AveragedModel, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load model, average and optimizers from the checkpoint, if there is one.

    Returns (steps done, learning rate of the last step).
    """
    if not path.exists():
        return 0, 0.0
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    with safe_open(path, framework="pt") as file:
        step, rate = int(file.metadata()["step"]), float(file.metadata()["learning_rate"])
        for key in file.keys():  # noqa: SIM118 - not a dict
            part, _, name = key.partition("|")
            parts[part][name] = file.get_tensor(key)
    model.load_state_dict(parts["model"])
    ema.load_state_dict(parts["ema"])
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in parts["optimizer"].items():
            owner, parameter, field = key.split("|")
            if int(owner) == number:
                state.setdefault(int(parameter), {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step, rate


def learning_rate_at(step: int, total: int, peak: float, decay_share: float) -> float:
    """The learning rate of a step: linear warm-up over 200 steps, linear decay over the last
    `decay_share`."""
    return peak * min(1.0, (step + 1) / 200, (total - step) / (decay_share * total))


def train_vae(options: Options, log: Log) -> AutoencoderKL:
    """The trained autoencoder, with the running average of its weights. The loss is L1 + squared error + KL
    to N(0, 1)."""
    torch.manual_seed(options.seed)
    vae, total, peak = build_vae(), options.vae_steps, 1e-3
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, weight_decay=0)
    path = options.work_dir / "vae.safetensors"
    step, learning_rate = resume(path, vae, ema, [optimizer])
    while step < total:
        learning_rate = learning_rate_at(step, total, peak, 0.4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        pixel_values = to_tensor([training_scene(options.seed, "vae", 16 * step + i) for i in range(16)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixel_values).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = reconstruction - pixel_values
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(vae)
        step += 1
        if step % 100 == 0:
            psnr = -10 * math.log10(error.square().mean().item() / 4)
            log(
                stage="vae",
                step=step,
                psnr=psnr,
                kl=kl.item(),
                latent_std=mean.std().item(),
                posterior_std=posterior.std.mean().item(),
            )
        if step % options.save_every == 0 or step == total:
            save_checkpoint(path, vae, ema, [optimizer], step, learning_rate)
    vae.load_state_dict(ema.module.state_dict())
    return vae.eval()


@torch.no_grad()
def encode_scenes(options: Options, vae: AutoencoderKL, log: Log) -> dict[str, torch.Tensor]:
    """Posterior mean and std of the training scenes, float16 [N, 4, 16, 16]. They are encoded
    once, then read from a file."""
    path = options.work_dir / "latents.safetensors"
    if not path.exists():
        mean = torch.empty(options.num_scenes, 4, 16, 16, dtype=torch.float16)
        std = torch.empty_like(mean)
        for start in range(0, options.num_scenes, 100):
            rows = range(start, min(start + 100, options.num_scenes))
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(
                    to_tensor([training_scene(options.seed, "unet", n) for n in rows])
                ).latent_dist
            mean[rows.start : rows.stop], std[rows.start : rows.stop] = (
                posterior.mean.half(),
                posterior.std.half(),
            )
            if start % 10_000 == 0:
                log(stage="latents", done=start)
        temporary = path.with_suffix(".tmp")
        save_file({"mean": mean, "std": std}, temporary)
        os.replace(temporary, path)
    return load_file(path)


def visits(seed: int, count: int, batch_size: int, first_step: int) -> Iterator[list[int]]:
    """Batches of scene numbers without end, from `first_step` on: one random order of all scenes after
    another.

    Each batch is a pure function of the step.
    """
    step = first_step
    while True:
        rows = []
        for n in range(step * batch_size, (step + 1) * batch_size):
            order = _order(seed, count, n // count)
            rows.append(int(order[n % count]))
        yield rows
        step += 1


_orders: dict[tuple[int, int, int], torch.Tensor] = {}


def _order(seed: int, count: int, epoch: int) -> torch.Tensor:
    key = (seed, count, epoch)
    if key not in _orders:
        _orders[key] = torch.randperm(
            count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)
        )
    return _orders[key]


class Denoiser(torch.nn.Module):
    """UNet and text encoder as one module, so that one optimizer and one average hold both."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.unet, self.text_encoder = build_unet(), build_text_encoder(vocab_size)

    def forward(self, noisy_latents, timesteps, input_ids):
        return self.unet(noisy_latents, timesteps, self.text_encoder(input_ids)[0]).sample


def timesteps_of_training(
    count: int, alphas_cumprod: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """[count] timesteps: 30 % uniform, the others log-normal in sigma (Karras et al. 2022, table 1).

    The centre is the noise level at which shapes and patterns are decided. Above it, most of the loss comes
    from attributes that no caption names. Below it, most comes from the noise of the autoencoder's posterior.
    """
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    uniform = torch.randint(len(sigmas), (count,), generator=generator)
    drawn = torch.searchsorted(sigmas, (0.3 + 1.0 * torch.randn(count, generator=generator)).exp()).clamp(
        max=len(sigmas) - 1
    )
    return torch.where(torch.rand(count, generator=generator) < 0.3, uniform, drawn)


def train_unet(
    options: Options, latents: dict[str, torch.Tensor], log: Log
) -> tuple[Denoiser, float, dict[str, Any]]:
    """(averaged UNet and text encoder, scaling factor of the latents, record of the training)."""
    torch.manual_seed(options.seed + 1)
    tokenizer = build_tokenizer()
    model = Denoiser(len(tokenizer))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = MuonAdamW(model, options.learning_rate)
    scheduler = DDPMScheduler(**SCHEDULE)
    scaling_factor = 1 / latents["mean"][:5000].float().std().item()
    scenes = [training_scene(options.seed, "unet", n) for n in range(options.num_scenes)]
    path = options.work_dir / "unet.safetensors"
    step, learning_rate = resume(path, model, ema, optimizer.optimizers)
    batches = visits(options.seed, options.num_scenes, options.unet_batch_size, step)
    losses = []
    while step < options.unet_steps:
        learning_rate = learning_rate_at(step, options.unet_steps, options.learning_rate, options.decay_share)
        for group in [group for each in optimizer.optimizers for group in each.param_groups]:
            group["lr"] = learning_rate
        rows = next(batches)
        rng = random.Random(f"{options.seed} captions {step}")
        captions = ["" if rng.random() < 0.1 else caption(scenes[row], rng) for row in rows]
        input_ids = tokenizer(
            captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        # noisy latents
        generator = torch.Generator().manual_seed(7_919 * step + options.seed)
        mean, std = latents["mean"][rows].float(), latents["std"][rows].float()
        clean = (mean + std * torch.randn(mean.shape, generator=generator)) * scaling_factor
        noise = torch.randn(mean.shape, generator=generator)
        timesteps = timesteps_of_training(len(rows), scheduler.alphas_cumprod, generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        # MATH: its backward pass takes two thirds of fused attention's time, for 64 tokens on a CPU
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                model_pred = model(noisy, timesteps, input_ids)
            loss = F.mse_loss(model_pred.float(), scheduler.get_velocity(clean, noise, timesteps))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            log(stage="unet", step=step, loss=sum(losses) / len(losses), lr=learning_rate)
            losses = []
        if step % options.save_every == 0 or step == options.unet_steps:
            save_checkpoint(path, model, ema, optimizer.optimizers, step, learning_rate)
    model.load_state_dict(ema.module.state_dict())
    record = {
        "seed": options.seed,
        "steps": step,
        "batch_size": options.unet_batch_size,
        "scenes": options.num_scenes,
        "peak_learning_rate": options.learning_rate,
        "last_learning_rate": learning_rate,
    }
    return model.eval(), scaling_factor, record


def export(
    vae: AutoencoderKL, model: Denoiser, scaling_factor: float, record: dict[str, Any], target: Path
) -> None:
    """Write a Stable Diffusion folder with weights in float16, and training.json with the record of the
    training."""
    vae.register_to_config(scaling_factor=scaling_factor)
    logging.set_verbosity_error()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=build_tokenizer(),
        unet=model.unet,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    # transformers 5 saves names without `text_model.`. Older versions and other programs need the prefix, and
    # would use a random text encoder without it. transformers 5 reads both forms.
    path = target / "text_encoder" / "model.safetensors"
    save_file(
        {"text_model." + key.removeprefix("text_model."): tensor for key, tensor in load_file(path).items()},
        path,
        {"format": "pt"},
    )
    (target / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in target.rglob("*.safetensors"):
        path.chmod(0o644)  # the library writes files that only their owner may read


def main() -> None:
    options = tyro.cli(Options, use_underscores=True)
    torch.set_num_threads(options.num_threads)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    log = Log(options.work_dir / "metrics.jsonl")
    if options.stage == "export":
        if missing := [
            name for name in ("vae.safetensors", "unet.safetensors") if not (options.work_dir / name).exists()
        ]:
            sys.exit(
                f"error: {options.work_dir} has no {' and no '.join(missing)}: there is nothing to export"
            )
        options.vae_steps = options.unet_steps = 0  # nothing more to train
    vae = train_vae(options, log)
    if options.stage == "vae":
        return
    latents = encode_scenes(options, vae, log)
    if options.stage == "latents":
        return
    model, scaling_factor, record = train_unet(options, latents, log)
    if options.stage == "unet":
        return
    export(vae.float(), model, scaling_factor, record, options.model_dir)
    print(f"wrote {options.model_dir}")


if __name__ == "__main__":
    main()
