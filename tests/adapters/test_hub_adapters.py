"""--adapter of infer.py by hub id: which file of a repository is drawn with."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import infer
from dreambooth.adapter_files import writing
from dreambooth.adapters import hub_adapters
from dreambooth.io.errors import UserError
from dreambooth.options import adapter_sets
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from tests.drawn_adapters import ATTENTION, adapter_of, lora


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder with a folder for each repository, as the hub has them."""
    folder = tmp_path / "hub"

    def of(hub_id: str) -> Path:
        if not (folder / hub_id).is_dir():
            raise OSError(f"no repository {hub_id}")
        return folder / hub_id

    def names(hub_id: str) -> list[str]:
        return [path.relative_to(of(hub_id)).as_posix() for path in of(hub_id).rglob("*") if path.is_file()]

    def download(hub_id: str, name: str) -> str:
        return str(of(hub_id) / name)

    def snapshot(hub_id: str, **_: Any) -> str:
        return str(of(hub_id))

    monkeypatch.setattr(huggingface_hub, "list_repo_files", names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    return folder


def repository(hub: Path, name: str, *files: str) -> None:
    for file in files:
        path = hub / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def paths(*words: str) -> list[Path]:
    (fetched,) = hub_adapters.fetched(adapter_sets.of(words, (), None))
    return [adapter.path for adapter in fetched.adapters]


def test_the_one_adapter_of_a_repository_is_taken(hub):
    repository(hub, "me/one", "dog.safetensors", "README.md", "checkpoint-1/dog.safetensors")
    repository(hub, "me/run", "pytorch_lora_weights.safetensors", "kohya.safetensors")
    repository(hub, "me/peft", "adapter_config.json", "adapter_model.safetensors")
    assert paths("me/one:0.5", "me/run", "me/peft") == [
        hub / "me/one/dog.safetensors",
        hub / "me/run/pytorch_lora_weights.safetensors",
        hub / "me/peft",
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a.safetensors", "b.safetensors"], "has several .safetensors files, a.safetensors, b.safetensors"),
        (["README.md"], "has no .safetensors file"),
        (["model_index.json", "x.safetensors"], "is a base, not an adapter"),
        ([], "there is no file or folder me/it, and as a hub id it cannot be read: no repository me/it"),
    ],
)
def test_a_repository_without_one_adapter_is_refused(hub, files, said):
    repository(hub, "me/it", *files)
    with pytest.raises(UserError) as error:
        paths("me/it")
    assert str(error.value).startswith("--adapter: ")
    assert said in str(error.value)


def test_files_are_never_asked_of_the_hub(hub, monkeypatch):
    def ask(*_: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", ask)
    (hub.parent / "runs" / "dog").mkdir(parents=True)
    names = ("runs/dog", "loras/style.safetensors", "style", "/a/b/c")
    assert [str(path) for path in paths(*names)] == list(names)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # those of the hub's client are no OSError
def test_without_a_connection_the_cache_is_used(hub, monkeypatch, kind):
    def offline(hub_id: str) -> None:
        raise kind("offline")

    repository(hub, "me/one", "dog.safetensors")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    assert paths("me/one") == [hub / "me/one/dog.safetensors"]
    with pytest.raises(UserError, match="as a hub id it cannot be read: offline"):
        paths("me/two")


@pytest.mark.slow
def test_pictures_name_the_repository(hub, tiny_base, layers, tmp_path):
    repository(hub, "me/dog", "dog.safetensors")
    file = hub / "me/dog/dog.safetensors"
    file.write_bytes(writing.write_native(adapter_of(layers, lora, ATTENTION), {}))
    words = ["--pretrained_model_name_or_path", str(tiny_base), "--prompt", "a dog", "--output_dir", "out"]
    words += ["--adapter", "me/dog:0.5", "--adapter_weights", "dog:unet=0.5", "--num_inference_steps", "2"]
    infer.main(parse(InferOptions, "", words))
    (record,) = json.loads((tmp_path / "out" / "images.json").read_text())
    assert record["adapter"] == "me/dog"
    assert record["adapters"][0]["weights"] == {"unet": 0.25}
