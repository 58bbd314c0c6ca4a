"""The settings of the launcher (`accelerate launch`, its configuration file, torchrun) in the environment.
What cannot be done is refused before accelerate is set up, and what is ignored is said."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from dreambooth.io import reader
from dreambooth.io.errors import UserError, raise_all, shortened

_PRECISIONS = ("no", "fp16", "bf16")
_TRUE = ("1", "true", "t", "yes", "y", "on")
# Settings that spread one model over devices, by the variable that turns each on. Here each device holds the
# whole base.
_OF_SHARDED_MODELS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


def adopt_local_rank(local_rank: int) -> None:
    """Set LOCAL_RANK, which accelerate reads, from --local_rank of an old launcher. -1, and 0 without a
    launcher, set nothing. Raises UserError for another rank without a launcher."""
    if local_rank < 0 or "LOCAL_RANK" in os.environ:
        return
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in os.environ]
    if not missing:
        os.environ["LOCAL_RANK"] = str(local_rank)
    elif local_rank > 0:
        raise UserError(
            f"--local_rank {local_rank}: no launcher started this process ({' and '.join(missing)} not set); "
            "leave the flag out, or start with accelerate launch or torchrun"
        )


def check(mixed_precision: str | None) -> None:
    """Raise UserError, with a line for each, if the launcher has settings that cannot be followed.
    `mixed_precision` is the precision that replaces the launcher's; None for no other."""
    problems = [
        f"the launcher's configuration turns on {name} ({variable}), which this program cannot do: each "
        "process holds the whole base; turn it off in `accelerate config` or the file of --config_file"
        for variable, name in _OF_SHARDED_MODELS.items()
        if _is_on(os.environ, variable)
    ]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision is None and precision.lower() not in _PRECISIONS:
        problems.append(
            f"the launcher's mixed_precision is {shortened(precision)} (ACCELERATE_MIXED_PRECISION); it must "
            f"be {', '.join(_PRECISIONS)}: change it there, or give the launcher --mixed_precision"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = os.environ.get(name)
        if value is not None and re.fullmatch(r"-1|\d{1,9}", value) is None:
            problems.append(f"{name} in the environment must be a whole number, got {shortened(value)}")
    raise_all(problems)


def notes(accumulation: int = 1) -> list[str]:
    """Notes for the user: settings of the launcher that are ignored, and processes that it did not start.
    `accumulation` is --gradient_accumulation_steps."""
    environment = os.environ
    ignored = []
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        ignored.append(f"dynamo_backend {shortened(backend)} (--compile compiles the UNet)")
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulation))
    if steps != str(accumulation):
        ignored.append(
            f"gradient_accumulation_steps {shortened(steps)} "
            f"(--gradient_accumulation_steps is {accumulation})"
        )
    if environment.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower() != "none":
        clipping = shortened(environment["ACCELERATE_GRADIENT_CLIPPING"])
        ignored.append(f"gradient_clipping {clipping} (--max_grad_norm clips)")
    if _is_on(environment, "ACCELERATE_DOWNCAST_BF16"):
        ignored.append("downcast_bf16, which is for TPUs")
    return [
        f"ignored of the launcher's configuration: {setting}" for setting in ignored
    ] + _too_few_processes()


def _is_on(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").strip().lower() in _TRUE


def _too_few_processes() -> list[str]:
    """A note if `accelerate launch --num_processes N` started a single process; else []."""
    # `accelerate launch --cpu --num_processes 2` sets MASTER_PORT and starts one process, without a message
    environment = os.environ
    if "ACCELERATE_DYNAMO_BACKEND" not in environment or "MASTER_PORT" not in environment:
        return []
    if "WORLD_SIZE" in environment:
        return []
    match = re.search(r"--num_processes[= ](\d+)", _command_line(os.getppid()))
    return [
        f"accelerate launch should start {match[1] if match else 'several'} processes and started 1: "
        "on CPUs it starts several only as `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
        "--num_processes N` (configs/accelerate/cpu_processes.yaml)"
    ]


def _command_line(pid: int) -> str:
    """The command line of a process; "" if it cannot be read."""
    try:
        data = reader.read_bytes(Path(f"/proc/{pid}/cmdline"), "the command line")
        return data.replace(b"\0", b" ").decode(errors="replace")
    except UserError:  # this system has no /proc
        return ""
