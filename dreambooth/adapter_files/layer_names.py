"""What the layers of a base are called in files of every layout: diffusers' names, peft's, kohya's and Stability's own.

From a key to its layer the way is a table of the layers that there are, never a guess at where a name with underscores has its dots.
"""

import re
from collections.abc import Iterable

from dreambooth.adapter_files.adapter import COMPONENTS, Family, Layers, Shape

_EMBEDDINGS = ("token_embedding", "position_embedding")


class Base:
    """The layers that an adapter may be for, under every name that they have in files."""

    def __init__(self, modules: Layers) -> None:
        self.layers: dict[str, dict[str, Shape]] = {}
        self.kohya: dict[str, tuple[str, str]] = {}
        for component in COMPONENTS:
            own = {
                name.removeprefix("text_model."): tuple(shape)
                for name, shape in modules.get(component, {}).items()
            }
            # embeddings have two dimensions as well, and are looked up, not multiplied
            layers = {
                name: shape
                for name, shape in own.items()
                if len(shape) in (2, 4) and not name.endswith(_EMBEDDINGS)
            }
            if not layers:
                continue
            self.layers[component] = layers
            depth = depth_of(layers)
            for name in layers:
                if component == "unet":
                    names = {f"lora_unet_{flat(name)}", f"lora_unet_{flat(sgm_name(name, depth))}"}
                else:
                    prefixes = ("lora_te_", "lora_te1_") if component == "text_encoder" else ("lora_te2_",)
                    names = {
                        f"{prefix}{form}{flat(name)}" for prefix in prefixes for form in ("", "text_model_")
                    }
                self.kohya |= dict.fromkeys(names, (component, name))

    def place(self, stem: str, component: str) -> tuple[str, str] | None:
        """(component, module) of a key without its last part; None if there is no such layer. Raises ValueError if it could be two."""
        if stem in self.kohya:
            return self.kohya[stem]
        component, stem = _parted(stem, component)
        holders = [
            name for name in ([component] if component else self.layers) if stem in self.layers.get(name, {})
        ]
        if len(holders) > 1:
            raise ValueError(" and ".join(holders))
        return (holders[0], stem) if holders else None


def _parted(stem: str, component: str) -> tuple[str, str]:
    """(component, "" if the key does not say it, module) of a key in diffusers' or peft's names."""
    stem = stem.replace(".base_layer", "")  # of an adapter that was put over another one
    head, _, rest = stem.partition(".")
    if head == "diffusion_model" and component in ("", "unet"):  # what other programs call the UNet
        return "unet", rest
    if not component and head in COMPONENTS:
        component, stem = head, rest
    return component, stem.removeprefix("base_model.model.").removeprefix("text_model.")


_RAW_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_TOPS = {
    **dict.fromkeys(
        ("conv_in", "conv_out", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks"),
        ("unet",),
    ),
    "encoder": ("text_encoder", "text_encoder_2"),
    "text_projection": ("text_encoder_2",),
}


def own_place(stem: str, component: str) -> tuple[str, str] | None:
    """`Base.place` for a file without a base: (component, module) as far as the key itself tells; kohya's names stay as they are."""
    if found := next((own for prefix, own in _RAW_PREFIXES.items() if stem.startswith(prefix)), None):
        return found, stem
    component, stem = _parted(stem, component)
    holders = (component,) if component else _TOPS.get(stem.partition(".")[0], ())
    if len(holders) > 1:
        raise ValueError(" and ".join(holders))
    return (holders[0], stem) if holders and stem else None


def with_prefix(path: str, prefix: str) -> str:
    """A text encoder's module behind `prefix`, `text_model.` or nothing; the projection of its output lies beside `text_model`, not in it."""
    return path if path.startswith("text_projection") else f"{prefix}{path}"


def is_raw(path: str) -> bool:
    """Whether a module has kohya's name, of which only a base tells where its dots were."""
    return "." not in path and path.startswith(tuple(_RAW_PREFIXES))


def flat(name: str) -> str:
    return name.replace(".", "_")


def depth_of(unet: Iterable[str]) -> int:
    """Resnets in a down block of the UNet with these layers, by which Stability's names count."""
    return 1 + max(
        [int(found[1]) for name in unet if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))],
        default=1,
    )


_SGM_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def sgm_name(name: str, depth: int) -> str:
    """A UNet's module as Stability's own code names it, and kohya's scripts for Stable Diffusion XL. `depth`: resnets in a down block."""
    if name in _SGM_LAYERS:
        return _SGM_LAYERS[name]
    found = re.fullmatch(
        r"(?:(mid)_block|(down|up)_blocks\.(\d+))\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
        name,
    )
    if not found:
        return name
    is_mid, side, block, part, index, rest = found.groups()
    tail = _SGM_RESNET.get(rest, rest) if part == "resnets" else rest
    if is_mid:
        return f"{_SGM_LAYERS[f'mid_block.{part}.{index}']}.{tail}"
    start = (depth + 1) * int(block)
    if part == "downsamplers":
        return f"input_blocks.{start + depth + 1}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{start + depth}.2.conv"
    first = (
        f"input_blocks.{start + int(index) + 1}" if side == "down" else f"output_blocks.{start + int(index)}"
    )
    return f"{first}.{0 if part == 'resnets' else 1}.{tail}"


# End of a key -> which tensor of a module it is.
_ENDS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
} | {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")}
_ENDS |= {
    name: name
    for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
}
_OLD_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(down|up)\.weight")
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# What else such a key may belong to.
FOREIGN = {
    r"\.(oft_R\.weight|boft_[Rs]|hra_u)$": "OFT, BOFT or HRA, which turn weights; `bake` works it into a base, and infer.py draws with it",
    r"oft_|\.oft\b": "OFT, which no two programs store alike",
    r"boft_": "BOFT, which no two programs store alike",
    r"\bhra_": "HRA, which peft alone knows",
    r"on_input$": "IA3",
    r"\.diff(_b)?$|\bw_norm$|\bb_norm$": "trained whole weights",
    r"emb_params$|string_to_param": "an embedding (textual inversion), not an adapter",
    r"lora_embedding_": "a LoRA of an embedding",
    r"\.bias$": "a trained bias",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"^(transformer|double_blocks|lora_transformer)": "a transformer (Stable Diffusion 3, Flux), not a UNet",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": "a whole checkpoint, not an adapter",
}


_NAMED = re.compile(
    r"(?P<start>.+\.)(?:(?P<plain>lora_[AB])\.(?P<one>[\w-]+)\.weight|(?P<other>lora_magnitude_vector|hada_\w+|lokr_\w+)\.(?P<two>[\w-]+)(?:\.weight)?)"
)


def without_name(keys: Iterable[str]) -> dict[str, str]:
    """Each key without the name that peft gave its adapter, where one and the same stands in all of them; else each as it is."""
    found = {key: _NAMED.fullmatch(key) for key in keys}
    names = {(match["one"] or match["two"]) if match else None for match in found.values()}
    if len(names) != 1 or names <= {None, "weight"}:  # `lora_magnitude_vector.weight` has none
        return {key: key for key in found}
    return {
        key: f"{m['start']}{m['plain']}.weight" if m["plain"] else f"{m['start']}{m['other']}"
        for key, m in found.items()
        if m
    }


def split(key: str) -> tuple[str, str] | None:
    """(what stands for the module, which of its tensors); None for a key of no known layout."""
    key = re.sub(
        r"\.default(_\d+)?(?=(\.weight)?$)", "", key
    )  # peft's name of the adapter, where it was not taken off
    if old := _OLD_PROCESSOR.fullmatch(key):
        names = _OLD_TEXT if old[1].endswith("self_attn") else _OLD_UNET
        return f"{old[1]}.{names.get(old[2], old[2])}", old[3]
    return next(
        ((key[: -len(end) - 1], part) for end, part in _ENDS.items() if key.endswith(f".{end}")), None
    )


KOHYA_PREFIXES = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
XL_DEPTH = 2  # resnets in a down block of every Stable Diffusion XL


def kohya_path(component: str, path: str, family: Family, depth: int) -> str:
    """What stands after the prefix for a module in kohya's files. `depth` as in `sgm_name`."""
    if component == "unet":
        return flat(sgm_name(path, depth) if family == "sdxl" else path)
    return flat(path if path.startswith("text_projection") else f"text_model.{path}")
