"""Data sets of photos: folders and the hub, read as they are meant, or refused in one message."""

import importlib.util
import io
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth.data import captions, photo_sets, photos
from dreambooth.io import writer
from dreambooth.io.errors import UserError
from tests.data.bad_pictures import HEIC
from tests.data.captioned import jsonl, wanted


@pytest.fixture(autouse=True)
def _no_waiting():
    """A test that would wait for ever, on a pipe, fails instead."""

    def stop(*_: object) -> None:
        pytest.fail("waited for 30 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Where the photos lie


def test_the_folder_is_the_one_that_a_flag_names(tmp_path):
    assert photo_sets.find(wanted(instance_data_dir=str(tmp_path))) == photo_sets.PhotoSet(
        tmp_path, "--instance_data_dir"
    )
    assert photo_sets.find(wanted(dataset_name=str(tmp_path))) == photo_sets.PhotoSet(
        tmp_path, "--dataset_name"
    )


def test_a_data_set_folder_without_photos_of_its_own_stands_for_its_train_folder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "README.md").touch()
    (tmp_path / ".hidden.png").touch()
    assert photo_sets.find(wanted(dataset_name=str(tmp_path))).folder == tmp_path / "train"
    (tmp_path / "metadata.csv").touch()
    assert photo_sets.find(wanted(dataset_name=str(tmp_path))).folder == tmp_path
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "a.JPG").touch()
    assert photo_sets.find(wanted(dataset_name=str(tmp_path))).folder == tmp_path


def set_refusal(**flags: Any) -> str:
    with pytest.raises(UserError) as refused:
        photo_sets.find(wanted(**flags))
    return str(refused.value)


def test_a_data_set_name_that_is_neither_folder_nor_hub_id_is_refused_without_the_package(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)  # its import fails
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert set_refusal(dataset_name=str(tmp_path / "file")).endswith(
        "is not a folder; name the folder that holds the pictures"
    )
    for name in ("imagefolder", "my photos", "a/b/c", "../x", str(tmp_path / "none"), "buckets/me/photos"):
        said = set_refusal(dataset_name=name)
        assert said == f"--dataset_name: there is no folder {name}, and a hub id is of the form OWNER/NAME"


def test_a_hub_id_without_the_datasets_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = set_refusal(dataset_name="me/dog")
    assert said == (
        "--dataset_name: there is no folder me/dog, and for a hub id the datasets package is "
        "needed: pip install '.[datasets]'"
    )


def test_a_configuration_is_not_for_folders(tmp_path):
    assert "--dataset_config_name is for a data set of the hub" in set_refusal(
        dataset_name=str(tmp_path), dataset_config_name="small"
    )
    assert "leave it out" in set_refusal(instance_data_dir=str(tmp_path), dataset_config_name="small")


# Data sets of the hub, through a package that needs no network


class Picture:
    """The package's kind of column with pictures."""

    def __init__(self, decode: bool = True):
        self.decode = decode


class Text:
    dtype = "string"


class Rows:
    """What the package's load_dataset gives: rows whose pictures are {"bytes", "path"} once they are not to
    be decoded."""

    def __init__(self, features: dict[str, Any], rows: list[dict[str, Any]], fingerprint: str = "1"):
        self.features, self.rows, self._fingerprint = features, rows, fingerprint

    def select_columns(self, names: list[str]) -> "Rows":
        return Rows(
            {n: self.features[n] for n in names},
            [{n: row[n] for n in names} for row in self.rows],
            self._fingerprint,
        )

    def cast_column(self, name: str, kind: Any) -> "Rows":
        return Rows(self.features | {name: kind}, self.rows, self._fingerprint)

    def __iter__(self):
        assert not any(kind.decode for kind in self.features.values() if isinstance(kind, Picture)), (
            "pictures would be decoded"
        )
        return iter(self.rows)


def encoded(kind: str, colour: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((80, 64), 50).convert("RGB").point(lambda v: v // 2 + len(colour)).save(
        buffer, kind, **settings
    )
    return buffer.getvalue()


def cell(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


class Hub:
    """A package in which load_dataset gives `rows`, or raises it. `calls` are what it was asked for."""

    def __init__(self, cache: Path):
        self.cache, self.calls = cache, list[tuple]()
        self.files = [encoded("PNG", "red"), encoded("JPEG", "green"), encoded("WEBP", "blue", lossless=True)]
        rows = [
            {"image": cell(data, "misnamed.bmp"), "text": f"caption {k}", "label": k}
            for k, data in enumerate(self.files)
        ]
        self.rows: Rows | Exception = Rows({"image": Picture(), "text": Text(), "label": object()}, rows)

    def load_dataset(self, name: str, config: str | None, *, split: str, cache_dir: str | None) -> Rows:
        self.calls.append((name, config, split, cache_dir))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub(tmp_path / "cache")
    package: Any = types.ModuleType("datasets")
    package.Image, package.load_dataset = Picture, hub.load_dataset
    package.config = types.SimpleNamespace(HF_DATASETS_CACHE=hub.cache)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return hub


def test_pictures_of_the_hub_become_a_folder_of_their_own_bytes_with_captions(hub, tmp_path):
    instance = wanted(dataset_name="me/dog", dataset_config_name="small", caption_column="text")
    found = photo_sets.find(instance)
    assert hub.calls == [("me/dog", "small", "train", None)]
    assert found.flag == "--dataset_name"
    assert found.folder.parent == tmp_path / "cache" / "dreambooth-photos"
    names = ["00000.png", "00001.jpg", "00002.webp"]
    assert sorted(os.listdir(found.folder)) == [*names, "metadata.jsonl"]
    assert [(found.folder / name).read_bytes() for name in names] == hub.files
    assert [photo.path.name for photo in photos.check_folder(found.folder, found.flag).photos] == names
    assert captions.read(found.folder, found.flag, names, instance) == (
        {name: f"caption {k}" for k, name in enumerate(names)},
        [],
    )


def test_a_second_run_takes_the_folder_that_is_there(hub, monkeypatch):
    first = photo_sets.find(wanted(dataset_name="me/dog", caption_column="text")).folder
    monkeypatch.setattr(photo_sets, "_write", lambda *_: pytest.fail("written again"))
    assert photo_sets.find(wanted(dataset_name="me/dog", caption_column="text")).folder == first


def test_another_revision_configuration_or_column_is_another_folder(hub):
    hub.rows.features |= {"photo": Picture(), "long": Text()}
    for row in hub.rows.rows:
        row |= {"photo": row["image"], "long": row["text"]}
    choices: list[dict[str, str]] = [
        {},
        {"caption_column": "text"},
        {"caption_column": "long"},
        {"image_column": "photo"},
        {"dataset_config_name": "small"},
    ]
    found = {photo_sets.find(wanted(dataset_name="me/dog", **flags)).folder for flags in choices}
    hub.rows._fingerprint = "2"
    assert len(found | {photo_sets.find(wanted(dataset_name="me/dog")).folder}) == 6


def test_cache_dir_is_where_the_data_set_and_its_pictures_go(hub, tmp_path):
    found = photo_sets.find(wanted(dataset_name="me/dog", cache_dir=str(tmp_path / "mine")))
    assert hub.calls == [("me/dog", None, "train", str(tmp_path / "mine"))]
    assert found.folder.parent == tmp_path / "mine" / "dreambooth-photos"


def test_captions_are_found_again_where_the_pictures_column_has_another_name(hub):
    rows: list[dict[str, Any]] = [
        {"photo": cell(hub.files[0]), "text": None},
        {"photo": cell(hub.files[1]), "text": "x\ny"},
    ]
    hub.rows = Rows({"photo": Picture(), "text": Text()}, rows)
    instance = wanted(dataset_name="me/dog", image_column="photo", caption_column="text")
    folder = photo_sets.find(instance).folder
    assert captions.read(folder, "--dataset_name", ["00000.png", "00001.jpg"], instance)[0] == {
        "00001.jpg": "x y"
    }


def test_text_of_the_hub_that_is_not_asked_for_is_told(hub):
    found = photo_sets.find(wanted(dataset_name="me/dog"))
    assert found.notes == ("me/dog has text beside its pictures; --caption_column text takes it as captions",)
    assert captions.read(found.folder, found.flag, ["00000.png", "00001.jpg", "00002.webp"], wanted()) == (
        {},
        [],
    )


def test_wrong_columns_name_the_columns_that_there_are(hub):
    said = set_refusal(dataset_name="me/dog", image_column="img", caption_column="label").split("\n")
    assert said == [
        (
            "--image_column: me/dog has no column img with pictures; those with pictures: image; all "
            "its columns: image, text, label"
        ),
        (
            "--caption_column: me/dog has no column label with text; those with text: text; all its "
            "columns: image, text, label"
        ),
    ]
    assert "those with pictures: image" in set_refusal(dataset_name="me/dog", image_column="text")


def test_an_error_of_the_hub_is_one_line(hub):
    hub.rows = FileNotFoundError("Dataset 'me/dog' doesn't exist\n\n  on the Hub \x1b[2J" + "x" * 1000)
    said = set_refusal(dataset_name="me/dog")
    assert said.startswith("--dataset_name: there is no folder me/dog, and as a hub id it cannot be read: ")
    assert "FileNotFoundError: Dataset 'me/dog' doesn" in said.replace("\\'", "'")
    assert said.isprintable()
    assert len(said) < 500


def test_rows_that_hold_no_picture_are_named_and_leave_nothing_behind(hub, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret.png").write_text("no picture")
    bad = [
        cell(hub.files[0]),
        None,
        cell(None),
        cell(HEIC),
        cell(None, str(tmp_path / "pipe")),
        cell(None, "/dev/zero"),
        cell(None, "a\0b"),
    ]
    bad += [
        cell(None, str(tmp_path / "none.png")),
        cell(None, str(tmp_path / "secret.png")),
        cell(None, "https://example.com/a.png"),
    ]
    hub.rows = Rows({"image": Picture()}, [{"image": found} for found in bad])
    said = set_refusal(dataset_name="me/dog").split("\n")
    assert [line.split(":")[1] for line in said] == [f" me/dog, row {k}" for k in range(1, len(bad))]
    assert os.listdir(tmp_path / "cache" / "dreambooth-photos") == [".lock"]


def test_pictures_of_the_hub_that_lie_in_files_are_copied(hub, tmp_path):
    (tmp_path / "blob").write_bytes(hub.files[1])
    hub.rows = Rows({"image": Picture()}, [{"image": cell(None, str(tmp_path / "blob"))}])
    folder = photo_sets.find(wanted(dataset_name="me/dog")).folder
    assert (folder / "00000.jpg").read_bytes() == hub.files[1]


def test_captions_of_the_hub_that_are_no_text_and_empty_data_sets_are_refused(hub):
    features = hub.rows.features
    hub.rows = Rows(features, [{"image": cell(hub.files[0]), "text": ["x"]}])
    assert (
        set_refusal(dataset_name="me/dog", caption_column="text")
        == "--dataset_name: me/dog, row 0: the caption is ['x'], which is not text"
    )
    hub.rows = Rows(features, [])
    assert set_refusal(dataset_name="me/dog") == "--dataset_name: me/dog has no rows in its train split"


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, OSError])
def test_an_interrupted_copy_is_not_taken_for_whole(hub, monkeypatch, stopped_by):
    write_new = writer.write_new

    def stop_at_the_second(path: Path, data: bytes) -> None:
        if path.name.startswith("00001"):
            raise stopped_by
        write_new(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_new", stop_at_the_second)
        with pytest.raises(UserError if stopped_by is OSError else stopped_by):
            photo_sets.find(wanted(dataset_name="me/dog"))
    assert os.listdir(hub.cache / "dreambooth-photos") == [".lock"]
    assert len(os.listdir(photo_sets.find(wanted(dataset_name="me/dog")).folder)) == 4


def test_processes_that_come_together_write_the_pictures_once(hub, tmp_path, monkeypatch):
    write = photo_sets._write

    def write_and_tell(*what: Any) -> None:
        with (tmp_path / "writers").open("a") as file:
            file.write("x")
        write(*what)

    monkeypatch.setattr(photo_sets, "_write", write_and_tell)
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = 0 if len(os.listdir(photo_sets.find(wanted(dataset_name="me/dog")).folder)) == 4 else 1
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert (tmp_path / "writers").read_text() == "x"


def test_what_a_killed_process_left_is_swept(hub):
    left = hub.cache / "dreambooth-photos" / ".0123456789abcdef.1.23.tmp"
    left.mkdir(parents=True)
    (left / "00000.png").touch()
    assert photo_sets.find(wanted(dataset_name="me/dog")).folder.is_dir()
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_one_message(hub, tmp_path):
    (tmp_path / "file").touch()
    said = set_refusal(dataset_name="me/dog", cache_dir=str(tmp_path / "file"))
    assert said.startswith("--cache_dir: the pictures of me/dog cannot be written to ")


def test_a_damaged_row_of_the_cache_is_one_message(hub):
    class Damaged(Rows):
        def select_columns(self, names):
            return self

        def cast_column(self, name, kind):
            return self

        def __iter__(self):
            yield self.rows[0]
            raise RuntimeError("bad\nArrow")

    hub.rows = Damaged(hub.rows.features, hub.rows.rows)
    assert "the cached data set cannot be read (RuntimeError: bad Arrow); remove it" in set_refusal(
        dataset_name="me/dog"
    )


# The package itself


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the datasets package, an extra, is not installed"
)
def test_the_datasets_package_itself_gives_bytes_captions_and_one_line_errors(tmp_path, monkeypatch):
    import datasets

    source = tmp_path / "source"
    source.mkdir()
    files = {"x.png": encoded("PNG", "red"), "y.jpg": encoded("JPEG", "green")}
    for name, data in files.items():
        (source / name).write_bytes(data)
    jsonl(source, {"file_name": "x.png", "text": "an x"}, {"file_name": "y.jpg", "text": None})
    instance = wanted(dataset_name="me/dog", caption_column="text", cache_dir=str(tmp_path / "cache"))
    load_dataset = datasets.load_dataset
    with monkeypatch.context() as patch:
        patch.setattr(
            datasets, "load_dataset", lambda _, config, **flags: load_dataset(str(source), config, **flags)
        )
        found = photo_sets.find(instance)
        assert photo_sets.find(instance) == found
        assert "those with pictures: image; all its columns: image, text" in set_refusal(
            dataset_name="me/dog", image_column="text", cache_dir=instance.cache_dir
        )
        parquet = tmp_path / "parquet"
        parquet.mkdir()
        rows = datasets.load_dataset("", None, split="train", cache_dir=str(tmp_path / "cache"))
        rows.to_parquet(
            str(parquet / "train.parquet")
        )  # as most data sets of the hub are: pictures within the rows
        source = parquet
        packed = photo_sets.find(instance)
    for folder in (found.folder, packed.folder):
        assert sorted(os.listdir(folder)) == ["00000.png", "00001.jpg", "metadata.jsonl"]
        assert [(folder / name).read_bytes() for name in ("00000.png", "00001.jpg")] == list(files.values())
        assert captions.read(folder, found.flag, ["00000.png", "00001.jpg"], instance)[0] == {
            "00000.png": "an x"
        }
    said = set_refusal(
        dataset_name="nobody/nothing-of-this-name", cache_dir=str(tmp_path / "empty")
    )  # the tests are offline
    assert said.startswith(
        "--dataset_name: there is no folder nobody/nothing-of-this-name, and as a hub id it cannot be read: "
    )
    assert said.isprintable()
