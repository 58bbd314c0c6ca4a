"""The flags of the adapter: its kind, its size, and the layers that it is put on. Imports no torch."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Annotated, Literal

from dreambooth.options.paths import FilePath
from dreambooth.options.rules import Decay, Group, Range, Rank, is_default, require

# Flags that only work with some kinds.
_KINDS_OF_FLAG = {
    "use_dora": ("lora",),
    "use_rslora": ("lora",),
    "lora_dropout": ("lora",),
    "text_encoder_dropout": ("lora",),
    "lora_alpha": ("lora", "loha", "lokr"),
    "text_encoder_alpha": ("lora", "loha", "lokr"),
    "rank_dropout": ("loha", "lokr"),
    "module_dropout": ("loha", "lokr", "oft"),
    "decompose_both": ("lokr",),
    "use_effective_conv2d": ("loha", "lokr"),
    "rank_pattern": ("lora", "loha", "lokr"),
    "output_kohya_format": ("lora", "loha", "lokr"),
    "decompose_factor": ("lokr",),
    "oft_block_size": ("oft",),
    "boft_block_size": ("boft",),
}

Alpha = Annotated[float, Range(0, 2**16, over=True)]
BlockSize = Annotated[int, Range(2, 2**16)]


@dataclasses.dataclass
class AdapterOptions(Group):
    """Adapter."""

    adapter: Literal["lora", "loha", "lokr", "oft", "boft", "hra"] = "lora"
    """Kind of adapter: LoRA (arXiv 2106.09685), LoHa (2108.06098), LoKr (2309.14859), OFT (2306.07280, linear
    layers only), BOFT (2311.06243) or HRA (2405.17484). diffusers loads LoRA files; LoHa and LoKr files are
    for ComfyUI and A1111, by --output_kohya_format or convert_adapter.py; only infer.py loads the last
    three."""
    rank: Rank = 4
    """Rank of the update matrices. For HRA: the number of reflections, which is even. OFT and BOFT have block
    sizes instead."""
    lora_alpha: Alpha | None = None
    """The update is scaled by alpha / rank; adapter files hold the scaled update. Default: the rank."""
    lora_dropout: Decay = 0.0
    """LoRA: dropout on the input of the update matrices during training."""
    use_dora: bool = False
    """LoRA: DoRA (arXiv 2402.09353), which also trains the magnitude of each output. For diffusers and
    infer.py; see --output_kohya_format for other programs."""
    use_rslora: bool = False
    """LoRA: scale by alpha / sqrt(rank) (arXiv 2312.03732), so that large ranks learn as fast as small
    ones."""
    text_encoder_rank: Rank | None = None
    """Rank in the text encoder. Default: --rank."""
    text_encoder_alpha: Alpha | None = None
    """Alpha in the text encoder. Default: --text_encoder_rank if that is given, else --lora_alpha."""
    text_encoder_dropout: Decay | None = None
    """Dropout in the text encoder. Default: --lora_dropout."""
    rank_dropout: Decay = 0.0
    """LoHa and LoKr: probability of dropping a rank during training."""
    module_dropout: Decay = 0.0
    """LoHa, LoKr and OFT: probability of leaving out a layer's update in a training step."""
    decompose_both: bool = False
    """LoKr: decompose both Kronecker factors into low-rank matrices."""
    decompose_factor: Annotated[int, Range(-1, 2**16)] = -1
    """LoKr: largest side of the first Kronecker factor; -1 divides each width as evenly as possible. LyCORIS
    cannot read layers in which it is over the root of the width."""
    use_effective_conv2d: bool = False
    """LoHa and LoKr: decompose 3 x 3 kernels too (CP, called tucker)."""
    oft_block_size: BlockSize = 32
    """OFT: side of the rotated blocks."""
    boft_block_size: BlockSize = 4
    """BOFT: side of the rotated blocks."""
    apply_gs: bool = False
    """HRA with orthogonal reflections. It is refused, since it cannot start as the base."""
    target_preset: Literal["attn", "attn_ff", "full"] = "attn"
    """Layers that get an adapter. attn: every attention projection. attn_ff: also the feed-forward layers and
    the projections into and out of attention blocks. full: also convolutions and time embeddings. In the text
    encoder, attn_ff and full add fc1 and fc2."""
    lora_layers: str | None = None
    """Layers of the UNet that get an adapter, instead of --target_preset: the ends of their names, separated
    by commas: "to_k,to_q,to_v,to_out.0"."""
    text_encoder_layers: str | None = None
    """Layers of the text encoder that get an adapter, in the same form: "q_proj,v_proj"."""
    rank_pattern: str | None = None
    """Ranks of parts of the models: "unet.up_blocks=8,text_encoder=2,to_q=16". A part matches a layer if its
    words follow each other in the layer's name; the last match counts. Alpha is multiplied by the same factor
    as the rank."""
    lr_pattern: str | None = None
    """Learning rates of parts of the models, in the same form: "unet.down_blocks=1e-5,mid_block=5e-5"."""
    output_kohya_format: bool = False
    """Also write pytorch_lora_weights_kohya.safetensors, for ComfyUI, A1111, Forge, InvokeAI and kohya's
    scripts: they do not read pytorch_lora_weights.safetensors. With --use_dora only LyCORIS reads it as it
    was trained; `convert_adapter.py convert` with --to kohya and --rank writes a LoRA for the others."""
    init_adapter: FilePath | None = None
    """Adapter to start from: a file, or a folder with one, of a finished run, of a checkpoint of the
    reference script, or in kohya's format."""
    dry_run: bool = False
    """Print what would be trained (layers, parameters, file sizes) without loading weights, and stop.
    --estimate measures."""

    def _check(self) -> None:
        for name in ("lora_layers", "text_encoder_layers"):
            value = getattr(self, name)
            layers = None if value is None else _words(value)
            is_list = layers is None or (bool(layers) and all(map(_is_name, layers)))
            require(is_list, f"--{name} must be names of layers separated by commas, got {value!r}")
        _ = self.ranks, self.learning_rates  # both check their pattern when they are first read
        self._check_kind()

    def _check_kind(self) -> None:
        """Require that flags of other kinds than --adapter are left at their defaults."""
        for name, kinds in _KINDS_OF_FLAG.items():
            choices = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
            require(
                is_default(self, name) or self.adapter in kinds,
                f"--{name} only works with --adapter {choices}",
            )
        require(self.decompose_factor != 0, "--decompose_factor must be -1 or at least 1, got 0")
        if self.adapter in ("oft", "boft"):
            require(
                is_default(self, "rank") and self.text_encoder_rank is None,
                f"--rank does not work with --adapter {self.adapter}; give --{self.adapter}_block_size",
            )
        if self.adapter == "hra":
            for name in ("rank", "text_encoder_rank"):
                value = getattr(self, name)
                require(
                    value is None or value % 2 == 0, f"--{name} must be even with --adapter hra, got {value}"
                )
        # HRA starts as the base by pairs of equal reflections. Gram-Schmidt leaves of one of them rounding
        # errors, which peft divides by their norm: the base is damaged, and gradients overflow.
        require(
            not self.apply_gs,
            "--apply_gs cannot be trained: the product of orthogonal reflections is never the identity, so "
            "that the adapter would not start as the base; leave it out",
        )
        # For kernels larger than 1 x 1, peft's OFT is not the identity at the start: it sums rotated patches.
        require(
            self.adapter != "oft" or self.target_preset != "full",
            "--target_preset full has 3 x 3 convolutions, which --adapter oft cannot rotate; "
            "use attn_ff, or --adapter boft",
        )

    def unet_layers(self) -> tuple[str, ...] | None:
        """The names in --lora_layers; None without it."""
        return None if self.lora_layers is None else _words(self.lora_layers)

    def text_layers(self) -> tuple[str, ...] | None:
        """The names in --text_encoder_layers; None without it."""
        return None if self.text_encoder_layers is None else _words(self.text_encoder_layers)

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """--rank_pattern as {part: rank}."""
        table = _pattern("rank_pattern", self.rank_pattern, lambda v: v == int(v) and 1 <= v <= 1024)
        return {part: int(rank) for part, rank in table.items()}

    @functools.cached_property
    def learning_rates(self) -> dict[str, float]:
        """--lr_pattern as {part: learning rate}."""
        return _pattern("lr_pattern", self.lr_pattern, lambda v: v >= 0)


def _words(text: str) -> tuple[str, ...]:
    """The words of "a, b"."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _pattern(flag: str, text: str | None, is_valid: Callable[[float], bool]) -> dict[str, float]:
    """{"a.b": 1.0, "c": 2.0} from "a.b=1,c=2". A malformed entry breaks a rule and is left out."""
    if text is None:
        return {}
    entries = _words(text) or ("",)
    table: dict[str, float] = {}
    for entry in entries:
        part, _, value = entry.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if _is_name(part.strip()) and math.isfinite(number) and is_valid(number):
            table[part.strip()] = number
        else:
            require(False, f"--{flag} must be PART=NUMBER, separated by commas, got {entry or text!r}")
    return table


def _is_name(text: str) -> bool:
    """Whether the text is words separated by dots, like the name of a layer or its end."""
    return re.fullmatch(r"\w+(\.\w+)*", text) is not None
