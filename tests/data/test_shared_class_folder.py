"""A folder of class images that two users share, or that cannot be written to."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from dreambooth.data import class_images
from dreambooth.files import locks
from dreambooth.io import writer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
# Modules that are loaded on first use, which the users below may not read.
Image.init()
"".encode("utf-8-sig")
ALICE, BOB, GROUP = 61001, 61002, 61003


def as_user(uid: int, work: Callable[[], object], umask: int = 0o022) -> str:
    """What the work raises as that user, who is in the group: the class and the message; "" for nothing."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            os.setgroups([GROUP])
            os.setgid(uid)
            os.setuid(uid)
            os.umask(umask)
            work()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        finally:
            os.write(said, message.encode()[:4000])
            os._exit(0)
    os.close(said)
    with os.fdopen(ready, "rb") as answer:
        message = answer.read().decode()
    os.waitpid(child, 0)
    return message


@pytest.fixture
def shared() -> Iterator[Path]:
    """A new folder of Alice's, in a folder that everybody may enter: pytest's is the tester's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "class"
        folder.mkdir()
        os.chown(folder, ALICE, GROUP)
        yield folder


def settings() -> class_images.ClassImageSettings:
    return class_images.ClassImageSettings("base", "a dog", 0, 1, 1.0, 2, 8, "fp32", "dpm")


def fill(folder: Path, total: int) -> None:
    """Fill the folder as `class_images.make` does, with pictures that cost nothing."""
    if class_images.is_complete(folder, settings(), total):
        return
    writer.make_output_folder(folder, "--class_data_dir")
    with locks.hold(folder, "--class_data_dir"):
        class_images.fill(
            folder,
            settings(),
            total,
            lambda: lambda seeds: [Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for seed in seeds],
        )


@pytest.mark.parametrize("mode", [0o2775, 0o775, 0o777])
def test_users_of_a_group_fill_a_folder_in_turn_whatever_the_umask(mode, shared):
    shared.chmod(mode)
    assert as_user(ALICE, lambda: fill(shared, 2)) == ""
    if mode != 0o777:
        os.chown(shared / ".lock", ALICE, GROUP)  # as the set-group-id bit of the folder does
    assert as_user(BOB, lambda: fill(shared, 4)) == ""
    assert as_user(ALICE, lambda: fill(shared, 6)) == ""
    assert len(list(shared.glob("class-*.png"))) == 6


@pytest.mark.parametrize("mode", [0o755, 0o2755, 0o555])
def test_a_complete_folder_of_another_user_is_used_and_an_incomplete_one_refused(mode, shared):
    assert as_user(ALICE, lambda: fill(shared, 2)) == ""
    shared.chmod(mode)
    assert as_user(BOB, lambda: fill(shared, 2)) == ""
    said = as_user(BOB, lambda: fill(shared, 4))
    assert said.startswith(
        f"UserError: --class_data_dir: {shared} cannot be written to: it is user {ALICE}'s"
    )
    assert "umask 002" in said


def test_a_lock_of_another_user_that_only_they_may_write_is_refused_with_their_name(shared):
    """Older versions gave the file the mode of the umask."""
    assert as_user(ALICE, lambda: fill(shared, 2)) == ""
    shared.chmod(0o777)
    (shared / ".lock").chmod(0o644)
    said = as_user(BOB, lambda: fill(shared, 4))
    assert said.startswith("UserError: --class_data_dir: ")
    assert f".lock cannot be used as a lock: it is user {ALICE}'s; give a group of both users" in said
    assert as_user(BOB, lambda: fill(shared, 2)) == ""


def test_in_a_sticky_folder_the_manifest_of_another_user_is_not_replaced(shared):
    shared.chmod(0o1777)
    assert as_user(ALICE, lambda: fill(shared, 2)) == ""
    said = as_user(BOB, lambda: fill(shared, 4))
    assert said == f"WriteError: {shared}/manifest.json cannot be written: Operation not permitted"
    assert as_user(ALICE, lambda: fill(shared, 4)) == ""


@pytest.mark.parametrize("name", ["manifest.json", "class-000000.png", ".class-000001.png.sha256"])
def test_files_that_may_not_be_read_are_one_message(name, shared):
    shared.chmod(0o777)
    assert as_user(ALICE, lambda: fill(shared, 2)) == ""
    (shared / name).touch()
    os.chown(shared / name, ALICE, GROUP)
    (shared / name).chmod(0)
    said = as_user(BOB, lambda: fill(shared, 3))
    assert said == "" or said.startswith("UserError: --class_data_dir: "), said


def test_a_folder_that_may_not_be_read_is_one_message(shared):
    assert as_user(ALICE, lambda: fill(shared, 2)) == ""
    for mode in (0o700, 0o711, 0o733):
        shared.chmod(mode)
        said = as_user(BOB, lambda: fill(shared, 2))
        assert said.startswith("UserError: --class_data_dir: "), said


def test_the_lock_has_the_write_permissions_of_its_folder(tmp_path):
    for mode in (0o700, 0o750, 0o755, 0o775, 0o2770, 0o777):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        with locks.hold(folder, "--class_data_dir"):
            assert stat.S_IMODE((folder / ".lock").stat().st_mode) == mode & 0o666


def test_the_owner_is_named_or_numbered(shared):
    assert f"it is user {ALICE}'s" in writer.why_not_writable(shared)
    os.chown(shared, 0, 0)
    assert "it is user root's" in writer.why_not_writable(shared)


def test_a_folder_behind_one_that_may_not_be_entered_is_one_message(shared):
    shared.parent.chmod(0o700)
    said = as_user(BOB, lambda: fill(shared, 2))
    assert said.startswith(f"UserError: --class_data_dir: {shared} cannot be "), said
