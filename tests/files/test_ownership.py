"""A file is replaced or removed only as this program wrote it."""

import itertools
import os
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.files import locks, pictures
from dreambooth.files.ownership import WrittenFiles, check_apart
from dreambooth.io.errors import UserError
from tests.faults import ownership_faults
from tests.tiny import make_photos

RECORD = ".written.jsonl"


@pytest.fixture
def files(tmp_path) -> WrittenFiles:
    written = WrittenFiles(tmp_path)
    written.write("run.json", b"first")
    return written


def test_what_was_written_may_be_replaced_and_removed(files, tmp_path):
    WrittenFiles(tmp_path).write("run.json", b"second")
    assert files.is_written("run.json")
    assert files.written() == ["run.json"]
    files.remove("run.json")
    assert os.listdir(tmp_path) == [RECORD]


@pytest.mark.parametrize("name", ["run.json", "adapter.safetensors", "validation/image_0.png"])
@pytest.mark.parametrize("kind", ["file", "empty", "folder", "link", "dangling"])
def test_what_the_user_put_there_is_refused_and_left(name, kind, files, tmp_path):
    path, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    elsewhere.write_bytes(b"first")  # as the program wrote it, but behind a link
    {
        "file": lambda: path.write_bytes(b"a user's"),
        "empty": lambda: path.write_bytes(b""),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(elsewhere),
        "dangling": lambda: path.symlink_to("nowhere"),
    }[kind]()
    with pytest.raises(UserError, match=r"--output_dir: .* is replaced only as this program wrote it"):
        files.check_free([name], "--output_dir")
    with pytest.raises(FileExistsError, match="this program did not write"):
        files.write(name, b"new")
    files.remove(name)
    assert os.path.lexists(path)
    assert elsewhere.read_bytes() == b"first"
    assert kind != "file" or path.read_bytes() == b"a user's"


def test_a_folder_behind_a_link_is_not_written_to(files, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (tmp_path / "validation").symlink_to(photos)
    with pytest.raises(FileExistsError):
        files.write("validation/image_0.png", b"new")
    assert os.listdir(photos) == []


@pytest.mark.parametrize("name", ["../precious", "/precious", "a/../../precious", ".", ""])
def test_a_record_from_elsewhere_removes_nothing_outside_its_folder(name, tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_bytes(b"data")
    folder.mkdir()
    name = str(precious) if name == "/precious" else name
    files = WrittenFiles(folder)
    files.record(name, 4, "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7")
    assert files.written() == []
    files.remove(name)
    assert precious.read_bytes() == b"data"


@pytest.mark.parametrize("torn", [b'{"file": "run.json', b"not JSON\n", b"[]\n", b'{"file": 3}\n', b"\0"])
def test_a_torn_record_goes_on(torn, files, tmp_path):
    with (tmp_path / RECORD).open("ab") as record:
        record.write(torn)
    again = WrittenFiles(tmp_path)
    again.write("status.json", b"{}")
    assert again.is_written("run.json")
    assert WrittenFiles(tmp_path).is_written("status.json")


def test_a_record_that_somebody_added_to_is_not_written_to(files, tmp_path):
    with (tmp_path / RECORD).open("ab") as record:
        record.write(b" edited")
    before = (tmp_path / RECORD).read_bytes()
    with pytest.raises(OSError, match="no record of this program"):
        WrittenFiles(tmp_path).write("status.json", b"{}")
    assert (tmp_path / RECORD).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"a user's", b'{"file": "run.json"}\n', None])
def test_a_record_of_another_program_is_not_written_to(content, tmp_path):
    path = tmp_path / RECORD
    path.mkdir() if content is None else path.write_bytes(content)
    files = WrittenFiles(tmp_path)
    with pytest.raises(UserError, match=r"holds \.written\.jsonl"):
        files.check_free([], "--output_dir")
    with pytest.raises(OSError, match="no record of this program"):
        files.write("run.json", b"data")
    assert content is None or path.read_bytes() == content


def test_the_record_goes_along_when_the_folder_is_renamed(files, tmp_path):
    renamed = tmp_path.with_name("renamed")
    tmp_path.rename(renamed)
    assert WrittenFiles(renamed).is_written("run.json")


@pytest.mark.parametrize(
    ("more", "is_written"),
    [(b"", True), (b'{"step": 2}\n', True), (b'{"step": 2}\n{"st', True), (b"a note\n", False)],
)
def test_a_file_that_grows_is_known_by_its_first_bytes_until_it_is_closed(more, is_written, tmp_path):
    files = WrittenFiles(tmp_path)
    files.write("metrics.jsonl", b'{"step": 1}\n', grows=True)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(more)
    assert files.is_written("metrics.jsonl") == is_written
    files.record("metrics.jsonl", 0, "0" * 64)
    assert files.is_written("metrics.jsonl") == (more == b"")


def test_only_temporaries_of_the_record_are_swept(tmp_path, monkeypatch):
    def die(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            WrittenFiles(tmp_path).write("run.json", b"data")
    (tmp_path / ".holiday.png.1.2.tmp").write_bytes(b"a user's")
    WrittenFiles(tmp_path).sweep()
    assert os.listdir(tmp_path) == [".holiday.png.1.2.tmp"]


@pytest.mark.parametrize("content", [b"a user's", b"{}", b"[1]", None, "link"])
def test_a_lock_of_another_program_is_left(content, tmp_path):
    path, precious = tmp_path / locks.NAME, tmp_path / "precious"
    precious.write_bytes(b"a user's")
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.symlink_to(precious)
    with (
        pytest.raises(UserError, match=r"--output_dir: .*\.lock cannot be used as a lock"),
        locks.hold(tmp_path, "--output_dir"),
    ):
        pass
    assert not isinstance(content, bytes) or path.read_bytes() == content
    assert precious.read_bytes() == b"a user's"


# --- folders


@pytest.mark.parametrize(
    ("output", "relation"),
    [
        ("photos", "is"),
        ("photos/", "is"),
        ("photos/../photos/.", "is"),
        ("link", "is"),
        (".", "holds"),
        ("photos/run", "lies in"),
        ("photos/new/run", "lies in"),
        ("link/run", "lies in"),
    ],
)
def test_folders_that_are_written_and_read_must_lie_apart(output, relation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("link").symlink_to("photos")
    for given in (output, str(tmp_path / output)):
        with pytest.raises(UserError, match=rf"^--output_dir: .* {relation} photos, which --instance"):
            check_apart({"--output_dir": given}, {"--instance_data_dir": "photos"}, {})
        with pytest.raises(UserError, match=relation):
            check_apart({"--output_dir": given}, {}, {"--base": "photos"})


@pytest.mark.parametrize("output", ["run", "photos2", "photos-run", "../photos"])
def test_folders_beside_each_other_are_allowed(output, tmp_path, monkeypatch):
    (tmp_path / "here" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    check_apart({"--output_dir": output}, {"--instance_data_dir": "photos"}, {"--base": "owner/name"})
    check_apart({"--output_dir": "."}, {}, {"--base": "owner/name"})


OUTPUTS = ("--output_dir", "--class_data_dir", "--encoded_dir", "--logging_dir")


@pytest.mark.parametrize(
    ("first", "second", "relation"),
    [
        ("run", "run", "is"),
        ("run", "link", "is"),
        ("run", "here/../run", "is"),
        ("run/new", "run", "lies in"),
        ("link/new", "run", "lies in"),
    ],
)
def test_two_folders_that_are_written_are_not_the_same(first, second, relation, tmp_path, monkeypatch):
    """Each has a lock, and closing one would release the other."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "here"):
        Path(name).mkdir()
    Path("link").symlink_to("run")
    for one, other in itertools.combinations(OUTPUTS, 2):
        with pytest.raises(UserError, match=rf"^{one}: .* {relation} .*, which {other} names: they must lie"):
            check_apart({one: first, other: second}, {}, {})
        check_apart({one: "run", other: "run/encoded"}, {}, {})


# --- pictures


def test_pictures_of_this_program_are_marked_and_others_are_not(tmp_path):
    make_photos(tmp_path / "photos", 1)
    photo = next((tmp_path / "photos").iterdir())
    image = Image.open(photo)
    (tmp_path / "drawn.jpg").write_bytes(pictures.png(image, {"prompt": "a dog"}))
    (tmp_path / "plain.png").write_bytes(pictures.png(image))
    image.save(tmp_path / "photo.jpg")
    (tmp_path / "short.png").write_bytes((tmp_path / "drawn.jpg").read_bytes()[:20])
    marked = {path.name for path in tmp_path.iterdir() if pictures.is_marked(path)}
    assert marked == {"drawn.jpg"}


@pytest.mark.trains
@pytest.mark.slow
def test_no_byte_of_a_user_changes_whatever_script_runs(tmp_path):
    violations = {seed: wrong for seed, wrong, _ in ownership_faults.fuzz(tmp_path, range(6)) if wrong}
    assert violations == {}


def test_a_record_of_a_terabyte_is_none_of_this_program(tmp_path):
    files = WrittenFiles(tmp_path)
    files.write("mine", b"1")
    os.truncate(files.path, 2**40)
    assert WrittenFiles(tmp_path).foreign(["mine"]) == ["mine"]
    with pytest.raises(OSError, match="no record of this program"):
        WrittenFiles(tmp_path).record("a", 1, "")
