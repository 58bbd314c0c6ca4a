"""Fixtures of this folder."""

import copy
from collections.abc import Callable

import pytest
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from dreambooth.adapter_files import reading
from dreambooth.adapter_files.adapter import Adapter
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.bases import families
from dreambooth.options.training import BaseOptions
from tests.adapter_files.files_made import KINDS, Models, peft_file, with_adapter


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder")
    return {"unet": unet.eval(), "text_encoder": text_encoder.eval()}


@pytest.fixture(scope="module")
def base(tiny_base) -> Layers:
    """From the headers of the base's files, as the scripts have it, before anything is loaded."""
    return families.find(BaseOptions(str(tiny_base))).layers()


@pytest.fixture(scope="module")
def adapted(loaded) -> Callable[[str], Models]:
    """Models with an adapter of a kind by peft, every tensor of it random; one pair for each kind."""
    made: dict[str, Models] = {}

    def of_kind(kind: str) -> Models:
        if kind not in made:
            made[kind] = {
                name: with_adapter(copy.deepcopy(model), KINDS[kind](name)) for name, model in loaded.items()
            }
        return made[kind]

    return of_kind


@pytest.fixture(scope="module")
def adapter_of(adapted, base, tmp_path_factory) -> Callable[[str], Adapter]:
    """The adapter of a kind, read from peft's own file, once for each kind."""
    read: dict[str, Adapter] = {}

    def of_kind(kind: str) -> Adapter:
        if kind not in read:
            path = peft_file(tmp_path_factory.mktemp("peft") / "peft.safetensors", adapted(kind))
            read[kind] = reading.read_additive(path, base)
        return read[kind]

    return of_kind
