"""Measures time and memory of training LoRA, LoHa and LoKr with peft's forward pass and with
adapters/factored.py's.

    python -m benchmarks.adapters

For each model, set of layers and adapter it measures the seconds of a forward and backward pass (medians of
rounds in which all adapters take turns), the bytes kept for the backward pass, and the rise of a fresh
process's resident memory. The UNet of Stable Diffusion 1.5 is too large for a small machine: its bytes and
floating point operations are counted on tensors without data. Writes `benchmarks/results/adapters.json` and
the table in docs/adapters.md. Takes minutes on two cores.
"""

import functools
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from dreambooth.adapters import factored

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "adapters.json"
DOCS = ROOT / "docs" / "adapters.md"
MARK = "<!-- measured: python -m benchmarks.adapters -->"
ROUNDS = 5
THREADS = 1  # with one thread, other programs slow all adapters equally

LAYERS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "full": [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv",
        "conv1",
        "conv2",
    ]
    + ["conv_shortcut", "time_emb_proj"],
}
ADAPTERS: dict[str, Callable[[list[str]], Any]] = {
    "lora 4": lambda layers: LoraConfig(r=4, lora_alpha=4, target_modules=layers),
    "loha 4": lambda layers: LoHaConfig(r=4, alpha=4, target_modules=layers),
    "loha 8": lambda layers: LoHaConfig(r=8, alpha=8, target_modules=layers),
    "lokr 4": lambda layers: LoKrConfig(r=4, alpha=4, target_modules=layers),
    "lokr 8": lambda layers: LoKrConfig(r=8, alpha=8, target_modules=layers),
    "lokr 4, factor 8": lambda layers: LoKrConfig(r=4, alpha=4, target_modules=layers, decompose_factor=8),
    "lokr 8, factor 8": lambda layers: LoKrConfig(r=8, alpha=8, target_modules=layers, decompose_factor=8),
}
SLOW = "block 320 wide, 4096 tokens"  # a step takes seconds, nearly all of them in attention
IN_SLOW = ("lora 4", "loha 8", "lokr 4")  # adapters measured on SLOW, on the full set of layers alone
COUNTED = ("lora 4", "loha 4", "loha 8", "lokr 4")  # adapters counted on all of Stable Diffusion 1.5
PRELOADED = (
    factored,
    diffusers.models.transformers.transformer_2d,
    diffusers.models.unets.unet_2d_condition,
    peft,
)  # modules that take seconds to import
Run = Callable[[], Any]


def block(width: int, side: int) -> tuple[Any, Callable[[Any], Any]]:
    """A transformer block of Stable Diffusion 1.5 with its two projections, for side x side latents."""
    model = Transformer2DModel(8, width // 8, width, cross_attention_dim=768)
    x = torch.randn(1, width, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    text = torch.randn(1, 77, 768)
    return model, lambda model: model(x, encoder_hidden_states=text).sample


def small_unet() -> tuple[Any, Callable[[Any], Any]]:
    """The UNet of the embedded base, for four latents."""
    model = UNet2DConditionModel.from_pretrained(ROOT / "picturebook" / "model", subfolder="unet")
    x = torch.randn(4, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    text = torch.randn(4, 32, model.config.cross_attention_dim)
    return model, lambda model: model(x, torch.tensor([10, 300, 600, 900]), text).sample


MODELS: dict[str, Callable[[], tuple[Any, Callable[[Any], Any]]]] = {
    SLOW: lambda: block(320, 64),
    "block 1280 wide, 64 tokens": lambda: block(1280, 8),
    "embedded base, batch 4": small_unet,
}


def measured(name: str) -> tuple[str, ...]:
    """The adapters that are measured on the model `name`."""
    return IN_SLOW if name == SLOW else tuple(ADAPTERS)


def programs(adapter: str) -> tuple[str, ...]:
    """The forward passes that the adapter has: LoRA has peft's alone."""
    return ("peft",) if adapter.startswith("lora") else ("peft", "factored")


def adapted(model: Any, layers: str, adapter: str, program: str) -> Any:
    """The model with an adapter on `layers`. All its parameters are random: at an adapter's start half of
    them are 0."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    peft.inject_adapter_in_model(ADAPTERS[adapter](LAYERS[layers]), model)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_meta:
            torch.nn.init.normal_(parameter, std=0.02)
    if program == "factored":
        factored.use_factored_forward(model)
    return model.train().to(memory_format=torch.channels_last)


def step(model: Any, call: Callable[[Any], Any]) -> None:
    call(model).square().mean().backward()


def kept_bytes(model: Any, call: Callable[[Any], Any]) -> tuple[int, Any]:
    """(bytes that autograd keeps of a forward pass, each storage once and no parameters; the output)."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held, so that no address is used twice
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call(model)
    return sum(storage.nbytes() for storage in kept.values()), output


def resident(field: str) -> int:
    """Resident memory of this process in bytes: now (VmRSS), or its peak (VmHWM)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def measure_memory(name: str, layers: str, adapter: str, program: str) -> dict[str, float]:
    """MiB kept for backward, and the rise of resident memory. Call it in a fresh process."""
    torch.set_num_threads(THREADS)
    model, call = MODELS[name]()
    model = adapted(model, layers, adapter, program)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    before = resident("VmRSS")
    kept, output = kept_bytes(model, call)
    output.square().mean().backward()
    return {
        "kept_mib": round(kept / 2**20, 1),
        "rss_rise_mib": round((resident("VmHWM") - before) / 2**20, 1),
    }


def measure_seconds(name: str, layers: str) -> dict[str, dict[str, float]]:
    """Seconds of a step by adapter and program: medians of rounds in which all take turns."""
    torch.set_num_threads(THREADS)
    runs: dict[tuple[str, str], Run] = {}
    for adapter in measured(name):
        for program in programs(adapter):
            model, call = MODELS[name]()
            model = adapted(model, layers, adapter, program)
            runs[adapter, program] = functools.partial(step, model, call)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for number in range(ROUNDS + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if number:  # the first round is slower
                seconds[key].append(time.perf_counter() - start)
    medians: dict[str, dict[str, float]] = {adapter: {} for adapter in measured(name)}
    for (adapter, program), taken in seconds.items():
        medians[adapter][program] = round(statistics.median(taken), 5)
    return medians


def count_whole(layers: str, adapter: str, program: str) -> dict[str, float]:
    """MiB kept and TFLOP of a forward and backward pass of Stable Diffusion 1.5's UNet.

    The input is one 64 x 64 latent in float32."""
    with torch.device("meta"):
        model = adapted(UNet2DConditionModel(cross_attention_dim=768), layers, adapter, program)
        x, times, text = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
    # outside the block above: peft reads random numbers, which a meta tensor does not have
    with FlopCounterMode(display=False) as counter:
        kept, output = kept_bytes(model, lambda model: model(x, times, text).sample)
        output.backward(torch.empty_like(output))
    return {"kept_mib": round(kept / 2**20), "tflop": round(counter.get_total_flops() / 1e12, 3)}


def load_of_others() -> float:
    """Cores that other processes keep busy, measured over one second of sleep."""

    def busy() -> float:
        user, nice, system, _, _, *others = (
            int(ticks) for ticks in Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
        )
        return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(1)
    return round(busy() - before, 2)


def main() -> None:
    start = time.perf_counter()
    load = [load_of_others()]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([module.__name__ for module in PRELOADED])
    results: dict[str, Any] = {}
    # each task runs in a new process, forked from one that has only imported modules
    with processes.Pool(1, maxtasksperchild=1) as pool:
        for name in MODELS:
            for layers in LAYERS if name != SLOW else ("full",):
                figures: dict[str, Any] = {
                    adapter: {program: {} for program in programs(adapter)} for adapter in measured(name)
                }
                for adapter, medians in pool.apply(measure_seconds, (name, layers)).items():
                    for program, seconds in medians.items():
                        figures[adapter][program] = {
                            "seconds": seconds,
                            **pool.apply(measure_memory, (name, layers, adapter, program)),
                        }
                results.setdefault(name, {})[layers] = with_ratios(figures)
                load.append(load_of_others())
                print(f"{name}, {layers}: {time.perf_counter() - start:.0f} s", flush=True)
        whole = "Stable Diffusion 1.5, batch 1, counted"
        for layers in LAYERS:
            counts = {
                a: {program: pool.apply(count_whole, (layers, a, program)) for program in programs(a)}
                for a in COUNTED
            }
            results.setdefault(whole, {})[layers] = with_ratios(counts)
    report = {
        "machine": {
            "processor": machine.processor(),
            "threads": THREADS,
            "python": platform.python_version(),
            "others_busy_cores": load,
        },
        "versions": {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "diffusers": diffusers.__version__,
        },
        "rounds": ROUNDS,
        "results": results,
        "seconds": round(time.perf_counter() - start, 1),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    write_table(report)
    print(f"{RESULTS.relative_to(ROOT)}, after {report['seconds']} s; others kept {load} cores busy")


def with_ratios(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with the ratio of factored's figures to peft's."""
    for by_program in results.values():
        if "factored" in by_program:
            by_program["ratio"] = {
                key: round(value / by_program["peft"][key], 3)
                for key, value in by_program["factored"].items()
            }
    return results


def table(report: dict[str, Any]) -> str:
    """The table of docs/adapters.md: seconds and bytes kept, of peft's forward and of this program's."""
    lines = [
        "| model | layers | adapter | seconds: peft | here | kept for backward: peft | here |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, by_layers in report["results"].items():
        for layers, by_adapter in by_layers.items():
            for adapter, by_program in by_adapter.items():
                theirs = by_program["peft"]
                ours = by_program.get("factored", theirs)
                if "tflop" in theirs:
                    seconds = [f"{values['tflop']:.2f} TFLOP" for values in (theirs, ours)]
                else:
                    seconds = [f"{values['seconds']:.3g}" for values in (theirs, ours)]
                kept = [f"{values['kept_mib']:,.0f} MiB" for values in (theirs, ours)]
                lines.append(f"| {' | '.join([model, layers, adapter, *seconds, *kept])} |")
    load = report["machine"]["others_busy_cores"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines.append("")
    computer = report["machine"]
    lines.append(
        f"`python -m benchmarks.adapters`: forward and backward in float32 on {computer['threads']} thread "
        f"of an {computer['processor']}, medians of {report['rounds']} rounds in turn; other programs kept "
        f"{min(load):.1f} to {max(load):.1f} cores busy meanwhile, so that the seconds say little beyond the "
        f"order; the bytes and operations are counted. {versions}."
    )
    return "\n".join(lines)


def write_table(report: dict[str, Any]) -> None:
    """Put the table between its marks in docs/adapters.md. Raises RuntimeError unless the mark occurs
    twice."""
    text = DOCS.read_text(encoding="utf-8")
    parts = text.split(MARK)
    if len(parts) != 3:
        raise RuntimeError(f"{DOCS.name} must have the mark {MARK} twice, has it {len(parts) - 1} times")
    DOCS.write_text(f"{parts[0]}{MARK}\n{table(report)}\n{MARK}{parts[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
