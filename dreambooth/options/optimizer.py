"""The flags of the optimizer and the learning rate. Imports no torch."""

import dataclasses
from typing import Literal

from dreambooth.io.errors import shown
from dreambooth.options.rules import BooleanWord, at_least, require, require_package

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "schedule-free")


@dataclasses.dataclass
class OptimizerOptions:
    """Optimizer and learning rate."""

    learning_rate: float | None = None
    """Learning rate. Default: 5e-4; 1e-4 for Stable Diffusion XL; 1 with Prodigy."""
    text_encoder_lr: float | None = None
    """Learning rate of the text encoder. Default: --learning_rate; 5e-6 for Stable Diffusion XL. Prodigy
    always uses --learning_rate."""
    scale_lr: bool = False
    """Multiply the learning rates by gradient accumulation steps x batch size x processes."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "constant"
    """Learning-rate schedule."""
    lr_warmup_steps: int = 500
    """Steps over which the learning rate rises from 0. `constant` has no warm-up."""
    lr_num_cycles: int = 1
    """Number of cycles of cosine_with_restarts."""
    lr_power: float = 1.0
    """Exponent of the polynomial schedule."""
    optimizer: str = "adamw"
    """adamw, adamw8bit (bitsandbytes package), prodigy (prodigyopt package), adafactor or schedule-free
    (schedulefree package)."""
    use_8bit_adam: bool = False
    """The same as --optimizer adamw8bit."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay rate of Adam's second moment."""
    adam_weight_decay: float | None = None
    """Decoupled weight decay of the UNet's adapter, with every optimizer. Default: 1e-2; 1e-4 for Stable
    Diffusion XL."""
    adam_weight_decay_text_encoder: float | None = None
    """Decoupled weight decay of the text encoder's adapter. Default: --adam_weight_decay; 1e-3 for Stable
    Diffusion XL."""
    adam_epsilon: float = 1e-8
    """Added to Adam's denominator."""
    prodigy_beta3: float | None = None
    """Decay rate of Prodigy's step size estimate. Default: the square root of --adam_beta2."""
    prodigy_decouple: BooleanWord = True
    """Prodigy decouples weight decay, as AdamW does."""
    prodigy_use_bias_correction: BooleanWord = True
    """Prodigy corrects the bias of its moments, as Adam does."""
    prodigy_safeguard_warmup: BooleanWord = True
    """Prodigy leaves the learning rate out of its step size estimate during warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm, over UNet and text encoder together; 0 does not clip."""

    def __post_init__(self) -> None:
        at_least(
            self, 0, "learning_rate", "lr_warmup_steps", "lr_power", "adam_weight_decay", "max_grad_norm"
        )
        at_least(self, 0, "text_encoder_lr", "adam_weight_decay_text_encoder")
        at_least(self, 1, "lr_num_cycles")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"--{name} must be in [0, 1), got {getattr(self, name)}")
        # An epsilon of 0 would divide zero by zero in the first step: LoRA's A has no gradient while B is 0.
        require(
            0 < self.adam_epsilon < float("inf"), f"--adam_epsilon must be over 0, got {self.adam_epsilon}"
        )
        beta3 = self.prodigy_beta3
        require(beta3 is None or 0 <= beta3 < 1, f"--prodigy_beta3 must be in [0, 1), got {beta3}")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        self.optimizer = self.optimizer.lower()
        known = self.optimizer in OPTIMIZERS
        require(known, f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {shown(self.optimizer)}")
        if self.use_8bit_adam:
            fits = self.optimizer in ("adamw", "adamw8bit")
            require(
                fits,
                "--use_8bit_adam is --optimizer adamw8bit; "
                f"it cannot be used with --optimizer {shown(self.optimizer)}",
            )
            self.optimizer = "adamw8bit"
        flag = "--use_8bit_adam" if self.use_8bit_adam else f"--optimizer {self.optimizer}"
        for name, package, extra in (
            ("adamw8bit", "bitsandbytes", "bitsandbytes"),
            ("prodigy", "prodigyopt", "prodigy"),
            ("schedule-free", "schedulefree", "schedule-free"),
        ):
            require_package(self.optimizer == name, flag, package, f"pip install '.[{extra}]'")
        if self.optimizer == "schedule-free":
            fits = self.lr_scheduler in ("constant", "constant_with_warmup")
            require(
                fits,
                "--lr_scheduler must be constant or constant_with_warmup with --optimizer schedule-free, "
                f"got {self.lr_scheduler}",
            )
            require(
                self.adam_beta1 > 0,
                f"--adam_beta1 must be over 0 with --optimizer schedule-free, got {self.adam_beta1}",
            )
