"""Before a run writes: its folders lie apart, and --overwrite checks all that it removes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth.files import checkpoint_folders
from dreambooth.files.ownership import WrittenFiles
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.training import output_folder, run_folder
from tests.faults.ownership_faults import snapshot
from tests.running import train_words


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run with two checkpoints and a picture."""
    out = tmp_path / "out"
    out.mkdir()
    files = WrittenFiles(out)
    for name in ("run.json", "run.yaml", "metrics.jsonl", "validation/image_0.png", "README.md"):
        files.write(name, b"{}")
    for step in (1, 2):
        checkpoint_folders.publish(out, step, {"state.json": b"{}"}, {}, limit=None)
    return out


def overwrite(out: Path) -> None:
    run_folder.begin(out, {"new": 1}, "new: 1", is_resumed=False, overwrite=True)


ODD: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in ("run.json", "run.yaml", "metrics.jsonl", "README.md", "checkpoint-7")
        for kind in ODD
        if (name, kind) != ("checkpoint-7", "folder")  # a checkpoint is a folder
    ],
)
def test_an_odd_entry_is_refused_before_anything_is_removed(name, kind, run):
    (run / name).unlink(missing_ok=True)
    ODD[kind](run / name)
    before = snapshot(run)
    with pytest.raises(UserError, match=rf"^--overwrite: .* holds {name}, which is no plain file or"):
        overwrite(run)
    assert snapshot(run) == before


def test_a_file_that_changed_after_the_checks_is_refused_before_anything_is_removed(run):
    for name in ("run.json", "run.yaml"):
        data = (run / name).read_bytes()
        (run / name).write_bytes(b"edited")
        before = snapshot(run)
        with pytest.raises(UserError, match=rf"holds {name}, to be written now"):
            overwrite(run)
        assert snapshot(run) == before
        (run / name).write_bytes(data)


def test_control_overwrite_removes_the_run(run):
    (run / "holiday.png").write_bytes(b"a user's")
    overwrite(run)
    names = {path.name for path in run.iterdir()}
    assert names == {"run.json", "run.yaml", ".written.jsonl", "validation", "holiday.png"}
    assert not list((run / "validation").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--encoded_dir {0}/out", "--output_dir: .* is .*, which --encoded_dir names"),
        (
            "--encoded_dir {0}/enc --output_dir {0}/enc/out",
            "--output_dir: .* lies in .*, which --encoded_dir names",
        ),
        ("--encoded_dir {0}/out/checkpoint-5", "--encoded_dir: .* lies in .* of --output_dir"),
        ("--encoded_dir {0}/out/validation/latents", "--encoded_dir: .* lies in .* of --output_dir"),
        ("--encoded_dir {0}/out/../out/checkpoint-5", "--encoded_dir: .* lies in .* of --output_dir"),
        ("--report_to tensorboard --logging_dir checkpoint-5", "--logging_dir: .* lies in .*checkpoint-5"),
        ("--output_dir {0}/enc/dreambooth-lora --report_to tensorboard --logging_dir ..", "which --logging"),
        ("--cache_dir {0}/out", "--output_dir: .* is .*, which --cache_dir names"),
        ("--cache_dir {0}", "--output_dir: .* lies in .*, which --cache_dir names"),
        ("--encoded_dir {0}/cache/latents --cache_dir {0}/cache", "--encoded_dir: .* lies in .*--cache_dir"),
    ],
)
def test_folders_of_a_run_lie_apart(words, message, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    given = train_words(tmp_path / "base", photos, tmp_path / "out", *words.format(tmp_path).split())
    options = parse(TrainOptions, "", given)
    trackers = ["tensorboard"] if options.reports.report_to == "tensorboard" else []
    with pytest.raises(UserError, match=message):
        output_folder.check_apart_from_input(options, trackers)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--encoded_dir {0}/out/latents",
        "--encoded_dir {0}/latents",
        "--report_to tensorboard --logging_dir .",
        "--report_to tensorboard --logging_dir {0}",
        "--report_to tensorboard --logging_dir {0}/logs --encoded_dir {0}/latents --cache_dir {0}/cache",
    ],
)
def test_control_folders_that_lie_apart_are_taken(words, tmp_path):
    photos = tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    given = train_words(tmp_path / "base", photos, tmp_path / "out", *words.format(tmp_path).split())
    if "--logging_dir {0} " in f"{words} ":
        photos.rename(tmp_path.with_name(f"{tmp_path.name}-photos"))
        given += ["--instance_data_dir", str(tmp_path.with_name(f"{tmp_path.name}-photos"))]
    options = parse(TrainOptions, "", given)
    assert output_folder.check_apart_from_input(options, ["tensorboard"]) == tmp_path / "out"
