"""The options of convert_adapter.py, one class for each command. Imports no torch."""

import dataclasses
from typing import Annotated, Literal

from dreambooth.io.errors import UserError
from dreambooth.options import adapter_sets
from dreambooth.options.paths import FilePath, PathOrId
from dreambooth.options.rules import Group, Name, Range, require
from dreambooth.options.training import BaseOptions

Dtype = Literal["fp32", "fp16", "bf16"]
Rank = Annotated[int, Range(1, 2**16)]  # of a sum of adapters it may be larger than that of a run


@dataclasses.dataclass
class KnownBase(Group):
    """Base model that the adapter is for."""

    pretrained_model_name_or_path: PathOrId | None = None
    """Folder, single file or hub id of the base. With it, the name and width of every layer are checked.
    Files in kohya's format, LoHa and LoKr cannot be converted without it, since they lack names or shapes.
    Only the headers of the base's files are read, but for --rank of a DoRA."""
    revision: Name | None = None
    """Hub revision (branch, tag or commit) of the base."""
    variant: str | None = None
    """Preferred weight files of the base: fp16 prefers `*.fp16.safetensors`, for each part that has them."""

    def _check(self) -> None:
        if self.model() is None:
            for name in ("revision", "variant"):
                is_alone = getattr(self, name) is not None
                require(not is_alone, f"--{name} only works with --pretrained_model_name_or_path")

    def model(self) -> BaseOptions | None:
        """The base as an option group, which checks the flags; None if it is not given."""
        name = self.pretrained_model_name_or_path
        return None if name is None else BaseOptions(name, revision=self.revision, variant=self.variant)


@dataclasses.dataclass
class NeededBase(KnownBase):
    """Base model."""

    pretrained_model_name_or_path: PathOrId = dataclasses.field()  # without a default
    """Folder, single file or hub id of the base."""


def _check_adapters(words: tuple[str, ...], minimum: int) -> None:
    require(len(words) >= minimum, f"--adapter: give {minimum} files or more, got {len(words)}")
    for word in words:
        try:
            _, weight = adapter_sets.split(word, "--adapter")
        except UserError as error:
            require(False, str(error))
        else:
            require(weight != 0, f"--adapter: the weight must be a number other than 0, got {word}")


def _check_file(output: str) -> None:
    require(
        output.endswith(".safetensors"), f"--output must be the name of a .safetensors file, got {output}"
    )


@dataclasses.dataclass
class InspectOptions(Group):
    """All flags of `inspect`."""

    base: KnownBase
    adapter: FilePath
    """Adapter file, the folder of a run, or a folder in peft's format."""


@dataclasses.dataclass
class ConvertOptions(Group):
    """All flags of `convert`."""

    base: KnownBase
    adapter: FilePath
    """Adapter file, the folder of a run, or a folder in peft's format. Its layout is detected."""
    to: Literal["native", "kohya", "lora", "peft"]
    """native: the layout of this suite; diffusers loads it if the adapter is LoRA or DoRA. kohya: for
    ComfyUI, A1111, Forge, InvokeAI and kohya's scripts; of a DoRA, only LyCORIS reads that file as it was
    trained, and the others need --rank. lora: the native layout, with every layer converted to a LoRA,
    exactly (the rank of a LoHa is squared; a DoRA keeps its magnitudes) or to --rank. peft: a folder for each
    component, for PeftModel.from_pretrained."""
    output: FilePath
    """File to write; with --to peft a folder, new or empty."""
    rank: Rank | None = None
    """With --to lora or kohya: the largest rank; the nearest plain LoRA of that rank is written, and the kept
    share of the update is printed. For a DoRA this needs the base. Default: exact."""
    dtype: Dtype = "fp32"
    """Precision of the file."""

    def _check(self) -> None:
        require(
            self.rank is None or self.to in ("lora", "kohya"),
            "--rank only works with --to lora or kohya; the command `resize` lowers the rank of an adapter",
        )
        if self.to == "peft":
            require(
                not self.output.endswith(".safetensors"),
                f"--output must be the name of a folder with --to peft, got {self.output}",
            )
        else:
            _check_file(self.output)


@dataclasses.dataclass
class MergeOptions(Group):
    """All flags of `merge`."""

    base: KnownBase
    adapter: tuple[FilePath, ...]
    """Two adapters or more, each FILE or FILE:WEIGHT. If they were trained with different clip_skip, a note
    says so and the file records none."""
    output: FilePath
    """File to write."""
    rank: Rank | None = None
    """Largest rank; the nearest LoRA of that rank is written, and the kept share of the update is printed.
    Default: exact, with the ranks of all adapters together."""
    dtype: Dtype = "fp32"
    """Precision of the file."""

    def _check(self) -> None:
        _check_adapters(self.adapter, 2)
        _check_file(self.output)


@dataclasses.dataclass
class ResizeOptions(Group):
    """All flags of `resize`."""

    base: KnownBase
    adapter: FilePath
    """Adapter file, the folder of a run, or a folder in peft's format."""
    rank: Rank
    """Largest rank. Layers of a larger rank become the nearest of this rank; the others do not change."""
    output: FilePath
    """File to write."""
    dtype: Dtype = "fp32"
    """Precision of the file."""

    def _check(self) -> None:
        _check_file(self.output)


@dataclasses.dataclass
class ExtractOptions(Group):
    """All flags of `extract`."""

    base: NeededBase
    tuned: PathOrId
    """Folder, single file or hub id of the fine-tuned base."""
    rank: Rank
    """Rank of the LoRA."""
    output: FilePath
    """File to write."""
    target_preset: Literal["attn", "attn_ff", "full"] = "attn"
    """Layers of the LoRA. attn: every attention projection. attn_ff: also the feed-forward layers and the
    projections into and out of attention blocks. full: also convolutions and time embeddings. In the text
    encoder, attn_ff and full add fc1 and fc2."""
    dtype: Dtype = "fp32"
    """Precision of the file."""

    def _check(self) -> None:
        _check_file(self.output)


@dataclasses.dataclass
class BakeOptions(Group):
    """All flags of `bake`."""

    base: NeededBase
    adapter: tuple[FilePath, ...]
    """Adapters, each FILE or FILE:WEIGHT. The updates of several adapters are added."""
    merge_to: FilePath
    """Folder for the new base, new or empty."""
    dtype: Dtype | None = None
    """Precision of the UNet and the text encoders. Default: the precision of the base."""

    def _check(self) -> None:
        _check_adapters(self.adapter, 1)


# Command: (its options, the flag that takes the words right after the command, its description).
COMMANDS: dict[str, tuple[type, str, str]] = {
    "inspect": (
        InspectOptions,
        "adapter",
        "Show what an adapter holds (kinds, ranks, scales, norms, metadata) and whether it fits a base.",
    ),
    "convert": (ConvertOptions, "adapter", "Write an adapter in another layout."),
    "merge": (MergeOptions, "adapter", "Merge several adapters into one LoRA, with weights."),
    "resize": (ResizeOptions, "adapter", "Reduce the rank of a LoRA."),
    "extract": (ExtractOptions, "tuned", "Extract a LoRA from a fine-tuned base."),
    "bake": (
        BakeOptions,
        "adapter",
        "Add adapters to the weights of a base, and write a base that needs no adapter.",
    ),
}
