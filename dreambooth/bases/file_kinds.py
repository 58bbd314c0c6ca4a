"""What a safetensors file holds, by the keys and shapes in its header: a base in the layout of the original
Stable Diffusion code, of a known version, or something else, which is refused by its name."""

import re
from collections.abc import Mapping

import torch
from diffusers.loaders import single_file_utils

from dreambooth.bases.folders import VAE_FLAG, KohyaFamily
from dreambooth.io.errors import UserError, few, shown

Shapes = Mapping[str, tuple[int, ...]]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# By version: the beginnings of the keys of its text encoders, by their folder.
TEXT: dict[str, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sd2_v": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
NAMES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sd2_v": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
_TRAINED = "of single files, Stable Diffusion 1.x, 2.x and XL are trained here"
# By channels of the UNet's input, where it is not four: what such a base is for.
_CHANNELS = {5: "depth", 7: "upscaling", 8: "editing by instructions", 9: "inpainting"}
# Files that are no checkpoint of a base: (keys that only such files have, what they are).
_ADAPTER = "is an adapter, not a base: give it as --adapter of infer.py or --init_adapter"
_REFINER = "is the refiner of Stable Diffusion XL, which is not trained here"
_OTHER_FILES = (
    (r"lora_(unet|te\d?)_|lora[._](up|down|A|B)\b|\.(hada_w|lokr_w|oft_|boft_|hra_|ia3_)", _ADAPTER),
    (r"^(emb_params|clip_[lg]|string_to_param.*)$", "is an embedding of textual inversion, not a base"),
    (r"^(control_model|zero_convs|controlnet_|control_)|^input_hint_block", "is a ControlNet, not a base"),
    (r"^edm_vpred\.", "is a base of EDM with velocity prediction (CosXL), which is not trained here"),
    (r"^edm_mean$", "is a Playground 2.5: give its diffusers folder or hub id"),
    (r"^conditioner\.embedders\.0\.model\.", _REFINER),
)
_PARTS = (
    (
        r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)",
        f"is a VAE alone, which {VAE_FLAG} takes",
    ),
    (
        r"^(down_blocks|up_blocks|mid_block)\.",
        "is the UNet alone of a diffusers folder: name the folder with all its parts",
    ),
    (r"^(input_blocks|middle_block|output_blocks)\.", "is a UNet alone: its text encoders are missing"),
    (r"^(text_model|cond_stage_model|conditioner|transformer|encoder\.layers)\b", "is a text encoder alone"),
)


def of(where: str, shapes: Shapes) -> KohyaFamily:
    """The version of the base in a file with these keys. Raises UserError, starting with `where`, if the file
    holds something else, or lacks a text encoder."""
    others = [text for pattern, text in _OTHER_FILES if any(re.search(pattern, key) for key in shapes)]
    if others:
        raise UserError(f"{where} {others[0]}")
    _refuse_other_families(where, shapes)
    conv_in = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    if len(conv_in) != 4:
        parts = [text for pattern, text in _PARTS if any(re.search(pattern, key) for key in shapes)]
        raise UserError(f"{where} {parts[0] if parts else _unknown(shapes)}")
    if (channels := conv_in[1]) != 4:
        purpose = f", a base for {_CHANNELS[channels]}" if channels in _CHANNELS else ""
        raise UserError(f"{where} takes {channels} channels and not 4{purpose}, which is not trained here")
    kind = _version(where, shapes)
    missing = [
        f"{part} ({prefix}*)"
        for part, prefix in TEXT[kind].items()
        if not any(key.startswith(prefix) for key in shapes)
    ]
    if missing:
        lack = f"is a {NAMES[kind]} without {' and '.join(missing)}"
        raise UserError(f"{where} {lack}; take a file with all parts, or a diffusers folder")
    return kind


def _version(where: str, shapes: Shapes) -> KohyaFamily:
    """The version, by what its UNet is made of."""
    widths = {shapes[key][-1] for key in shapes if key.startswith(UNET) and key.endswith("attn2.to_k.weight")}
    projections = {
        len(shape) for key, shape in shapes.items() if key.startswith(UNET) and key.endswith("proj_in.weight")
    }
    if f"{UNET}label_emb.0.0.weight" in shapes:
        if widths == {1024}:
            raise UserError(f"{where} is a Stable Diffusion 2.x unCLIP, which is not trained here")
        return "sdxl"
    if len(projections) != 1:
        raise UserError(f"{where} {_unknown(shapes)}")
    return "sd1" if projections == {4} else "sd2"


def _refuse_other_families(where: str, shapes: Shapes) -> None:
    """Raise UserError if diffusers recognizes a model of another family."""
    try:
        # diffusers also looks at shapes
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        name = single_file_utils.infer_diffusers_model_type(tensors)
    except Exception:  # of shapes that no published model has, diffusers raises anything
        raise UserError(f"{where} {_unknown(shapes)}") from None
    if name == "xl_refiner":
        raise UserError(f"{where} {_REFINER}")
    # what diffusers takes for Stable Diffusion, or for its kinds of more channels, is looked at in `of`
    if name not in ("v1", "v2", "xl_base", "upscale", "instruct-pix2pix") and "inpaint" not in name:
        raise UserError(f"{where} is a model of another family, {name}; {_TRAINED}")


def _unknown(shapes: Shapes) -> str:
    content = few([shown(key) for key in shapes], 3) if shapes else "no tensors"
    return f"is no base that is known here ({_TRAINED}); it holds {content}"
