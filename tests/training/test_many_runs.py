"""--runs: a table of many runs in one process, each with the bytes that it has alone."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.bases import families, loading
from dreambooth.io.errors import UserError
from dreambooth.options import run_table
from dreambooth.options.training import BaseOptions
from dreambooth.training import many_runs
from dreambooth.training.run_report import RunReport
from tests.faults.jobs import ended, forked, steps_done
from tests.running import digest, run_train, train_words

# Settings that could leave something behind in the base that all runs share.
ROWS: dict[str, list[str]] = {
    "plain": [],
    "text": ["--train_text_encoder", "--lora_dropout", "0.1"],
    "dora": ["--use_dora", "--target_preset", "full"],
    "loha": ["--adapter", "loha"],
    "oft": ["--adapter", "oft", "--oft_block_size", "8"],
    "drawn": ["--validation_prompt", "a sks dog", "--num_validation_images", "1"],
    "flipped": ["--random_flip", "--gradient_checkpointing"],
    "two": ["--train_batch_size", "2", "--rank", "2"],
}
STEPS = ["--max_train_steps", "2", "--checkpointing_steps", "1"]


def table(path: Path, rows: dict[str, list[str]]) -> Path:
    """A file of --runs with these flags."""
    lines = []
    for name, words in rows.items():
        lines.append(f"{name}:" + ("" if words else " {}"))
        flags = " ".join(words).removeprefix("--").split(" --") if words else []
        lines += [f"  {flag}: {value or 'true'}" for flag, _, value in (f.partition(" ") for f in flags)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def words_of_table(base: Path, photos: Path, out: Path, path: Path, *more: str) -> list[str]:
    return [*train_words(base, photos, out, "--runs", str(path)), *more]


def train_table(words: list[str]) -> None:
    many_runs.train(run_table.parse("", words), train.main)


def state(out: Path, name: str) -> str:
    return str(json.loads((out / name / "status.json").read_text())["state"])


@pytest.mark.trains
def test_a_table_of_eight_that_is_killed_twice_ends_with_the_adapters_of_eight_single_runs(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(RunReport, "_page", lambda self: "a page takes a second of each run")
    path, out = table(tmp_path / "runs.yaml", ROWS), tmp_path / "table"
    words = words_of_table(tiny_base, photos_dir, out, path, *STEPS)
    for name, step in (("text", 1), ("flipped", 1)):
        child = forked(lambda: train_table(words), tmp_path / "log")
        while steps_done(out / name) < step:
            assert os.waitpid(child, os.WNOHANG)[0] == 0, (tmp_path / "log").read_text()
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
    kept = (out / "plain" / native.ADAPTER_NAME).stat()
    assert ended(forked(lambda: train_table(words), tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert (out / "plain" / native.ADAPTER_NAME).stat().st_mtime_ns == kept.st_mtime_ns  # passed over
    for name, flags in ROWS.items():
        single = run_train(tiny_base, photos_dir, tmp_path / "single" / name, *STEPS, *flags)
        assert digest(out / name / native.ADAPTER_NAME) == digest(single), name
    page = (out / "runs.html").read_text(encoding="utf-8")
    assert "8 finished" in page
    assert all(f'href="{name}/report.html"' in page for name in ROWS)


def test_wrong_rows_are_named_before_any_run_starts(tiny_base, photos_dir, tmp_path, capsys):
    words = words_of_table(tiny_base, photos_dir, tmp_path / "out", tmp_path / "runs.yaml")
    for content, problems in (
        ("good: {}\nelsewhere: {output_dir: x}\n", ["elsewhere: output_dir cannot differ between runs"]),
        ("good: {}\ndry: {dry_run: true}\n", ["dry: dry_run cannot differ between runs"]),
        (
            "good: {}\nlow: {rank: 0}\nmisspelt: {ranc: 4}\n",
            ["low: --rank must be at least 1", "misspelt: no flag 'ranc'; did you mean 'rank'?"],
        ),
        ("a/b: {}\n", ["'a/b' cannot be the name of a run"]),
        ("a: {}\nA: {}\n", ["a is the name of two runs"]),
        ("- a\n", ["must be a table of runs"]),
        ("a: 3\n", ["a: must be a table of `flag: value` lines, got int"]),
    ):
        (tmp_path / "runs.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit) as ended_with:
            run_table.parse("", words)
        assert ended_with.value.code == 2
        error = capsys.readouterr().err
        assert all(problem in error for problem in problems), error
    assert not (tmp_path / "out").exists()


def test_a_table_needs_what_it_needs(tmp_path, capsys):
    path = table(tmp_path / "runs.yaml", {"a": [], "b": []})
    words = train_words(tmp_path, tmp_path, tmp_path / "out", "--runs", str(path))
    at = words.index("--output_dir")
    for more, problem in (
        (["--overwrite"], "--overwrite does not work with --runs"),
        (["--resume_from_checkpoint=latest"], "--resume_from_checkpoint does not work with --runs"),
        (["--run-number", "3"], "--run_number must be the number of a run of the table, from 1 to 2, got 3"),
    ):
        with pytest.raises(SystemExit):
            run_table.parse("", [*words, *more])
        assert problem in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_table.parse("", [*words[:at], *words[at + 2 :]])
    assert "give --output_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_table.parse("", [*train_words(tmp_path, tmp_path, tmp_path), "--run_number", "1"])
    assert "--run_number needs --runs" in capsys.readouterr().err


def test_a_table_is_named_on_the_command_line_only(tmp_path, capsys):
    """In a --config file --runs would be passed over, and one run be trained in place of the table."""
    path, config = table(tmp_path / "runs.yaml", {"a": []}), tmp_path / "config.yaml"
    config.write_text(f"runs: {path}\n", encoding="utf-8")
    words = train_words(tmp_path, tmp_path, tmp_path / "out", "--config", str(config))
    for more in ([], ["--runs", str(path)]):
        with pytest.raises(SystemExit) as ended_with:
            run_table.parse("", [*words, *more])
        assert ended_with.value.code == 2
        assert "--runs is in a --config file" in capsys.readouterr().err


def test_wrong_photos_of_any_row_end_the_table_before_its_first_run(
    tiny_base, photos_dir, tmp_path, no_models
):
    (tmp_path / "empty").mkdir()
    empty, path = ["--instance_data_dir", str(tmp_path / "empty")], tmp_path / "runs.yaml"
    table(path, {"good": [], "none": empty, "gone": ["--init_adapter", "nowhere"]})
    with pytest.raises(UserError) as error:
        train_table(words_of_table(tiny_base, photos_dir, tmp_path / "out", path, *STEPS))
    assert f"--runs {path}: none: --instance_data_dir" in str(error.value)
    assert f"--runs {path}: gone: --init_adapter" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.trains
def test_a_run_that_fails_is_the_only_one(tiny_base, photos_dir, tmp_path, monkeypatch, capsys):
    """It fails in its first step; the one before it and the one after it are trained."""
    real = train.Training.micro_step

    def micro_step(self, batch):
        if self.options.run.output_dir.endswith("bad"):
            raise ZeroDivisionError("a fault")
        return real(self, batch)

    path, out = table(tmp_path / "runs.yaml", {"one": [], "bad": [], "two": []}), tmp_path / "out"
    words = words_of_table(tiny_base, photos_dir, out, path, "--max_train_steps", "1")
    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "micro_step", micro_step)
        with pytest.raises(SystemExit) as failed:
            train_table(words)
    assert failed.value.code == 1
    assert [state(out, name) for name in ("one", "bad", "two")] == ["finished", "failed", "finished"]
    error = capsys.readouterr().err
    assert "ZeroDivisionError: a fault" in error  # with its traceback: it is no mistake of the user's
    assert "1 of 3 runs failed: bad; the same command tries them again" in error
    assert "2 finished, 1 failed" in (out / "runs.html").read_text(encoding="utf-8")

    train_table([*words, "--run_number", "2"])
    assert state(out, "bad") == "finished"
    train_table(words)
    assert "3 finished" in (out / "runs.html").read_text(encoding="utf-8")

    # another table in the same folder is refused, and one that cannot go on, before any run starts
    table(path, {"one": ["--rank", "2"], "bad": ["--max_train_steps", "2"], "two": [], "new": []})
    (out / "new").mkdir()
    (out / "new" / "report.html").write_text("a user's")
    with pytest.raises(UserError) as refusal:
        train_table(words)
    problems = str(refusal.value)
    for said in (
        "one: --output_dir:",
        "holds another run",
        "one: In a table give the run another name, or move its folder away",
        "bad: --resume_from_checkpoint latest:",
        "no checkpoint",
        "new: --output_dir:",
        "holds report.html",
    ):
        assert said in problems


def test_parts_that_are_kept_have_the_same_weights_and_nothing_else_in_common(tiny_base):
    base = families.find(BaseOptions(str(tiny_base)))
    cpu, names = torch.device("cpu"), ("unet", "text_encoder", "vae")
    alone = {name: loading.load_part(base, name, torch.float32, cpu) for name in names}
    with loading.parts_kept():
        for name in names:
            first = loading.load_part(base, name, torch.float32, cpu)
            second = loading.load_part(base, name, torch.float32, cpu)
            pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
            for (key, one), (_, other) in pairs:
                assert one is not other
                assert one.data_ptr() == other.data_ptr()
                assert torch.equal(one, alone[name].get_parameter(key))
                assert one.stride() == alone[name].get_parameter(key).stride()
            first.added = torch.nn.Linear(1, 1)
            assert not hasattr(second, "added")
            assert not hasattr(loading.load_part(base, name, torch.float32, cpu), "added")
