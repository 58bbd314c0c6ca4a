"""The recipes for small cards: what each phase of their runs loads and switches on. If it changes, a run may
take more memory than the card has."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train_dreambooth_lora as train
from dreambooth.bases import loading, pipelines, quantization
from dreambooth.options.command_line import as_table, parse
from dreambooth.options.training import TrainOptions

CONFIGS = Path(__file__).parent.parent.parent / "configs"
MODELS = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
RECIPES = ("sd15_4gb", "sdxl_8gb", "sdxl_6gb")
# every flag that decides how much memory a run takes, as all three recipes have it
SHARED = {
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "train_batch_size": 1,
    "rank": 8,
    "adapter": "lora",
    "optimizer": "adamw",
    "cache_latents": "auto",
    "gradient_accumulation_steps": 1,
    "target_preset": "attn",
    "enable_xformers_memory_efficient_attention": False,
    "offload": False,
    "compile": False,
    "validation_prompt": None,
}
OF_RECIPE: dict[str, dict[str, Any]] = {
    "sd15_4gb": {
        "resolution": 512,
        "train_text_encoder": True,
        "with_prior_preservation": True,
        "sample_batch_size": 1,
        "prior_generation_precision": None,
        "quantize_base": None,
    },
    "sdxl_8gb": {
        "resolution": 1024,
        "train_text_encoder": False,
        "with_prior_preservation": False,
        "quantize_base": None,
    },
    "sdxl_6gb": {
        "resolution": 1024,
        "train_text_encoder": False,
        "with_prior_preservation": False,
        "quantize_base": "int8",
    },
}


def options_of(recipe: str, *words: str) -> TrainOptions:
    needed = "--instance_data_dir d --instance_prompt p --class_prompt c --class_data_dir e"
    return parse(TrainOptions, "", ["--config", str(CONFIGS / f"{recipe}.yaml"), *needed.split(), *words])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_for_a_small_card_keeps_its_flags_of_memory(recipe):
    table = as_table(options_of(recipe))
    wanted = {**SHARED, **OF_RECIPE[recipe]}
    assert {name: table.get(name) for name in wanted} == wanted


def test_the_recipe_for_six_gigabytes_is_the_one_for_eight_with_eight_bits():
    eight, six = (as_table(options_of(recipe)) for recipe in ("sdxl_8gb", "sdxl_6gb"))
    assert {name: six[name] for name in six if eight.get(name) != six[name]} == {"quantize_base": "int8"}
    assert eight.keys() <= six.keys()


class Phases:
    """What the phases of runs hold and do, recorded while they run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.phases: dict[str, Any] = {}
        gc.collect()
        self.earlier = {id(model) for model in self._all_models()}
        load_unet, draw, load_pipeline = loading.load_unet, pipelines.draw, pipelines.load_pipeline
        run = train.Training.train

        def loaded_unet(*args: Any, **keywords: Any) -> Any:
            self.phases["beside the UNet's loading"] = self.models()
            return load_unet(*args, **keywords)

        def loaded_pipeline(base: Any, dtype: torch.dtype, *args: Any, **keywords: Any) -> Any:
            self.phases["class images' precision"] = dtype
            return load_pipeline(base, dtype, *args, **keywords)

        def drawn(pipeline: Any, prompts: Any, negative: Any, seeds: Any, *args: Any, **keywords: Any) -> Any:
            self.phases.setdefault("class images at once", set()).add(len(seeds))
            self.phases["beside the class images"] = self.models()
            return draw(pipeline, prompts, negative, seeds, *args, **keywords)

        def training(this: train.Training) -> None:
            self.phases["training"] = self.models()
            parts = this.frozen.parts
            trained = [parts.unet, *(parts.text.encoders.values() if parts.text else [])]
            self.phases["checkpointed"] = [model.is_gradient_checkpointing for model in trained]
            self.phases["dtypes of frozen weights"] = {
                parameter.dtype
                for model in trained
                for parameter in model.parameters()
                if not parameter.requires_grad
            }
            frozen = [name for name in quantization.linear_layers(parts.unet) if ".lora_" not in name]
            self.phases["linear layers in 8 bits"] = {
                isinstance(parts.unet.get_submodule(name), quantization.QuantizedLinear) for name in frozen
            }
            self.phases["encoded photos are kept"] = this.frozen.encoded is not None
            run(this)

        monkeypatch.setattr(loading, "load_unet", loaded_unet)
        monkeypatch.setattr(pipelines, "load_pipeline", loaded_pipeline)
        monkeypatch.setattr(pipelines, "draw", drawn)
        monkeypatch.setattr(train.Training, "train", training)

    @staticmethod
    def _all_models() -> list[Any]:
        return [model for model in gc.get_objects() if isinstance(model, MODELS)]

    def models(self) -> list[str]:
        """The classes of the models whose weights this run holds."""
        models = [
            model
            for model in self._all_models()
            if id(model) not in self.earlier and not next(model.parameters()).is_meta
        ]
        return sorted(type(model).__name__ for model in models)


WANTED: dict[str, dict[str, Any]] = {
    "sd15_4gb": {
        "class images' precision": torch.bfloat16,
        "class images at once": {1},
        "beside the class images": ["AutoencoderKL", "UNet2DConditionModel"],
        "beside the UNet's loading": ["CLIPTextModel"],
        "training": ["CLIPTextModel", "UNet2DConditionModel"],
        "checkpointed": [True, True],
        "linear layers in 8 bits": {False},
    },
    "sdxl_8gb": {
        "beside the UNet's loading": [],
        "training": ["UNet2DConditionModel"],
        "checkpointed": [True],
        "linear layers in 8 bits": {False},
    },
    "sdxl_6gb": {
        "beside the UNet's loading": [],
        "training": ["UNet2DConditionModel"],
        "checkpointed": [True],
        "linear layers in 8 bits": {True},
    },
}


@pytest.mark.trains
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_phase_of_a_recipe_holds_or_switches_on_anything_else(
    recipe, photos_dir, tmp_path, monkeypatch, request
):
    base = request.getfixturevalue("tiny_base" if recipe == "sd15_4gb" else "tiny_xl")
    words = f"--pretrained_model_name_or_path {base} --instance_data_dir {photos_dir} --resolution 64"
    words += f" --output_dir {tmp_path / 'run'} --class_data_dir {tmp_path / 'class'} --num_class_images 2"
    words += (
        " --class_inference_steps 1 --prior_generation_precision bf16 --max_train_steps 1 --meter_steps 0"
    )
    phases = Phases(monkeypatch)
    train.main(options_of(recipe, *words.split(), "--report_to", "none"))
    assert phases.phases == {
        **WANTED[recipe],
        "dtypes of frozen weights": {torch.bfloat16},
        "encoded photos are kept": True,
    }
