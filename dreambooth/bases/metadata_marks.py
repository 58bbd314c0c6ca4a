"""What the metadata of a safetensors file say about noise and prediction of the model that was trained: the
fields of kohya's scripts (`ss_*`) and of the modelspec standard (`modelspec.*`). Imports no torch."""

import re
from collections.abc import Mapping

_PREDICTION_TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "edm": "edm"}


def prediction_type(metadata: Mapping[str, str]) -> str | None:
    """What the trained UNet predicted: "epsilon", "v_prediction" or "edm"; None if no field says it."""
    version = metadata.get("ss_base_model_version", "")
    stated = metadata.get("modelspec.prediction_type", "").strip().lower()
    architecture = metadata.get("modelspec.architecture", "")
    is_v = re.match(r"sd_v\d_(768_)?v\b", version) or architecture.startswith("stable-diffusion-v2-768-v")
    if is_v or _is_true(metadata.get("ss_v_parameterization")):
        return "v_prediction"
    if stated in _PREDICTION_TYPES:
        return _PREDICTION_TYPES[stated]
    is_false = metadata.get("ss_v_parameterization", "").strip().lower() in ("false", "0")
    return "epsilon" if is_false else None


def has_zero_terminal_snr(metadata: Mapping[str, str]) -> bool:
    """Whether the last noise level had no signal (arXiv 2305.08891)."""
    return _is_true(metadata.get("ss_zero_terminal_snr"))


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() in ("true", "1")
