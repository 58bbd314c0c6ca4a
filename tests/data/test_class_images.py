"""Class images: the same set on any number of processes and after any interruption, and nobody else's
pictures are touched."""

import dataclasses
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth.data import sampling_order
from dreambooth.data.class_images import file_name
from dreambooth.files import pictures
from dreambooth.io.errors import UserError
from tests.data.class_sets import SETTINGS, Interrupted, Painter, contents, fill, manifest

FLAG = "--class_data_dir"


def fill_with_processes(folder: Path, total: int, painters: list[Painter]) -> list[int]:
    """Processes as threads with a real barrier; how many pictures each made."""
    barrier = threading.Barrier(len(painters), timeout=60)
    made, errors = [-1] * len(painters), []

    def work(rank: int) -> None:
        try:
            made[rank] = fill(
                folder,
                total,
                painters[rank],
                rank=rank,
                world=len(painters),
                wait=lambda: barrier.wait() and None,
            )
        except BaseException as error:
            barrier.abort()  # as a launcher ends all processes when one dies
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(painters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Ten pictures in three chunks, made at once by one process."""
    folder = tmp_path_factory.mktemp("whole")
    fill(folder, 10)
    return contents(folder)


# --- a set


def test_a_set_is_its_pictures_and_a_manifest(whole):
    assert set(whole) == {*map(file_name, range(10)), "manifest.json"}
    assert len(set(whole.values())) == 11


def test_a_missing_folder_is_made(tmp_path, whole):
    assert fill(tmp_path / "new" / "folder", 10) == 10
    assert contents(tmp_path / "new" / "folder") == whole


def test_every_picture_has_a_seed_of_its_own_and_chunks_go_by_number(tmp_path):
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 10
    seeds = [sampling_order.key(5, "class-image", number) for number in range(12)]
    assert painter.chunks == [
        seeds[:4],
        seeds[4:8],
        seeds[8:],
    ]  # the last one whole, though two of it are not kept
    assert painter.loaded == 1


def test_a_whole_set_is_left_alone_and_no_model_is_loaded(tmp_path, whole):
    fill(tmp_path, 10)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 0
    assert fill(tmp_path, 6, painter) == 0
    assert painter.loaded == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_makes_the_same_set(world, tmp_path, whole):
    """Byte for byte, manifest included; five processes have nothing to do for two of them."""
    painters = [Painter() for _ in range(world)]
    made = fill_with_processes(tmp_path, 10, painters)
    assert contents(tmp_path) == whole
    assert sum(made) == 10
    assert [painter.numbers for painter in painters] == [list(range(rank, 3, world)) for rank in range(world)]
    assert [painter.loaded for painter in painters] == [1 if rank < 3 else 0 for rank in range(world)]


def test_the_batch_size_is_part_of_what_a_set_is(tmp_path, whole):
    """The control: in other batches the pictures are others, so comparing bytes above says something."""
    fill(tmp_path, 10, settings=dataclasses.replace(SETTINGS, batch_size=3))
    assert contents(tmp_path)[file_name(0)] != whole[file_name(0)]


def test_the_manifest_says_what_the_set_is(tmp_path, whole):
    fill(tmp_path, 10)
    found = manifest(tmp_path)
    assert found["settings"] == {
        "base": "0123456789abcdef",
        "prompt": "a photo of dog",
        "seed": 5,
        "steps": 20,
        "guidance_scale": 7.5,
        "batch_size": 4,
        "side": 64,
        "precision": "fp32",
        "scheduler": "dpm",
    }
    assert found["sha256"] == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in sorted(whole.items())
        if name.endswith(".png")
    }
    assert list(found["sha256"]) == sorted(found["sha256"])


def test_every_picture_says_how_it_was_made(tmp_path):
    fill(tmp_path, 5)
    for number in range(5):
        inside = json.loads(Image.open(tmp_path / file_name(number)).text["dreambooth"])  # type: ignore[attr-defined]
        assert inside == {**dataclasses.asdict(SETTINGS), "number": number}


def test_a_prompt_cannot_forge_another_field(tmp_path):
    """A line break in a prompt stays within its own string."""
    prompt = 'dog\nseed: 1\x00tEXt", "seed": 1, "x": "狗'
    fill(tmp_path, 1, settings=dataclasses.replace(SETTINGS, prompt=prompt))
    image = Image.open(tmp_path / file_name(0))
    assert list(image.text) == ["dreambooth"]  # type: ignore[attr-defined]
    inside = json.loads(image.text["dreambooth"])  # type: ignore[attr-defined]
    assert (inside["prompt"], inside["seed"]) == (prompt, 5)


# --- interrupted


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_an_interrupted_set_is_completed_to_the_same_set(chunks, tmp_path, whole):
    """Only what is missing is drawn."""
    with pytest.raises(Interrupted):
        fill(tmp_path, 10, Painter(fail_after=chunks))
    there = {name for name in contents(tmp_path) if name.endswith(".png")}
    assert there == {file_name(number) for number in range(4 * chunks)}
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 10 - 4 * chunks
    assert painter.numbers == list(range(chunks, 3))
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_may_complete_a_set(first, then, tmp_path, whole):
    with pytest.raises(Interrupted):
        fill_with_processes(tmp_path, 10, [Painter(fail_after=1 - rank) for rank in range(first)])
    fill_with_processes(tmp_path, 10, [Painter() for _ in range(then)])
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("count", range(6))
def test_a_chunk_cut_short_is_drawn_again_whole(count, tmp_path, whole, monkeypatch):
    """Killed between two files: the missing pictures come from the same batch as in an unbroken run."""
    encode, left = pictures.png, [count]

    def until(image: Any, settings: Any) -> bytes:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        return encode(image, settings)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "png", until)
        with pytest.raises(Interrupted):
            fill(tmp_path, 10)
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 10 - count
    assert painter.numbers == list(range(count // 4, 3))
    assert contents(tmp_path) == whole


def test_killed_after_the_last_picture_the_next_run_completes_the_manifest(tmp_path, whole):
    """Nothing is left to draw, but the set is not yet written down."""
    waits: list[None] = []

    def wait() -> None:
        waits.append(None)
        if len(waits) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        fill(tmp_path, 10, wait=wait)
    assert {name for name in contents(tmp_path) if name.endswith(".png")} == {
        file_name(number) for number in range(10)
    }
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 0
    assert painter.loaded == 0
    assert contents(tmp_path) == whole


def test_an_empty_picture_is_drawn_again(tmp_path, whole):
    fill(tmp_path, 10)
    (tmp_path / file_name(5)).write_bytes(b"")
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 1
    assert painter.numbers == [1]
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("change", [lambda _: b"a photo", lambda data: data[:-20], lambda data: data + b"x"])
def test_a_picture_that_was_changed_is_refused_not_replaced(change, tmp_path, whole):
    """It may be the user's: an edited one, or a photo under its name."""
    fill(tmp_path, 10)
    changed = change(whole[file_name(5)])
    (tmp_path / file_name(5)).write_bytes(changed)
    painter = Painter()
    with pytest.raises(UserError, match=rf"{file_name(5)} is not as it was made .* remove it to have it"):
        fill(tmp_path, 10, painter)
    assert painter.loaded == 0
    assert contents(tmp_path) == whole | {file_name(5): changed}


def test_a_removed_picture_is_drawn_again_and_its_neighbours_are_not_written(tmp_path, whole):
    fill(tmp_path, 10)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    (tmp_path / file_name(6)).unlink()
    assert fill(tmp_path, 10) == 1
    assert contents(tmp_path) == whole
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert {name for name in after if after[name] != before[name]} == {file_name(6)}


def test_a_disk_that_is_full_leaves_no_half_picture(tmp_path, whole, monkeypatch):
    """A picture that is cut off would count as one of the set, or stop the training an hour later."""
    replace, left = os.replace, [8]

    def until(*names: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until)
        with pytest.raises(OSError, match="No space left"):
            fill(tmp_path, 10)
    there = contents(tmp_path)
    assert any(name.endswith(".png") for name in there)
    assert all(data == whole[name] for name, data in there.items() if name.endswith(".png"))
    assert not any(name.endswith(".tmp") for name in there)
    fill(tmp_path, 10)
    assert contents(tmp_path) == whole


# --- more pictures


@pytest.mark.parametrize("more", [11, 12, 13, 20])
def test_raising_the_number_keeps_the_old_pictures(more, tmp_path, whole):
    """Byte for byte, and the larger set is the one that would have been made at once."""
    fill(tmp_path / "grown", 10)
    painter = Painter()
    assert fill(tmp_path / "grown", more, painter) == more - 10
    assert painter.numbers == list(range(2, (more + 3) // 4))
    grown = contents(tmp_path / "grown")
    assert all(grown[name] == data for name, data in whole.items() if name.endswith(".png"))
    fill(tmp_path / "at_once", more)
    assert grown == contents(tmp_path / "at_once")


# --- other settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base", "fedcba9876543210"),
        ("prompt", "a photo of cat"),
        ("seed", 6),
        ("steps", 50),
        ("guidance_scale", 1.0),
        ("batch_size", 8),
        ("side", 512),
        ("precision", "bf16"),
        ("scheduler", "base"),
    ],
)
@pytest.mark.parametrize("interrupted", [False, True], ids=["whole", "interrupted"])
def test_a_set_made_with_other_settings_is_refused_with_the_difference(name, value, interrupted, tmp_path):
    """Two prompts in one folder would be trained on as one class."""
    if interrupted:
        with pytest.raises(Interrupted):
            fill(tmp_path, 10, Painter(fail_after=1))
    else:
        fill(tmp_path, 10)
    before = contents(tmp_path)
    painter = Painter()
    with pytest.raises(UserError) as refused:
        fill(tmp_path, 20, painter, dataclasses.replace(SETTINGS, **{name: value}))
    message = str(refused.value)
    assert message.startswith(f"{FLAG}: {tmp_path} holds class images made with other settings: ")
    assert f"{name} is {getattr(SETTINGS, name)!r} there and {value!r} now" in message
    assert message.count(" there and ") == 1
    assert (painter.loaded, contents(tmp_path)) == (0, before)


def test_all_differences_are_shown_at_once(tmp_path):
    fill(tmp_path, 4)
    with pytest.raises(UserError) as refused:
        fill(tmp_path, 4, settings=dataclasses.replace(SETTINGS, prompt="a cat", seed=9, precision="bf16"))
    for name in ("prompt", "seed", "precision"):
        assert f"{name} is " in str(refused.value)


def test_every_process_is_refused_alike(tmp_path):
    """One that went on alone would wait at the next barrier for ever."""
    fill(tmp_path, 4)
    other = dataclasses.replace(SETTINGS, seed=9)
    for rank in range(2):
        with pytest.raises(UserError, match="made with other settings"):
            fill(tmp_path, 8, settings=other, rank=rank, world=2, wait=lambda: pytest.fail("waited"))


# --- the user's own pictures


def test_the_user_s_own_pictures_count_and_are_never_touched(tmp_path, whole):
    own = {
        "holiday.jpg": b"not even read here",
        "IMG_1.PNG": b"x",
        "class-1.png": b"x",
        "class-000000.jpg": b"x",
    }
    others = {"notes.txt": b"x", ".hidden.png": b"x"}
    for name, data in (own | others).items():
        (tmp_path / name).write_bytes(data)
    assert fill(tmp_path, 10) == 6
    found = contents(tmp_path)
    assert set(found) == {*own, *others, *map(file_name, range(6)), "manifest.json"}
    assert all(found[name] == data for name, data in (own | others).items())
    assert all(found[name] == whole[name] for name in map(file_name, range(6)))


def test_enough_own_pictures_need_no_model(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 0
    assert painter.loaded == 0
    assert set(contents(tmp_path)) == {f"{number}.jpg" for number in range(10)}


def test_a_picture_under_our_name_that_is_not_ours_is_refused_not_overwritten(tmp_path):
    """It may be all that is left of somebody's set whose manifest was lost."""
    (tmp_path / file_name(0)).write_bytes(b"precious")
    painter = Painter()
    with pytest.raises(UserError) as refused:
        fill(tmp_path, 10, painter)
    assert str(refused.value).startswith(
        f"{FLAG}: {tmp_path / file_name(0)} is in no manifest and would be overwritten"
    )
    assert contents(tmp_path) == {file_name(0): b"precious"}
    assert painter.loaded == 0


def test_pictures_of_an_interrupted_run_whose_manifest_is_gone_are_refused(tmp_path):
    """Nothing says any more which prompt they show; counted in, two prompts would be trained on as one
    class."""
    with pytest.raises(Interrupted):
        fill(tmp_path, 10, Painter(fail_after=1))
    (tmp_path / "manifest.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"class-00000\d\.png is in no manifest"):
        fill(tmp_path, 10, settings=dataclasses.replace(SETTINGS, prompt="a photo of cat"))
    assert contents(tmp_path) == before


def test_a_foreign_picture_beside_our_set_is_refused_too(tmp_path):
    fill(tmp_path, 4)
    (tmp_path / file_name(7)).write_bytes(b"precious")
    with pytest.raises(UserError, match=rf"{file_name(7)} is in no manifest"):
        fill(tmp_path, 10)
    assert (tmp_path / file_name(7)).read_bytes() == b"precious"


def refused_as_damaged(folder: Path, text: str) -> None:
    """With `text` for a manifest, and nothing is written."""
    fill(folder, 4)
    (folder / "manifest.json").write_text(text)
    before = contents(folder)
    with pytest.raises(UserError) as refused:
        fill(folder, 4)
    assert str(refused.value).startswith(f"{FLAG}: {folder / 'manifest.json'} is damaged, or another program")
    assert contents(folder) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"settings": {}}',
        '{"settings": 3, "sha256": {}}',
        '{"settings": {}, "sha256": ["x"]}',
        "null",
    ],
)
def test_a_damaged_manifest_is_refused_with_what_to_do(text, tmp_path):
    refused_as_damaged(tmp_path, text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "50"},
        {"steps": 0},
        {"seed": -1},
        {"side": 1.5},
        {"precision": "fp8"},
        {"precision": None},
        {"scheduler": ["dpm"]},
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_gone_on_from_is_refused_as_damaged(wrong, tmp_path):
    """What the flags leave open is taken from it."""
    refused_as_damaged(tmp_path, json.dumps({"settings": dataclasses.asdict(SETTINGS) | wrong, "sha256": {}}))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^{FLAG}: .* is not a folder$"):
        fill(tmp_path / "file", 10)
