"""Names of a layer's tensors in adapter files of every layout: the ends of keys."""

import re
from collections.abc import Iterable

# End of a key -> which tensor of a module it is.
_DOWN = ("lora_A.weight", "lora_A", "lora.down.weight", "lora_linear_layer.down.weight", "lora_down.weight")
_UP = ("lora_B.weight", "lora_B", "lora.up.weight", "lora_linear_layer.up.weight", "lora_up.weight")
_SAME_NAME = (
    *("dora_scale", "alpha", "diff"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
_ENDS = dict.fromkeys(_DOWN, "down") | dict.fromkeys(_UP, "up") | {name: name for name in _SAME_NAME}
_ENDS |= {"lora_mid.weight": "mid"}
_ENDS |= dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "magnitude")
_OLD_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(down|up)\.weight")
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Keys with this start are an embedding (textual inversion) that OneTrainer and A1111 store with a LoRA.
BUNDLED = "bundle_emb."
# Pattern of a key that is not read here -> the kind of adapter or file that it belongs to.
FOREIGN = {
    r"\.(oft_R\.weight|boft_[Rs]|hra_u)$": (
        "OFT, BOFT or HRA, which rotate weights; `bake` merges it into a base, and infer.py draws with it"
    ),
    r"oft_|\.oft\b": "OFT in a layout other than peft's: every program has another",
    r"boft_": "BOFT in a layout other than peft's: every program has another",
    r"\bhra_": "HRA in a layout other than peft's",
    r"on_input$": "IA3",
    r"\.(diff_b|b_norm)$": "a difference of a bias, which no adapter here has",
    r"\.(diff|w_norm)$": "a difference of a normalization layer, which no adapter here has",
    r"\.set_weight$|\.reshape_weight$": "a weight that replaces the base's",
    r"emb_params$|string_to_param|^clip_[gl]$": "an embedding (textual inversion), not an adapter",
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
