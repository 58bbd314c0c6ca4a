"""Adapters on live models: any number of them, of any kind and from any layout of file, each at a weight of its own, or at several.

What an adapter of weight w adds to a layer is w * (W' - W), W' being the weight that it makes of the base's W. So adapters add up in any
order, whatever their kinds, and the weight 0 is the base itself, for DoRA too: peft's own DoRA at weight 0 is another model, and depends on
what was added before it.

There are two ways to the same pictures, but for their last bits. Live: as a peft adapter, which diffusers can weigh, disable, fuse and
delete. Fused: the sum goes into the weight itself, from which the base comes back bit for bit, since its own tensor is kept.
"""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreambooth.adapter_files import deltas, formats, layer_names, native, rotations
from dreambooth.adapter_files.deltas import LoHa, Lora, Module
from dreambooth.adapter_files.formats import Adapter
from dreambooth.adapter_files.rotations import Rotations
from dreambooth.errors import UserError, shown

Weight = float | Mapping[str, float]
"""One for all layers; or by place (`unet`, `unet.up_blocks`, ...), where the longest that fits a layer holds, and "" all others, else 1."""
Models = Mapping[str, nn.Module]  # by component: unet, text_encoder, text_encoder_2
_TEXT_PREFIX = "text_model."


def read(path: Path, layers: formats.Layers) -> Adapter | Rotations:
    """The adapter in a file or folder, of every kind and layout that is known here. Raises UserError as `adapter_formats.read` does."""
    try:
        whole = path / native.ADAPTER_NAME if path.is_dir() else path
        is_rotation = whole.suffix == ".safetensors" and whole.exists() and rotations.is_one(whole)
    except OSError as error:  # a name that is too long, for one
        raise UserError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    return rotations.read(whole, layers) if is_rotation else formats.read(path, layers)


def layers_of(models: Models) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the models' weights by component and module, whatever adapters are on them: what `read` takes for a base."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for component, model in models.items():
        within = tuple(f"{path}." for path in _tuners(model))
        weights = (
            (name, getattr(module, "weight", None))
            for name, module in model.named_modules()
            if not name.startswith(within)
        )
        found[component] = {
            name: tuple(weight.shape) for name, weight in weights if isinstance(weight, Tensor)
        }
    return found


def part(adapter: Adapter | Rotations, components: tuple[str, ...]) -> Adapter | Rotations:
    """The adapter of these components alone."""
    kept = {name: modules for name, modules in adapter.components.items() if name in components}
    return dataclasses.replace(adapter, components=kept)  # type: ignore[arg-type]


def weight_at(weight: Weight, component: str, module: str) -> float:
    """The weight of one layer."""
    if not isinstance(weight, Mapping):
        return weight
    place = f"{component}.{module}"
    fitting = [key for key in weight if key == "" or place == key or place.startswith(f"{key}.")]
    return weight[max(fitting, key=len)] if fitting else 1.0


def is_worn(weight: Weight) -> bool:
    """Whether any layer has another weight than 0."""
    return any(weight.values()) or "" not in weight if isinstance(weight, Mapping) else bool(weight)


def _worn(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: weight for name, weight in weights.items() if is_worn(weight)}


# ---- live


def attach(models: Models, adapter: Adapter, name: str) -> None:
    """Put an adapter on the models as the peft adapter `name`, active with weight 1 beside those that are active already.

    Its modules may be LoRA, DoRA, LoHa and LoKr side by side, each of its own rank. DoRA on LoHa and LoKr becomes DoRA on the LoRA that equals
    it. Tensors take dtype and device of the layer. Raises ValueError for a name that peft or diffusers would stumble over, or that is taken.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{name!r} cannot be the name of an adapter")
    for component, modules in adapter.components.items():
        model = models[component]
        if name in getattr(model, "peft_config", {}):
            raise ValueError(f"{component} has an adapter {name!r} already")
        active = {layer: [*layer.active_adapters] for layer in _tuners(model).values()}
        paths = {
            _live_path(model, module): deltas.as_lora(m) if m.magnitude is not None else m
            for module, m in modules.items()
        }
        for config, tag, kind in _KINDS:
            own = {path: module for path, module in paths.items() if isinstance(module, kind)}
            if own:
                with _beneath_others(model, list(own)) if kind is Lora else contextlib.nullcontext():
                    _inject(model, config(list(own)), name, [f"{path}.{tag}" for path in own])
            for path, module in own.items():
                layer = _tuner_of(model, path, name)
                _FILL[kind](layer, name, module, layer.get_base_layer().weight)
                if isinstance(module, Lora) and module.magnitude is not None:
                    layer.lora_variant[name] = _Dora(model, path, layer.get_base_layer().weight, module)
        for layer in _tuners(model).values():  # peft has left the newest alone active
            layer.set_adapter(
                [*active.get(layer, ()), *([name] if name in layer.scaling else [])], inference_mode=True
            )
        model._hf_peft_config_loaded = True  # type: ignore[assignment]


def _tuners(model: nn.Module) -> dict[str, Any]:
    """peft's layers on a model, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def _live_path(model: nn.Module, module: str) -> str:
    """Where a module is in this version's models: some have `text_model.` in front."""
    return layer_names.with_prefix(module, _TEXT_PREFIX if hasattr(model, "text_model") else "")


def _lora_config(paths: list[str]) -> LoraConfig:
    return LoraConfig(r=1, lora_alpha=1, target_modules=paths, inference_mode=True)


def _loha_config(paths: list[str]) -> LoHaConfig:
    return LoHaConfig(r=1, alpha=1, target_modules=paths, inference_mode=True)


def _lokr_config(paths: list[str]) -> LoKrConfig:
    return LoKrConfig(r=1, alpha=1, target_modules=paths, inference_mode=True)


_KINDS: tuple[tuple[Any, str, type], ...] = (
    (_lora_config, "lora_A.weight", Lora),
    (_loha_config, "hada_w1_a", LoHa),
    (_lokr_config, "lokr_w1", deltas.LoKr),
)


@contextlib.contextmanager
def _beneath_others(model: nn.Module, paths: list[str]) -> Iterator[None]:
    """peft puts its layers one over another, but LoRA over those of another kind on a convolution it cannot: they are taken off meanwhile."""
    others: dict[str, tuple[Any, Any]] = {}
    for path in paths:
        outermost: Any = model.get_submodule(path)
        innermost = None
        layer = outermost
        while isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            innermost, layer = layer, layer.base_layer  # type: ignore[assignment]
        if innermost is not None:
            others[path] = outermost, innermost
            model.set_submodule(path, layer)
    try:
        yield
    finally:
        for path, (outermost, innermost) in others.items():
            innermost.base_layer = model.get_submodule(path)
            model.set_submodule(path, outermost)


def _inject(model: nn.Module, config: Any, name: str, keys: list[str]) -> None:
    """peft's layers of rank 1 at the modules of these keys; their tensors are on the meta device, to be replaced."""
    with warnings.catch_warnings():
        # several adapters on one model are what is wanted here; and the keys say which layers, whatever the names in the config match
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters, an inconsistency")
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True, state_dict=dict.fromkeys(keys))  # type: ignore[arg-type]


def _tuner_of(model: nn.Module, path: str, name: str) -> Any:
    """The peft layer at `path`, or within it, that holds the adapter: the layers of other kinds lie one in another."""
    layer = model.get_submodule(path)
    while isinstance(layer, BaseTunerLayer):
        if name in layer.scaling:  # type: ignore[operator]
            return layer
        layer = layer.base_layer  # type: ignore[assignment]
    raise RuntimeError(f"peft has put nothing at {path}")


def _frozen(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(like.device, like.dtype), requires_grad=False)


def _fill_lora(layer: Any, name: str, module: Lora, weight: Tensor) -> None:
    down, up = layer.lora_A[name], layer.lora_B[name]
    down.weight, up.weight = _frozen(module.down, weight), _frozen(module.up, weight)
    if weight.ndim == 2:
        down.out_features = up.in_features = module.rank
    else:
        down.out_channels = up.in_channels = module.rank
    layer.r[name] = layer.lora_alpha[name] = module.rank
    if module.magnitude is not None:
        layer.use_dora[name] = True
        # peft's own, so that the adapter is whole in a state dict
        kept = (DoraLinearLayer if weight.ndim == 2 else DoraConv2dLayer)(fan_in_fan_out=False)
        kept.weight = _frozen(module.magnitude.reshape(-1 if weight.ndim == 2 else (1, -1, 1, 1)), weight)
        layer.lora_magnitude_vector[name] = kept


def _fill_loha(layer: Any, name: str, module: LoHa, weight: Tensor) -> None:
    whole = {
        "hada_w1_a": module.w1a,
        "hada_w1_b": module.w1b,
        "hada_w2_a": module.w2a,
        "hada_w2_b": module.w2b,
    }
    _fill_factors(
        layer, name, whole | {"hada_t1": module.t1, "hada_t2": module.t2}, weight, module.t1 is not None
    )


def _fill_lokr(layer: Any, name: str, module: deltas.LoKr, weight: Tensor) -> None:
    first = {"lokr_w1": module.w1, "lokr_w1_a": module.w1a, "lokr_w1_b": module.w1b}
    second = {"lokr_w2": module.w2, "lokr_w2_a": module.w2a, "lokr_w2_b": module.w2b, "lokr_t2": module.t2}
    _fill_factors(layer, name, first | second, weight, module.t2 is not None)


def _fill_factors(
    layer: Any, name: str, tensors: Mapping[str, Tensor | None], weight: Tensor, has_core: bool
) -> None:
    for part, tensor in tensors.items():
        held = getattr(layer, part)
        if name in held:
            del held[name]
        if tensor is not None:
            # without a core the last factor has the kernel in its columns
            is_flat = part.endswith("_b") and not has_core
            held[name] = _frozen(tensor.flatten(1) if is_flat else tensor, weight)


_FILL: dict[type, Any] = {Lora: _fill_lora, LoHa: _fill_loha, deltas.LoKr: _fill_lokr}


class _Dora:
    """What peft asks of a variant of LoRA, for DoRA (arXiv 2402.09353) that adds up with other adapters and is linear in its weight.

    `rows` are the magnitudes over the lengths of the rows of W + dW, [out] or [out, 1, 1]: they never change, so no call builds dW.
    """

    def __init__(self, model: nn.Module, path: str, weight: Tensor, module: Lora) -> None:
        self.model, self.path = model, path
        assert module.magnitude is not None
        with torch.no_grad():
            lengths = (weight.float() + deltas.delta(_on(module, weight.device))).flatten(1).norm(dim=1)
            self.rows = (module.magnitude.to(weight.device) / lengths).reshape(-1, *[1] * (weight.ndim - 2))

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **others: Any) -> Tensor:
        base, rows = module.get_base_layer(), self.rows.to(result.device)
        # rows are close to 1: bfloat16 would round them to 1 itself, and their difference from it keeps 8 bits of its own
        beyond, rows = (rows - 1).to(result.dtype), rows.to(result.dtype)
        plain = (
            F.linear(x, base.weight)
            if isinstance(base, nn.Linear)
            else base._conv_forward(x, base.weight, None)
        )
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result + (beyond * plain + rows * update) * module.scaling[active_adapter]

    def _added(self, module: Any, active_adapter: str) -> Tensor:
        """What the adapter adds to the base's own weight, which may have others merged into it already; in float32."""
        with module._unmerged_base_weight() as weight:
            own = weight.float()
        layer: Any = self.model.get_submodule(self.path)
        while layer is not module:  # peft's layers of other kinds, over this one
            own = own - sum(layer.get_delta_weight(name).float() for name in layer.merged_adapters)
            layer = layer.base_layer
        rows = self.rows.reshape(-1, *[1] * (own.ndim - 1)).to(own.device)
        update = (
            module.lora_B[active_adapter].weight.flatten(1).float()
            @ module.lora_A[active_adapter].weight.flatten(1).float()
        )
        return ((rows - 1) * own + rows * update.reshape(own.shape)) * module.scaling[active_adapter]

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = self._added(module, active_adapter).to(orig_weight.dtype)
        module._cache_store(f"{active_adapter}-added", delta)
        return orig_weight + delta

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight.data - module._cache_pop(f"{active_adapter}-added")

    def supports_lora_conversion(self) -> bool:
        return False


def set_weights(models: Models, weights: Mapping[str, Weight]) -> None:
    """Have the adapters named in `weights`, and no others, on the models, each layer with the weight that holds there.

    Where it is 0 the adapter is left out: the layer computes what it does without it, bit for bit.
    """
    for component, model in models.items():
        for path, layer in _tuners(model).items():
            module = path.replace(".base_layer", "").removeprefix(_TEXT_PREFIX)
            active = []
            for name, weight in weights.items():
                here = weight_at(weight, component, module)
                if here and name in layer.scaling:
                    layer.set_scale(name, here)
                    active.append(name)
            layer.set_adapter(active, inference_mode=True)


# ---- fused


def _on(module: Any, device: torch.device) -> Any:
    """A module of `deltas` with its tensors on the device."""
    return dataclasses.replace(
        module,
        **{
            f.name: t.to(device)
            for f in dataclasses.fields(module)
            if (t := getattr(module, f.name)) is not None
        },
    )


def added(adapter: Adapter | Rotations, component: str, module: str, layer: nn.Module) -> Tensor:
    """W' - W of one layer that has no other adapter fused: in float32, in the weight's shape, on its device."""
    weight: Tensor = layer.weight.detach().float()  # type: ignore[assignment,operator]
    if isinstance(adapter, Rotations):
        return adapter.turned(component, module, layer) - weight
    own: Module = _on(adapter.components[component][module], weight.device)
    return deltas.delta(own) if own.magnitude is None else deltas.adapted(own, weight) - weight


@contextlib.contextmanager
def fused(models: Models, worn: list[tuple[Adapter | Rotations, Weight]]) -> Iterator[None]:
    """Within the block the models' own weights have the adapters in them, summed in float32 and rounded once; peft adapters, if there are any,
    stay as they are. After it the base is back, bit for bit. Costs the memory of the layers that are changed, once more."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for component, model in models.items():
                for module in dict.fromkeys(
                    module for adapter, _ in worn for module in adapter.components.get(component, {})
                ):
                    layer = _base_layer(model, module)
                    here = [(adapter, weight_at(weight, component, module)) for adapter, weight in worn]
                    here = [
                        (adapter, w)
                        for adapter, w in here
                        if w and module in adapter.components.get(component, {})
                    ]
                    if not here:
                        continue
                    total = layer.weight.float() + sum(
                        w * added(adapter, component, module, layer) for adapter, w in here
                    )
                    kept.append((layer.weight, layer.weight.data))
                    layer.weight.data = torch.empty_like(layer.weight.data).copy_(
                        total
                    )  # in its memory format: convolutions are channels last
        yield
    finally:
        for parameter, before in kept:
            parameter.data = before


def _base_layer(model: nn.Module, module: str) -> Any:
    layer = model.get_submodule(_live_path(model, module))
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


# ---- either


Fusing = Literal["auto", "yes", "no"]


def is_fused(adapters: list[Adapter | Rotations], how: Fusing, dtype: torch.dtype) -> bool:
    """Whether these, worn together, go into the weights.

    OFT, BOFT and HRA always do, and what is worn with them. Else `auto` fuses everything but plain LoRA, whose two thin layers cost little: for
    LoHa and LoKr peft builds a matrix of the layer's size in every call, DoRA runs the layer twice. Not in bfloat16: a weight of 8 bits
    swallows most of a small update, which beside it stays whole.
    """
    if any(isinstance(adapter, Rotations) for adapter in adapters) or how == "yes":
        return bool(adapters)
    return (
        how == "auto" and dtype != torch.bfloat16 and any(adapter.kinds != ("lora",) for adapter in adapters)
    )


class Stack:
    """Adapters for the models of one pipeline, any of which can be worn, at any weights; the base is loaded once."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.adapters: dict[str, Adapter | Rotations] = {}

    def add(self, name: str, adapter: Adapter | Rotations) -> None:
        self.adapters[name] = adapter

    def attach_all(self, wanted: Iterable[Mapping[str, Weight]], how: Fusing = "auto") -> None:
        """Put every adapter on the models that one of these sets of weights wears live, in the order in which they were added; none active.

        Layers of several kinds lie one in another as they were attached, and sums are rounded in that order: so last bits are the same for all who
        do this first, whatever they wear later, and which sets they leave to others.
        """
        live: set[str] = set()
        for weights in wanted:
            worn = _worn(weights)
            if not self._is_fused(worn, how):
                live |= worn.keys()
        for name, adapter in self.adapters.items():
            if name in live:
                self._attach(name, adapter)
        set_weights(self.models, {})

    def _attach(self, name: str, adapter: Adapter | Rotations) -> None:
        assert isinstance(adapter, Adapter)  # the others are fused
        if not any(name in getattr(model, "peft_config", {}) for model in self.models.values()):
            attach(self.models, adapter, name)

    def _is_fused(self, names: Iterable[str], how: Fusing) -> bool:
        dtype = next(iter(next(iter(self.models.values())).parameters())).dtype
        return is_fused([self.adapters[name] for name in names], how, dtype)

    @contextlib.contextmanager
    def worn(self, weights: Mapping[str, Weight], how: Fusing = "auto") -> Iterator[None]:
        """Within the block the models wear the adapters named, at their weights; before and after it, none."""
        worn = _worn(weights)
        if self._is_fused(worn, how):
            set_weights(self.models, {})
            with fused(self.models, [(self.adapters[name], weight) for name, weight in worn.items()]):
                yield
            return
        for name in worn:
            self._attach(name, self.adapters[name])
        set_weights(self.models, worn)
        try:
            yield
        finally:
            set_weights(self.models, {})
