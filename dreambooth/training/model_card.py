"""The model card, README.md of an output folder: what the adapter is, how to use it, under which licence its base is.

What users typed stands in it as text only: it opens no YAML key, no code block and no tag. No path of the machine is in it, and no token.
"""

import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from dreambooth.adapter_files.native import ADAPTER_NAME, KOHYA_NAME
from dreambooth.errors import printable
from dreambooth.options.command_line import as_table, without_token
from dreambooth.options.resolved import ResolvedTrainOptions
from dreambooth.training.hub import CARD_NAME

_TAGS = {"sd": "stable-diffusion", "sdxl": "stable-diffusion-xl", "if": "deepfloyd-if"}
# Flags whose values say where things lie on this machine; those of the second line may be hub ids too.
_PLACES = (
    "output_dir",
    "instance_data_dir",
    "class_data_dir",
    "init_adapter",
    "cache_dir",
    "encoded_dir",
    "logging_dir",
    "resume_from_checkpoint",
)
_PLACES_OR_IDS = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "tokenizer_name",
    "dataset_name",
)
_KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "boft": "BOFT", "hra": "HRA"}
_LARGEST_CARD = 2**20  # bytes
_ANSWER_WITHIN = 10.0  # seconds


def model_card(
    options: ResolvedTrainOptions,
    *,
    base_folder: Path,
    pictures: Sequence[str],
    repository: str | None,
    family: str,
) -> str:
    """The text of README.md.

    `options` are the completed ones, `base_folder` is where the base lies, `pictures` are names of files beside the card, `repository` is
    OWNER/NAME on the hub or None, `family` is sd, sdxl or if. The hub is asked for the licence of a base that is from there and came without
    its card.
    """
    table = without_token(as_table(options))
    ids = {
        flag: table[flag] for flag in _PLACES_OR_IDS if flag in table and _is_hub_id(table[flag], base_folder)
    }
    table |= {
        flag: _last_part(table[flag])
        for flag in (*_PLACES, *_PLACES_OR_IDS)
        if flag in table and flag not in ids
    }
    licence, about_licence = _licence(options, base_folder, ids.get("pretrained_model_name_or_path"))
    prompt, drawn_prompt = options.instance.instance_prompt, options.validation.validation_prompt

    front: dict[str, Any] = {"library_name": "diffusers", **licence}
    if "pretrained_model_name_or_path" in ids:
        front["base_model"] = ids["pretrained_model_name_or_path"]
    kind = _KINDS[options.adapter.adapter]
    loads = options.adapter.adapter == "lora"  # in plain diffusers
    front["tags"] = [
        "text-to-image",
        "diffusers",
        options.adapter.adapter,
        "dreambooth",
        *(["template:sd-lora"] if loads else []),
        _TAGS[family],
    ]
    front["instance_prompt"] = prompt
    if pictures:
        front["widget"] = [{"text": drawn_prompt or prompt, "output": {"url": name}} for name in pictures]

    gallery = [f"![picture {number}](./{quote(name)})" for number, name in enumerate(pictures)]
    if pictures and drawn_prompt:
        gallery.append(f"\nDrawn with the prompt: {_prose(drawn_prompt)}")
    size = f" of rank {options.adapter.rank}" if options.adapter.adapter not in ("oft", "boft") else ""
    files = f"`{ADAPTER_NAME}` is the adapter."
    if not loads:
        files += f" Plain diffusers does not load {kind}: `infer.py --adapter {ADAPTER_NAME}` of the program that trained it does"
        converted = (
            f", and `convert_adapter.py convert {ADAPTER_NAME} --to lora --output NEW` makes a LoRA of it."
        )
        files += converted if options.adapter.adapter in ("loha", "lokr") else "."
    if options.adapter.output_kohya_format:
        files += f" `{KOHYA_NAME}` is the same one for ComfyUI, A1111, Forge and kohya's scripts."
    sections = [
        f"---\n{_yaml(front)}---",
        f"# {_prose(repository or table['output_dir'])}",
        f"{kind}{size} for {_named(table, ids, 'pretrained_model_name_or_path')}, trained on photos of one subject "
        "with [DreamBooth](https://arxiv.org/abs/2208.12242).",
        f"Trigger prompt: {_prose(prompt)}",
        "\n".join(gallery),
        "## Use",
        _fenced(_example(options, table, ids, repository, family), "python") if loads else "",
        files,
        "## Training",
        "\n".join(f"- {said}" for said in _parts(options, table, ids)),
        "All options:",
        _fenced(_yaml(table), "yaml"),
        "## Licence",
        about_licence,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _parts(options: ResolvedTrainOptions, table: Mapping[str, Any], ids: Mapping[str, str]) -> list[str]:
    """What was trained, on what, and with which parts that are not the base's own."""
    text, prior = options.text, options.prior
    said = [
        "The text encoder was trained too."
        if text.train_text_encoder
        else "The text encoder was not trained."
    ]
    if prior.with_prior_preservation:
        said.append(
            f"Beside the photos it saw pictures of the class, with the prompt: {_prose(prior.class_prompt or '')}"
        )
    for flag, what in (
        ("dataset_name", "Photos"),
        ("pretrained_vae_model_name_or_path", "VAE"),
        ("tokenizer_name", "Tokenizer"),
    ):
        if flag in table:
            said.append(f"{what}: {_named(table, ids, flag)}")
    return said


def _example(
    options: ResolvedTrainOptions,
    table: Mapping[str, Any],
    ids: Mapping[str, str],
    repository: str | None,
    family: str,
) -> str:
    """Python that draws one picture with plain diffusers. Folders are named without what is above them."""
    base = options.base
    imports, others = ["AutoPipelineForText2Image"], ["import torch"]
    arguments = [repr(table["pretrained_model_name_or_path"])]
    if "pretrained_model_name_or_path" in ids and base.revision:
        arguments.append(f"revision={base.revision!r}")
    if base.variant:
        arguments.append(f"variant={base.variant!r}")
    if "pretrained_vae_model_name_or_path" in table:
        imports.insert(0, "AutoencoderKL")
        arguments.append(f"vae=AutoencoderKL.from_pretrained({table['pretrained_vae_model_name_or_path']!r})")
    if "tokenizer_name" in table:
        others.append("from transformers import AutoTokenizer")
        arguments.append(f"tokenizer=AutoTokenizer.from_pretrained({table['tokenizer_name']!r})")
    lines = [others[0], f"from diffusers import {', '.join(imports)}", *others[1:], ""]
    lines.append(f"pipeline = AutoPipelineForText2Image.from_pretrained({', '.join(arguments)})")
    if base.prediction_type:
        lines.append(
            f"settings = pipeline.scheduler.config | {{'prediction_type': {base.prediction_type!r}}}"
        )
        lines.append("pipeline.scheduler = type(pipeline.scheduler).from_config(settings)")
    if family == "if":  # the variance that the UNet predicts is not trained, and no longer fits
        lines.append("settings = pipeline.scheduler.config | {'variance_type': 'fixed_small'}")
        lines.append("pipeline.scheduler = type(pipeline.scheduler).from_config(settings)")
    lines.append("pipeline = pipeline.to('cuda' if torch.cuda.is_available() else 'cpu')")
    lines.append(
        f"pipeline.load_lora_weights({repository or table['output_dir']!r}, weight_name={ADAPTER_NAME!r})"
    )
    skip = f", clip_skip={options.text.clip_skip}" if options.text.clip_skip and family != "if" else ""
    if skip and family == "sd":  # without it diffusers 0.42 with transformers 5 ends in an AttributeError
        lines.append(
            "if not hasattr(pipeline.text_encoder, 'text_model'):  # diffusers looks for its layers there"
        )
        lines.append("    object.__setattr__(pipeline.text_encoder, 'text_model', pipeline.text_encoder)")
    lines.append(f"pipeline({options.instance.instance_prompt!r}{skip}).images[0].save('picture.png')")
    return "\n".join(lines)


def _licence(
    options: ResolvedTrainOptions, base_folder: Path, hub_id: str | None
) -> tuple[dict[str, Any], str]:
    """(what the base's card states, under a card's keys; a sentence). Nothing is stated that the base does not state."""
    found: Any = None
    readme = base_folder / CARD_NAME
    if readme.is_file() and readme.stat().st_size <= _LARGEST_CARD:
        try:
            found = metadata_load(readme) or {}
        except (
            OSError,
            ValueError,
            TypeError,
            yaml.YAMLError,
            RecursionError,
        ):  # a front matter that nothing can be read from states nothing
            found = {}
    elif hub_id is not None:
        try:
            api = HfApi(token=options.reports.hub_token)
            found = (
                api.model_info(hub_id, revision=options.base.revision, timeout=_ANSWER_WITHIN).card_data or {}
            )
        except (
            Exception
        ):  # no network, no rights, any answer: the sentence below says that it could not be read
            return (
                {},
                f"The licence of the base could not be read when this card was written. See {_linked(hub_id)}.",
            )
    link = _address(found.get("license_link"), hub_id, options.base.revision) if found else None
    values = (
        {
            "license": _stated(found.get("license")),
            "license_name": _stated(found.get("license_name")),
            "license_link": link,
        }
        if found
        else {}
    )
    stated = {key: value for key, value in values.items() if value is not None}
    if "license" not in stated:
        return {}, "The base states no licence."
    words = [", ".join(value) if isinstance(value, list) else value for value in stated.values()]
    return stated, f"The base states this licence: {_prose(', '.join(words))}"


def _stated(value: object) -> str | list[str] | None:
    """A value of a front matter that a licence can be: a word, or several."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [str(item) for item in value]
    return value if isinstance(value, str) and value.strip() else None


def _address(link: object, hub_id: str | None, revision: str | None) -> str | None:
    """The link of a base's card, as one that leads there from another repository too; None if there is none."""
    if not isinstance(link, str):
        return None
    if link.startswith(("https://", "http://")):
        return link
    return (
        f"{constants.ENDPOINT}/{hub_id}/blob/{quote(revision or 'main', safe='')}/{quote(link)}"
        if hub_id
        else None
    )


def _is_hub_id(name: str, base_folder: Path) -> bool:
    """True for a name that a repository may have, and no file or folder here has."""
    if os.path.exists(name) or Path(name) == base_folder:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _last_part(place: str) -> str:
    return os.path.basename(os.path.abspath(place))


def _named(table: Mapping[str, Any], ids: Mapping[str, str], flag: str) -> str:
    """A base, a part of one or a data set in prose: a link if it is of the hub, else the name of its folder."""
    if flag in ids:
        return _linked(f"datasets/{ids[flag]}" if flag == "dataset_name" else ids[flag])
    return f"a local folder, {_prose(table[flag])}"


def _linked(hub_id: str) -> str:
    return f"[{_prose(hub_id)}]({constants.ENDPOINT}/{hub_id})"


def _prose(text: str) -> str:
    """Any text as Markdown shows it within a line: no tag, link, emphasis, code or line break comes out of it."""
    line = html.escape(" ".join(printable(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:@^=.])", r"\\\1", line)


def _yaml(table: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=True)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it, so that nothing in it closes it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
