"""Names of a base's layers in files of every layout: diffusers', peft's, kohya's and Stability's.

kohya's keys replace dots by underscores. They are resolved by looking them up among the base's layers, never
by guessing where the dots were.

The layers of text encoders begin with `text_model.` in some files, and in the models of some versions of
transformers. Inside this project they have no prefix: `plain` removes it from names that are read. `stored`
and `with_prefix` add it to names that are written or looked up in a model.
"""

import re
from collections.abc import Container, Iterable, Mapping

from dreambooth.bases.folders import KohyaFamily

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
Shape = tuple[int, ...]
Layers = Mapping[str, Mapping[str, Shape]]  # component -> layer -> shape of its weight

TEXT_PREFIX = "text_model."
_EMBEDDINGS = ("token_embedding", "position_embedding")


# ---- the prefix of text encoders


def plain(name: str) -> str:
    """A layer's name, or a key, without the prefix of text encoders."""
    return name.removeprefix(TEXT_PREFIX)


def plain_layers(layers: Layers) -> dict[str, dict[str, Shape]]:
    """`layers` with plain names."""
    return {
        component: {plain(name): tuple(shape) for name, shape in shapes.items()}
        for component, shapes in layers.items()
    }


def with_prefix(path: str, prefix: str) -> str:
    """A text encoder's layer with `prefix`, which is `text_model.` or empty. `text_projection` gets none: it
    is not inside `text_model`."""
    return path if path.startswith("text_projection") else f"{prefix}{path}"


def stored(component: str, name: str) -> str:
    """A layer's name in adapter files, for its plain name: with the prefix if it is a text encoder's.

    Older libraries and other programs accept these layers only with it.
    """
    return name if component == "unet" else with_prefix(name, TEXT_PREFIX)


def live_prefix(model: object) -> str:
    """The prefix of a model's layers in the installed version of its library: `text_model.` or ""."""
    return TEXT_PREFIX if hasattr(model, "text_model") else ""


def installed_text_prefixes() -> dict[str, str]:
    """`live_prefix` of each text encoder, from small models without weights."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # takes seconds

    with torch.device("meta"):
        models = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(num_hidden_layers=1)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=1)),
        }
    return {component: live_prefix(model) for component, model in models.items()}


# ---- from a key to a layer


class LayerNames:
    """The layers that an adapter may be for, under every name that they have in files.

    `layers` has them with the shapes of their weights, by component and plain name.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers: dict[str, dict[str, Shape]] = {}
        self.kohya: dict[str, tuple[str, str]] = {}  # kohya's name -> (component, layer)
        by_plain_name = plain_layers(layers)
        for component in COMPONENTS:
            # embeddings also have two dimensions, but no adapter of this project is for them
            shapes = {
                name: shape
                for name, shape in by_plain_name.get(component, {}).items()
                if len(shape) in (2, 4) and not name.endswith(_EMBEDDINGS)
            }
            if shapes:
                self.layers[component] = shapes
                depth = depth_of(shapes)
                for name in shapes:
                    self.kohya |= dict.fromkeys(_kohya_names(component, name, depth), (component, name))

    def place(self, stem: str, component: str) -> tuple[str, str] | None:
        """(component, layer) for `stem`, the part of a key that names the layer; None if there is no such
        layer.

        `component` is the file's, or "" if only the key can name it. Raises ValueError, with the names of the
        components, if two components have such a layer.
        """
        if stem in self.kohya:
            return self.kohya[stem]
        component, stem = _parted(stem, component)
        candidates = [component] if component else self.layers
        holders = [name for name in candidates if stem in self.layers.get(name, {})]
        if len(holders) > 1:
            raise ValueError(" and ".join(holders))
        return (holders[0], stem) if holders else None


def _kohya_names(component: str, name: str, depth: int) -> set[str]:
    """Every spelling of a layer in kohya's files. `depth`: see `sgm_name`."""
    if component == "unet":
        return {f"lora_unet_{flat(name)}", f"lora_unet_{flat(sgm_name(name, depth))}"}
    prefixes = ("lora_te_", "lora_te1_") if component == "text_encoder" else ("lora_te2_",)
    return {f"{prefix}{form}{flat(name)}" for prefix in prefixes for form in ("", flat(TEXT_PREFIX))}


def _parted(stem: str, component: str) -> tuple[str, str]:
    """(component, plain layer) for a stem in diffusers' or peft's names. The component is "" if neither
    `component` nor the stem names it."""
    stem = stem.replace(".base_layer", "")  # in adapters that were trained on top of another one
    head, _, rest = stem.partition(".")
    if head == "diffusion_model" and component in ("", "unet"):  # the UNet's name in other programs
        return "unet", rest
    if not component and head in COMPONENTS:
        component, stem = head, rest
    return component, plain(stem.removeprefix("base_model.model."))


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


def place_by_key(stem: str, component: str) -> tuple[str, str] | None:
    """`LayerNames.place` without a base, from the key alone. The layer of a kohya key is the stem unchanged.

    None if the key does not decide the component. Raises ValueError as `LayerNames.place`.
    """
    for prefix, owner in _RAW_PREFIXES.items():
        if stem.startswith(prefix):
            return owner, stem
    component, stem = _parted(stem, component)
    holders = (component,) if component else _TOPS.get(stem.partition(".")[0], ())
    if len(holders) > 1:
        raise ValueError(" and ".join(holders))
    return (holders[0], stem) if holders and stem else None


def is_raw(path: str) -> bool:
    """Whether `path` is a name of kohya's, whose dots only a base's layers can restore."""
    return "." not in path and path.startswith(tuple(_RAW_PREFIXES))


def absent_layers(
    component: str, targets: Iterable[str], layers: Iterable[str], present: Container[str]
) -> str:
    """The end of a message about the layers that end with one of `targets` and are not in `present`; "" if
    there are none."""
    ends = tuple(f".{target}" for target in targets)
    expected = {name for name in layers if f".{name}".endswith(ends)} if ends else set()
    absent = sorted(name for name in expected if name not in present)
    if not absent:
        return ""
    return (
        f"{len(absent)} of the {len(expected)} layers of {component} that it was trained on, e.g. {absent[0]}"
    )


def flat(name: str) -> str:
    """A layer's name with underscores for dots, as in kohya's keys."""
    return name.replace(".", "_")


def depth_of(unet: Iterable[str]) -> int:
    """Number of resnets in a down block of the UNet, from the names of its layers; 2 if there are none.

    Stability's numbering of blocks depends on it.
    """
    matches = (re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name) for name in unet)
    return 1 + max([int(match[1]) for match in matches if match], default=1)


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
    """A UNet layer's name in Stability's code, which kohya's scripts use for Stable Diffusion XL.

    `depth` is the number of resnets in a down block. A name that has no other form is returned unchanged.
    """
    if name in _SGM_LAYERS:
        return _SGM_LAYERS[name]
    match = re.fullmatch(
        r"(?:(mid)_block|(down|up)_blocks\.(\d+))\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
        name,
    )
    if not match:
        return name
    is_mid, direction, block, part, index, rest = match.groups()
    tail = _SGM_RESNET.get(rest, rest) if part == "resnets" else rest
    if is_mid:
        return f"{_SGM_LAYERS[f'mid_block.{part}.{index}']}.{tail}"
    start = (depth + 1) * int(block)
    if part == "downsamplers":
        return f"input_blocks.{start + depth + 1}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{start + depth}.2.conv"
    half, number = (
        ("input", start + int(index) + 1) if direction == "down" else ("output", start + int(index))
    )
    return f"{half}_blocks.{number}.{0 if part == 'resnets' else 1}.{tail}"


# ---- the tensors of a layer


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
# Pattern of a key that is not read here -> the kind of adapter or file that it belongs to.
FOREIGN = {
    r"\.(oft_R\.weight|boft_[Rs]|hra_u)$": (
        "OFT, BOFT or HRA, which rotate weights; `bake` merges it into a base, and infer.py draws with it"
    ),
    r"oft_|\.oft\b": "OFT in a layout other than peft's: every program has another",
    r"boft_": "BOFT in a layout other than peft's: every program has another",
    r"\bhra_": "HRA in a layout other than peft's",
    r"on_input$": "IA3",
    r"\.diff(_b)?$|\bw_norm$|\bb_norm$": "a full weight difference, not an adapter",
    r"emb_params$|string_to_param": "an embedding (textual inversion), not an adapter",
    r"lora_embedding_": "a LoRA of an embedding",
    r"\.bias$": "a trained bias",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"^(transformer|double_blocks|lora_transformer)": "a transformer (Stable Diffusion 3, Flux), not a UNet",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": (
        "a full checkpoint, not an adapter"
    ),
}


# A key of peft's that contains the name of an adapter.
_NAMED = re.compile(
    r"(?P<start>.+\.)"
    r"(?:(?P<plain>lora_[AB])\.(?P<one>[\w-]+)\.weight"
    r"|(?P<other>lora_magnitude_vector|hada_\w+|lokr_\w+)\.(?P<two>[\w-]+)(?:\.weight)?)"
)


def without_name(keys: Iterable[str]) -> dict[str, str]:
    """By key: the key without the adapter's name, which peft puts before its end. Unchanged if the keys do
    not all contain the same name."""
    matches = {key: _NAMED.fullmatch(key) for key in keys}
    names = {(match["one"] or match["two"]) if match else None for match in matches.values()}
    if len(names) != 1 or names <= {None, "weight"}:  # `lora_magnitude_vector.weight` contains no name
        return {key: key for key in matches}
    return {
        key: f"{m['start']}{m['plain']}.weight" if m["plain"] else f"{m['start']}{m['other']}"
        for key, m in matches.items()
        if m
    }


def split(key: str) -> tuple[str, str] | None:
    """(stem: the part that names the layer; which of the layer's tensors); None for a key of no known
    layout."""
    # some programs leave peft's name of the adapter in the key
    key = re.sub(r"\.default(_\d+)?(?=(\.weight)?$)", "", key)
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


def kohya_stem(component: str, path: str, family: KohyaFamily, depth: int) -> str:
    """A layer's name in kohya's files. `depth`: see `sgm_name`. Raises KeyError if the family has no such
    component."""
    is_sgm = component == "unet" and family == "sdxl"
    name = sgm_name(path, depth) if is_sgm else stored(component, path)
    return KOHYA_PREFIXES[family][component] + flat(name)
