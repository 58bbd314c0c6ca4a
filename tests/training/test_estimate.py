"""--estimate: what a run will take, measured, with nothing left behind."""

import re
import tempfile
from pathlib import Path

import pytest

import train_dreambooth_lora as train
from dreambooth.io.errors import UserError
from dreambooth.options import run_table
from dreambooth.training import many_runs
from tests.running import prior_words, train_words


def estimate(base: Path, photos: Path, out: Path, *words: str) -> None:
    many_runs.train(run_table.parse("", train_words(base, photos, out, "--estimate", *words)), train.main)


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.trains
def test_an_estimate_counts_the_whole_run_and_leaves_nothing(
    tiny_base, photos_dir, tmp_path, capsys, monkeypatch
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = files(photos_dir) | files(tiny_base)
    words = ["--max_train_steps", "60", "--train_batch_size", "2", "--checkpointing_steps", "20"]
    words += ["--validation_steps", "25", "--validation_prompt", "a sks dog", "--num_validation_images", "1"]
    words += prior_words(tmp_path / "class", "--meter_steps", "30")
    estimate(tiny_base, photos_dir, tmp_path / "out", *words)
    said = capsys.readouterr().out
    for line in (
        *("start: 1 x ", "class images: 3 x ", "steps: 60 x ", "validation pictures: 7 x "),
        *("measurements: 3 x ", "checkpoints: 3 x ", "total: about ", "memory: ", "disk: about "),
        "exposures per photo: 40.0 (60 steps x 2 rows, 3 photos)",
    ):
        assert f"\n  {line}" in said, (line, said)
    seconds = re.search(r"steps: 60 x (\S+) s", said)
    assert seconds is not None
    assert 0 < float(seconds[1]) < 60
    assert str(temporary) not in said
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary"]
    assert files(photos_dir) | files(tiny_base) == before


def test_wrong_input_is_refused_before_anything_is_measured(tiny_base, tmp_path, no_models):
    with pytest.raises(UserError, match="--instance_data_dir"):
        estimate(tiny_base, tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_refused_beside_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        estimate(tmp_path, tmp_path, tmp_path / "out", "--dry_run")
    assert "--dry_run prints without loading weights and --estimate measures" in capsys.readouterr().err


def test_several_processes_are_refused(tiny_base, photos_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--estimate measures one process"):
        estimate(tiny_base, photos_dir, tmp_path / "out")
