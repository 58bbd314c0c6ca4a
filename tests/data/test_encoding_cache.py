"""The files of encodings: never read as something they are not, and removed when they are old."""

import dataclasses
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import train_dreambooth_lora as train
from dreambooth.bases import families, loading, prompts
from dreambooth.data import decode_cache, encoding_cache, encodings, photos
from dreambooth.data.crops import Crops
from dreambooth.data.encoding_cache import EncodingCache, Entry
from dreambooth.files import checkpoint_folders
from dreambooth.io import writer
from dreambooth.io.errors import UserError
from dreambooth.options.training import BaseOptions
from tests import tiny
from tests.data.encoding import (
    ALONE,
    CAPTIONED,
    CPU,
    FLAG,
    ON_DISK,
    encoded_photo,
    entries_in,
    photo_of,
    spy,
)
from tests.running import digest, prior_words, run_train

# --- files that are not as they were written


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    others = sorted(
        other
        for other in path.parent.glob("*.safetensors")
        if other != path and other.name[:4] == path.name[:4]
    )
    header = int.from_bytes(data[:8], "little")
    content = {
        "cut off": data[: len(data) // 2],
        "empty": b"",
        "one bit": data[:-1] + bytes([data[-1] ^ 1]),
        "one bit of the header": data[:20] + bytes([data[20] ^ 1]) + data[21:],
        "another file": others[0].read_bytes(),
        "no hash": data.replace(b'"sha256"', b'"sha257"'),
        "text": b"<!DOCTYPE html>",
        "zeros": data[: 8 + header] + bytes(len(data) - 8 - header),
    }
    path.write_bytes(content[how])


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["latents", "prompt"])
@pytest.mark.parametrize(
    "how",
    ["cut off", "empty", "one bit", "one bit of the header", "another file", "no hash", "text", "zeros"],
)
def test_a_damaged_entry_is_encoded_anew_and_it_alone(
    kept, tiny_base, mine, tmp_path, start, capsys, how, kind
):
    shutil.copytree(kept, tmp_path / "kept")
    whole = entries_in(kept, kind)
    victim = sorted(whole)[-1]
    damage(tmp_path / "kept" / victim, how)
    assert entries_in(tmp_path / "kept", kind) != whole
    done = start(
        tiny_base, mine, tmp_path / "run", *ON_DISK, str(tmp_path / "kept"), *CAPTIONED, "--num_threads", "1"
    )
    assert (len(done.pictures), len(done.prompts)) == ((1, 0) if kind == "latents" else (0, 1))
    assert entries_in(tmp_path / "kept", kind) == whole
    assert (
        f"1 files in {tmp_path / 'kept'} were damaged and have been encoded again: {victim}"
        in capsys.readouterr().out
    )


def test_an_entry_of_another_shape_is_encoded_anew_though_its_hash_holds(tmp_path):
    told: list[str] = []
    entry = Entry("latents-a", {"mean": (2, 2)})
    cache = EncodingCache(tmp_path, told.append)
    assert not cache.has(entry)
    cache.store(entry, {"mean": torch.ones(2, 2)})
    assert EncodingCache(tmp_path, told.append).has(entry)
    for shapes in ({"mean": (4,)}, {"mean": (2, 2), "std": (2, 2)}, {"std": (2, 2)}):
        assert not EncodingCache(tmp_path, told.append).has(Entry("latents-a", shapes))
    (tmp_path / "latents-b.safetensors").write_bytes((tmp_path / "latents-a.safetensors").read_bytes())
    assert not cache.has(Entry("latents-b", {"mean": (2, 2)}))
    assert (cache.damaged, told, cache.in_memory) == (["latents-b.safetensors"], [], {})


@pytest.mark.trains
def test_a_file_that_breaks_during_training_ends_the_run_by_name_and_it_goes_on(
    tiny_base, photos_dir, tmp_path, monkeypatch, capsys
):
    common = [*ON_DISK, str(tmp_path / "kept"), "--max_train_steps", "6"]
    whole = run_train(tiny_base, photos_dir, tmp_path / "whole", *common)
    real, steps = train.Training.step, []

    def step(self, number, *others):
        real(self, number, *others)
        steps.append(number)
        if number == 1:
            for path in (tmp_path / "kept").glob("latents-*"):
                path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(train.Training, "step", step)
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path / "cut", *common)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "kept" / "latents-") in said
    assert "With --resume_from_checkpoint latest the run continues and encodes it again" in said
    assert steps == [0, 1]
    assert [step for step, _ in checkpoint_folders.list_checkpoints(tmp_path / "cut")] == [2]
    monkeypatch.undo()
    assert digest(
        run_train(tiny_base, photos_dir, tmp_path / "cut", *common, "--resume_from_checkpoint", "latest")
    ) == digest(whole)


def test_a_photo_that_changes_after_it_was_checked_is_not_taken_for_the_one_that_was(tiny_base, tmp_path):
    """Else its latents would be found under the other's name ever after."""
    photo = photo_of(tmp_path, (64, 64))
    tiny.make_photos(tmp_path, 1, seed=5)
    with pytest.raises(UserError, match=r"photo-0\.png has changed since the run was started; restore it"):
        encoded_photo(families.find(BaseOptions(str(tiny_base))), photo)
    photo.path.unlink()
    with pytest.raises(UserError, match=r"photo-0\.png cannot be read: No such file"):
        encoded_photo(families.find(BaseOptions(str(tiny_base))), photo)


def test_a_photo_that_cannot_be_unpacked_any_more_is_named(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"no picture")
    photo = photos.Photo(path, (64, 64), hashlib.sha256(b"no picture").hexdigest(), "")
    with pytest.raises(UserError) as refusal:
        photos.load(photo)
    assert (
        str(refusal.value)
        == f"{path}: not a whole picture (Pillow does not recognize it); save it again or remove it"
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_base_that_changes_while_it_is_read_gives_no_entry(
    tiny_base, photos_dir, tmp_path, monkeypatch, part
):
    """Else what the new weights make would be found under the name of the old ones ever after."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (path,) = (base / part).glob("*.safetensors")

    def change(*args: Any) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))

    spy(monkeypatch, loading, "load_vae" if part == "vae" else "load_encoders", change)
    with pytest.raises(
        UserError, match=rf"the base has changed while it was read: {base / part}; start again"
    ):
        run_train(base, photos_dir, tmp_path / "run", *ON_DISK, str(tmp_path / "kept"))
    assert entries_in(tmp_path / "kept", "latents" if part == "vae" else "prompt") == {}


def test_other_pixels_of_the_same_file_and_other_arithmetic_are_other_entries(
    tiny_base, tmp_path, monkeypatch
):
    base, photo = families.find(BaseOptions(str(tiny_base))), photo_of(tmp_path, (64, 64))
    names = set()
    for changed in (photo, photo, dataclasses.replace(photo, pixels_sha256="other")):
        names |= set(encoded_photo(base, changed).cache.in_memory)
    assert len(names) == 2
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx2": True, "cpu_name": "another"}
    )
    assert not names & set(encoded_photo(base, photo).cache.in_memory)


@pytest.mark.trains
def test_each_entry_that_is_looked_for_can_be_the_last(tiny_base, tmp_path):
    """A stop that is asked for is not kept waiting by thousands of files."""
    base, photo = families.find(BaseOptions(str(tiny_base))), photo_of(tmp_path, (64, 64))
    crops = Crops(64, "lanczos", False, base.vae_stride)
    (tmp_path / "kept").mkdir()
    for expected in (2, 1):  # looked for and encoded; looked for
        check = Mock()
        encodings.encode_photos(
            EncodingCache(tmp_path / "kept", print), base, [(photo, False, crops)], CPU, ALONE, check
        )
        assert check.call_count == expected


# --- folders


@pytest.mark.parametrize("where", ["a file", "beside the photos", "beside the class images"])
def test_a_folder_that_cannot_hold_encodings_is_refused_before_models_load(
    tiny_base, mine, tmp_path, no_models, where
):
    (tmp_path / "file").write_text("")
    (tmp_path / "class").mkdir()
    folder = {
        "a file": tmp_path / "file" / "kept",
        "beside the photos": mine,
        "beside the class images": tmp_path / "class" / ".." / "class",
    }[where]
    before = sorted(mine.iterdir())
    with pytest.raises(
        UserError, match=r"--encoded_dir: .* (cannot be made|must lie apart; name another folder)"
    ):
        run_train(tiny_base, mine, tmp_path / "run", *ON_DISK, str(folder), *prior_words(tmp_path / "class"))
    assert sorted(mine.iterdir()) == before
    assert list((tmp_path / "class").iterdir()) == []


@pytest.mark.parametrize("where", ["the same", "a link", "a loop"])
def test_encodings_have_a_folder_of_their_own(tiny_base, mine, tmp_path, no_models, where):
    out, folder = tmp_path / "run", tmp_path / "run"
    if where != "the same":
        folder = tmp_path / "kept"
        folder.symlink_to(out if where == "a link" else folder)
    with pytest.raises(
        UserError,
        match=r"--encoded_dir: .* cannot be made"
        if where == "a loop"
        else "--output_dir: .* is .*, which --encoded_dir names",
    ):
        run_train(tiny_base, mine, out, *ON_DISK, str(folder))


def test_somebody_else_s_entry_that_may_not_be_read_stays_as_it_is(tmp_path, monkeypatch):
    entries = [Entry(name, {"mean": (2,)}) for name in ("latents-a", "latents-b")]
    for entry in entries:
        EncodingCache(tmp_path, print).store(entry, {"mean": torch.ones(2)})
    before, real = entries_in(tmp_path), os.open

    def refused(path, flags, *others):
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *others)

    monkeypatch.setattr(os, "open", refused)
    told: list[str] = []
    cache = EncodingCache(tmp_path, told.append)
    for entry in entries:
        assert not cache.has(entry)
        cache.store(entry, {"mean": torch.zeros(2)})
        assert cache.has(entry)
        assert cache.read(entry)["mean"].tolist() == [0, 0]
    assert (entries_in(tmp_path), cache.damaged) == (before, [])
    said = (
        "latents-a.safetensors cannot be read (Permission denied): encodings in files that may not "
        "be read are made again and kept in memory"
    )
    assert len(told) == 1
    assert said in told[0]


def test_what_dead_runs_left_is_removed_after_a_day_and_nothing_else(tmp_path):
    cache = EncodingCache(tmp_path, print)
    name = encoding_cache.name_of("latents", {})
    left: list[str] = []
    with pytest.MonkeyPatch.context() as patch:  # killed before the file has its name
        patch.setattr(
            os, "replace", lambda source, target: left.append(shutil.copy(source, f"{source}.kept"))
        )
        cache.store(Entry(name, {"mean": (2,)}), {"mean": torch.ones(2)})
        writer.write(tmp_path / decode_cache.NAME, b"{}")
        writer.write(tmp_path / decode_cache.NAME, b"{}")
    mine = {Path(copy).rename(copy.removesuffix(".kept")) for copy in left}
    assert len(mine) == 3
    others = {tmp_path / f"{name}.safetensors", tmp_path / "notes.tmp", tmp_path / ".notes.1.tmp"}
    for path in others:
        path.write_text("")
    assert encoding_cache.sweep(tmp_path) == []
    for path in mine | others:
        os.utime(path, (0, 0))
    assert set(encoding_cache.sweep(tmp_path)) == {path.name for path in mine}
    assert set(tmp_path.iterdir()) == others


@pytest.mark.trains
def test_a_full_disk_costs_the_cache_and_not_the_run(tiny_base, mine, tmp_path, monkeypatch, capsys):
    common = ["--max_train_steps", "3", *CAPTIONED]
    whole = run_train(tiny_base, mine, tmp_path / "whole", *common)
    real, written = writer.write, []

    def fills_up(path, data, *temporary):
        if path.parent.name == "kept":
            written.append(path.name)
            if len(written) > 4:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data, *temporary)

    monkeypatch.setattr(writer, "write", fills_up)
    found = run_train(tiny_base, mine, tmp_path / "full", *ON_DISK, str(tmp_path / "kept"), *common)
    assert digest(found) == digest(whole)
    said = capsys.readouterr().out
    assert (
        said.count(
            f"warning: {tmp_path / 'kept'} cannot be written to (No space left on device): further encodings"
        )
        == 1
    )
    assert len(entries_in(tmp_path / "kept")) == 3  # after the pictures' own file
    assert len(written) == 5


def test_with_a_folder_nothing_stays_in_memory(tiny_base, tmp_path):
    base = families.find(BaseOptions(str(tiny_base)))
    found = photos.check_folder(tiny.make_photos(tmp_path / "photos", 3, (96, 64)), FLAG).photos
    crops = Crops(64, "lanczos", False, base.vae_stride)
    (tmp_path / "kept").mkdir()
    cache = EncodingCache(tmp_path / "kept", print)
    encoded = encodings.encode_photos(
        cache, base, [(photo, False, crops) for photo in found], CPU, ALONE, lambda: None
    )
    assert cache.in_memory == {}
    assert encoded.posterior(found[0], crops, (8, 0), is_mirrored=False).mean.shape == (1, 4, 8, 8)
    assert cache.in_memory == {}


def test_few_prompts_wait_on_the_device_and_many_are_read_at_each_visit():
    read: list[str] = []

    def one(prompt: str) -> prompts.PromptEmbeds:
        read.append(prompt)
        return prompts.PromptEmbeds(torch.full((1, 2, 3), float(prompt)))

    few, many = ([str(number) for number in range(count)] for count in (64, 65))
    prompt_cache = prompts.PromptCache(one, few, CPU)
    assert read == few
    assert prompt_cache.of(["7", "7", "3"]).embeds[:, 0, 0].tolist() == [7, 7, 3]
    assert read == few
    read.clear()
    prompt_cache = prompts.PromptCache(one, many, CPU)
    assert read == []
    assert prompt_cache.of(["7", "64"]).embeds[:, 0, 0].tolist() == [7, 64]
    assert read == ["7", "64"]


def test_auto_is_memory_for_up_to_64_pictures_and_disk_above_or_with_a_folder_named():
    assert encodings.mode_of("auto", 64, is_folder_given=False) == "memory"
    assert encodings.mode_of("auto", 65, is_folder_given=False) == "disk"
    assert encodings.mode_of("auto", 1, is_folder_given=True) == "disk"
    for mode in ("memory", "disk", "off"):
        assert {
            encodings.mode_of(mode, count, is_folder_given=given)
            for count in (1, 100)
            for given in (True, False)
        } == {mode}


@pytest.mark.trains
def test_loader_processes_that_load_nothing_are_said(tiny_base, photos_dir, tmp_path, start, capsys):
    said = "note: You need not use --dataloader_num_workers without --cache_latents off."
    for mode, expected in (("memory", True), ("off", False)):
        start(
            tiny_base, photos_dir, tmp_path / mode, "--cache_latents", mode, "--dataloader_num_workers", "1"
        )
        assert (said in capsys.readouterr().out) == expected


@pytest.mark.trains
def test_a_folder_that_is_named_for_nothing_is_said(tiny_base, photos_dir, tmp_path, start, capsys):
    for mode in ("memory", "off"):
        start(
            tiny_base,
            photos_dir,
            tmp_path / mode,
            "--cache_latents",
            mode,
            "--encoded_dir",
            str(tmp_path / "kept"),
        )
        assert f"note: You need not use --encoded_dir with --cache_latents {mode}." in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()
    start(tiny_base, photos_dir, tmp_path / "auto", "--encoded_dir", str(tmp_path / "kept"))
    assert len(entries_in(tmp_path / "kept")) == 4
    start(tiny_base, photos_dir, tmp_path / "own", "--cache_latents", "disk")
    assert entries_in(tmp_path / "own" / "encoded") == entries_in(tmp_path / "kept")
