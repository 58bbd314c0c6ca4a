"""Adapters of every common layout, read into one form and written from it. This is the door: each room behind it says what it is for."""

from dreambooth.adapter_files.adapter import COMPONENTS, Adapter, Family, Layers, table, to_lora
from dreambooth.adapter_files.reading import read
from dreambooth.adapter_files.writing import divided, write_kohya, write_native, write_peft

__all__ = [
    "COMPONENTS",
    "Adapter",
    "Family",
    "Layers",
    "divided",
    "read",
    "table",
    "to_lora",
    "write_kohya",
    "write_native",
    "write_peft",
]
