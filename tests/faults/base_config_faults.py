"""Each field of each configuration of a base replaced by odd values: refused with one message, or loaded.

    python -m tests.faults.base_config_faults [CASES]

Each case runs in a process of its own, which is forked from this one, with a limit of time and of memory.
Prints the counts, and every case that did not end with a message or with loaded models; the exit status is 1
if there was one.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dreambooth.bases import autoencoder, families, loading, prompts, schedulers
from dreambooth.io.errors import UserError
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.training import BaseOptions, TextOptions
from dreambooth.training import adapter_targets
from tests import tiny

SECONDS, MEMORY = 5.0, 2**30  # of a case; bytes beyond what this process has
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3, 10**7, 10**10, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 10**6, [], [1], [10**7] * 4, [None], [[[]]], {}, {"a": {"b": [1]}}),
)
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.build_pipeline,
    "xl": tiny.build_xl,
    "edm": lambda folder: tiny.build_xl(folder, edm=True),
    "if": tiny.build_if,
}
# Fields of published bases that the tiny ones leave out, and fields that steer a library.
MORE_FIELDS = {
    "config.json": ("dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "return_dict")
    + ("quantization_config", "_class_name", "auto_map", "use_attention_mask", "id2label", "norm_type"),
    "scheduler_config.json": (
        "trained_betas",
        "solver_order",
        "variance_type",
        "use_karras_sigmas",
        "sigma_min",
    )
    + ("thresholding", "sample_max_value", "dynamic_thresholding_ratio", "lambda_min_clipped", "rho"),
    "tokenizer_config.json": (
        "auto_map",
        "chat_template",
        "additional_special_tokens",
        "added_tokens_decoder",
    ),
    "model_index.json": ("force_zeros_for_empty_prompt", "scheduler", "safety_checker"),
}


Case = tuple[str, str, str, Any]
"""Base, file, field, value."""


def cases(bases: dict[str, Path]) -> Iterator[Case]:
    """Every field of every JSON file of every base, with every value."""
    for base, folder in bases.items():
        for path in sorted(folder.rglob("*.json")):
            fields = dict.fromkeys((*json.loads(path.read_text()), *MORE_FIELDS.get(path.name, ())))
            for field, value in itertools.product(fields, VALUES):
                yield base, str(path.relative_to(folder)), field, value


def load_and_predict(folder: Path) -> None:
    """What training does with a base: the checks, the table of adapters, and one prediction of each model."""
    base = families.find(BaseOptions(str(folder)))
    text, words, cpu = TextOptions(), ["a photo of a dog"], torch.device("cpu")
    families.check_text(base, text)
    tokenizers = loading.load_tokenizers(base)
    prompts.check(tokenizers, {"--instance_prompt": words[0]}, families.max_tokens(base, text))
    adapter_targets.table(base, AdapterOptions(), text)
    parts = loading.text_without_encoders(base, tokenizers, text)
    parts.encoders = loading.load_encoders(base, torch.float32, cpu)
    embeds = parts(words)
    vae, unet = loading.load_vae(base, cpu), loading.load_unet(base, torch.float32, cpu)
    scheduler = schedulers.load_scheduler(base)
    schedulers.sampler(scheduler, has_vae=vae is not None, wanted=None).set_timesteps(3)
    posterior = autoencoder.encode(vae, torch.zeros(1, 3, 64, 64))
    latents, timesteps = autoencoder.normalized(base.vae_config, posterior.mean), torch.tensor([3])
    if not base.is_edm:
        latents = scheduler.add_noise(latents, torch.ones_like(latents), timesteps)
    added = {"text_embeds": embeds.pooled, "time_ids": torch.ones(1, 6)}
    unet(latents, timesteps, embeds.embeds, added_cond_kwargs=added)


@torch.no_grad()
def outcome(work: Callable[[], object], seconds: float = SECONDS, memory: int = MEMORY) -> tuple[str, str]:
    """What the work ended with, in a child process with a limit of time and of memory: "loaded", "refused",
    "traceback", "hang" or "crash"; and the message."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + memory, in_use + memory))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time; its signal ends the process
        signal.alarm(60)
        try:
            work()
            said = "loaded", ""
        except UserError as error:
            said = "refused", str(error)
        except BaseException:
            said = "traceback", traceback.format_exc()[-1500:]
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        received = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not received:
        return (
            ("hang", "") if code in (-signal.SIGPROF, -signal.SIGALRM) else ("crash", f"exit status {code}")
        )
    verdict, message = json.loads(received)
    return verdict, message


@contextlib.contextmanager
def replaced(bases: dict[str, Path], case: Case) -> Iterator[Path]:
    """The base of a case with its value written; afterwards it is as before."""
    base, name, field, value = case
    path = bases[base] / name
    before = path.read_bytes()
    path.write_text(json.dumps(json.loads(before) | {field: value}))
    yield bases[base]
    path.write_bytes(before)


def build(folder: Path) -> dict[str, Path]:
    """The tiny bases, by the names of `BUILDERS`."""
    return {name: builder(folder / name) for name, builder in BUILDERS.items()}


def count(bases: dict[str, Path], drawn: Iterable[Case]) -> tuple[Counter[str], list[str]]:
    """How many cases ended how, and a line for each that ended with no message and no loaded model."""
    counts: Counter[str] = Counter()
    wrong = []
    for case in drawn:
        with replaced(bases, case) as folder:
            verdict, message = outcome(functools.partial(load_and_predict, folder))
        if verdict == "refused" and (
            len(message) > 2000 or not all(map(str.isprintable, message.split("\n")))
        ):
            verdict = "unreadable"
        counts[verdict] += 1
        if verdict not in ("refused", "loaded"):
            base, name, field, value = case
            wrong.append(f"{verdict}: {base}/{name} {field} = {ascii(value)[:60]}: {message}")
    return counts, wrong


def main() -> int:
    torch.set_num_threads(1)
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tempfile.TemporaryDirectory() as folder:
        bases = build(Path(folder))
        every = list(cases(bases))
        drawn = random.Random(0).sample(every, min(most, len(every)))
        counts, wrong = count(bases, drawn)
    print("\n".join(wrong))
    print(json.dumps({"cases": len(drawn), "of": len(every), **counts}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
