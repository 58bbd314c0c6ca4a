"""Photos with captions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dreambooth.options.captions import CaptionOptions
from dreambooth.options.photos import InstanceOptions


def wanted(**flags: Any) -> InstanceOptions:
    place = {} if "dataset_name" in flags else {"instance_data_dir": "photos"}
    names = {field.name for field in dataclasses.fields(CaptionOptions)} & flags.keys()
    nested = CaptionOptions(**{name: flags.pop(name) for name in names})
    return InstanceOptions(instance_prompt="a photo of sks dog", captions=nested, **(place | flags))


def lines(*rows: Any) -> bytes:
    return "".join(
        (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
    ).encode()


def jsonl(folder: Path, *rows: Any) -> None:
    (folder / "metadata.jsonl").write_bytes(lines(*rows))
