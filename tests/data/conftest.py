"""Fixtures of this folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_dreambooth_lora as train
from dreambooth.bases import autoencoder, loading, prompts
from dreambooth.data import photos
from tests import tiny
from tests.data.encoding import CAPTIONED, ON_DISK, Work, spy, train_nothing
from tests.running import run_train


@pytest.fixture
def work(monkeypatch) -> Work:
    done = Work()
    spy(
        monkeypatch,
        autoencoder,
        "encode",
        lambda vae, pixels: done.pictures.extend(tuple(one.shape[1:]) for one in pixels),
    )
    spy(monkeypatch, prompts.TextParts, "__call__", lambda self, words: done.prompts.extend(words))

    def decoded(data: bytes, *limits: int, reduced_to: int | None = None) -> None:
        if reduced_to is None:  # else for the notes about photos: small, and at every start
            done.decoded.append(data)

    spy(monkeypatch, photos, "decode", decoded)
    for part in ("load_vae", "load_encoders", "load_unet"):
        spy(
            monkeypatch,
            loading,
            part,
            lambda *args, part=part: done.loaded.append(part.removeprefix("load_")),
        )
    return done


@pytest.fixture
def start(monkeypatch, work) -> Callable[..., Work]:
    """Everything of a run but its steps; what was done in it."""
    monkeypatch.setattr(train.Training, "train", train_nothing)

    def run(*args: Any) -> Work:
        for field in dataclasses.fields(Work):
            getattr(work, field.name).clear()
        run_train(*args)
        return dataclasses.replace(
            work, **{field.name: list(getattr(work, field.name)) for field in dataclasses.fields(Work)}
        )

    return run


@pytest.fixture
def mine(tmp_path) -> Path:
    """Three pictures, two of them with captions; one is not square."""
    folder = tiny.make_photos(tmp_path / "photos")
    tiny.make_photos(folder, 1, (96, 64))
    (folder / "photo-0.txt").write_text("sks dog in the snow")
    (folder / "photo-1.txt").write_text("sks dog on a mat")
    return folder


@pytest.fixture(scope="module")
def kept(tiny_base, tmp_path_factory) -> Path:
    """The folder of encodings that a run of `mine` leaves."""
    folder = tmp_path_factory.mktemp("kept")
    pictures = tiny.make_photos(folder / "photos")
    tiny.make_photos(pictures, 1, (96, 64))
    (pictures / "photo-0.txt").write_text("sks dog in the snow")
    (pictures / "photo-1.txt").write_text("sks dog on a mat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "train", train_nothing)
        run_train(
            tiny_base,
            pictures,
            folder / "run",
            *ON_DISK,
            str(folder / "encoded"),
            *CAPTIONED,
            "--num_threads",
            "1",
        )
    return folder / "encoded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for captions; the pictures are known by name only."""
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"
