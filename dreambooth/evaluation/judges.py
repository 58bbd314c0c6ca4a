"""Judges: models that embed pictures and texts, from local folders or the hub, told apart by the hash of
their weights.

DINO is a ViT of transformers (facebook/dino-vits16): the class token of its last hidden state. CLIP is a
CLIPModel (openai/clip-vit-base-patch32): its projected embeddings. All sizes come from the model's own
configuration. Pictures and texts are embedded one at a time, in float32, so that an embedding depends on
nothing else.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, ViTModel
from transformers.utils import logging as transformers_logging

from dreambooth.evaluation import scores
from dreambooth.files import digests, safetensors_files
from dreambooth.io import reader
from dreambooth.io.errors import UserError, is_memory_error, reason_of, shortened, shown, type_and_reason
from dreambooth.options.paths import PIN
from dreambooth.runtime import environment

transformers_logging.disable_progress_bar()  # it would run through the bar of the training

Kind = Literal["dino", "clip"]
Transform = Literal["crop", "squash"]
FLAGS: dict[Kind, str] = {"dino": "--judge_dino", "clip": "--judge_clip"}

_TYPES: dict[Kind, tuple[str, str]] = {  # model_type of config.json, and a model that has it
    "dino": ("vit", "facebook/dino-vits16"),
    "clip": ("clip", "openai/clip-vit-base-patch32"),
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_FILES = [*_WEIGHTS, "model-*.safetensors", "config.json", "preprocessor_config.json"]
_TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]
_TOKENIZER_FILES += ["special_tokens_map.json", "added_tokens.json"]
_PINNED = re.compile(rf"(.+){PIN}([0-9a-fA-F]*)")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel
_LONGEST_TEXT = 77  # tokens


@dataclasses.dataclass(frozen=True)
class JudgeFiles:
    """A judge on disk: checked, with nothing loaded."""

    kind: Kind
    given: str
    """The folder or hub id as the user named it, without the pin."""
    folder: Path
    weights: tuple[Path, ...]
    sha256: str
    """Of the weight file; of the files' hashes in order of name if there are several."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A loaded judge. Its model is on the CPU but within `on`."""

    name: Kind
    settings: dict[str, Any]
    """What its scores depend on: folder or hub id, hash of the weights, transform, dtype, versions."""
    model: Any
    """ViTModel or CLIPModel."""
    _pixels: Callable[[Image.Image], torch.Tensor]
    """The model's input for an upright RGB picture, float32 [1, 3, H, W]."""
    _tokens: Callable[[str], torch.Tensor] | None = None
    """The tokens of a text, [1, tokens]; None for a judge that knows no texts."""

    def embed_images(self, images: Sequence[Image.Image | None]) -> np.ndarray:
        """Unit embeddings of pictures, float32 [N, D]; a row of zeros where `scores.failure` has a reason.

        Raises FloatingPointError if the model returns zeros, or values that are not finite.
        """
        rows = np.zeros((len(images), self.width), dtype=np.float32)
        for row, image in zip(rows, images, strict=True):
            if image is not None and scores.failure(image) is None:
                row[:] = self._image(image.convert("RGB"))
        return rows

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings of texts, float32 [N, D]; text past 77 tokens is cut. Only CLIP has them."""
        assert self._tokens is not None, f"{self.name} embeds no texts"
        rows = [self._unit(_pooled(self._run(self.model.get_text_features, self._tokens(t)))) for t in texts]
        return np.stack(rows) if rows else np.zeros((0, self.width), dtype=np.float32)

    @property
    def width(self) -> int:
        """D, the number of values of an embedding."""
        config = self.model.config
        return int(config.projection_dim if self.name == "clip" else config.hidden_size)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within the block the model is on `device`: by count of weights, 87 MB for DINO ViT-S/16 and 605 MB
        for CLIP ViT-B/32. Afterwards it is on the CPU again."""
        self.model.to(device)
        try:
            yield
        finally:
            self.model.to("cpu")

    def _image(self, image: Image.Image) -> np.ndarray:
        pixels = self._pixels(image)
        if self.name == "clip":
            return self._unit(_pooled(self._run(self.model.get_image_features, pixels)))
        return self._unit(self._run(self.model, pixels).last_hidden_state[:, 0])

    def _run(self, function: Callable[..., Any], value: torch.Tensor) -> Any:
        device = next(self.model.parameters()).device
        # a run may train under autocast; judges are float32
        with torch.no_grad(), torch.autocast(device.type, enabled=False), environment.deterministic(device):
            return function(value.to(device))

    def _unit(self, rows: torch.Tensor) -> np.ndarray:
        """The embedding, [1, D], as a row of length 1 on the CPU, [D]."""
        row = rows[0].to("cpu", torch.float64)
        if not torch.isfinite(row).all() or not row.any():
            raise FloatingPointError(f"the {self.name} judge returns values that are 0 or not finite")
        return (row / row.norm()).float().numpy()


def _pooled(output: Any) -> torch.Tensor:
    """The projected embedding: transformers 5 returns it as `pooler_output`, earlier versions by itself."""
    pooled = getattr(output, "pooler_output", output)
    assert isinstance(pooled, torch.Tensor)
    return pooled


# --- on disk


def check_given(kind: Kind, given: str) -> None:
    """Raise UserError if `given` is neither a folder with such a judge nor the form of a hub id. Asks no hub:
    `find` does."""
    name, _ = split_pin(kind, given)
    if Path(name).exists():
        find(kind, given)
        return
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError:
        raise UserError(f"{FLAGS[kind]}: there is no folder {shown(name)}, and it is no hub id") from None


def split_pin(kind: Kind, given: str) -> tuple[str, str | None]:
    """(folder or hub id, SHA-256 in lower case or None) of NAME or NAME@sha256:HEX. Raises UserError if HEX
    is not 64 digits."""
    match = _PINNED.fullmatch(given)
    if match is None:
        return given, None
    if len(match[2]) != 64:
        rule = "@sha256: needs the 64 hexadecimal digits of the weight file's SHA-256"
        raise UserError(f"{FLAGS[kind]}: {rule}, got {shortened(match[2])}")
    return match[1], match[2].lower()


def find(kind: Kind, given: str) -> JudgeFiles:
    """The judge on disk, its weights hashed. A hub id is downloaded, or taken from the hub's cache.

    Raises UserError if there is none, if it is another model, or if its weights have another hash than the
    pinned one.
    """
    flag, (name, pin) = FLAGS[kind], split_pin(kind, given)
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag}: {shown(name)} is a file; name the folder that holds config.json")
    if not folder.is_dir():
        patterns = _FILES + (_TOKENIZER_FILES if kind == "clip" else [])
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            rule = f"there is no folder {shown(name)}, and as a hub id it cannot be read"
            raise UserError(f"{flag}: {rule}: {reason_of(error)}") from None
    _check_model(kind, folder, name)
    weights = _weight_files(flag, folder)
    try:
        hashes = [digests.of(path) for path in weights]
    except OSError as error:
        raise UserError(f"{flag}: {shown(name)} cannot be read: {reason_of(error)}") from None
    digest = hashes[0].hex() if len(hashes) == 1 else hashlib.sha256(b"".join(hashes)).hexdigest()
    if pin is not None and pin != digest:
        raise UserError(f"{flag}: the weights of {shown(name)} have the SHA-256 {digest}, not {pin}")
    return JudgeFiles(kind, name, folder, tuple(weights), digest)


def _check_model(kind: Kind, folder: Path, name: str) -> None:
    """Raise UserError if the folder holds another model, or not all that the judge is made of."""
    flag, (model_type, example) = FLAGS[kind], _TYPES[kind]
    wanted = f'it must be a model of the type "{model_type}", such as {example}'
    if not (folder / "config.json").is_file():
        kinds = {"model_index.json": "a diffusers pipeline", "adapter_config.json": "an adapter"}
        what = next((what for file, what in kinds.items() if (folder / file).is_file()), None)
        holds = f"is {what}" if what else "has no config.json"
        raise UserError(f"{flag}: {shown(name)} {holds}; {wanted}")
    config = reader.read_json_table(folder / "config.json", f"{flag}: {shown(folder / 'config.json')}")
    if config.get("model_type") != model_type:
        holds = config.get("model_type") or config.get("_class_name") or "model without a type"
        raise UserError(f"{flag}: {shown(name)} holds a {shortened(holds)}; {wanted}")
    needed = ["preprocessor_config.json"] if kind == "clip" else []
    missing = [file for file in needed if not (folder / file).is_file()]
    if kind == "clip" and not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer.json")
    if missing:
        raise UserError(f"{flag}: {shown(name)} lacks {', '.join(missing)}")


def _weight_files(flag: str, folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads, in order of name. Of pytorch_model.bin it reads tensors only,
    no code."""
    given = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if given is None:
        raise UserError(f"{flag}: {shown(folder)} has no weights: there is no {_WEIGHTS[0]}")
    if given.name != "model.safetensors.index.json":
        return [given]
    table = reader.read_json_table(given, f"{flag}: {shown(given)}").get("weight_map")
    names = sorted({str(value) for value in table.values()}) if isinstance(table, dict) else []
    odd = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    missing = [name for name in names if name not in odd and not (folder / name).is_file()]
    if not names or odd or missing:
        problem = odd or missing or ["no weights"]
        raise UserError(f"{flag}: {shown(given)} names {shortened(problem[0])}, which is no file beside it")
    return [folder / name for name in names]


# --- loaded


def load(files: JudgeFiles, transform: Transform = "crop") -> Judge:
    """The judge, on the CPU. `transform` is that of DINO: `crop` resizes the shorter side to 256/224 of the
    model's side and crops the centre; `squash` resizes to the model's side. CLIP has the transform of its own
    preprocessor_config.json.

    Raises UserError if the weights are damaged or incomplete, or the model cannot embed a picture or a text.
    """
    flag, name = FLAGS[files.kind], shown(files.given)
    kind: Any = ViTModel if files.kind == "dino" else CLIPModel
    options = {"add_pooling_layer": False} if files.kind == "dino" else {}
    try:
        for path in files.weights:
            if path.suffix == ".safetensors":
                safetensors_files.read(path, safetensors_files.BASE)
        with _without_warnings():  # of DINO's pooling layer, which is not used; `info` has what is missing
            model, info = kind.from_pretrained(
                files.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
            )
        parts = _dino_parts(model, transform) if files.kind == "dino" else _clip_parts(model, files.folder)
        pixels, tokens, described = parts
        settings = {
            "model": files.given,
            "sha256": files.sha256,
            "transform": described,
            "dtype": "float32",
            "versions": environment.versions(("torch", "transformers", "pillow")),
        }
        judge = Judge(files.kind, settings, model.eval().requires_grad_(False), pixels, tokens)
        lacking = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        if lacking:
            raise UserError(f"the weights of {name} lack {shortened(lacking[0])}")
        _try(judge)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    except Exception as error:  # of odd files the library raises anything
        if is_memory_error(error):
            raise
        raise UserError(f"{flag}: {name} cannot be loaded: {type_and_reason(error)}") from None
    return judge


def _try(judge: Judge) -> None:
    """Embed a picture and a text. Raises FloatingPointError or another error if the model cannot."""
    judge.embed_images([Image.linear_gradient("L")])
    if judge.name == "clip":
        judge.embed_texts(["a photo"])


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Within the block transformers logs errors only."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _dino_parts(model: Any, transform: Transform) -> tuple[Callable[[Image.Image], torch.Tensor], None, str]:
    """(function that makes the input, no function for texts, the transform in words)."""
    side = model.config.image_size if isinstance(model.config.image_size, int) else model.config.image_size[0]
    resized = round(side * 256 / 224)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))

    def pixels(image: Image.Image) -> torch.Tensor:
        if transform == "squash":
            cut = image.resize((side, side), Image.Resampling.BICUBIC)
        else:
            # as torchvision's Resize and CenterCrop do it
            width, height = image.size
            shorter = min(width, height)
            size = (int(resized * width / shorter), int(resized * height / shorter))
            left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
            box = (left, top, left + side, top + side)
            cut = image.resize(size, Image.Resampling.BICUBIC).crop(box)
        values = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
        return ((values - mean) / std)[None]

    if transform == "squash":
        return pixels, None, f"resize to {side} x {side} bicubic, ImageNet mean and deviation"
    words = f"resize shorter side to {resized} bicubic, crop centre {side}, ImageNet mean and deviation"
    return pixels, None, words


def _clip_parts(
    model: Any, folder: Path
) -> tuple[Callable[[Image.Image], torch.Tensor], Callable[[str], torch.Tensor], str]:
    """(function that makes the input, function that makes tokens, the transform in words).

    The processor on Pillow: the one on torchvision, which is an optional package, gives other last bits.
    """
    processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    most = min(_LONGEST_TEXT, model.config.text_config.max_position_embeddings)

    def pixels(image: Image.Image) -> torch.Tensor:
        values: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return values.float()

    def tokens(text: str) -> torch.Tensor:
        ids: torch.Tensor = tokenizer([text], truncation=True, max_length=most, return_tensors="pt").input_ids
        return ids

    size, crop = dict(processor.size), dict(processor.crop_size)
    return (
        pixels,
        tokens,
        f"CLIPImageProcessor on Pillow, size {size}, crop {crop}; text cut at {most} tokens",
    )
