"""Training options with every default filled in, as a run uses them once its input is checked.

Some defaults depend on the base's family, others on the machine, on an earlier run in the same output folder,
or on the class images that exist. Imports no torch.
"""

import dataclasses
from typing import Any, Literal, TypeVar

from dreambooth.options.optimizer import OptimizerOptions
from dreambooth.options.paths import FilePath
from dreambooth.options.photos import InstanceOptions, PriorOptions
from dreambooth.options.training import RunOptions, TrainOptions

Group = TypeVar("Group")

# Defaults by family of the base.
_DEFAULTS: dict[str, dict[str, float]] = {
    "sd": {"learning_rate": 5e-4, "adam_weight_decay": 1e-2},
    "sdxl": {
        "learning_rate": 1e-4,
        "adam_weight_decay": 1e-4,
        "text_encoder_lr": 5e-6,
        "adam_weight_decay_text_encoder": 1e-3,
    },
    "if": {"learning_rate": 5e-4, "adam_weight_decay": 1e-2},
}
_RESOLUTIONS = {"sd": 512, "sdxl": 1024, "if": 64}


@dataclasses.dataclass
class ResolvedInstanceOptions(InstanceOptions):
    """The resolution is known."""

    resolution: int | str = dataclasses.field(kw_only=True)

    @property
    def side(self) -> int:
        """The (first) resolution, in pixels."""
        return self.sides[0]


@dataclasses.dataclass
class ResolvedPriorOptions(PriorOptions):
    """With class images that are drawn: their folder, prompt and seed are known."""

    class_data_dir: FilePath = dataclasses.field(kw_only=True)
    class_prompt: str = dataclasses.field(kw_only=True)
    class_seed: int = dataclasses.field(kw_only=True)


@dataclasses.dataclass
class ResolvedOptimizerOptions(OptimizerOptions):
    """Learning rate and weight decay are known; those of the text encoder too if it is trained."""

    learning_rate: float = dataclasses.field(kw_only=True)
    adam_weight_decay: float = dataclasses.field(kw_only=True)

    def rate_and_decay(self, component: str) -> tuple[float, float]:
        """(learning rate, weight decay) of the adapter on `component`: "unet" or a text encoder."""
        rate, decay = self.text_encoder_lr, self.adam_weight_decay_text_encoder
        if component == "unet" or rate is None or decay is None:
            return self.learning_rate, self.adam_weight_decay
        return rate, decay


@dataclasses.dataclass
class ResolvedRunOptions(RunOptions):
    """Seed and precision are known."""

    seed: int = dataclasses.field(kw_only=True)
    mixed_precision: Literal["no", "fp16", "bf16"] = dataclasses.field(kw_only=True)


@dataclasses.dataclass(kw_only=True)
class ResolvedTrainOptions(TrainOptions):
    """All flags of a training run. `prior` is a ResolvedPriorOptions if class images are drawn."""

    instance: ResolvedInstanceOptions
    optimization: ResolvedOptimizerOptions
    run: ResolvedRunOptions


def resolution_of(instance: InstanceOptions, family: str) -> int:
    """The (first) --resolution, or the default of the base's `family`: sd, sdxl or if."""
    return instance.sides[0] if instance.sides else _RESOLUTIONS[family]


def resolve_prior(prior: PriorOptions, *, class_seed: int) -> ResolvedPriorOptions:
    """`prior` with the seed of the class images. Raises ValueError without a folder or a prompt."""
    return _as(ResolvedPriorOptions, prior, class_seed=class_seed)


def resolve(
    options: TrainOptions,
    family: str,
    *,
    seed: int,
    mixed_precision: str,
    prior: ResolvedPriorOptions | None = None,
) -> ResolvedTrainOptions:
    """The options with the defaults of the base's `family`: sd, sdxl or if. `prior` is the resolved group if
    class images are drawn."""
    resolution = options.instance.resolution or _RESOLUTIONS[family]
    return _as(
        ResolvedTrainOptions,
        options,
        instance=_as(ResolvedInstanceOptions, options.instance, resolution=resolution),
        prior=prior or options.prior,
        optimization=_resolve_optimizer(
            options.optimization, family, trains_text=options.text.train_text_encoder
        ),
        run=_as(ResolvedRunOptions, options.run, seed=seed, mixed_precision=mixed_precision),
    )


def _resolve_optimizer(
    optimizer: OptimizerOptions, family: str, *, trains_text: bool
) -> ResolvedOptimizerOptions:
    """The group with learning rates and weight decays filled in."""
    defaults = _DEFAULTS[family]

    def first(*values: float | None) -> float:
        return next(value for value in values if value is not None)

    is_prodigy = optimizer.optimizer == "prodigy"
    rate = first(optimizer.learning_rate, 1.0 if is_prodigy else defaults["learning_rate"])
    decay = first(optimizer.adam_weight_decay, defaults["adam_weight_decay"])
    resolved = _as(ResolvedOptimizerOptions, optimizer, learning_rate=rate, adam_weight_decay=decay)
    if trains_text:
        text_rate = first(optimizer.text_encoder_lr, defaults.get("text_encoder_lr"), rate)
        # Prodigy has one step size for all parameters.
        resolved.text_encoder_lr = rate if is_prodigy else text_rate
        resolved.adam_weight_decay_text_encoder = first(
            optimizer.adam_weight_decay_text_encoder, defaults.get("adam_weight_decay_text_encoder"), decay
        )
    return resolved


def _as(kind: type[Group], group: Any, **values: Any) -> Group:
    """The option group as its subclass `kind`, with `values` filled in."""
    present = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return kind(**present | values)
