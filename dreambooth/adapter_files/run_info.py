"""What the metadata of an adapter file say about its training: how it must be drawn, and on which base.

This project's own record is read, and where it has none, the fields of kohya's scripts (`ss_*`) and of the
modelspec standard (`modelspec.*`). docs/adapters.md has a table of these fields.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.adapter_files.layer_names import FAMILY_NAMES, KohyaFamily
from dreambooth.bases import metadata_marks
from dreambooth.io import reader
from dreambooth.io.errors import UserError, shortened

if TYPE_CHECKING:  # its libraries take seconds, and most conversions need no base
    from dreambooth.bases import families

# Beginnings of ss_base_model_version and of modelspec.architecture, the longer ones first.
_FAMILY_OF: dict[str, KohyaFamily] = {
    "sdxl": "sdxl",
    "sd_v1": "sd1",
    "sd_v2": "sd2",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2": "sd2",
}


def of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What is known of the training run of a file with this metadata: the record of this project, and from
    the fields of other programs what the record lacks.

    `clip_skip` counts skipped layers, as in diffusers: 0 is the last hidden state. A value that is wrong is
    left out.
    """
    try:
        record = reader.parsed_json_table(metadata.get("dreambooth", "{}"), "")
    except UserError:
        record = {}
    if not _is_count(record.get("clip_skip", 0)):
        del record["clip_skip"]
    return _of_other_programs(metadata) | record


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 100


def _of_other_programs(metadata: Mapping[str, str]) -> dict[str, Any]:
    info: dict[str, Any] = {}
    for name in ("seed", "steps"):
        if re.fullmatch(r"\d{1,18}", metadata.get(f"ss_{name}", "")):
            info[name] = int(metadata[f"ss_{name}"])
    if match := re.fullmatch(r"\(?(\d{1,6})(?:, ?\1)?\)?", metadata.get("ss_resolution", "").strip()):
        info["resolution"] = int(match[1])
    # kohya counts layers from the end, so that 1 is the last; its training of Stable Diffusion XL ignores
    # the flag
    count = re.fullmatch(r"[1-9]\d?", metadata.get("ss_clip_skip", "").strip())
    if count and _family(metadata) != "sdxl":
        info["clip_skip"] = int(count[0]) - 1
    if prediction_type := metadata_marks.prediction_type(metadata):
        info["prediction_type"] = prediction_type
    if metadata_marks.has_zero_terminal_snr(metadata):
        info["zero_terminal_snr"] = True
    return info


def _family(metadata: Mapping[str, str]) -> KohyaFamily | str | None:
    """The version of Stable Diffusion that a file says it is for; the text itself if it names another model;
    None if it says nothing."""
    for field in ("ss_base_model_version", "modelspec.architecture"):
        if text := metadata.get(field, "").strip():
            beginnings = (name for start, name in _FAMILY_OF.items() if text.lower().startswith(start))
            return next(beginnings, text)
    return None


def kohya_fields(info: Mapping[str, Any], family: KohyaFamily) -> dict[str, str]:
    """The fields of kohya's layout that say how to draw an adapter. `info` is about its training run. They
    are written only where they differ from what every program does without them."""
    fields = {}
    skipped = info.get("clip_skip", 0)
    if _is_count(skipped) and skipped:
        # as kohya's programs count when they draw: Stable Diffusion XL is at 2 where nothing is skipped
        fields["ss_clip_skip"] = str(skipped + (2 if family == "sdxl" else 1))
    if info.get("prediction_type") == "v_prediction":
        fields["ss_v_parameterization"] = "True"
    if info.get("zero_terminal_snr") is True:
        fields["ss_zero_terminal_snr"] = "True"
    return fields


# ---- the base that draws


def notes(name: str, metadata: Mapping[str, str], base: "families.Base") -> list[str]:
    """What the metadata of the adapter `name` say against a base, one note each."""
    info, lines = of(metadata), []
    trained = info.get("prediction_type")
    predicted = "edm" if base.is_edm and trained == "edm" else base.prediction_type
    if isinstance(trained, str) and trained != predicted:
        lines.append(
            f"{name} was trained on a base that predicts {shortened(trained)}, and this base predicts"
            f" {predicted}; use the base that it was trained on, or --prediction_type if the base's own"
            " setting is wrong"
        )
    if info.get("zero_terminal_snr") is True and not base.config("scheduler").get("rescale_betas_zero_snr"):
        lines.append(
            f"{name} was trained with a last noise level without signal (ss_zero_terminal_snr), which this"
            " base's scheduler does not have (rescale_betas_zero_snr); brightness may differ"
        )
    trained_family = _family(metadata)
    if trained_family is not None and trained_family != base.kohya_family:
        trained_name = FAMILY_NAMES.get(trained_family) or shortened(trained_family)
        lines.append(
            f"the metadata of {name} say that it is for {trained_name}, and this base is a"
            f" {FAMILY_NAMES[base.kohya_family]}"
        )
    stated = metadata.get("ss_clip_skip", "").strip()
    if "clip_skip" not in info and stated.lower() not in ("", "none", "0", "1", "2"):
        is_xl = trained_family == "sdxl"
        reason = (
            "kohya's training of Stable Diffusion XL ignores it"
            if is_xl
            else "it must be a whole number from 1"
        )
        lines.append(f"ss_clip_skip {shortened(stated)} of {name} is not used: {reason}")
    return lines


# ---- several adapters


def merged(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], list[str]]:
    """(what holds for the sum of adapters, notes). `runs` are (name for messages, `of` its metadata). Fields
    with one value in all runs are kept. A prediction type is kept where no other run has another one."""
    first = runs[0][1]
    info = {
        field: value
        for field, value in first.items()
        if all(field in run and run[field] == value for _, run in runs)
    }
    lines = []
    skips = {name: run.get("clip_skip", 0) for name, run in runs}
    if len(set(skips.values())) > 1:
        values = ", ".join(f"{name}: {skip}" for name, skip in skips.items())
        lines.append(
            f"the adapters were trained with different clip_skip ({values}); the merged file records none:"
            " give --clip_skip when you draw with it"
        )
    elif any("clip_skip" in run for _, run in runs):
        info["clip_skip"] = next(iter(skips.values()))
    for field in ("prediction_type", "zero_terminal_snr"):
        stated = {name: run[field] for name, run in runs if field in run}
        if len(set(map(str, stated.values()))) == 1:
            info[field] = next(iter(stated.values()))
        elif stated:
            values = ", ".join(f"{name}: {shortened(value)}" for name, value in stated.items())
            lines.append(
                f"the adapters were trained with different {field} ({values}): they are for different bases"
            )
    return info, lines
