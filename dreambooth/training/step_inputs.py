"""The tensors that one forward and backward pass takes, made on the CPU from a micro-batch."""

import dataclasses

from diffusers import DDPMScheduler

from dreambooth.bases import autoencoder
from dreambooth.data.batches import MicroBatch
from dreambooth.options.objective import ObjectiveOptions
from dreambooth.runtime.graphs import Tensors
from dreambooth.training import objectives
from dreambooth.training.frozen_models import FrozenModels


def of_batch(batch: MicroBatch, frozen: FrozenModels, objective: ObjectiveOptions) -> Tensors:
    """The tensors of the task and of the prompts (`FrozenModels.prompt_inputs`, `base_prompt_inputs`), and
    SDXL's `time_ids`; with masks and --unmasked_target base also `inside`, see base_targets.py."""
    task, masks, count = make_task(batch, frozen, objective), frozen.masks, len(batch.rows)
    inputs: Tensors = {}
    of_instance, of_class = batch.prompts[:count], batch.prompts[count:]
    base_prompts = of_class if frozen.has_base_priors else []  # of rows whose target the base predicts
    if masks is not None:
        height, width = task.target.shape[2:]
        inside = masks.of_rows(batch.rows, (height, width))
        task = objectives.with_masks(task, inside, masks.options.outside_weight)
        if masks.options.has_base_targets:
            inputs["inside"] = inside
            base_prompts = of_instance + base_prompts
    inputs |= {**task.tensors(), **frozen.prompt_inputs(batch.prompts)}
    inputs |= frozen.base_prompt_inputs(base_prompts)
    if frozen.parts.base.takes_time_ids:
        inputs["time_ids"] = batch.time_ids
    return inputs


def make_task(batch: MicroBatch, frozen: FrozenModels, objective: ObjectiveOptions) -> objectives.Task:
    """Noisy latents, timesteps and target. Random numbers depend on seed and row alone."""
    noise_scheduler, dataset = frozen.parts.noise_scheduler, frozen.dataset
    rows, shape = batch.rows, tuple(batch.posterior.mean.shape[1:])
    posterior_noise = dataset.randn("posterior", rows, shape)
    latents = autoencoder.normalized(frozen.vae_config, batch.posterior.sample(posterior_noise))
    noise = dataset.randn("noise", rows, shape)
    if objective.noise_offset:
        noise = noise + objective.noise_offset * dataset.randn("noise-offset", rows, (shape[0], 1, 1))
    perturbation = None
    if objective.input_perturbation:
        perturbation = objective.input_perturbation * dataset.randn("input-noise", rows, shape)
    timesteps = dataset.timesteps(rows, noise_scheduler.config.num_train_timesteps, objective.noise_levels)
    if not (objective.noise_levels.is_uniform or isinstance(noise_scheduler, DDPMScheduler)):
        # index 0 of the other schedulers is the noisiest
        timesteps = noise_scheduler.config.num_train_timesteps - 1 - timesteps
    task = objectives.make_task(
        noise_scheduler,
        latents,
        noise,
        timesteps,
        snr_gamma=objective.snr_gamma,
        is_debiased=objective.debiased_estimation,
        perturbation=perturbation,
    )
    if (weights := dataset.weights(rows)) is None:
        return task
    return dataclasses.replace(task, weights=weights if task.weights is None else weights * task.weights)
