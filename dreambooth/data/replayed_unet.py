"""The UNet of a pipeline, replayed from CUDA graphs while pictures are drawn.

The pipelines of diffusers are left as they are, with any of their samplers: they call the UNet, and get what
its kernels would have given. Guidance stays one batch of the UNet. Sampler and VAE are launched.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from dreambooth.io.errors import is_memory_error, type_and_reason
from dreambooth.options.speed import GraphOptions
from dreambooth.runtime.graphs import Graphs, Tensors

_Forward: TypeAlias = Callable[..., Any]
_ADDED = "added_cond_kwargs."  # before the names of these inputs: text_embeds, time_ids


def graphs_of(options: GraphOptions, device: torch.device, note: Callable[[str], None]) -> Graphs:
    """The graphs of a program that draws. `note` is called with a line if recording fails."""
    return Graphs(device, "--cuda_graph off" if options.cuda_graph == "off" else None, note)


@contextlib.contextmanager
def replaying(pipeline: Any, graphs: Graphs) -> Iterator[None]:
    """Within the block the pipeline's UNet is recorded at its second call with inputs of a shape, and then
    replayed. Where `graphs` records nothing, the pipeline stays as it is.

    The block may hold any number of drawings. The UNet's weights, its adapters and their scales must not
    change in it. Afterwards all recordings of `graphs` are dropped, with their memory.
    """
    if graphs.reason is not None:
        yield
        return
    unet, scheduler, vae = pipeline.unet, pipeline.scheduler, getattr(pipeline, "vae", None)
    replayed = graphs.replayed(functools.partial(_predict, unet.forward))
    forward = functools.partial(_forward, unet.forward, replayed)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                _replaced(unet, "forward", functools.partial(_launched_without_memory, graphs, forward))
            )
            if vae is not None:
                decode = functools.partial(_launched_without_memory, graphs, vae.decode)
                stack.enter_context(_replaced(vae, "decode", decode))
            set_timesteps = functools.partial(_set_timesteps, scheduler)
            stack.enter_context(_replaced(scheduler, "set_timesteps", set_timesteps))
            yield
    finally:
        graphs.forget()
        graphs.functions.remove(replayed)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block the method `name` of the object is `function`."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _launched_without_memory(
    graphs: Graphs, function: Callable[..., Any], *arguments: Any, **keywords: Any
) -> Any:
    """What the function returns. If memory runs out, the function is called again without recordings, which
    hold the memory of a whole pass."""
    try:
        return function(*arguments, **keywords)
    except RuntimeError as error:
        if graphs.reason is not None or not is_memory_error(error):
            raise
        reason = type_and_reason(error)
    graphs.launch_from_now_on(reason)  # out of the block above, whose error holds the tensors of the call
    return function(*arguments, **keywords)


def _predict(launched: _Forward, inputs: Tensors) -> Tensors:
    """The UNet's prediction for tensors by name."""
    added = {name.removeprefix(_ADDED): value for name, value in inputs.items() if name.startswith(_ADDED)}
    arguments = {name: value for name, value in inputs.items() if not name.startswith(_ADDED)}
    return {"sample": launched(**arguments, added_cond_kwargs=added or None, return_dict=False)[0]}


def _forward(
    launched: _Forward,
    replayed: Callable[[Tensors], Tensors],
    sample: torch.Tensor,
    timestep: torch.Tensor | float,
    encoder_hidden_states: torch.Tensor,
    *others: Any,
    added_cond_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    **keywords: Any,
) -> Any:
    """The UNet's `forward` by replay. With other inputs than tensors it is launched."""
    added = {_ADDED + name: value for name, value in (added_cond_kwargs or {}).items()}
    given = {"encoder_hidden_states": encoder_hidden_states, **keywords, **added}
    inputs = {"sample": sample, "timestep": _as_tensor(timestep)} | {
        name: value for name, value in given.items() if value is not None
    }
    if others or not all(isinstance(value, torch.Tensor) for value in inputs.values()):
        keywords |= {"added_cond_kwargs": added_cond_kwargs, "return_dict": return_dict}
        return launched(sample, timestep, encoder_hidden_states, *others, **keywords)
    # multistep samplers keep predictions, and the next replay overwrites the graph's
    prediction = replayed(inputs)["sample"].clone()
    return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def _as_tensor(timestep: torch.Tensor | float) -> torch.Tensor:
    """The timestep as an input that changes between replays; numbers in the dtypes that the UNet gives
    them."""
    if isinstance(timestep, torch.Tensor):
        return timestep
    return torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64)


def _set_timesteps(scheduler: Any, *arguments: Any, **keywords: Any) -> None:
    """`set_timesteps` of the scheduler's class, with the timesteps in main memory. Many samplers look them up
    in tables there: from the GPU each look-up would wait for the UNet."""
    type(scheduler).set_timesteps(scheduler, *arguments, **keywords)
    scheduler.timesteps = scheduler.timesteps.cpu()
