"""What is trained: an adapter on UNet and text encoders, put there by peft; where, of which kind, and how much of it.

A kind is one record in `KINDS`. AdapterOptions files have the scale worked into one factor of each layer (`Component.state_dict`), as with alpha = rank:
readers that know nothing of alpha get it right.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import (
    BOFTConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from dreambooth.adapters import factored
from dreambooth.errors import UserError, reason_of
from dreambooth.options.adapter import AdapterOptions

# The layers of "dual LoRA": every attention projection. The added ones exist in UNets that attend to image or T5 tokens (DeepFloyd IF).
UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
_UNET_PRESETS = {
    "attn": UNET_TARGETS,
    "attn_ff": (*UNET_TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    "full": (
        *(*UNET_TARGETS, "proj", "proj_in", "proj_out", "ff.net.2"),
        *("conv", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    ),
}
_TEXT_PRESETS = {
    "attn": TEXT_ENCODER_TARGETS,
    "attn_ff": (*TEXT_ENCODER_TARGETS, "fc1", "fc2"),
    "full": (*TEXT_ENCODER_TARGETS, "fc1", "fc2"),
}
_SUFFIX = re.compile(r"\.(lora_|hada_|lokr_|oft_|boft_|hra_).*")
_MAGNITUDE = ".lora_magnitude_vector"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of adapter: peft's settings for it, and which tensor of a layer carries the scale ("" where there is none)."""

    config: Callable[["Plan"], Any]
    carrier: str
    has_rank: bool = True


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one model gets: the options, with rank, alpha and dropout of this model; the ends of its layers' names; ranks of single layers."""

    options: AdapterOptions
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    ranks: dict[str, int]

    @property
    def alphas(self) -> dict[str, float]:
        """Alpha of the layers with ranks of their own: the same scale for all."""
        power = 0.5 if self.options.use_rslora else 1.0  # by the root of the rank is what rsLoRA divides
        return {layer: self.alpha * (rank / self.rank) ** power for layer, rank in self.ranks.items()}


def _lora(plan: Plan) -> LoraConfig:
    o = plan.options
    return LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        init_lora_weights="gaussian",
        use_dora=o.use_dora,
        use_rslora=o.use_rslora,
        target_modules=list(plan.targets),
        rank_pattern=_anchored(plan.ranks),
        alpha_pattern=_anchored(plan.alphas),
    )


def _factors(plan: Plan) -> dict[str, Any]:
    o = plan.options
    return {
        "r": plan.rank,
        "alpha": plan.alpha,
        "rank_dropout": o.rank_dropout,
        "module_dropout": o.module_dropout,
        "use_effective_conv2d": o.use_effective_conv2d,
        "target_modules": list(plan.targets),
        "rank_pattern": _anchored(plan.ranks),
        "alpha_pattern": _anchored(plan.alphas),
    }


def _anchored(table: Mapping[str, Any]) -> dict[str, Any]:
    """peft reads the keys as regular expressions for the end of a layer's name."""
    return {f"^{re.escape(layer)}": value for layer, value in table.items()}


def _lokr(plan: Plan) -> LoKrConfig:
    return LoKrConfig(
        **_factors(plan),
        decompose_both=plan.options.decompose_both,
        decompose_factor=plan.options.decompose_factor,
    )


def _oft(plan: Plan) -> OFTConfig:
    o = plan.options
    return OFTConfig(
        r=0,
        oft_block_size=o.oft_block_size,
        module_dropout=o.module_dropout,
        target_modules=list(plan.targets),
    )


KINDS = {
    "lora": Kind(_lora, ".lora_B."),
    "loha": Kind(lambda plan: LoHaConfig(**_factors(plan)), ".hada_w1_a"),
    "lokr": Kind(_lokr, ".lokr_w1"),  # the first factor, whole or its first half
    "oft": Kind(_oft, "", has_rank=False),
    "boft": Kind(
        lambda plan: BOFTConfig(
            boft_block_size=plan.options.boft_block_size, target_modules=list(plan.targets)
        ),
        "",
        has_rank=False,
    ),
    "hra": Kind(
        lambda plan: HRAConfig(
            r=plan.rank, apply_GS=plan.options.apply_gs, target_modules=list(plan.targets)
        ),
        "",
    ),
}


def module_of(key: str) -> str:
    """The layer that an adapter's tensor belongs to, by peft's key."""
    return _SUFFIX.sub("", key)


@dataclasses.dataclass
class Component:
    """One model that carries an adapter. `name` is its prefix in adapter files: `unet`, `text_encoder` or `text_encoder_2`."""

    name: str
    model: torch.nn.Module
    kind: Kind = dataclasses.field(default_factory=lambda: KINDS["lora"])

    def __post_init__(self) -> None:
        # noted once: another adapter on the same model, to look at it, changes what requires gradients
        self._trained = [
            (f"{self.name}.{name}", p) for name, p in self.model.named_parameters() if p.requires_grad
        ]
        scales = {
            name: getattr(module, "scaling", {}).get("default", 1.0)
            for name, module in self.model.named_modules()
            if hasattr(module, "scaling")
        }
        self._scales = {name: float(scale) for name, scale in scales.items() if scale != 1}

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters, under names that are unique in a run."""
        return list(self._trained)

    @property
    def is_scaled(self) -> bool:
        """Whether `state_dict` has other numbers than the parameters."""
        return bool(self._scales)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors under peft's keys, `<module path>.lora_A.weight`, the scale worked in: as with alpha = rank. Without the
        `text_model.` that some versions of some text encoders have in front."""
        # save_embedding_layers=False: "auto" would ask the hub for a config at every save
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        # readers take this one for a parameter of a module, as the others are
        state = {
            f"{key}.weight" if key.endswith(_MAGNITUDE) else key: tensor for key, tensor in state.items()
        }
        return {
            key.removeprefix(self._prefix): tensor * scale if (scale := self._scale_of(key)) != 1 else tensor
            for key, tensor in state.items()
        }

    @property
    def _prefix(self) -> str:
        return "text_model." if hasattr(self.model, "text_model") else ""

    def _scale_of(self, key: str) -> float:
        """What the tensor at the model's own key is multiplied by in files."""
        is_carrier = bool(self.kind.carrier) and self.kind.carrier in key and not key.endswith("_b")
        return self._scales.get(module_of(key), 1.0) if is_carrier else 1.0

    def check_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise UserError, naming keys, if they are not exactly those of the model, or of other shapes."""
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise UserError(
                f"the adapter file lacks {len(missing)} of {len(own)} tensors of {self.name}, e.g. {missing[0]}"
            )
        if unknown := sorted(state.keys() - own.keys()):
            raise UserError(
                f"the adapter file has {len(unknown)} tensors that {self.name} has no place for, e.g. {unknown[0]}"
            )
        for key, tensor in own.items():
            if tensor.shape != state[key].shape:
                raise UserError(
                    f"the adapter file has {key} of shape {tuple(state[key].shape)}; {self.name} needs {tuple(tensor.shape)}"
                )

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Fill the adapter with what `state_dict` gives. Raises UserError if the tensors are not those that it has."""
        self.check_state_dict(state)
        own = {self._prefix + key: tensor for key, tensor in state.items()}
        own = {
            key: tensor / scale if (scale := self._scale_of(key)) != 1 else tensor
            for key, tensor in own.items()
        }
        set_peft_model_state_dict(
            self.model,
            {key.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE): tensor for key, tensor in own.items()},
        )


def unet_targets(options: AdapterOptions) -> tuple[str, ...]:
    """The ends of the names of the UNet's layers that get an adapter."""
    return options.unet_layers() or _UNET_PRESETS[options.target_preset]


def text_targets(
    layers: int,
    unused: int,
    options: AdapterOptions | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[str, ...]:
    """The same of a text encoder of so many layers, without the last `unused`, whose output nobody looks at. `shapes` are of its layers by name,
    which --text_encoder_layers is read against; without them its names must be those of single projections."""
    options = options or AdapterOptions()
    ends = options.text_layers() or _TEXT_PRESETS[options.target_preset]
    if not unused:
        return ends
    if shapes is None:
        return tuple(
            f"layers.{layer}.{'mlp' if end in ('fc1', 'fc2') else 'self_attn'}.{end}"
            for layer in range(layers - unused)
            for end in ends
        )
    numbers = {layer: re.search(r"\blayers\.(\d+)\.", layer) for layer in layers_at(ends, shapes)}
    return tuple(
        layer for layer, number in numbers.items() if number is None or int(number[1]) < layers - unused
    )


def _is_part(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def by_part(table: Mapping[str, float], name: str) -> float | None:
    """The value of the last part in `table` that the name of a layer, its component in front, has; None if it has none."""
    found = [value for part, value in table.items() if _is_part(part, name)]
    return found[-1] if found else None


def unknown_parts(flag: str, parts: Iterable[str], layers: Sequence[str]) -> list[str]:
    """A line for every part that no layer has in its name, with those that look like it."""
    ends = sorted(
        {
            ".".join(words[i : i + n])
            for layer in layers
            for words in [layer.split(".")]
            for n in (1, 2)
            for i in range(len(words) - n + 1)
        }
    )
    problems = []
    for part in parts:
        if not any(_is_part(part, layer) for layer in layers):
            near = difflib.get_close_matches(part, ends, n=3)
            problems.append(
                f"{flag}: no trained layer has {part} in its name"
                + (f"; there are {', '.join(near)}" if near else "")
            )
    return problems


def layers_at(targets: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The layers, of all that a model has by name and shape, whose names end with one of `targets`."""
    ends = tuple(f".{target}" for target in targets)
    return [layer for layer, shape in shapes.items() if len(shape) > 1 and f".{layer}".endswith(ends)]


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's layers by name."""
    return {
        layer: tuple(m.weight.shape)
        for layer, m in model.named_modules()
        if isinstance(getattr(m, "weight", None), torch.Tensor)
    }


def inject(
    name: str, model: torch.nn.Module, options: AdapterOptions, targets: tuple[str, ...], *, seed: int
) -> Component:
    """Freeze `model` and add a trainable adapter to every layer whose name ends with one of `targets`.

    LoRA's A is drawn from N(0, 1/rank^2) and B is zero (arXiv 2106.09685); the other kinds start at no change as well: for LoRA, DoRA, LoHa and
    LoKr the adapted model equals the base bit for bit. Raises UserError if peft cannot do it, with its reason.
    """
    is_text = name != "unet"
    rank = (options.text_encoder_rank if is_text else None) or options.rank
    own_rank = is_text and options.text_encoder_rank is not None
    alpha = (options.text_encoder_alpha if is_text else None) or (
        rank if own_rank or options.lora_alpha is None else options.lora_alpha
    )
    dropout = (
        options.text_encoder_dropout
        if is_text and options.text_encoder_dropout is not None
        else options.lora_dropout
    )
    shapes = shapes_of(model)
    ranks = {layer: by_part(options.ranks, f"{name}.{layer}") for layer in layers_at(targets, shapes)}
    own_ranks = {layer: int(own) for layer, own in ranks.items() if own is not None and own != rank}
    kind = KINDS[options.adapter]
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(kind.config(Plan(options, rank, float(alpha), dropout, targets, own_ranks)))  # type: ignore[operator]
        except ValueError as error:  # a width that its blocks do not divide, for one
            raise UserError(
                f"--adapter {options.adapter}: {name} cannot have it: {reason_of(error)}"
            ) from None
    factored.use_factored_forward(
        model
    )  # peft would build and keep a dense matrix for every layer of LoHa and LoKr
    for parameter in model.parameters():
        if parameter.requires_grad:
            # peft makes the adapter in the base's dtype; in bf16 most of Adam's steps would round to nothing, and fp16 cannot be unscaled
            parameter.data = parameter.data.float()
    return Component(name, model, kind)


def inject_lora(
    name: str,
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float,
    targets: tuple[str, ...],
    seed: int,
) -> Component:
    """`inject` of plain LoRA, for callers that have no options."""
    return inject(
        name, model, AdapterOptions(rank=rank, lora_alpha=alpha, lora_dropout=dropout), targets, seed=seed
    )


def metadata(component: Component) -> dict[str, Any]:
    """The fields of peft's settings that a reader of the component's `state_dict` needs, in a stable order."""
    config: Any = component.model.peft_config["default"]  # type: ignore[index]
    kind = config.peft_type.value
    found: dict[str, Any] = {"peft_type": kind, "target_modules": sorted(config.target_modules)}
    if kind in ("LORA", "LOHA", "LOKR"):
        ranks = {key.removeprefix("^").replace("\\", ""): rank for key, rank in config.rank_pattern.items()}
        alpha = "lora_alpha" if kind == "LORA" else "alpha"
        # the scale is in the tensors: alpha is the rank, everywhere
        found |= {"r": config.r, alpha: config.r, "rank_pattern": ranks, "alpha_pattern": dict(ranks)}
    if kind == "LORA":
        # of training: diffusers would drop out as it draws, since the layers that it adds stay in training mode
        found |= {"lora_dropout": 0.0, "bias": "none", "use_dora": config.use_dora, "use_rslora": False}
    names = {
        "LOHA": ("use_effective_conv2d",),
        "LOKR": ("use_effective_conv2d", "decompose_both", "decompose_factor"),
        "OFT": (
            "r",
            "oft_block_size",
            "block_share",
            "coft",
            "eps",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
        ),
        "BOFT": ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
        "HRA": ("r", "apply_GS"),
    }
    return found | {field: getattr(config, field) for field in names.get(kind, ())}


def describe(components: list[Component]) -> str:
    """A table of what is trained: modules, parameters, their share of the frozen weights and their size in a file."""
    lines = [f"{'trained':<14} {'modules':>8} {'parameters':>12} {'of frozen':>10} {'in file':>10}"]
    for component in components:
        trained = [(name, p) for name, p in component.model.named_parameters() if p.requires_grad]
        modules = {module_of(name) for name, _ in trained}
        parameters = sum(p.numel() for _, p in trained)
        frozen = sum(p.numel() for p in component.model.parameters() if not p.requires_grad)
        lines.append(
            f"{component.name:<14} {len(modules):>8,} {parameters:>12,} {parameters / frozen:>10.3%} {4 * parameters / 2**20:>6.2f} MiB"
        )
    return "\n".join(lines)
