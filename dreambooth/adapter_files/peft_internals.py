"""The only module that uses private parts of peft (0.21.2), and the private mark of diffusers (0.42.1) for
models with adapters.

Read this module first when either package is updated. It relies on: a LoRA layer's `lora_variant`,
`_unmerged_base_weight` and cache; BOFT's `_FBD_CUDA`; the text of two warnings; `_hf_peft_config_loaded` of
diffusers' models.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.boft import layer as boft_layer
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def stand_in(shape: Sequence[int]) -> nn.Module:
    """A Linear or Conv2d for a weight of this shape, without bias and without data (on the meta device). peft
    reads only its class and sizes."""
    outputs, inputs, *kernel = shape
    if kernel:
        return nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=False, device="meta")
    return nn.Linear(inputs, outputs, bias=False, device="meta")


def tuners(model: nn.Module) -> dict[str, Any]:
    """peft's layers on a model, by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def add_layers(model: nn.Module, config: Any, name: str, keys: Iterable[str]) -> None:
    """Put peft's layers of the adapter `name` on the layers that `keys` of a state dict name. Their tensors
    are on the meta device; the caller replaces them."""
    with warnings.catch_warnings():
        # peft warns of several adapters on one model, which are intended, and of keys that do not match the
        # config; the keys alone decide the layers here
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters, an inconsistency")
        state: Any = dict.fromkeys(keys)
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True, state_dict=state)
    # diffusers' enable_lora, disable_lora, delete_adapters and others refuse a model without this mark
    model._hf_peft_config_loaded = True  # type: ignore[assignment]


@contextlib.contextmanager
def without_boft_extension() -> Iterator[None]:
    """Within the block peft does not try to build its CUDA extension for every BOFT layer, and warns of
    nothing."""
    before = boft_layer._FBD_CUDA
    boft_layer._FBD_CUDA = False  # None would mean "not tried yet"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        boft_layer._FBD_CUDA = before


# ---- variants of LoRA


def set_variant(layer: Any, name: str, variant: Any) -> None:
    """Make `variant` compute the adapter `name` of a LoRA layer. peft calls its methods forward, merge_safe,
    merge_unsafe and unmerge with the layer and the adapter's name, and supports_lora_conversion."""
    layer.lora_variant[name] = variant


def set_magnitude(layer: Any, name: str, magnitude: nn.Parameter) -> None:
    """Store the magnitude of the adapter `name` where peft's state dict of the LoRA layer includes it."""
    holder_class = DoraLinearLayer if magnitude.ndim == 1 else DoraConv2dLayer
    holder = holder_class(fan_in_fan_out=False)
    holder.weight = magnitude
    layer.use_dora[name] = True
    layer.lora_magnitude_vector[name] = holder


def unmerged_weight(layer: Any) -> contextlib.AbstractContextManager[Tensor]:
    """Within the block: the weight of a LoRA layer's base layer without the adapters that LoRA has merged
    into it."""
    return layer._unmerged_base_weight()  # type: ignore[no-any-return]


def cache_store(layer: Any, name: str, added: Tensor) -> None:
    """Keep `added`, which the adapter `name` added to a layer's weight, until `cache_pop`."""
    layer._cache_store(f"{name}-added", added)


def cache_pop(layer: Any, name: str) -> Tensor:
    """What `cache_store` kept for the adapter `name`; it is kept no longer."""
    tensor: Tensor = layer._cache_pop(f"{name}-added")
    return tensor


def forward_without_bias(layer: Any, x: Tensor) -> Tensor:
    """A Linear's or Conv2d's output without its bias."""
    if isinstance(layer, nn.Linear):
        return torch.nn.functional.linear(x, layer.weight)
    return layer._conv_forward(x, layer.weight, None)
