"""Which file of a run is for which program: the last line of a run, and a sentence of the model card."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.adapter_files.native import ADAPTER_NAME, KOHYA_NAME

_OTHERS = "ComfyUI, A1111, Forge, InvokeAI and kohya's scripts"


def readers(flags: Mapping[str, Any], folder: str, *, has_kohya_names: bool) -> list[str]:
    """Phrases of the form "for PROGRAMS: FILE", for the files of a run in `folder` ("" for names alone).

    `flags` are all flags of the run. `has_kohya_names` says whether kohya's layout has names for the layers
    of the base. A program that no file is for gets the command that writes one.
    """
    native, kohya = (str(Path(folder) / name) for name in (ADAPTER_NAME, KOHYA_NAME))
    kind, is_dora = flags["adapter"], bool(flags.get("use_dora"))
    if kind in ("oft", "boft", "hra"):
        return [
            f"for infer.py: {native}",
            "for other programs: the base that `convert_adapter.py bake` writes",
        ]
    phrases = [f"for {'diffusers and ' if kind == 'lora' else ''}infer.py: {native}"]
    if kind != "lora":
        phrases.append(f"for diffusers: the LoRA of `{_convert(native, flags, 'lora')}`")
    if not has_kohya_names:
        return phrases
    is_written = bool(flags.get("output_kohya_format"))
    if is_dora:
        phrases += [f"for LyCORIS: {kohya}"] if is_written else []
        command = _convert(native, flags, "kohya --rank 16")
        return [*phrases, f"for {_OTHERS}, which misread DoRA: the LoRA near it of `{command}`"]
    if is_written:
        return [*phrases, f"for {_OTHERS}: {kohya}"]
    command = _convert(native, flags, "kohya")
    return [
        *phrases,
        f"for {_OTHERS}: the file of `{command}`, or of --output_kohya_format in training",
    ]


def _convert(adapter: str, flags: Mapping[str, Any], target: str) -> str:
    """The command that writes the adapter in another layout."""
    needs_base = flags["adapter"] != "lora" or "--rank" in target
    given = " --pretrained_model_name_or_path BASE" if needs_base else ""
    return f"convert_adapter.py convert {shlex.quote(adapter)} --to {target}{given} --output NEW.safetensors"
