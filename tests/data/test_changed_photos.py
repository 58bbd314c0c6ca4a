"""Photos whose files change while a run trains on them."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import train_dreambooth_lora as train
from dreambooth.data import photos, picture_files
from dreambooth.files import checkpoint_folders
from dreambooth.io.errors import UserError
from tests import tiny
from tests.data.bad_pictures import encoded, noise
from tests.running import digest, on_processes, prior_words, run_train

CHANGED = "has changed since the run was started; restore it, or start a new run"


def edit(path: Path) -> None:
    """One bit of the pixels, at the same size and time."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited": (edit, CHANGED),
    "replaced": (lambda path: path.write_bytes(encoded(noise(seed=9), "PNG")), CHANGED),
    "truncated": (lambda path: os.truncate(path, 100), CHANGED),
    "emptied": (lambda path: os.truncate(path, 0), CHANGED),
    "appended to": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), CHANGED),
    "removed": (os.unlink, "cannot be read: No such file or directory"),
    "a pipe": (replace_by(os.mkfifo), "cannot be read: not a regular file"),
    "a folder": (replace_by(os.mkdir), "cannot be read: Is a directory"),
    "a device": (replace_by(lambda path: path.symlink_to("/dev/zero")), "cannot be read: not a regular file"),
    "a loop": (
        replace_by(lambda path: path.symlink_to(path)),
        "cannot be read: Too many levels of symbolic links",
    ),
    "a link to another photo": (
        replace_by(lambda path: path.symlink_to(path.with_name("photo-1.png"))),
        CHANGED,
    ),
    "a terabyte": (replace_by(sparse), "cannot be read: over 10,000,000 bytes"),
    "in no folder": (lambda path: path.parent.rename(path.parent.with_name("moved")), "No such file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_photo_that_is_no_longer_the_checked_one_is_named_with_the_reason(tmp_path, monkeypatch, change):
    folder = tiny.make_photos(tmp_path / "photos", 2)
    photo = photos.check_folder(folder, "--instance_data_dir").photos[0]
    expected = photos.load(photo).tobytes()
    monkeypatch.setattr(picture_files, "LARGEST", 10_000_000)  # reading a gigabyte takes a second
    make, reason = CHANGES[change]
    make(photo.path)
    with pytest.raises(UserError) as refusal:
        photos.load(photo)
    assert str(refusal.value).startswith(f"{photo.path} ")
    assert reason in str(refusal.value)
    # the control: the same bytes, in a file of another time, behind a link
    if change == "edited":
        edit(photo.path)
        copy = photo.path.rename(tmp_path / "copy")
        photo.path.symlink_to(copy)
        assert photos.load(photo).tobytes() == expected


def change_after(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[], object]) -> None:
    """Call `change` when so many steps are done."""
    real = train.Training.after_step

    def after_step(self, done, *others):
        real(self, done, *others)
        if done == step:
            change()

    monkeypatch.setattr(train.Training, "after_step", after_step)


@pytest.mark.trains
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_photo_changed_in_training_ends_the_run_by_name_and_restored_it_goes_on(
    tiny_base, tmp_path, monkeypatch, capsys, workers
):
    """Also a class image, and with processes that load photos ahead."""
    mine, classes = (tiny.make_photos(tmp_path / name, 3, seed=n) for n, name in enumerate(["mine", "dogs"]))
    common = ["--max_train_steps", "8", "--cache_latents", "off", "--dataloader_num_workers", workers]
    common += prior_words(classes)
    expected = digest(run_train(tiny_base, mine, tmp_path / "out", *common))
    pictures = list(mine.iterdir()) if workers == "0" else list(classes.iterdir())
    kept = {path: path.read_bytes() for path in pictures}

    def change() -> None:
        for path in pictures:
            path.write_bytes(b"")

    change_after(monkeypatch, 1, change)
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, mine, tmp_path / "cut", *common)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert f"{pictures[0].parent}/photo-" in said
    assert (
        f"{CHANGED}. Once the picture is as it was, --resume_from_checkpoint latest continues the run" in said
    )
    assert "Traceback" not in said
    ((done, _),) = checkpoint_folders.list_checkpoints(tmp_path / "cut")
    assert 1 <= done < 8  # loaders are some steps ahead
    for path, data in kept.items():
        path.write_bytes(data)
    monkeypatch.undo()
    adapter = run_train(tiny_base, mine, tmp_path / "cut", *common, "--resume_from_checkpoint", "latest")
    assert digest(adapter) == expected


@pytest.mark.trains
def test_a_photo_that_one_process_cannot_read_ends_both_for_its_reason(
    tiny_base, photos_dir, tmp_path, monkeypatch, capfd
):
    real, words = photos.load, ["--max_train_steps", "2", "--cache_latents", "off"]

    def load(photo: photos.Photo, reduced_to: int | None = None):
        is_lost = os.environ.get("RANK") == "1"
        path = photo.path.with_name("lost.png") if is_lost else photo.path
        return real(dataclasses.replace(photo, path=path), reduced_to)

    def work() -> object:
        try:
            run_train(tiny_base, photos_dir, tmp_path / "out", *words)
        except SystemExit as end:
            return end.code
        return 0

    monkeypatch.setattr(photos, "load", load)
    assert on_processes(work) == [1, 1]
    said = capfd.readouterr().err
    assert said.count(f"error: {photos_dir / 'lost.png'} cannot be read: No such file") == 2
    assert "died" not in said
