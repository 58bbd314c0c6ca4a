"""Fixtures of this folder."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dreambooth.adapter_files import reading, writing
from dreambooth.bases import families
from dreambooth.options.training import BaseOptions
from tests.adapter_files.files_made import ATTENTION, KINDS, Models, peft_file, with_adapter
from tests.running import prior_words, run_train
from tests.scripts.converting import INFO


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Models:
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    return {
        "unet": unet.eval(),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder").eval(),
    }


@pytest.fixture(scope="module")
def loaded_xl(tiny_xl) -> Models:
    return {
        "unet": UNet2DConditionModel.from_pretrained(tiny_xl, subfolder="unet").eval(),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_xl, subfolder="text_encoder").eval(),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(
            tiny_xl, subfolder="text_encoder_2"
        ).eval(),
    }


@pytest.fixture(scope="module")
def adapted(loaded) -> Callable[[str], Models]:
    """Models of the base with an adapter of a kind by peft, one pair for each kind."""
    made: dict[str, Models] = {}

    def of_kind(kind: str) -> Models:
        if kind not in made:
            made[kind] = {
                name: with_adapter(copy.deepcopy(model), KINDS[kind](name)) for name, model in loaded.items()
            }
        return made[kind]

    return of_kind


@pytest.fixture(scope="module")
def native(adapted, layers, tmp_path_factory) -> Callable[[str], Path]:
    """The file of such an adapter in our layout."""
    folder = tmp_path_factory.mktemp("native")

    def of_kind(kind: str) -> Path:
        path = folder / f"{kind.replace(' ', '_')}.safetensors"
        if not path.exists():
            adapter = reading.read_additive(peft_file(folder / "peft.safetensors", adapted(kind)), layers)
            path.write_bytes(writing.write_native(adapter, INFO))
        return path

    return of_kind


@pytest.fixture(scope="module")
def xl_adapter(loaded_xl, tiny_xl, tmp_path_factory) -> Path:
    """LoRA on the UNet and both text encoders of the small Stable Diffusion XL."""
    folder = tmp_path_factory.mktemp("xl_adapter")
    targets = {
        name: ATTENTION["unet"] if name == "unet" else [*ATTENTION["text_encoder"], "fc1"]
        for name in loaded_xl
    }
    models = {
        n: with_adapter(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=3, target_modules=targets[n]))
        for n, model in loaded_xl.items()
    }
    adapter = reading.read_additive(
        peft_file(folder / "peft.safetensors", models), families.find(BaseOptions(str(tiny_xl))).layers()
    )
    (folder / "xl.safetensors").write_bytes(writing.write_native(adapter, INFO))
    return folder / "xl.safetensors"


def classes_of(run: Path) -> Path:
    """The class images of the run in `trained`: they may not lie in its output folder."""
    return run.with_name("trained_class")


@pytest.fixture(scope="session")
def trained(tiny_base, photos_dir, tmp_path_factory) -> Path:
    """A whole run: class images, both adapters, checkpoints, validation."""
    out = tmp_path_factory.mktemp("trained")
    words = prior_words(
        classes_of(out), "--train_text_encoder", "--max_train_steps", "6", "--checkpointing_steps", "2"
    )
    run_train(
        tiny_base, photos_dir, out, *words, "--validation_prompt", "a dog", "--num_validation_images", "1"
    )
    return out
