"""Pictures that were decoded before: known by their content."""

import importlib.metadata
from typing import Any

import PIL
import pytest
from PIL import Image

from dreambooth.data import decode_cache, photos, picture_files
from dreambooth.data.decode_cache import DecodeCache
from dreambooth.io.errors import UserError
from tests import tiny
from tests.data.encoding import FLAG, check


@pytest.mark.trains
def test_pictures_are_decoded_once_and_hashed_at_each_start(tmp_path, work):
    folder = tiny.make_photos(tmp_path / "photos", 3)
    Image.new("L", (80, 70), 9).save(folder / "grey.png")
    first = check(folder, tmp_path)
    assert (len(work.decoded), first.notes) == (4, ["without colour: grey.png"])
    assert check(folder, tmp_path) == first == photos.check_folder(folder, FLAG)
    work.decoded.clear()
    (folder / "grey.png").rename(folder / "renamed.png")
    tiny.make_photos(folder, 1, seed=8)
    assert check(folder, tmp_path).notes == ["without colour: renamed.png"]
    assert work.decoded == [(folder / "photo-0.png").read_bytes()]


@pytest.mark.trains
def test_what_is_remembered_lifts_no_limit(tmp_path):
    """A picture that was good enough yesterday is refused today as if it had never been seen."""
    folder = tiny.make_photos(tmp_path / "photos", 1, (40, 300))
    assert len(check(folder, tmp_path, allow_odd_photos=True).photos) == 1
    limits: list[tuple[dict[str, Any], str]] = [
        ({}, "40 x 300 pixels is small"),
        ({"allow_odd_photos": True, "max_pixels": 5000}, "over 5,000 pixels"),
    ]
    for given, said in limits:
        messages = []
        for known in (DecodeCache(tmp_path), None):
            with pytest.raises(UserError, match=said) as refusal:
                photos.check_folder(folder, FLAG, cache=known, **given)
            messages.append(str(refusal.value))
        assert messages[0] == messages[1]
    (folder / "photo-0.png").write_bytes((folder / "photo-0.png").read_bytes()[:-50])
    with pytest.raises(UserError, match="not a whole picture"):
        check(folder, tmp_path, allow_odd_photos=True)


@pytest.mark.trains
@pytest.mark.parametrize(
    "how",
    [
        *("cut off", "one number", "no table", "another version of Pillow", "a plugin of Pillow"),
        *("nonsense", "a folder"),
    ],
)
def test_a_damaged_memory_of_pictures_is_no_memory(tmp_path, work, monkeypatch, how):
    folder = tiny.make_photos(tmp_path / "photos", 2)
    first = check(folder, tmp_path)
    path = tmp_path / decode_cache.NAME
    text = path.read_text()
    if how == "another version of Pillow":
        monkeypatch.setattr(PIL, "__version__", "0.1")
    elif how == "a plugin of Pillow":
        monkeypatch.setattr(picture_files, "INSTALLED", ["HEIF"])
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.1")
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        content = {
            "cut off": text[:-20],
            "one number": text.replace("[64,64]", "[64,65]", 1),
            "no table": '{"layout":[]}',
            "nonsense": '{"layout":1',
        }
        path.write_text(content[how])
    work.decoded.clear()
    known = DecodeCache(tmp_path)
    assert photos.check_folder(folder, FLAG, cache=known) == first
    assert len(work.decoded) == 2
    assert len(known.save()) == (how == "a folder")  # it cannot be written, which is said


@pytest.mark.parametrize("content", ["", "[]", '{"a.png": "my dog"}', "photos of my dog"])
def test_a_file_of_the_user_with_the_name_of_the_cache_stays(content, tmp_path, work):
    folder = tiny.make_photos(tmp_path / "photos", 1)
    path = tmp_path / decode_cache.NAME
    path.write_text(content)
    known = DecodeCache(tmp_path)
    photos.check_folder(folder, FLAG, cache=known)
    [warning] = known.save()
    assert "another program wrote it" in warning
    assert path.read_text() == content
