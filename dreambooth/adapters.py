"""What is trained: low-rank updates on UNet and text encoder, put there by peft."""

import dataclasses
import re

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from dreambooth.errors import UserError

# The layers of "dual LoRA": every attention projection. The added ones exist in UNets that attend to image or T5 tokens (DeepFloyd IF).
UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclasses.dataclass
class Component:
    """One model that carries an adapter. `name` is its prefix in adapter files: `unet`, `text_encoder` or `text_encoder_2`; `scale` is alpha /
    rank, by which the update counts."""

    name: str
    model: torch.nn.Module
    scale: float = 1.0

    def __post_init__(self) -> None:
        # noted once: another adapter on the same model, to look at it, changes what requires gradients
        self._trained = [(f"{self.name}.{name}", p) for name, p in self.model.named_parameters() if p.requires_grad]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters, under names that are unique in a run."""
        return list(self._trained)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors under peft's keys, `<module path>.lora_A.weight`, the scale worked into B: as with alpha = rank. Without the
        `text_model.` that some versions of some text encoders have in front."""
        # save_embedding_layers=False: "auto" would ask the hub for a config at every save
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {key.removeprefix(self._prefix): tensor for key, tensor in self._scaled(state, self.scale).items()}

    @property
    def _prefix(self) -> str:
        return "text_model." if hasattr(self.model, "text_model") else ""

    def _scaled(self, state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        if scale == 1:
            return state
        return {key: tensor * scale if ".lora_B." in key else tensor for key, tensor in state.items()}

    def check_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raise UserError, naming keys, if they are not exactly those of the model, or of other shapes."""
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise UserError(f"the adapter file lacks {len(missing)} of {len(own)} tensors of {self.name}, e.g. {missing[0]}")
        if unknown := sorted(state.keys() - own.keys()):
            raise UserError(f"the adapter file has {len(unknown)} tensors that {self.name} has no place for, e.g. {unknown[0]}")
        for key, tensor in own.items():
            if tensor.shape != state[key].shape:
                raise UserError(f"the adapter file has {key} of shape {tuple(state[key].shape)}; {self.name} needs {tuple(tensor.shape)}")

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Fill the adapter with what `state_dict` gives. Raises UserError if the tensors are not those that it has."""
        self.check_state_dict(state)
        set_peft_model_state_dict(self.model, {self._prefix + key: tensor for key, tensor in self._scaled(state, 1 / self.scale).items()})


def text_targets(layers: int, unused: int) -> tuple[str, ...]:
    """The attention projections of a text encoder of so many layers, without those of the last `unused`, whose output nobody looks at."""
    if not unused:
        return TEXT_ENCODER_TARGETS
    return tuple(f"layers.{layer}.self_attn.{target}" for layer in range(layers - unused) for target in TEXT_ENCODER_TARGETS)


def inject_lora(
    name: str, model: torch.nn.Module, *, rank: int, alpha: float | None = None, dropout: float, targets: tuple[str, ...], seed: int
) -> Component:
    """Freeze `model` and add trainable LoRA to every layer named in `targets`; its update counts alpha / rank times (None: once).

    A is drawn from N(0, 1/rank^2) and B is zero, so the adapted model equals the base bit for bit (LoRA, arXiv 2106.09685).
    """
    alpha = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=list(targets))
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)  # type: ignore[operator]
    for parameter in model.parameters():
        if parameter.requires_grad:
            # peft makes the adapter in the base's dtype; in bf16 most of Adam's steps would round to nothing, and fp16 cannot be unscaled
            parameter.data = parameter.data.float()
    return Component(name, model, alpha / rank)


def lora_metadata(component: Component) -> dict[str, object]:
    """The fields of a `LoraConfig` that a reader of the component's `state_dict` needs, in a stable order."""
    config: LoraConfig = component.model.peft_config["default"]  # type: ignore[assignment,index]
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.r,  # the scale is in B
        "target_modules": sorted(config.target_modules),
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def describe(components: list[Component]) -> str:
    """A table of what is trained: modules, parameters, their share of the frozen weights and their size in a file."""
    lines = [f"{'trained':<14} {'modules':>8} {'parameters':>12} {'of frozen':>10} {'in file':>10}"]
    for component in components:
        trained = [(name, p) for name, p in component.model.named_parameters() if p.requires_grad]
        modules = {re.sub(r"\.lora_[AB]\..*", "", name) for name, _ in trained}
        parameters = sum(p.numel() for _, p in trained)
        frozen = sum(p.numel() for p in component.model.parameters() if not p.requires_grad)
        lines.append(f"{component.name:<14} {len(modules):>8,} {parameters:>12,} {parameters / frozen:>10.3%} {4 * parameters / 2**20:>6.2f} MiB")
    return "\n".join(lines)
