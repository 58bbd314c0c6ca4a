"""Counts the kernels of one training step, with torch's profiler.

    python -m benchmarks.gpu_kernels [FLAGS of train_dreambooth_lora.py]

Trains as train_dreambooth_lora.py does, and profiles step 12: forward and backward pass of all its
micro-batches, clipping, and AdamW. Prints the number of kernels and of copies between memories, how long
they kept the GPU busy, how many operators the host called, and the kernels that took longest. A replayed
step has its kernels and no operators. On a CPU it counts operators alone.
"""

import collections
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from dreambooth.options.command_line import fail, parse
from dreambooth.options.training import TrainOptions

SCRIPT = Path(__file__).parent.parent / "train_dreambooth_lora.py"
STEP = 12
LONGEST = 15  # kernels that are printed


def counted(events: Sequence[Any]) -> Iterator[str]:
    """Lines on the profile of a step. Annotations of the profiler are no kernels."""
    on_gpu = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    copies = [event for event in on_gpu if event.name.startswith(("Memcpy", "Memset"))]
    operators = collections.Counter(
        event.name for event in events if event.device_type == DeviceType.CPU and "::" in event.name
    )
    yield f"operators: {operators.total():,}, of which aten::copy_: {operators['aten::copy_']:,}"
    if not on_gpu:
        return
    busy = sum(event.time_range.elapsed_us() for event in on_gpu) / 1000
    yield f"kernels: {len(on_gpu) - len(copies):,}; copies between memories: {len(copies):,}; {busy:.2f} ms"
    times: dict[str, list[float]] = collections.defaultdict(list)
    for event in on_gpu:
        times[event.name].append(event.time_range.elapsed_us() / 1000)
    for name, of_kernel in sorted(times.items(), key=lambda item: -sum(item[1]))[:LONGEST]:
        yield f"{sum(of_kernel):8.2f} ms  {len(of_kernel):6,} x  {name[:100]}"


def profile_a_step(training: Any) -> None:
    """From now on a run prints the profile of its step 12. `training` is the script's class."""
    take_step = training.step

    def profiled(self: Any, step: int, batches: Any) -> None:
        if step != STEP - 1:  # counted from 0
            take_step(self, step, batches)
            return
        on_gpu = self.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            take_step(self, step, batches)
            if on_gpu:
                torch.cuda.synchronize()
        print("\n".join(counted(profile.events())), flush=True)

    training.step = profiled


def main(words: Sequence[str]) -> None:
    options = parse(TrainOptions, __doc__, words)
    if (options.run.max_train_steps or 0) < STEP:
        fail(f"--max_train_steps must be at least {STEP}: step {STEP} is profiled")
    script = runpy.run_path(str(SCRIPT))
    profile_a_step(script["Training"])
    script["main"](options)


if __name__ == "__main__":
    main(sys.argv[1:])
