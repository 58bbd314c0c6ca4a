"""Adds trainable adapters to UNet and text encoders with peft: which layers get one, of which kind, and with
which settings.

A kind is one record in `KINDS`. In adapter files the scale is multiplied into one factor of each layer and
alpha is the rank (`Component.state_dict`), so that readers that ignore alpha apply the right scale.
"""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from dreambooth.adapter_files import layer_names, peft_internals
from dreambooth.adapters import factored
from dreambooth.io.errors import UserError, reason_of
from dreambooth.options.adapter import AdapterOptions

# Every attention projection. add_* exist in UNets that attend to image or T5 tokens (DeepFloyd IF).
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
_TEXT_WITH_FF = (*TEXT_ENCODER_TARGETS, "fc1", "fc2")
_TEXT_PRESETS = {"attn": TEXT_ENCODER_TARGETS, "attn_ff": _TEXT_WITH_FF, "full": _TEXT_WITH_FF}
_SUFFIX = re.compile(r"\.(lora_|hada_|lokr_|oft_|boft_|hra_).*")
_MAGNITUDE = ".lora_magnitude_vector"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of adapter. `config` makes peft's configuration from a plan. `carrier` is the part of a key
    that marks the tensor into which the scale is multiplied; "" if the kind has no scale."""

    config: Callable[["Plan"], Any]
    carrier: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of one model's adapter. `rank`, `alpha` and `dropout` are this model's. `targets` are the
    ends of the names of the adapted layers. `ranks` has the layers whose rank is another."""

    options: AdapterOptions
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    ranks: dict[str, int]

    @property
    def alphas(self) -> dict[str, float]:
        """Alpha of each layer in `ranks`, chosen so that all layers of the model have the same scale."""
        power = 0.5 if self.options.use_rslora else 1.0  # rsLoRA divides alpha by the root of the rank
        return {layer: self.alpha * (rank / self.rank) ** power for layer, rank in self.ranks.items()}


def _patterns(plan: Plan) -> dict[str, Any]:
    """The fields of peft's configuration that name layers."""
    # peft reads keys as regular expressions for the end of a layer's name: each of these matches one layer
    ranks, alphas = (
        {f"^{re.escape(layer)}": value for layer, value in table.items()}
        for table in (plan.ranks, plan.alphas)
    )
    return {"target_modules": list(plan.targets), "rank_pattern": ranks, "alpha_pattern": alphas}


def _lora(plan: Plan) -> LoraConfig:
    return LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        init_lora_weights="gaussian",
        use_dora=plan.options.use_dora,
        use_rslora=plan.options.use_rslora,
        **_patterns(plan),
    )


def _factors(plan: Plan) -> dict[str, Any]:
    """The fields that LoHa and LoKr share."""
    return {
        "r": plan.rank,
        "alpha": plan.alpha,
        "rank_dropout": plan.options.rank_dropout,
        "module_dropout": plan.options.module_dropout,
        "use_effective_conv2d": plan.options.use_effective_conv2d,
    } | _patterns(plan)


def _lokr(plan: Plan) -> LoKrConfig:
    options = plan.options
    return LoKrConfig(
        decompose_both=options.decompose_both, decompose_factor=options.decompose_factor, **_factors(plan)
    )


def _oft(plan: Plan) -> OFTConfig:
    return OFTConfig(
        r=0,
        oft_block_size=plan.options.oft_block_size,
        module_dropout=plan.options.module_dropout,
        target_modules=list(plan.targets),
    )


def _boft(plan: Plan) -> BOFTConfig:
    return BOFTConfig(boft_block_size=plan.options.boft_block_size, target_modules=list(plan.targets))


KINDS = {
    "lora": Kind(_lora, ".lora_B."),
    "loha": Kind(lambda plan: LoHaConfig(**_factors(plan)), ".hada_w1_a"),
    "lokr": Kind(_lokr, ".lokr_w1"),  # the first factor, dense or the first half of its product
    "oft": Kind(_oft, ""),
    "boft": Kind(_boft, ""),
    "hra": Kind(lambda plan: HRAConfig(r=plan.rank, target_modules=list(plan.targets)), ""),
}


def module_of(key: str) -> str:
    """The name of the layer to which the adapter tensor with this key of peft's belongs."""
    return _SUFFIX.sub("", key)


@dataclasses.dataclass
class Component:
    """A model with an adapter that is trained. `name` is its prefix in adapter files: `unet`, `text_encoder`
    or `text_encoder_2`."""

    name: str
    model: torch.nn.Module
    kind: Kind = dataclasses.field(default_factory=lambda: KINDS["lora"])

    def __post_init__(self) -> None:
        # listed once: another adapter that validation attaches to the same model changes which parameters
        # require gradients
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
        """Whether the tensors of `state_dict` differ from the parameters."""
        return bool(self._scales)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by peft's key with the plain layer name, `<layer>.lora_A.weight`. The scale
        is multiplied into one tensor of each layer, so that alpha is the rank."""
        # save_embedding_layers=False: "auto" would request a config from the hub at every save
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        tensors = {}
        for key, tensor in state.items():
            # readers expect a magnitude to be a parameter of a module, as the other tensors are
            name = f"{key}.weight" if key.endswith(_MAGNITUDE) else key
            scale = self._scale_of(name)
            tensors[name.removeprefix(self._prefix)] = tensor * scale if scale != 1 else tensor
        return tensors

    @property
    def _prefix(self) -> str:
        """The prefix of the model's layers that plain names lack."""
        return layer_names.live_prefix(self.model)

    def _scale_of(self, key: str) -> float:
        """The factor by which the tensor in files is larger than the model's parameter with this key."""
        has_scale = bool(self.kind.carrier) and self.kind.carrier in key and not key.endswith("_b")
        return self._scales.get(module_of(key), 1.0) if has_scale else 1.0

    def check_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise UserError, naming a key, unless `state` has exactly the keys and shapes of `state_dict`."""
        expected = self.state_dict()
        if missing := sorted(expected.keys() - state.keys()):
            raise UserError(
                f"the adapter file lacks {len(missing)} of {len(expected)} tensors of {self.name},"
                f" e.g. {missing[0]}"
            )
        if unknown := sorted(state.keys() - expected.keys()):
            raise UserError(
                f"the adapter file has {len(unknown)} tensors that {self.name} does not have,"
                f" e.g. {unknown[0]}"
            )
        for key, tensor in expected.items():
            if tensor.shape != state[key].shape:
                raise UserError(
                    f"the adapter file has {key} of shape {tuple(state[key].shape)};"
                    f" {self.name} needs {tuple(tensor.shape)}"
                )

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set the parameters from tensors in the form of `state_dict`. Raises UserError as `check_state_dict`
        does."""
        self.check_state_dict(state)
        tensors = {}
        for name, tensor in state.items():
            key = self._prefix + name
            scale = self._scale_of(key)
            key = key.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE)
            tensors[key] = tensor / scale if scale != 1 else tensor
        set_peft_model_state_dict(self.model, tensors)


# ---- which layers


def unet_targets(options: AdapterOptions) -> tuple[str, ...]:
    """The ends of the names of the UNet's layers that get an adapter."""
    return options.unet_layers() or _UNET_PRESETS[options.target_preset]


def text_targets(options: AdapterOptions) -> tuple[str, ...]:
    """The ends of the names of a text encoder's layers that get an adapter if the output of all is used."""
    return options.text_layers() or _TEXT_PRESETS[options.target_preset]


def used_text_targets(
    options: AdapterOptions, used: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The names of a text encoder's layers that get an adapter if only the first `used` numbered layers have
    an effect. `shapes` has all layers of the encoder."""
    ends = text_targets(options)
    numbers = {layer: re.search(r"\blayers\.(\d+)\.", layer) for layer in layers_at(ends, shapes)}
    return tuple(layer for layer, number in numbers.items() if number is None or int(number[1]) < used)


def _is_part(part: str, name: str) -> bool:
    """Whether the dotted `name` contains `part` at word boundaries."""
    return f".{part}." in f".{name}."


def by_part(table: dict[str, float] | dict[str, int], name: str) -> float | None:
    """The value of the last part in `table` that `name`, a component and a layer, contains; None if it
    contains none."""
    return next((value for part, value in reversed(table.items()) if _is_part(part, name)), None)


def unknown_parts(flag: str, parts: Iterable[str], layers: Sequence[str]) -> list[str]:
    """A message for every part that is in no layer's name, with similar parts that are."""
    known = set()  # one or two consecutive words of the names
    for layer in layers:
        words = layer.split(".")
        known |= {".".join(words[i : i + n]) for n in (1, 2) for i in range(len(words) - n + 1)}
    problems = []
    for part in parts:
        if not any(_is_part(part, layer) for layer in layers):
            near = difflib.get_close_matches(part, sorted(known), n=3)
            hint = f"; there are {', '.join(near)}" if near else ""
            problems.append(f"{flag}: no trained layer has {part} in its name{hint}")
    return problems


def layers_at(targets: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The layers in `shapes` whose names end with one of `targets`. Layers whose weight is a vector are left
    out."""
    ends = tuple(f".{target}" for target in targets)
    return [layer for layer, shape in shapes.items() if len(shape) > 1 and f".{layer}".endswith(ends)]


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a model's layers, by name."""
    return {
        layer: tuple(m.weight.shape)
        for layer, m in model.named_modules()
        if isinstance(getattr(m, "weight", None), torch.Tensor)
    }


# ---- adding the adapter


def inject(
    name: str, model: torch.nn.Module, options: AdapterOptions, targets: tuple[str, ...], *, seed: int
) -> Component:
    """Freeze `model` and add a trainable adapter to every layer whose name ends with one of `targets`.

    The new adapter does not change the model's output, bit for bit for LoRA, DoRA, LoHa and LoKr. LoRA's A is
    drawn from N(0, 1/rank^2), B is zero (arXiv 2106.09685). `name` is the component's, `seed` that of the
    draws. Raises UserError with peft's reason if the adapter cannot be added.
    """
    plan = _plan(name, options, targets, shapes_of(model))
    kind = KINDS[options.adapter]
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(kind.config(plan))  # type: ignore[operator]
        except ValueError as error:  # for example, a width that is no multiple of the block size
            reason = reason_of(error)
            raise UserError(f"--adapter {options.adapter}: {name} cannot have it: {reason}") from None
    # peft would build and keep a dense matrix for every layer of LoHa and LoKr
    factored.use_factored_forward(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # peft gives the adapter the base's dtype. In bf16 most of Adam's steps would be rounded to zero,
            # and GradScaler needs fp32 gradients
            parameter.data = parameter.data.float()
    return Component(name, model, kind)


def _plan(
    name: str, options: AdapterOptions, targets: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Plan:
    """The plan for the model `name`. For a text encoder the --text_encoder_* flags replace the common ones.
    --rank_pattern replaces the rank of single layers. Without a flag alpha is the rank."""
    is_text = name != "unet"
    rank, alpha, dropout = options.rank, options.lora_alpha, options.lora_dropout
    if is_text and options.text_encoder_rank is not None:
        rank, alpha = options.text_encoder_rank, None  # --lora_alpha belongs to --rank
    if is_text and options.text_encoder_alpha is not None:
        alpha = options.text_encoder_alpha
    if is_text and options.text_encoder_dropout is not None:
        dropout = options.text_encoder_dropout
    table = options.ranks
    ranks = {layer: by_part(table, f"{name}.{layer}") for layer in layers_at(targets, shapes)}
    other_ranks = {layer: int(r) for layer, r in ranks.items() if r is not None and r != rank}
    return Plan(options, rank, float(rank if alpha is None else alpha), dropout, targets, other_ranks)


@contextlib.contextmanager
def without_adapters(components: Sequence[Component]) -> Iterator[None]:
    """Within the block the models are the base: their adapters, of any kind, have no effect."""
    layers = [layer for component in components for layer in peft_internals.tuners(component.model).values()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # and trainable again


# ---- descriptions


def metadata(component: Component) -> dict[str, Any]:
    """The fields of peft's configuration that a reader of the component's `state_dict` needs. Alpha is the
    rank."""
    config: Any = component.model.peft_config["default"]  # type: ignore[index]
    kind = config.peft_type.value
    fields: dict[str, Any] = {"peft_type": kind, "target_modules": sorted(config.target_modules)}
    if kind in ("LORA", "LOHA", "LOKR"):
        ranks = {key.removeprefix("^").replace("\\", ""): rank for key, rank in config.rank_pattern.items()}
        alpha = "lora_alpha" if kind == "LORA" else "alpha"
        # the scale is in the tensors: alpha is the rank of every layer
        fields |= {"r": config.r, alpha: config.r, "rank_pattern": ranks, "alpha_pattern": dict(ranks)}
    if kind == "LORA":
        # no dropout: diffusers leaves its layers in training mode, and would apply it while drawing
        fields |= {"lora_dropout": 0.0, "bias": "none", "use_dora": config.use_dora, "use_rslora": False}
    return fields | {name: getattr(config, name) for name in _FIELDS.get(kind, ())}


# further fields by kind
_FIELDS = {
    "LOHA": ("use_effective_conv2d",),
    "LOKR": ("use_effective_conv2d", "decompose_both", "decompose_factor"),
    "OFT": (
        *("r", "oft_block_size", "block_share", "coft", "eps"),
        *("use_cayley_neumann", "num_cayley_neumann_terms"),
    ),
    "BOFT": ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    "HRA": ("r", "apply_GS"),
}


def describe(components: list[Component]) -> str:
    """A table of the trained adapters: modules, parameters, their share of the frozen weights and their size
    in a file."""
    lines = [f"{'trained':<14} {'modules':>8} {'parameters':>12} {'of frozen':>10} {'in file':>10}"]
    for component in components:
        trained = [(name, p) for name, p in component.model.named_parameters() if p.requires_grad]
        modules = {module_of(name) for name, _ in trained}
        parameters = sum(p.numel() for _, p in trained)
        frozen = sum(p.numel() for p in component.model.parameters() if not p.requires_grad)
        lines.append(
            f"{component.name:<14} {len(modules):>8,} {parameters:>12,} {parameters / frozen:>10.3%}"
            f" {4 * parameters / 2**20:>6.2f} MiB"
        )
    return "\n".join(lines)
