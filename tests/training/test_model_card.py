"""The model card: what it shows of a run, and nothing that the user did not mean to show."""

import os
import re
from typing import Any, get_args

import pytest
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from peft import LoraConfig, get_peft_model_state_dict

from dreambooth.adapters import inject
from dreambooth.bases import families
from dreambooth.options import resolved
from dreambooth.options.adapter import AdapterOptions
from dreambooth.options.command_line import as_table, fields_of, without_token
from dreambooth.options.rules import Name
from dreambooth.options.training import TrainOptions
from dreambooth.training import model_card
from tests.training.fake_hub import PICTURES, TOKEN, card, chosen


def front_of(text: str) -> dict[str, Any]:
    found = REGEX_YAML_BLOCK.search(text)  # where the hub's library finds it
    assert found is not None
    return yaml.safe_load(found[2])


def block_of(text: str, language: str) -> str:
    """A code block as Markdown reads it: up to a fence as long or longer, indented by at most three."""
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)\n {{0,3}}\1`*$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[2]


def prose_of(text: str) -> str:
    """A card without front matter and code blocks, whose fences become equally long."""
    text = REGEX_YAML_BLOCK.sub("", text)
    for language in ("python", "yaml"):
        text = text.replace(block_of(text, language), "")
    return re.sub("^`{3,}", "```", text, flags=re.MULTILINE)


# --- the card

HOSTILE = [
    "---\nlicense: mit",
    "\n---\nlicense: mit\n---\n# mine",
    "license: mit\r\n---\r",
    "```\n# mine\n````\n`````",
    "<script>alert(1)</script>\n<!-- ",
    "[a](http://b) ![c](d) *e* _f_ | g |\n\n# mine\n- h",
    "\"quoted\" 'twice': # {not: [yaml]} & more",
    "x\u2028y\x85z\x1b[2J\x07",
    "'); import os #",
    "yes",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_users_typed_is_text_in_the_card_and_nothing_more(text):
    values: dict[str, Any] = {
        "instance_prompt": text,
        "validation_prompt": text,
        "with_prior_preservation": True,
        "class_prompt": text,
        "class_data_dir": "c",
    }
    harmless: dict[str, Any] = {name: "plain" if value == text else value for name, value in values.items()}
    plain, hostile = card(**harmless), card(**values)
    front = front_of(hostile)
    assert front.keys() == front_of(plain).keys()
    assert (front["instance_prompt"], front["widget"][0]["text"]) == (text, text)
    table = yaml.safe_load(block_of(hostile, "yaml"))
    assert [table[name] for name in ("instance_prompt", "validation_prompt", "class_prompt")] == [text] * 3
    compile(block_of(hostile, "python"), "card", "exec")
    assert repr(text) in block_of(hostile, "python")
    # The rest is prose: the same number of lines, with the same beginnings; no tag; no code, link or emphasis
    # but the card's own.
    prose, expected = prose_of(hostile), prose_of(plain)
    assert [line[:12] for line in prose.splitlines()] == [line[:12] for line in expected.splitlines()]
    assert "<" not in prose
    for sign in "`[]()*#!|":
        assert len(re.findall(rf"(?<!\\)(?:\\\\)*{re.escape(sign)}", prose)) == expected.count(sign), sign
    assert "\x1b" not in hostile


def test_a_hostile_name_of_the_output_folder_is_text_too(tmp_path):
    text = card(output_dir=str(tmp_path / "a\n# b\udcff<b>`"))
    assert text.encode("utf-8").count(b"\n# ") == 1
    assert "<b>" not in prose_of(text)


def test_every_family_and_every_kind_of_adapter_has_its_entries():
    keys = {family.key for family in families.FAMILIES.values()}
    assert model_card._TAGS.keys() == resolved._DEFAULTS.keys() == resolved._RESOLUTIONS.keys() == keys
    kinds = set(get_args(AdapterOptions.__annotations__["adapter"]))
    assert model_card._KINDS.keys() == inject.KINDS.keys() == kinds


@pytest.mark.parametrize(
    ("family", "tag"), [("sd", "stable-diffusion"), ("sdxl", "stable-diffusion-xl"), ("if", "deepfloyd-if")]
)
def test_the_front_matter_says_what_the_hub_sorts_by(family, tag):
    front = front_of(card(family, validation_prompt="a sks dog in snow", repository="me/dog"))
    assert front["library_name"] == "diffusers"
    assert front["base_model"] == "org/base"
    assert front["tags"] == ["text-to-image", "diffusers", "lora", "dreambooth", "template:sd-lora", tag]
    assert front["widget"] == [{"text": "a sks dog in snow", "output": {"url": name}} for name in PICTURES]
    assert "widget" not in front_of(card(family, pictures=[]))


@pytest.mark.parametrize(
    ("readme", "stated"),
    [
        ("---\nlicense: openrail++\ntags: [a]\n---\n# Base", {"license": "openrail++"}),
        (
            "---\nlicense: other\nlicense_name: club\nlicense_link: https://example.org/L\n---\n",
            {"license": "other", "license_name": "club", "license_link": "https://example.org/L"},
        ),
        (
            "---\nlicense: other\nlicense_link: /home/me/LICENSE\n---\n",
            {"license": "other"},
        ),  # leads nowhere from another repository
        ("# Base\n\nlicense: mit\n", {}),
        ("---\ntags: [a]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: {a: b}\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_one_that_the_base_states_and_never_another(tmp_path, readme, stated):
    base = tmp_path / "base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme, encoding="utf-8")
    text = card(base_folder=base, pretrained_model_name_or_path=str(base))
    front = front_of(text)
    assert {key: value for key, value in front.items() if key.startswith("license")} == stated
    assert ("The base states no licence." in text) == (not stated)
    assert "base_model" not in front


def test_the_hub_is_asked_for_the_licence_of_a_base_that_came_without_its_card(server):
    server.cards["org/base"] = {"license": "other", "license_name": "club", "license_link": "LICENSE.md"}
    expected = {
        "license": "other",
        "license_name": "club",
        "license_link": f"{server.address}/org/base/blob/main/LICENSE.md",
    }
    assert expected.items() <= front_of(card()).items()
    server.cards["org/base"] = {"tags": ["a"]}
    assert "The base states no licence." in card()


@pytest.mark.parametrize("trouble", ["offline", "gone", "refused"])
def test_a_licence_that_cannot_be_read_is_left_out_and_the_card_says_so(server, monkeypatch, trouble):
    server.cards["org/base"] = {"license": "mit"}
    server.faults["/api/models/"] = 403
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if trouble == "gone":
        server.close()
    text = card()
    assert "license" not in front_of(text)
    assert "could not be read" in text
    assert TOKEN not in text


def test_no_path_of_the_machine_and_no_token_is_in_the_card(tmp_path, server):
    for name in ("base", "vae", "tokenizer", "data"):
        (tmp_path / "secret" / name).mkdir(parents=True)
    prompts = {"instance_prompt", "class_prompt", "validation_prompt"}
    not_places = {
        "class_labels_conditioning",
        "image_column",
        "caption_column",
        "dataset_config_name",
        "revision",
        "variant",
        "lora_layers",
        "text_encoder_layers",
        "rank_pattern",
        "lr_pattern",
        "optimizer",
        "hub_model_id",
        "hub_token",
        "trigger_word",
    }
    kinds = (str, str | None, Name, Name | None)
    texts = {name for name, field in fields_of(TrainOptions).items() if field.type in kinds}
    assert texts == prompts | not_places  # a new flag is marked as a path, or is none
    places = {*model_card._PLACES, *model_card._PLACES_OR_IDS}
    at = {
        "pretrained_model_name_or_path": "base",
        "pretrained_vae_model_name_or_path": "vae",
        "tokenizer_name": "tokenizer",
        "dataset_name": "data",
    }
    values: dict[str, Any] = {
        name: str(tmp_path / "secret" / at.get(name, f"{name}-folder")) for name in places
    }
    text = card(
        base_folder=tmp_path / "secret" / "base", with_prior_preservation=True, class_prompt="a dog", **values
    )
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert TOKEN not in text
    assert yaml.safe_load(block_of(text, "yaml"))["init_adapter"] == "init_adapter-folder"
    gone = card(base_folder=tmp_path / "moved", pretrained_model_name_or_path=str(tmp_path / "moved"))
    assert str(tmp_path) not in gone


def test_the_card_says_whether_the_text_encoder_was_trained():
    assert "The text encoder was not trained." in card()
    assert "The text encoder was trained too." in card(train_text_encoder=True)


@pytest.mark.slow
def test_the_example_of_the_card_draws_with_the_adapter(tiny_base, tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.symlink_to(tiny_base)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "out", unet_lora_layers=get_peft_model_state_dict(unet)
    )
    text = card(
        base_folder=base,
        pretrained_model_name_or_path=str(base),
        output_dir=str(tmp_path / "out"),
        pretrained_vae_model_name_or_path=str(base / "vae"),
        tokenizer_name=str(base / "tokenizer"),
        prediction_type="v_prediction",
        clip_skip=1,
        instance_prompt="a 'photo' of\nsks dog",
    )
    for name in ("vae", "tokenizer"):  # the card names folders without what is above them
        (tmp_path / name).symlink_to(base / name)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    example = block_of(text, "python").replace("clip_skip=1", "clip_skip=1, num_inference_steps=1")
    exec(compile(example, "card", "exec"), space)
    assert (tmp_path / "picture.png").is_file()
    assert space["pipeline"].get_active_adapters() == ["default_0"]
    assert space["pipeline"].scheduler.config.prediction_type == "v_prediction"


def test_the_example_loads_a_single_file_with_what_was_detected():
    scheduler = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}
    text = card("sdxl", single_file=scheduler, pretrained_model_name_or_path="/a/noob.safetensors")
    assert "pipeline = StableDiffusionXLPipeline.from_single_file('noob.safetensors')" in text
    assert "settings = pipeline.scheduler.config | {'prediction_type': 'v_prediction'}" in text
    assert "pipeline.scheduler = EulerDiscreteScheduler.from_config(settings)" in text
    assert "a local file, noob" in text


def test_a_repository_is_what_the_example_loads():
    assert "load_lora_weights('me/dog', " in card(repository="me/dog")
    assert "load_lora_weights('out', " in card(output_dir=os.path.join(os.sep, "a", "out"))


def test_the_card_has_every_flag_of_the_run_but_the_token():
    table = yaml.safe_load(block_of(card(resume_from_checkpoint="latest"), "yaml"))
    assert table == without_token(as_table(chosen(resume_from_checkpoint="latest")))


def test_passes_that_memory_had_room_for_are_said():
    passes = {"rows": 2, "gradient_checkpointing": True}
    sentence = "Memory had room for 2 of the 4 rows of a micro-batch in a pass, with gradient checkpointing"
    assert sentence in card(passes=passes)
    assert "Memory had room" not in card()
