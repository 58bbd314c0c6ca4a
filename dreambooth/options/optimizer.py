"""The flags of the optimizer and the learning rate. Imports no torch."""

import dataclasses
from typing import Literal

from dreambooth.io.errors import shown
from dreambooth.options.rules import (
    Amount,
    AmountOverZero,
    BooleanWord,
    Count,
    CountOrZero,
    Decay,
    Group,
    require,
    require_package,
)

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "schedule-free")


@dataclasses.dataclass
class OptimizerOptions(Group):
    """Optimizer and learning rate."""

    learning_rate: Amount | None = None
    """Learning rate. Default: 5e-4; 1e-4 for Stable Diffusion XL; 1 with Prodigy."""
    text_encoder_lr: Amount | None = None
    """Learning rate of the text encoder. Default: --learning_rate; 5e-6 for Stable Diffusion XL. Prodigy
    always uses --learning_rate."""
    lora_plus_ratio: AmountOverZero | None = None
    """LoRA+ (arXiv 2402.12354): the learning rate of the second factor (B) is this many times that of the
    first. Default: 1."""
    scale_lr: bool = False
    """Multiply the learning rates by gradient accumulation steps x batch size x processes."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "constant"
    """Learning-rate schedule."""
    lr_warmup_steps: CountOrZero = 500
    """Steps over which the learning rate rises from 0. `constant` has no warm-up."""
    lr_num_cycles: Count = 1
    """Number of cycles of cosine_with_restarts."""
    lr_power: Amount = 1.0
    """Exponent of the polynomial schedule."""
    optimizer: str = "adamw"
    """adamw, adamw8bit (bitsandbytes package), prodigy (prodigyopt package), adafactor or schedule-free
    (schedulefree package)."""
    use_8bit_adam: bool = False
    """The same as --optimizer adamw8bit."""
    adam_beta1: Decay = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: Decay = 0.999
    """Decay rate of Adam's second moment."""
    adam_weight_decay: Amount | None = None
    """Decoupled weight decay of the UNet's adapter, with every optimizer. Default: 1e-2; 1e-4 for Stable
    Diffusion XL."""
    adam_weight_decay_text_encoder: Amount | None = None
    """Decoupled weight decay of the text encoder's adapter. Default: --adam_weight_decay; 1e-3 for Stable
    Diffusion XL."""
    adam_epsilon: AmountOverZero = 1e-8
    """Added to Adam's denominator. 0 would divide zero by zero in the first step: LoRA's A has no gradient
    while B is 0."""
    prodigy_beta3: Decay | None = None
    """Decay rate of Prodigy's step size estimate. Default: the square root of --adam_beta2."""
    prodigy_decouple: BooleanWord = True
    """Prodigy decouples weight decay, as AdamW does."""
    prodigy_use_bias_correction: BooleanWord = True
    """Prodigy corrects the bias of its moments, as Adam does."""
    prodigy_safeguard_warmup: BooleanWord = True
    """Prodigy leaves the learning rate out of its step size estimate during warm-up."""
    max_grad_norm: Amount = 1.0
    """Gradients are clipped to this norm, over UNet and text encoder together; 0 does not clip."""

    def _check(self) -> None:
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
