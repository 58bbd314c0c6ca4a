"""Names of a base's layers in files of every layout: diffusers', peft's, kohya's and Stability's.

kohya's keys replace dots by underscores. They are resolved by looking them up among the base's layers, never
by guessing where the dots were.

The layers of text encoders begin with `text_model.` in some files, and in the models of some versions of
transformers. Inside this project they have no prefix: `plain` removes it from names that are read. `stored`
and `with_prefix` add it to names that are written or looked up in a model.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

from dreambooth.bases.folders import KohyaFamily

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
Shape = tuple[int, ...]
Layers = Mapping[str, Mapping[str, Shape]]  # component -> layer -> shape of its weight

FAMILY_NAMES: dict[str | None, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    None: "DeepFloyd IF",  # has no names in kohya's layout
}
# By the width of the text embeddings that the UNet takes.
FAMILY_OF_WIDTH: dict[int, KohyaFamily] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
TEXT_PREFIX = "text_model."
EMBEDDINGS = ("token_embedding", "position_embedding")


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
    """A layer's name in adapter files, for its plain name: with the prefix if it is a text encoder's. Older
    libraries and other programs accept these layers only with it."""
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


def flat(name: str) -> str:
    """A layer's name with underscores for dots, as in kohya's keys."""
    return name.replace(".", "_")


# What stands before a layer's name in the files of programs, by component; written with dots.
_PREFIXES_OF = {
    "unet": ("unet", "lora_unet", "lycoris_unet", "diffusion_model", "model.diffusion_model"),
    "text_encoder": (
        *("text_encoder", "lora_te", "lora_te1", "lora_text_encoder", "te", "te1"),
        *("lycoris_te", "lycoris_te1", "lycoris_text_encoder"),
        *("clip_l", "clip_l.transformer", "text_encoders.clip_l", "text_encoders.clip_l.transformer"),
        *("clip_h", "clip_h.transformer", "text_encoders.clip_h", "text_encoders.clip_h.transformer"),
        *("cond_stage_model.transformer", "cond_stage_model.model"),
        *("conditioner.embedders.0.transformer", "conditioner.embedders.0.model"),
    ),
    "text_encoder_2": (
        *("text_encoder_2", "lora_te2", "lora_text_encoder_2", "te2"),
        *("lycoris_te2", "lycoris_text_encoder_2"),
        *("clip_g", "clip_g.transformer", "text_encoders.clip_g", "text_encoders.clip_g.transformer"),
        "conditioner.embedders.1.model",
    ),
}
# Prefix, flat -> components. The first two do not name the component.
_OWNERS: dict[str, tuple[str, ...]] = {"lycoris_": COMPONENTS, "": COMPONENTS} | {
    flat(f"{prefix}."): (component,) for component, prefixes in _PREFIXES_OF.items() for prefix in prefixes
}
_LONGEST_FIRST = sorted(_OWNERS, key=len, reverse=True)
# The layers behind these have OpenCLIP's names. Its `text_projection` is the transpose of a Linear's weight.
_OPEN_CLIP_PREFIXES = (
    "cond_stage_model_model_",
    "conditioner_embedders_0_model_",
    "conditioner_embedders_1_model_",
)
# Names that wrappers of models put into those of layers: peft's, torch.compile's, DistributedDataParallel's.
_WRAPPERS = re.compile(
    r"(?:^|(?<=[._]))(?:base_model[._]model[._]|_orig_mod[._]|processor[._](?=to_))|^module\."
    r"|\.base_layer(?=\.|$)"
)
FUSED = "self_attn.in_proj"  # OpenCLIP's one layer in place of q_proj, k_proj and v_proj


class LayerNames:
    """The layers that an adapter may be for, under every name that they have in files.

    `layers` has them with the shapes of their weights, by component and plain name. `stems` has names that
    are only in the file, for reading without a base.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers: dict[str, dict[str, Shape]] = {}
        self.stems: dict[str, tuple[str, str]] = {}
        self._by_flat_name: dict[str, dict[str, str]] = {}  # component -> flat name -> layer
        by_plain_name = plain_layers(layers)
        for component in COMPONENTS:
            # embeddings also have two dimensions, but no adapter of this project is for them
            shapes = {
                name: shape
                for name, shape in by_plain_name.get(component, {}).items()
                if len(shape) in (2, 4) and not name.endswith(EMBEDDINGS)
            }
            if shapes:
                self.layers[component] = shapes
                spellings = _unet_spellings(shapes) if component == "unet" else _text_spellings(shapes)
                self._by_flat_name[component] = {flat(name): layer for name, layer in spellings}

    def place(self, stem: str, component: str) -> tuple[str, str] | None:
        """(component, layer) for `stem`, the part of a key that names the layer; None if there is no such
        layer.

        A layer `encoder.layers.N.self_attn.in_proj` stands for three (`FUSED`). `component` is the file's, or
        "" if only the key can name it. Raises ValueError, with the names of the components, if two components
        have such a layer.
        """
        if stem in self.stems:
            return self.stems[stem]
        for owners, rest in _parted(stem, component):
            names = [(owner, self._by_flat_name.get(owner, {}).get(flat(rest))) for owner in owners]
            holders = [(owner, layer) for owner, layer in names if layer is not None]
            if len(holders) > 1:
                raise ValueError(" and ".join(owner for owner, _ in holders))
            if holders:
                return holders[0]
        return None

    def nearest(self, stem: str, fits_else: bool) -> str:
        """The end of a message about `stem`, which is no layer: the layer whose name is most like it.
        `fits_else`: whether other keys of the file are for layers of this base."""
        owners, rest = next(_parted(stem, ""))
        names = {flat(layer): f"{owner}.{layer}" for owner in owners for layer in self.layers.get(owner, {})}
        closest = difflib.get_close_matches(flat(rest)[:150], names, n=1, cutoff=0)
        like = f"; the layer with the most similar name is {names[closest[0]]}" if closest else ""
        if fits_else:
            return f"{like}. The other keys are for layers of this base: these names are wrong or unknown"
        return f"{like}: the adapter is for another base, or has names of an unknown layout"


def _unet_spellings(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name in files, layer) for each layer of the UNet: diffusers' and Stability's."""
    sgm = sgm_names(layers)
    for layer in layers:
        for name in (sgm[layer], layer):
            yield name, layer
            yield name.removesuffix(".0") if name.endswith("to_out.0") else name, layer


def _text_spellings(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name in files, layer) for each layer of a text encoder: transformers' and OpenCLIP's."""
    for layer in layers:
        yield layer, layer
        yield f"{TEXT_PREFIX}{layer}", layer
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", layer):
            block, rest = f"transformer.resblocks.{match[1]}", match[2]
            for name, other in _OPEN_CLIP.items():
                rest = rest.replace(name, other)
            yield f"{block}.{rest}", layer
            if layer.endswith("self_attn.q_proj"):
                fused = f"encoder.layers.{match[1]}.{FUSED}"
                yield f"{block}.attn.in_proj", fused
                yield f"{block}.attn.in_proj_weight", fused


_OPEN_CLIP = {"self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def _parted(stem: str, component: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(components that the stem may be for, layer's name in the file) for each prefix that fits. `component`
    is the file's, or ""."""
    stem = _WRAPPERS.sub("", stem)
    flat_stem = flat(stem)  # as long as `stem`
    for prefix in _LONGEST_FIRST:
        if flat_stem.startswith(prefix):
            rest = stem[len(prefix) :]
            possible = tuple(owner for owner in _OWNERS[prefix] if component in ("", owner))
            is_transposed = prefix in _OPEN_CLIP_PREFIXES and rest == "text_projection"
            if possible and rest and not is_transposed:
                yield possible, rest


def component_of(stem: str) -> str:
    """The component that a stem's prefix names; "" if it names none."""
    owners, _ = next(_parted(stem, ""), ((), ""))
    return owners[0] if len(owners) == 1 else ""


_RAW_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_TOPS = {
    "unet": re.compile(
        r"(conv_in|conv_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks"
        r"|input_blocks|middle_block|output_blocks|time_embed|label_emb|out_2)(_|$)"
    ),
    "text_encoder": re.compile(r"(text_model_)?encoder_layers_|transformer_resblocks_"),
    "text_encoder_2": re.compile(
        r"(text_model_)?encoder_layers_|transformer_resblocks_|(text_model_)?text_projection$"
    ),
}
# A name that only a base's layers can turn into diffusers': Stability's, OpenCLIP's, or one without dots.
_UNRESOLVED = re.compile(
    r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)[._]\d|transformer[._]resblocks[._]"
    r"|(down_blocks|up_blocks|mid_block|time_embedding|add_embedding|(text_model_)?encoder_layers)_"
)


def place_by_key(stem: str, component: str) -> tuple[str, str] | None:
    """`LayerNames.place` without a base, from the key alone. A layer's name that only a base can resolve is
    returned in kohya's form (`is_raw`).

    None if the key does not decide the component. Raises ValueError as `LayerNames.place`.
    """
    for owners, rest in _parted(stem, component):
        holders = owners
        if len(owners) > 1:
            holders = tuple(owner for owner in owners if _TOPS[owner].match(flat(rest)))
        if len(holders) > 1:
            raise ValueError(" and ".join(holders))
        if holders:
            if is_raw(stem):
                return holders[0], stem
            is_unresolved = _UNRESOLVED.match(rest)
            return holders[0], f"{_RAW_PREFIXES[holders[0]]}{flat(rest)}" if is_unresolved else plain(rest)
    return None


def is_raw(path: str) -> bool:
    """Whether `path` is a name of kohya's, whose dots only a base's layers can restore."""
    return "." not in path and path.startswith((*_RAW_PREFIXES.values(), "lora_te1_"))


def depth_of(unet: Iterable[str]) -> int:
    """Number of resnets in a down block of the UNet, from the names of its layers; 2 if there are none.
    Stability's numbering of blocks depends on it."""
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


def sgm_names(layers: Iterable[str]) -> dict[str, str]:
    """`sgm_name` of each of the UNet's `layers`, which must be all."""
    names = list(layers)
    depth = depth_of(names)
    attending = {match[0] for name in names if (match := re.match(r"up_blocks\.\d+\.(?=attentions)", name))}
    return {
        name: sgm_name(name, depth, has_attention=name.partition("upsamplers")[0] in attending)
        for name in names
    }


def sgm_name(name: str, depth: int, *, has_attention: bool = True) -> str:
    """A UNet layer's name in Stability's code, which kohya's scripts use for Stable Diffusion XL.

    `depth` is the number of resnets in a down block. `has_attention`: whether the up block of an upsampler
    has attention, as those of Stable Diffusion XL have. A name that has no other form is returned unchanged.
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
        return f"output_blocks.{start + depth}.{2 if has_attention else 1}.conv"
    half, number = (
        ("input", start + int(index) + 1) if direction == "down" else ("output", start + int(index))
    )
    return f"{half}_blocks.{number}.{0 if part == 'resnets' else 1}.{tail}"


# ---- kohya's names, for writing


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
