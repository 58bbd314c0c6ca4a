"""Applies adapters to models in memory: any number of them, of any kind, each with its weights.

An adapter of weight w adds w * (W' - W) to a layer. W is the base's weight, W' that weight with the adapter
merged into it (`Adapter.adapted`). So adapters can be added in any order, whatever their kinds, and weight 0
is the base itself. peft's DoRA does not work like this: with weight 0 it still changes the layer, and its
result depends on the adapters before it. `_Dora` replaces it.

There are two ways, which give the same pictures except for their last bits. Live: a peft adapter, which
diffusers can weigh, disable, fuse and delete. Fused: the sum is added to the weight itself; the base's tensor
is kept in memory and restored, bit for bit.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreambooth.adapter_files import deltas, layer_names, peft_internals
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.deltas import LoHa, LoKr, Lora
from dreambooth.adapter_files.peft_internals import tuners
from dreambooth.adapter_files.reading import AnyAdapter
from dreambooth.adapters import inject

Weight = float | Mapping[str, float]
"""One number for all layers, or numbers by part of a model (`unet`, `unet.up_blocks`, ...). The number of the
longest part that contains a layer is the layer's. "" contains all layers. A layer in no part has 1."""
Models = Mapping[str, nn.Module]  # by component: unet, text_encoder, text_encoder_2


def layers_of(models: Models) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the models' weights by component and layer, as `reading.read` takes them. Layers of adapters
    are not included."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for component, model in models.items():
        inside_tuners = tuple(f"{path}." for path in tuners(model))
        shapes = inject.shapes_of(model)
        layers[component] = {n: shape for n, shape in shapes.items() if not n.startswith(inside_tuners)}
    return layers


def part(adapter: AnyAdapter, components: tuple[str, ...]) -> AnyAdapter:
    """The adapter, reduced to these components."""
    selected: Any = {name: modules for name, modules in adapter.components.items() if name in components}
    return dataclasses.replace(adapter, components=selected)


def weight_at(weight: Weight, component: str, layer: str) -> float:
    """The number that `weight` gives to one layer."""
    if not isinstance(weight, Mapping):
        return weight
    path = f"{component}.{layer}"
    containing = [part for part in weight if part == "" or path == part or path.startswith(f"{part}.")]
    return weight[max(containing, key=len)] if containing else 1.0


def is_active(weight: Weight) -> bool:
    """Whether any layer can have a weight other than 0."""
    return any(weight.values()) or "" not in weight if isinstance(weight, Mapping) else bool(weight)


def _active(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: weight for name, weight in weights.items() if is_active(weight)}


# ---- live


def attach(models: Models, adapter: Adapter, name: str) -> None:
    """Add an adapter to the models as the peft adapter `name`. It is active with weight 1, and adapters that
    were active stay active.

    Its modules may be LoRA, DoRA, LoHa and LoKr, each of any rank. A LoHa or LoKr with a magnitude becomes
    the equal LoRA with that magnitude. Tensors get the dtype and device of their layer. Raises ValueError for
    a name that is taken, or that peft or diffusers cannot use.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{name!r} cannot be the name of an adapter")
    for component, modules in adapter.components.items():
        model = models[component]
        if name in getattr(model, "peft_config", {}):
            raise ValueError(f"{component} has an adapter {name!r} already")
        active = {layer: [*layer.active_adapters] for layer in tuners(model).values()}
        by_path = {
            _live_path(model, layer): deltas.as_lora(module) if module.magnitude is not None else module
            for layer, module in modules.items()
        }
        for kind in _KINDS:
            selected = {path: module for path, module in by_path.items() if isinstance(module, kind.module)}
            if selected:
                _attach_kind(model, name, kind, selected)
        for layer in tuners(model).values():  # peft leaves only the newest adapter active
            names = [*active.get(layer, ()), *([name] if name in layer.scaling else [])]
            layer.set_adapter(names, inference_mode=True)


@dataclasses.dataclass(frozen=True)
class _LiveKind:
    """How peft makes one class of `deltas`: the class of its configuration, the configuration's field of
    alpha, and the end of a key by which peft recognizes the layers."""

    module: type
    config: type
    alpha: str
    key: str


_KINDS = (
    _LiveKind(Lora, LoraConfig, "lora_alpha", "lora_A.weight"),
    _LiveKind(LoHa, LoHaConfig, "alpha", "hada_w1_a"),
    _LiveKind(LoKr, LoKrConfig, "alpha", "lokr_w1"),
)


def _attach_kind(model: nn.Module, name: str, kind: _LiveKind, modules: Mapping[str, Any]) -> None:
    """Add peft's layers of rank 1 at the modules' paths, and replace their tensors by the modules'."""
    config = kind.config(r=1, target_modules=list(modules), inference_mode=True, **{kind.alpha: 1})
    is_lora = kind.module is Lora
    with _without_other_kinds(model, modules) if is_lora else contextlib.nullcontext():
        peft_internals.add_layers(model, config, name, [f"{path}.{kind.key}" for path in modules])
    for path, module in modules.items():
        layer = _tuner_of(model, path, name)
        weight = layer.get_base_layer().weight
        if is_lora:
            _fill_lora(layer, name, module, weight)
            if module.magnitude is not None:
                peft_internals.set_variant(layer, name, _Dora(model, path, weight, module))
        else:
            _fill_factors(layer, name, module, weight)


def _live_path(model: nn.Module, layer: str) -> str:
    """The path of a layer in this model."""
    return layer_names.with_prefix(layer, layer_names.live_prefix(model))


@contextlib.contextmanager
def _without_other_kinds(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Within the block the layers at these paths have no peft layers of LoHa or LoKr around them. Afterwards
    these are around whatever layer is then at the path.

    peft wraps layers of several kinds into each other, but on a convolution it cannot wrap a LoRA around
    another kind.
    """
    removed: dict[str, tuple[Any, Any]] = {}  # path -> outermost and innermost layer
    for path in paths:
        outermost: Any = model.get_submodule(path)
        innermost = None
        layer = outermost
        while isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            innermost, layer = layer, layer.base_layer  # type: ignore[assignment]
        if innermost is not None:
            removed[path] = outermost, innermost
            model.set_submodule(path, layer)
    try:
        yield
    finally:
        for path, (outermost, innermost) in removed.items():
            innermost.base_layer = model.get_submodule(path)
            model.set_submodule(path, outermost)


def _tuner_of(model: nn.Module, path: str, name: str) -> Any:
    """The peft layer that holds the adapter: the one at `path`, or one nested in it. Raises RuntimeError if
    none does."""
    layer = model.get_submodule(path)
    while isinstance(layer, BaseTunerLayer):
        if name in layer.scaling:  # type: ignore[operator]
            return layer
        layer = layer.base_layer  # type: ignore[assignment]
    raise RuntimeError(f"peft has added no layer at {path}")


def _frozen(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """The tensor as a parameter without gradient, in the device and dtype of `like`."""
    return nn.Parameter(tensor.to(like.device, like.dtype), requires_grad=False)


def _fill_lora(layer: Any, name: str, module: Lora, weight: Tensor) -> None:
    """Replace the tensors and the rank of the adapter in a LoRA layer. `weight` is the layer's."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    down.weight, up.weight = _frozen(module.down, weight), _frozen(module.up, weight)
    if weight.ndim == 2:
        down.out_features = up.in_features = module.rank
    else:
        down.out_channels = up.in_channels = module.rank
    layer.r[name] = layer.lora_alpha[name] = module.rank
    if module.magnitude is not None:
        magnitude = module.magnitude.reshape(-1 if weight.ndim == 2 else (1, -1, 1, 1))
        peft_internals.set_magnitude(layer, name, _frozen(magnitude, weight))


def _fill_factors(layer: Any, name: str, module: LoHa | LoKr, weight: Tensor) -> None:
    """Replace the tensors of the adapter in a LoHa or LoKr layer. `weight` is the layer's."""
    for holder in (getattr(layer, part) for part in layer.adapter_layer_names):
        if name in holder:
            del holder[name]
    factors = deltas.factors_by_name(module)
    has_core = any(part.endswith(("t1", "t2")) for part in factors)
    for part, tensor in factors.items():
        # without a core, peft flattens the kernel into the columns of the last factor
        is_flat = part.endswith("_b") and not has_core
        getattr(layer, part)[name] = _frozen(tensor.flatten(1) if is_flat else tensor, weight)


class _Dora:
    """DoRA (arXiv 2402.09353) as a variant of peft's LoRA whose update does not depend on other adapters and
    is linear in its weight.

    `rows` are the magnitudes divided by the norms of the rows of W + dW, [out] or [out, 1, 1]. They are
    computed once, so no call builds dW. peft calls the methods (`peft_internals.set_variant`).
    """

    def __init__(self, model: nn.Module, path: str, weight: Tensor, module: Lora) -> None:
        self.model, self.path = model, path
        assert module.magnitude is not None
        with torch.no_grad():
            update = deltas.delta(deltas.to(module, weight.device))
            lengths = (weight.float() + update).flatten(1).norm(dim=1)
            self.rows = (module.magnitude.to(weight.device) / lengths).reshape(-1, *[1] * (weight.ndim - 2))

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **extra: Any) -> Tensor:
        rows = self.rows.to(result.device)
        # rows are close to 1, and bfloat16 would round them to 1; their difference from 1 keeps 8 bits
        excess, rows = (rows - 1).to(result.dtype), rows.to(result.dtype)
        plain = peft_internals.forward_without_bias(module.get_base_layer(), x)
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result + (excess * plain + rows * update) * module.scaling[active_adapter]

    def _added(self, module: Any, active_adapter: str) -> Tensor:
        """The adapter's change of the base's weight, float32. Adapters that are merged into that weight are
        subtracted first."""
        with peft_internals.unmerged_weight(module) as weight:
            base = weight.float()
        layer: Any = self.model.get_submodule(self.path)
        while layer is not module:  # peft's layers of other kinds around this one
            base = base - sum(layer.get_delta_weight(name).float() for name in layer.merged_adapters)
            layer = layer.base_layer
        rows = self.rows.reshape(-1, *[1] * (base.ndim - 1)).to(base.device)
        up, down = module.lora_B[active_adapter].weight, module.lora_A[active_adapter].weight
        update = up.flatten(1).float() @ down.flatten(1).float()
        return ((rows - 1) * base + rows * update.reshape(base.shape)) * module.scaling[active_adapter]

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        added = self._added(module, active_adapter).to(orig_weight.dtype)
        peft_internals.cache_store(module, active_adapter, added)
        return orig_weight + added

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight.data - peft_internals.cache_pop(module, active_adapter)

    def supports_lora_conversion(self) -> bool:
        return False


def set_weights(models: Models, weights: Mapping[str, Weight]) -> None:
    """Make exactly the adapters in `weights` active on the models, in each layer with the layer's weight.

    Where the weight is 0 the adapter is inactive: the layer's output is the same bit for bit as without it.
    """
    for component, model in models.items():
        for path, layer in tuners(model).items():
            layer_name = layer_names.plain(path.replace(".base_layer", ""))
            active = []
            for name, weight in weights.items():
                scale = weight_at(weight, component, layer_name)
                if scale and name in layer.scaling:
                    layer.set_scale(name, scale)
                    active.append(name)
            layer.set_adapter(active, inference_mode=True)


# ---- fused


@contextlib.contextmanager
def fused(models: Models, adapters: list[tuple[AnyAdapter, Weight]]) -> Iterator[None]:
    """Within the block the adapters are merged into the models' weights, summed in float32 and rounded once.
    peft's adapters are not changed.

    Afterwards the weights are the base's again, bit for bit. The changed layers need their memory twice.
    """
    originals: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for component, model in models.items():
                changes: dict[str, list[tuple[AnyAdapter, float]]] = {}  # by layer
                for adapter, weights in adapters:
                    for name in adapter.components.get(component, {}):
                        if weight := weight_at(weights, component, name):
                            changes.setdefault(name, []).append((adapter, weight))
                for name, weighted in changes.items():
                    layer: Any = model.get_submodule(_live_path(model, name))
                    if isinstance(layer, BaseTunerLayer):
                        layer = layer.get_base_layer()
                    parameter = layer.weight
                    base = parameter.detach().float()
                    total = base + sum(w * adapter.update(component, name, base) for adapter, w in weighted)
                    originals.append((parameter, parameter.data))
                    # with the memory format of the layer's weight
                    parameter.data = torch.empty_like(parameter.data).copy_(total)
        yield
    finally:
        for parameter, tensor in originals:
            parameter.data = tensor


# ---- live or fused


Fusing = Literal["auto", "yes", "no"]


def is_fused(adapters: list[AnyAdapter], fuse: Fusing, dtype: torch.dtype) -> bool:
    """Whether adapters that are active together are fused; `dtype` is the model's.

    OFT, BOFT and HRA are always fused, and so are adapters that are active together with them. Otherwise
    `auto` fuses all kinds but LoRA, whose two thin layers cost little: for LoHa and LoKr peft builds a matrix
    of the layer's size in every call, and DoRA runs the layer twice. In bfloat16 `auto` fuses nothing: most
    of a small update would be lost when the sum is rounded to the 8 bits of a weight.
    """
    if not all(adapter.is_additive for adapter in adapters) or fuse == "yes":
        return bool(adapters)
    is_costly = any(adapter.kinds != ("lora",) for adapter in adapters)
    return fuse == "auto" and dtype != torch.bfloat16 and is_costly


class Stack:
    """The adapters for the models of one pipeline. Any of them can be active, with any weights; the base
    stays loaded."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.adapters: dict[str, AnyAdapter] = {}

    def add(self, name: str, adapter: AnyAdapter) -> None:
        """Register an adapter as `name`. The models do not change."""
        self.adapters[name] = adapter

    def attach_all(self, uses: Iterable[Mapping[str, Weight]], fuse: Fusing = "auto") -> None:
        """Attach every adapter that is live for at least one of `uses`, sets of weights by name. None is
        active afterwards.

        Adapters are attached in the order of `add`. Layers of several kinds are nested in the order of
        attaching, and sums are rounded in that order. After this call the last bits do not depend on which
        sets a process draws, nor on their order.
        """
        live: set[str] = set()
        for weights in uses:
            active = _active(weights)
            if not self._is_fused(active, fuse):
                live |= active.keys()
        for name, adapter in self.adapters.items():
            if name in live:
                self._attach(name, adapter)
        set_weights(self.models, {})

    def _attach(self, name: str, adapter: AnyAdapter) -> None:
        assert isinstance(adapter, Adapter)  # rotations are always fused
        if not any(name in getattr(model, "peft_config", {}) for model in self.models.values()):
            attach(self.models, adapter, name)

    def _is_fused(self, names: Iterable[str], fuse: Fusing) -> bool:
        dtype = next(iter(next(iter(self.models.values())).parameters())).dtype
        return is_fused([self.adapters[name] for name in names], fuse, dtype)

    @contextlib.contextmanager
    def activated(self, weights: Mapping[str, Weight], fuse: Fusing = "auto") -> Iterator[None]:
        """Within the block exactly the adapters in `weights` are active, live or fused. Afterwards none
        is."""
        active = _active(weights)
        if self._is_fused(active, fuse):
            set_weights(self.models, {})
            with fused(self.models, [(self.adapters[name], weight) for name, weight in active.items()]):
                yield
            return
        for name in active:
            self._attach(name, self.adapters[name])
        set_weights(self.models, active)
        try:
            yield
        finally:
            set_weights(self.models, {})
