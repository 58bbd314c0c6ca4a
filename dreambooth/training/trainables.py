"""The trained part of a run: adapters on UNet and text encoders, their optimizer and learning rates."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from diffusers.optimization import get_scheduler

from dreambooth.adapters import inject
from dreambooth.adapters.low_precision import StepWeights
from dreambooth.bases import compilation
from dreambooth.bases.loading import FrozenParts
from dreambooth.files import checkpoint_folders
from dreambooth.io.errors import UserError
from dreambooth.options.resolved import ResolvedOptimizerOptions
from dreambooth.training import adapter_targets, checkpoints, optimizers, recomputation
from dreambooth.training.checks import AdapterState
from dreambooth.training.start import Start


class Trainables:
    """The adapters of one run, with their optimizer, learning-rate schedule and fp16 scaler. `components` are
    the models with an adapter that is still trained; text encoders leave the list in `drop_text_encoders`."""

    def __init__(self, start: Start, parts: FrozenParts, max_steps: int):
        options, accelerator = start.options, start.peers.accelerator
        run, optimization, self.device = options.run, options.optimization, accelerator.device
        models: dict[str, torch.nn.Module] = {"unet": parts.unet}
        if options.text.train_text_encoder:
            assert parts.text is not None
            models |= parts.text.encoders
        self.is_compiled = options.speed.compile
        self.components = adapter_targets.inject_adapters(
            models, parts.base, options.adapter, options.text, run.seed
        )
        for component in self.components:
            if options.speed.compile and component.name == "unet":
                compilation.compile_blocks(component.model)
            component.model.train()  # LoRA dropout and gradient checkpointing work in training mode only
        if run.gradient_checkpointing:
            recomputation.enable(parts.unet, [component.model for component in self.text_components()])
        if run.enable_xformers_memory_efficient_attention:
            parts.unet.enable_xformers_memory_efficient_attention()
        batch_size = run.gradient_accumulation_steps * run.train_batch_size * start.peers.world
        scale = batch_size if optimization.scale_lr else 1
        groups = parameter_groups(self.components, optimization, options.adapter.learning_rates, scale=scale)
        self.optimizer = optimizers.make(optimization, groups)
        is_fp16 = accelerator.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_fp16)
        # it makes its tensors now: a recorded step that made them would set them back at every replay
        self.scaler.scale(torch.zeros((), device=self.device))
        self.gradient_sum = torch.empty(0, device=self.device)
        self.lr_factor = lr_factor(optimization, max_steps)
        self.weight_dtype = start.weight_dtype
        self.step_weights = self._step_weights()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are still trained, in the order in which their gradients are exchanged."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def count(self) -> int:
        """The number of trained scalars."""
        return sum(parameter.numel() for parameter in self.parameters)

    def gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """The gradients of `loss`, a scalar, with respect to all parameters in one tensor, float32 [count].
        Those of parameters that it does not depend on are 0. `loss` is computed, and this is called, within
        `step_weights.in_place()`."""
        leaves = [self.step_weights.leaf(parameter) for parameter in self.parameters]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        pairs = zip(leaves, gradients, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]).float()

    def _step_weights(self) -> StepWeights:
        return StepWeights(
            [component.model for component in self.components],
            self.weight_dtype,
            casts_norms=self.device.type == "cuda",
        )

    def zeroed_sum(self) -> torch.Tensor:
        """The sum of gradients of one optimizer step, [count], filled with zeros. It is the same memory for
        every step with the same parameters, as a recorded step needs it."""
        if self.gradient_sum.numel() != self.count:
            self.gradient_sum = torch.empty(self.count, device=self.device)
        return self.gradient_sum.zero_()

    def state(self) -> list[torch.Tensor]:
        """The tensors that losses and gradients depend on and that an optimizer step changes."""
        scale = [self.scaler._scale, self.scaler._growth_tracker] if self.scaler.is_enabled() else []
        return [*self.parameters, *[tensor for tensor in scale if tensor is not None]]

    def put_gradients(self, flat: torch.Tensor) -> None:
        """Make the gradients of all parameters views of `flat`, [count]."""
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, flat.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Set the learning rates of step number `step`, counted from 0. Returns them by their log names."""
        rates = optimizers.set_learning_rate(self.optimizer, self.lr_factor(step))
        return {"lr" if name == "unet" else f"lr_{name}": rate for name, rate in rates.items()}

    def optimizer_step(self) -> None:
        """Apply the gradients to the parameters, and remove them."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def start_from(self, state: AdapterState) -> None:
        """Fill the adapters from `state`, the tensors of --init_adapter. A component that `state` lacks keeps
        its random initial values. Raises UserError if tensors do not fit."""
        for component in self.components:
            if component.name in state:
                try:
                    component.load_state_dict(state[component.name])
                except UserError as error:
                    raise UserError(f"--init_adapter: {error}") from None

    def restore(self, checkpoint: checkpoint_folders.Content) -> None:
        """Fill adapters, optimizer and scaler from a checkpoint. Raises UserError if tensors do not fit."""
        state = checkpoints.read_state(checkpoint)
        if not state.get("trains_text", True):
            self.stop_text_optimizer()
        checkpoints.restore(checkpoint, self.components, self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["grad_scaler"])

    def text_components(self) -> list[inject.Component]:
        """The text encoders that are still trained."""
        return [component for component in self.components if component.name != "unet"]

    def stop_text_optimizer(self) -> None:
        """Take the text encoders' parameters out of the optimizer."""
        for name in [group["name"] for group in self.optimizer.param_groups]:
            if name.startswith("text_encoder"):
                optimizers.drop(self.optimizer, name)

    def drop_text_encoders(self) -> list[inject.Component]:
        """Train the UNet alone from now on. Returns the text encoders."""
        self.stop_text_optimizer()
        dropped = self.text_components()
        self.components = [component for component in self.components if component.name == "unet"]
        self.step_weights = self._step_weights()
        return dropped

    @contextlib.contextmanager
    def base_unet(self) -> Iterator[None]:
        """Within the block the UNet is the base's: it has no adapter and no dropout. Nothing compiled is run,
        since that is for the model with its adapter."""
        (unet,) = (component for component in self.components if component.name == "unet")
        unet.model.eval()
        try:
            with inject.without_adapters([unet]), compilation.eager(wanted=self.is_compiled):
                yield
        finally:
            unet.model.train()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block there is no dropout, and parameters have the values of the adapter file."""
        for component in self.components:
            component.model.eval()
        with optimizers.evaluated(self.optimizer):
            yield
        for component in self.components:
            component.model.train()


def parameter_groups(
    components: list[inject.Component],
    optimization: ResolvedOptimizerOptions,
    rates_by_part: dict[str, float],
    *,
    scale: int,
) -> list[optimizers.Group]:
    """The optimizer's groups: the parameters of each component, split by their rate in --lr_pattern, and by
    factor of LoRA with --lora_plus_ratio.

    `rates_by_part` is --lr_pattern. The parameters that it does not match have a group with the component's
    name. `scale` multiplies every learning rate.
    """
    groups = []
    for component in components:
        rate, decay = optimization.rate_and_decay(component.name)
        ratio = optimization.lora_plus_ratio
        by_rate: dict[tuple[float | None, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in component.named_parameters():
            is_second = ratio is not None and ".lora_B." in name
            by_rate.setdefault((inject.by_part(rates_by_part, name), is_second), []).append(parameter)
        for (part_rate, is_second), parameters in by_rate.items():
            name = component.name if part_rate is None else f"{component.name}:{part_rate!r}"
            group_rate = (rate if part_rate is None else part_rate) * scale
            if is_second and ratio is not None:
                name, group_rate = f"{name}:lora_B", group_rate * ratio
            groups.append(optimizers.Group(name, parameters, group_rate, decay))
    return groups


def lr_factor(optimization: ResolvedOptimizerOptions, max_steps: int) -> Callable[[int], float]:
    """The learning-rate schedule: a function from the step number, counted from 0, to a factor.

    diffusers' schedules are such functions. Without torch's scheduler around them there is no state that a
    resumed run would have to restore.
    """
    if optimizers.schedules_itself(optimization):
        return lambda step: 1.0
    # diffusers' polynomial schedule ends at a rate of 1e-7, and raises an error for a start below it
    rate = optimization.learning_rate
    start = rate if rate and rate > 1e-7 else 1.0
    unused_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=start)
    schedule = get_scheduler(
        optimization.lr_scheduler,
        unused_optimizer,
        num_warmup_steps=optimization.lr_warmup_steps,
        num_training_steps=max_steps,
        num_cycles=optimization.lr_num_cycles,
        power=optimization.lr_power,
    )
    return schedule.lr_lambdas[0]
