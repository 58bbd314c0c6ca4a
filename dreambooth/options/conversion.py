"""Every flag of convert_adapter.py, command by command.

Imports no torch: `--help` and every message about a wrong flag come at once.
"""

import dataclasses
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options import adapter_sets
from dreambooth.options.rules import named, require
from dreambooth.options.training import BaseOptions

Dtype = Literal["fp32", "fp16", "bf16"]


@dataclasses.dataclass
class KnownBase:
    """The base that the adapter is for."""

    pretrained_model_name_or_path: str | None = None
    """Folder or hub id of the base. With it every layer's name and width is checked; files in kohya's layout, LoHa and LoKr cannot be converted
    without it, since they do not say all of what they are for. Only the headers of its files are read."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the base."""
    variant: str | None = None
    """Weight files of the base to prefer, e.g. fp16 for `*.fp16.safetensors`."""

    def __post_init__(self) -> None:
        named("pretrained_model_name_or_path", self.pretrained_model_name_or_path)
        for name in ("revision", "variant"):
            without = self.pretrained_model_name_or_path is None and getattr(self, name) is not None
            require(not without, f"--{name} only works with --pretrained_model_name_or_path")
        if self.pretrained_model_name_or_path is not None:
            self.model()

    def model(self) -> BaseOptions | None:
        """The base as the other scripts have it; None if there is none."""
        name = self.pretrained_model_name_or_path
        return None if name is None else BaseOptions(name, revision=self.revision, variant=self.variant)


@dataclasses.dataclass
class NeededBase:
    """The base model."""

    pretrained_model_name_or_path: str
    """Folder or hub id of the base."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the base."""
    variant: str | None = None
    """Weight files of the base to prefer, e.g. fp16 for `*.fp16.safetensors`."""

    def __post_init__(self) -> None:
        self.model()

    def model(self) -> BaseOptions:
        """The base as the other scripts have it."""
        return BaseOptions(self.pretrained_model_name_or_path, revision=self.revision, variant=self.variant)


def _check_adapters(words: tuple[str, ...], least: int) -> None:
    require(len(words) >= least, f"--adapter: give {least} files or more, got {len(words)}")
    for word in words:
        named("adapter", word)
        try:
            _, weight = adapter_sets.split(word, "--adapter")
        except UserError as error:
            require(False, str(error))
        else:
            require(weight != 0, f"--adapter: the weight must be a number other than 0, got {word}")


def _check_file(output: str) -> None:
    named("output", output)
    require(
        output.endswith(".safetensors"), f"--output must be the name of a .safetensors file, got {output}"
    )


def _check_rank(rank: int | None) -> None:
    require(rank is None or rank >= 1, f"--rank must be at least 1, got {rank}")


@dataclasses.dataclass
class InspectOptions:
    """All flags of `inspect`."""

    base: KnownBase
    adapter: str
    """AdapterOptions file, the folder of a run, or a folder of peft's."""

    def __post_init__(self) -> None:
        named("adapter", self.adapter)


@dataclasses.dataclass
class ConvertOptions:
    """All flags of `convert`."""

    base: KnownBase
    adapter: str
    """AdapterOptions file, the folder of a run, or a folder of peft's. Its layout is found out from what it holds."""
    to: Literal["native", "kohya", "lora", "peft"]
    """native: this suite's, which diffusers loads where it is LoRA or DoRA. kohya: for ComfyUI, A1111, Forge and kohya's scripts. lora: native, and
    every layer a LoRA, exactly (a LoHa's rank is squared) or of --rank. peft: a folder for each part, for PeftModel.from_pretrained."""
    output: str
    """File to write; with --to peft a folder, new or empty."""
    rank: int | None = None
    """With --to lora: at most this rank, the nearest there is; how much of the update is kept is printed. None is exact."""
    dtype: Dtype = "fp32"
    """Precision of the file."""

    def __post_init__(self) -> None:
        named("adapter", self.adapter)
        _check_rank(self.rank)
        require(
            self.rank is None or self.to == "lora",
            "--rank only works with --to lora; the command `resize` lowers the rank of an adapter",
        )
        if self.to == "peft":
            named("output", self.output)
            require(
                not self.output.endswith(".safetensors"),
                f"--output must be the name of a folder with --to peft, got {self.output}",
            )
        else:
            _check_file(self.output)


@dataclasses.dataclass
class MergeOptions:
    """All flags of `merge`."""

    base: KnownBase
    adapter: tuple[str, ...]
    """Two adapters or more, each FILE or FILE:WEIGHT."""
    output: str
    """File to write."""
    rank: int | None = None
    """At most this rank, the nearest there is; how much of the update is kept is printed. None is exact, of all ranks together."""
    dtype: Dtype = "fp32"
    """Precision of the file."""

    def __post_init__(self) -> None:
        _check_adapters(self.adapter, 2)
        _check_file(self.output)
        _check_rank(self.rank)


@dataclasses.dataclass
class ResizeOptions:
    """All flags of `resize`."""

    base: KnownBase
    adapter: str
    """AdapterOptions file, the folder of a run, or a folder of peft's."""
    rank: int
    """Largest rank; layers above it become the nearest of it, the others stay."""
    output: str
    """File to write."""
    dtype: Dtype = "fp32"
    """Precision of the file."""

    def __post_init__(self) -> None:
        named("adapter", self.adapter)
        _check_rank(self.rank)
        _check_file(self.output)


@dataclasses.dataclass
class ExtractOptions:
    """All flags of `extract`."""

    base: NeededBase
    tuned: str
    """Folder or hub id of the base after fine-tuning."""
    rank: int
    """Rank of the LoRA."""
    output: str
    """File to write."""
    target_preset: Literal["attn", "attn_ff", "full"] = "attn"
    """Layers: every attention projection; with the feed-forward and in and out projections too; or also convolutions and time embeddings. In
    the text encoder the last two add fc1 and fc2."""
    dtype: Dtype = "fp32"
    """Precision of the file."""

    def __post_init__(self) -> None:
        named("tuned", self.tuned)
        _check_rank(self.rank)
        _check_file(self.output)


@dataclasses.dataclass
class BakeOptions:
    """All flags of `bake`."""

    base: NeededBase
    adapter: tuple[str, ...]
    """Adapters, each FILE or FILE:WEIGHT. Several add up."""
    merge_to: str
    """Folder of the new base, new or empty."""
    dtype: Dtype | None = None
    """Precision of its UNet and text encoders; None is that of the base."""

    def __post_init__(self) -> None:
        _check_adapters(self.adapter, 1)
        named("merge_to", self.merge_to)


# Command -> (its flags, the flag that words right after it stand for, what it does).
COMMANDS: dict[str, tuple[type, str, str]] = {
    "inspect": (
        InspectOptions,
        "adapter",
        "Show what an adapter holds: kinds, ranks, scales, norms, metadata; and whether it fits a base.",
    ),
    "convert": (ConvertOptions, "adapter", "Write an adapter in another layout."),
    "merge": (MergeOptions, "adapter", "Make one LoRA of several adapters, with weights."),
    "resize": (ResizeOptions, "adapter", "Make a LoRA of a smaller rank."),
    "extract": (ExtractOptions, "tuned", "Make a LoRA of what fine-tuning has changed in a base."),
    "bake": (BakeOptions, "adapter", "Work adapters into a base: a folder that needs no adapter."),
}
