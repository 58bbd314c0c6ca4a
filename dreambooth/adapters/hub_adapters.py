"""Adapters that infer.py is given by the id of a repository on the hub."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from dreambooth.adapter_files import native
from dreambooth.bases import folders
from dreambooth.io.errors import UserError, few, reason_of, shown
from dreambooth.options.adapter_sets import AdapterSet, WeightedAdapter

_PEFT = ("adapter_config.json", "adapter_model.safetensors")


def fetched(sets: Sequence[AdapterSet]) -> list[AdapterSet]:
    """The sets, with each id of a repository replaced by the adapter's file, or its folder in peft's format.
    It is downloaded, or taken from the hub's cache.

    Raises UserError if a repository cannot be read, or does not have one adapter.
    """

    def local(where: str, adapter: WeightedAdapter) -> WeightedAdapter:
        hub_id = str(adapter.path)
        if not _is_id(hub_id):
            return adapter
        return dataclasses.replace(adapter, path=_download(where, hub_id), hub_id=hub_id)

    return [
        dataclasses.replace(each, adapters=tuple(local(each.where, adapter) for adapter in each.adapters))
        for each in sets
    ]


def _is_id(name: str) -> bool:
    """Whether the name is that of a repository, with its owner's. One that ends in .safetensors is a file."""
    return name.count("/") == 1 and not name.lower().endswith(".safetensors") and folders.is_hub_id(name)


def _download(where: str, hub_id: str) -> Path:
    try:
        names = _names(hub_id)
        if set(_PEFT) <= set(names):
            return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_PEFT)))
        files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
        if native.ADAPTER_NAME in files:
            files = [native.ADAPTER_NAME]
        if len(files) == 1 and "model_index.json" not in names:
            return Path(huggingface_hub.hf_hub_download(hub_id, files[0]))
    except (OSError, ValueError) as error:
        missing = f"there is no file or folder {shown(hub_id)}, and as a hub id it cannot be read"
        raise UserError(f"{where}: {missing}: {reason_of(error)}") from None
    if "model_index.json" in names:
        raise UserError(f"{where}: {shown(hub_id)} is a base, not an adapter")
    content = f"has several .safetensors files, {few(files)}" if files else "has no .safetensors file"
    raise UserError(f"{where}: {shown(hub_id)} {content}; download the adapter, and name its file")


def _names(hub_id: str) -> list[str]:
    """The names of a repository's files. If the hub cannot be asked, those in its cache. Raises OSError if
    there are none."""
    try:
        return list(huggingface_hub.list_repo_files(hub_id))
    except Exception as error:  # errors of httpx, of addresses, of sockets
        try:
            folder = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
        except (OSError, ValueError):
            raise OSError(reason_of(error)) from None
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
