"""What LoRA, LoHa and LoKr cost in training: peft's forward and dreambooth/adapters/factored.py's, side by side.

    python -m benchmarks.adapters

Per model, layers and adapter: seconds of a forward and backward (all adapters in turn, round after round; medians), bytes kept for backward,
and how far the resident memory of a fresh process rises. For Stable Diffusion 1.5 as a whole, which fits no small machine, the bytes kept and
the floating point operations, counted without doing them. Writes `benchmarks/results/adapters.json`. Minutes, on two cores.
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
THREADS = 1  # other programs on the machine then slow a run evenly

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
SLOW = "block 320 wide, 4096 tokens"  # seconds a step, nearly all of it attention
IN_SLOW = ("lora 4", "loha 8", "lokr 4")  # and their full set of layers only
COUNTED = ("lora 4", "loha 4", "loha 8", "lokr 4")  # on all of Stable Diffusion 1.5
PRELOADED = (
    factored,
    diffusers.models.transformers.transformer_2d,
    diffusers.models.unets.unet_2d_condition,
    peft,
)  # what takes seconds
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
    return IN_SLOW if name == SLOW else tuple(ADAPTERS)


def programs(adapter: str) -> tuple[str, ...]:
    return ("peft",) if adapter.startswith("lora") else ("peft", "factored")


def adapted(model: Any, layers: str, adapter: str, program: str) -> Any:
    """The model, trained in these layers, no adapter at its start where half of it is zero."""
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
    """(what autograd keeps of a forward, apart from parameters and each thing once; the output)."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held here, so that no address comes twice
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call(model)
    return sum(storage.nbytes() for storage in kept.values()), output


def resident(field: str) -> int:
    """VmRSS or VmHWM, the highest so far, of this process in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def measure_memory(name: str, layers: str, adapter: str, program: str) -> dict[str, float]:
    """In a process that has done nothing else."""
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
    """Medians of rounds in which every adapter and program has its turn."""
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
            if number:  # the first is slower
                seconds[key].append(time.perf_counter() - start)
    medians: dict[str, dict[str, float]] = {adapter: {} for adapter in measured(name)}
    for (adapter, program), taken in seconds.items():
        medians[adapter][program] = round(statistics.median(taken), 5)
    return medians


def count_whole(layers: str, adapter: str, program: str) -> dict[str, float]:
    """Bytes kept and operations of a forward and backward of Stable Diffusion 1.5's UNet, one 64 x 64 latent, float32."""
    with torch.device("meta"):
        model = adapted(UNet2DConditionModel(cross_attention_dim=768), layers, adapter, program)
        x, times, text = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
    # not inside: peft looks at random numbers, and a meta tensor has none
    with FlopCounterMode(display=False) as counter:
        kept, output = kept_bytes(model, lambda model: model(x, times, text).sample)
        output.backward(torch.empty_like(output))
    return {"kept_mib": round(kept / 2**20), "tflop": round(counter.get_total_flops() / 1e12, 3)}


def load_of_others() -> float:
    """Processor seconds per second that other processes take, over one second of sleep."""

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
    # each task in a process of its own, forked from one that has imported and done nothing
    with processes.Pool(1, maxtasksperchild=1) as pool:
        for name in MODELS:
            for layers in LAYERS if name != SLOW else ("full",):
                found: dict[str, Any] = {
                    adapter: {program: {} for program in programs(adapter)} for adapter in measured(name)
                }
                for adapter, medians in pool.apply(measure_seconds, (name, layers)).items():
                    for program, seconds in medians.items():
                        found[adapter][program] = {
                            "seconds": seconds,
                            **pool.apply(measure_memory, (name, layers, adapter, program)),
                        }
                results.setdefault(name, {})[layers] = with_ratios(found)
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


def with_ratios(found: dict[str, Any]) -> dict[str, Any]:
    """The same with factored's share of peft's."""
    for by_program in found.values():
        if "factored" in by_program:
            by_program["ratio"] = {
                key: round(value / by_program["peft"][key], 3)
                for key, value in by_program["factored"].items()
            }
    return found


def table(report: dict[str, Any]) -> str:
    """The table of docs/adapters.md: seconds and bytes kept, of peft's forward and of this program's."""
    lines = [
        "| model | layers | adapter | seconds: peft | here | kept for backward: peft | here |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, by_layers in report["results"].items():
        for layers, by_adapter in by_layers.items():
            for adapter, found in by_adapter.items():
                theirs, ours = found["peft"], found.get("factored", found["peft"])
                if "tflop" in theirs:
                    seconds = [f"{values['tflop']:.2f} TFLOP" for values in (theirs, ours)]
                else:
                    seconds = [f"{values['seconds']:.3g}" for values in (theirs, ours)]
                kept = [f"{values['kept_mib']:,.0f} MiB" for values in (theirs, ours)]
                lines.append(
                    f"| {model} | {layers} | {adapter} | {seconds[0]} | {seconds[1]} | {kept[0]} | {kept[1]} |"
                )
    load = report["machine"]["others_busy_cores"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines.append("")
    computer = report["machine"]
    lines.append(
        f"`python -m benchmarks.adapters`: forward and backward in float32 on {computer['threads']} thread of an {computer['processor']}, medians of "
        f"{report['rounds']} rounds in turn; other programs kept {min(load):.1f} to {max(load):.1f} cores busy meanwhile, so that the seconds say "
        f"little beyond the order; the bytes and operations are counted. {versions}."
    )
    return "\n".join(lines)


def write_table(report: dict[str, Any]) -> None:
    """Put the table between its marks in docs/adapters.md. Raises RuntimeError if they are not there once."""
    text = DOCS.read_text(encoding="utf-8")
    parts = text.split(MARK)
    if len(parts) != 3:
        raise RuntimeError(f"{DOCS.name} must have the mark {MARK} twice, has it {len(parts) - 1} times")
    DOCS.write_text(f"{parts[0]}{MARK}\n{table(report)}\n{MARK}{parts[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
