"""The model card, README.md of an output folder: the adapter, how to use it, the licence of its base.

Text that users typed is escaped: it opens no YAML key, no code block and no tag. The card holds no token and
no path of this machine.
"""

import dataclasses
import html
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, constants
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from dreambooth.adapter_files.native import ADAPTER_NAME
from dreambooth.bases.folders import is_hub_id
from dreambooth.io import reader
from dreambooth.io.errors import UserError, printable
from dreambooth.options import paths
from dreambooth.options.command_line import fields_of, yaml_text
from dreambooth.options.training import TrainOptions
from dreambooth.training import programs
from dreambooth.training.run_folder import CARD

_TAGS = {"sd": "stable-diffusion", "sdxl": "stable-diffusion-xl", "if": "deepfloyd-if"}
_KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "boft": "BOFT", "hra": "HRA"}
# Flags whose values are paths, and flags whose values are paths or hub ids.
_MARKS = {name: paths.mark_of(field.type) for name, field in fields_of(TrainOptions).items()}
_PLACES = tuple(name for name, mark in _MARKS.items() if mark and mark.kind != "file or id")
_PLACES_OR_IDS = tuple(name for name, mark in _MARKS.items() if mark and mark.kind == "file or id")
_LARGEST_CARD = 2**20  # bytes
_ANSWER_WITHIN = 10.0  # seconds


@dataclasses.dataclass(frozen=True)
class PublicFlags:
    """The flags of a run as others may see them."""

    values: dict[str, Any]
    """Values by name of the flag. Of a local path, only the last part."""
    hub_ids: dict[str, str]
    """The flags whose value is a hub id, with that id."""

    def link(self, flag: str) -> str:
        """The value of a flag as Markdown: a link to the hub, or the name of a local folder."""
        if flag in self.hub_ids:
            hub_id = self.hub_ids[flag]
            return _link(f"datasets/{hub_id}" if flag == "dataset_name" else hub_id)
        name = self.values[flag]
        return f"a local {'file' if name.endswith('.safetensors') else 'folder'}, {_prose(name)}"


def model_card(
    flags: Mapping[str, Any],
    *,
    base_folder: Path,
    family: str,
    pictures: Mapping[str, str],
    repository: str | None,
    token: str | None,
    single_file: Mapping[str, Any] | None = None,
    passes: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md.

    `flags` are all flags of the run but the token. `base_folder` is the base on disk, `family` is sd, sdxl
    or if. `single_file` has the settings in which the scheduler of a base in a single file differs from the
    published base's; it is None for a folder. `pictures` are prompts by the names of files beside the card,
    `repository` is OWNER/NAME on the hub or None. If the base is from the hub and came without its card, its
    licence is read from the hub, with `token`. `passes` is the entry of that name in status.json.
    """
    public = public_flags(flags, base_folder)
    hub_id = public.hub_ids.get("pretrained_model_name_or_path")
    licence, about_licence = _licence(base_folder, hub_id, flags.get("revision"), token)
    name = repository or public.values["output_dir"]
    is_lora = flags["adapter"] == "lora"  # plain diffusers loads it
    rank = f" of rank {flags['rank']}" if flags["adapter"] not in ("oft", "boft") else ""
    files = programs.readers(flags, "", has_kohya_names=family != "if")
    sections = [
        f"---\n{yaml_text(_front_matter(flags, licence, hub_id, family, pictures))}---",
        f"# {_prose(name)}",
        f"{_KINDS[flags['adapter']]}{rank} for {public.link('pretrained_model_name_or_path')}, trained on "
        "photos of one subject with [DreamBooth](https://arxiv.org/abs/2208.12242).",
        f"Trigger prompt: {_prose(flags['instance_prompt'])}",
        _gallery(pictures),
        "## Use",
        _fenced(_example(public, name, family, single_file), "python") if is_lora else "",
        "\n".join(f"- {phrase[0].upper()}{phrase[1:]}" for phrase in files),
        "## Training",
        "\n".join(f"- {line}" for line in _about_training(public, passes)),
        "All options:",
        _fenced(yaml_text(public.values), "yaml"),
        "## Licence",
        about_licence,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def public_flags(flags: Mapping[str, Any], base_folder: Path) -> PublicFlags:
    """The flags as others may see them. `base_folder` is the base on disk."""
    hub_ids = {
        flag: flags[flag]
        for flag in _PLACES_OR_IDS
        if flag in flags and Path(flags[flag]) != base_folder and is_hub_id(flags[flag])
    }
    local = [flag for flag in (*_PLACES, *_PLACES_OR_IDS) if flag in flags and flag not in hub_ids]
    last_parts = {flag: os.path.basename(os.path.abspath(flags[flag])) for flag in local}
    return PublicFlags({**flags, **last_parts}, hub_ids)


def _front_matter(
    flags: Mapping[str, Any],
    licence: Mapping[str, Any],
    base_id: str | None,
    family: str,
    pictures: Mapping[str, str],
) -> dict[str, Any]:
    prompt = flags["instance_prompt"]
    front: dict[str, Any] = {"library_name": "diffusers", **licence}
    if base_id is not None:
        front["base_model"] = base_id
    template = ["template:sd-lora"] if flags["adapter"] == "lora" else []
    front["tags"] = ["text-to-image", "diffusers", flags["adapter"], "dreambooth", *template, _TAGS[family]]
    front["instance_prompt"] = prompt
    if pictures:
        front["widget"] = [{"text": text, "output": {"url": name}} for name, text in pictures.items()]
    return front


def _gallery(pictures: Mapping[str, str]) -> str:
    lines = []
    for prompt in dict.fromkeys(pictures.values()):
        names = [name for name in pictures if pictures[name] == prompt]
        lines += [f"![picture {number}](./{quote(name)})" for number, name in enumerate(names)]
        lines.append(f"\nDrawn with the prompt: {_prose(prompt)}\n")
    return "\n".join(lines).rstrip("\n")


def _about_training(public: PublicFlags, passes: Mapping[str, Any] | None) -> list[str]:
    """Sentences on what was trained, on which pictures, and with which VAE or tokenizer of its own."""
    flags = public.values
    trained = "was trained too" if flags["train_text_encoder"] else "was not trained"
    lines = [f"The text encoder {trained}."]
    if flags["with_prior_preservation"]:
        prompt = _prose(flags.get("class_prompt", ""))
        lines.append(f"Beside the photos it saw pictures of the class, with the prompt: {prompt}")
    if passes:
        with_checkpointing = ", with gradient checkpointing" if passes["gradient_checkpointing"] else ""
        lines.append(
            f"Memory had room for {passes['rows']} of the {flags['train_batch_size']} rows of a micro-batch "
            f"in a pass{with_checkpointing}: smaller passes give the same gradients up to rounding."
        )
    for flag, part in (
        ("dataset_name", "Photos"),
        ("pretrained_vae_model_name_or_path", "VAE"),
        ("tokenizer_name", "Tokenizer"),
    ):
        if flag in flags:
            lines.append(f"{part}: {public.link(flag)}")
    return lines


def _example(
    public: PublicFlags, name: str, family: str, single_file: Mapping[str, Any] | None = None
) -> str:
    """Python that draws one picture with plain diffusers; the adapter is in repository or folder `name`."""
    flags = public.values
    pipeline = "AutoPipelineForText2Image" if single_file is None else _PIPELINES[family]
    load = "from_pretrained" if single_file is None else "from_single_file"
    imports, more_imports = [pipeline], []
    arguments = [repr(flags["pretrained_model_name_or_path"])]
    if "pretrained_model_name_or_path" in public.hub_ids and flags.get("revision"):
        arguments.append(f"revision={flags['revision']!r}")
    if flags.get("variant") and single_file is None:
        arguments.append(f"variant={flags['variant']!r}")
    if "pretrained_vae_model_name_or_path" in flags:
        imports.insert(0, "AutoencoderKL")
        vae = flags["pretrained_vae_model_name_or_path"]
        load_vae = "from_single_file" if vae.endswith(".safetensors") else "from_pretrained"
        arguments.append(f"vae=AutoencoderKL.{load_vae}({vae!r})")
    if "tokenizer_name" in flags:
        more_imports.append("from transformers import AutoTokenizer")
        arguments.append(f"tokenizer=AutoTokenizer.from_pretrained({flags['tokenizer_name']!r})")
    clip_skip = flags.get("clip_skip") if family != "if" else None
    skip = f", clip_skip={clip_skip}" if clip_skip else ""
    lines = [
        "import torch",
        f"from diffusers import {', '.join(imports)}",
        *more_imports,
        "",
        f"pipeline = {pipeline}.{load}({', '.join(arguments)})",
        *_scheduler_lines(flags, family, single_file or {}),
        "pipeline = pipeline.to('cuda' if torch.cuda.is_available() else 'cpu')",
        f"pipeline.load_lora_weights({name!r}, weight_name={ADAPTER_NAME!r})",
        *(_CLIP_SKIP_LINES if skip and family == "sd" else ()),
        f"pipeline({flags['instance_prompt']!r}{skip}).images[0].save('picture.png')",
    ]
    return "\n".join(lines)


_PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
# Without these lines diffusers 0.42 with transformers 5 raises AttributeError.
_CLIP_SKIP_LINES = (
    "if not hasattr(pipeline.text_encoder, 'text_model'):  # diffusers looks for its layers there",
    "    object.__setattr__(pipeline.text_encoder, 'text_model', pipeline.text_encoder)",
)


def _scheduler_lines(flags: Mapping[str, Any], family: str, single_file: Mapping[str, Any]) -> list[str]:
    change = {key: value for key, value in single_file.items() if key != "_class_name"}
    if flags.get("prediction_type"):
        change["prediction_type"] = flags["prediction_type"]
    if family == "if":  # the predicted variance is not trained, and no longer fits the trained mean
        change["variance_type"] = "fixed_small"
    if not change:
        return []
    kind = single_file.get("_class_name")
    return [
        f"settings = pipeline.scheduler.config | {change}",
        *([f"from diffusers import {kind}"] if kind else []),
        f"pipeline.scheduler = {kind or 'type(pipeline.scheduler)'}.from_config(settings)",
    ]


# --- the licence


def _licence(
    base_folder: Path, hub_id: str | None, revision: str | None, token: str | None
) -> tuple[dict[str, Any], str]:
    """(licence entries of the base's card; a sentence). Nothing is stated that the base does not state."""
    card = _local_card(base_folder)
    if card is None and hub_id is not None:
        try:
            api = HfApi(token=token)
            card = api.model_info(hub_id, revision=revision, timeout=_ANSWER_WITHIN).card_data
        except Exception:  # no network, no access, an unexpected answer
            unread = "The licence of the base could not be read when this card was written."
            return {}, f"{unread} See {_link(hub_id)}."
    card = card or {}
    entries = {
        "license": _stated(card.get("license")),
        "license_name": _stated(card.get("license_name")),
        "license_link": _address(card.get("license_link"), hub_id, revision),
    }
    stated = {key: value for key, value in entries.items() if value is not None}
    if "license" not in stated:
        return {}, "The base states no licence."
    words = [", ".join(value) if isinstance(value, list) else value for value in stated.values()]
    return stated, f"The base states this licence: {_prose(', '.join(words))}"


def licence_of_folder(base_folder: Path) -> str:
    """The licence that the card in the base's folder states, in words. Nothing is read from the hub."""
    card = _local_card(base_folder)
    if card is None:
        return "not known: the base came without its card"
    names = [_stated(card.get(key)) for key in ("license", "license_name")]
    words = [", ".join(name) if isinstance(name, list) else name for name in names if name is not None]
    return ", ".join(words) or "the base states none"


def _local_card(base_folder: Path) -> Any:
    """The front matter of the card in the base's folder, {} if it is damaged; None if there is no card."""
    readme = base_folder / CARD
    if not readme.is_file():
        return None
    try:
        text = reader.read_text(readme, CARD, _LARGEST_CARD)
        front_matter = REGEX_YAML_BLOCK.search(text)
        card = reader.parsed_yaml(front_matter[2], CARD) if front_matter else {}
    except UserError:
        return {}
    return card if isinstance(card, dict) else {}


def _stated(value: object) -> str | list[str] | None:
    """The value if it can be a licence: a word or a list of words."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [str(item) for item in value]
    return value if isinstance(value, str) and value.strip() else None


def _address(link: object, hub_id: str | None, revision: str | None) -> str | None:
    """The link of a base's card, made absolute; None if it is no link, or relative to an unknown address."""
    if isinstance(link, str) and link.startswith(("https://", "http://")):
        return link
    if not isinstance(link, str) or hub_id is None:
        return None
    return f"{constants.ENDPOINT}/{hub_id}/blob/{quote(revision or 'main', safe='')}/{quote(link)}"


# --- Markdown


def _link(hub_id: str) -> str:
    return f"[{_prose(hub_id)}]({constants.ENDPOINT}/{hub_id})"


def _prose(text: str) -> str:
    """The text, escaped so that a line of Markdown shows it as it is: no tag, link, emphasis or code."""
    line = html.escape(" ".join(printable(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:@^=.])", r"\\\1", line)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it, so that none closes it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
