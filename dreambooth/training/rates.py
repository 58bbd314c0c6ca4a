"""Notes on learning rates that leave an adapter next to untrained."""

from dreambooth.options.resolved import ResolvedOptimizerOptions, ResolvedTrainOptions
from dreambooth.training import optimizers
from dreambooth.training.trainables import lr_factor

_FULL = 0.99  # of the learning rate, reached at some step of a schedule
_LEAST_SHARE = 0.1  # of the learning rate, on average over the run; a linear decay has 0.5
# Adam moves a weight by about the learning rate a step. The defaults add up to 0.25 in 500 steps.
_LEAST_SUM = 1e-5


def notes(
    options: ResolvedTrainOptions, components: tuple[str, ...], max_steps: int, scale: int
) -> list[str]:
    """Notes, with the numbers, on rates of 0, on a warm-up longer than the run, and on vanishing rates.

    `components` are the trained models: "unet" and text encoders. `scale` is the factor of --scale_lr, else
    1.
    """
    optimization = options.optimization
    rates = {name: optimization.rate_and_decay(name)[0] * scale for name in components}
    result = [_untrained(name, options) for name, rate in rates.items() if rate == 0]
    result += [
        f"--lr_pattern: the learning rate of {part} is 0: its adapter stays as it starts"
        for part, rate in options.adapter.learning_rates.items()
        if rate == 0
    ]
    rate = max([*rates.values(), *(scale * rate for rate in options.adapter.learning_rates.values())])
    return result + (_of_schedule(optimization, rate, max_steps) if rate else [])


def _untrained(component: str, options: ResolvedTrainOptions) -> str:
    """The note on a component whose learning rate is 0."""
    is_unet = component == "unet" or options.optimization.text_encoder_lr is None
    flag = "--learning_rate" if is_unet else "--text_encoder_lr"
    others = ", but for the parts of --lr_pattern" if options.adapter.learning_rates else ""
    return f"{flag} is 0: the adapter of {component} is not trained and stays as it starts{others}"


def _of_schedule(optimization: ResolvedOptimizerOptions, rate: float, max_steps: int) -> list[str]:
    """Notes on what the schedule leaves of the learning rate `rate`."""
    shares = _shares(optimization, max_steps)
    mean, most, warmup = sum(shares) / max_steps, max(shares), optimization.lr_warmup_steps
    if most < _FULL and warmup >= max_steps:
        return [
            f"--lr_warmup_steps {warmup} is not over at the end of this run of {max_steps} steps: the "
            f"learning rate reaches {rate * most:.2g}, which is {most:.2%} of {rate:g}; give fewer warm-up "
            "steps, or train longer"
        ]
    if mean < _LEAST_SHARE:
        return [
            f"--lr_scheduler {optimization.lr_scheduler} leaves {mean:.2%} of the learning rate {rate:g} on "
            f"average over {max_steps} steps: the adapter stays next to untrained"
        ]
    if optimization.optimizer != "prodigy" and rate * sum(shares) < _LEAST_SUM:
        return [
            f"the learning rate {rate:g} adds up to {rate * sum(shares):.2g} over {max_steps} steps, and the "
            "defaults to 0.25 over 500 steps: the adapter stays next to untrained"
        ]
    return []


def _shares(optimization: ResolvedOptimizerOptions, max_steps: int) -> list[float]:
    """The share of the learning rate that each step has."""
    if optimizers.schedules_itself(optimization):
        warmup = optimization.lr_warmup_steps if optimization.lr_scheduler == "constant_with_warmup" else 0
        return [min(1.0, (step + 1) / max(1, warmup)) for step in range(max_steps)]
    factor = lr_factor(optimization, max_steps)
    return [factor(step) for step in range(max_steps)]
