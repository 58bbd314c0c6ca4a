"""--auto_batch: passes get smaller when memory runs out, and the training stays the same up to rounding."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dreambooth_lora as train
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.training import recomputation
from tests import running
from tests.running import digest, run_train, train_words

FOUR_ROWS = ("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_train_steps", "3")


def lacking_memory(monkeypatch, most_rows: int, *, from_call: int = 1, rank: str | None = None) -> list[int]:
    """From its `from_call`-th pass on, passes of more than `most_rows` rows have too little memory; on the
    process of `rank` alone if it is given. Returns the rows of all passes so far."""
    real, rows = train.Training.forward_backward, []

    def forward_backward(self, inputs):
        rows.append(len(inputs["timesteps"]) // len(self.sources))
        is_here = rank is None or os.environ.get("RANK") == rank
        if is_here and len(rows) >= from_call and rows[-1] > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, inputs)

    monkeypatch.setattr(train.Training, "forward_backward", forward_backward)
    return rows


def farthest(one: Path, other: Path) -> float:
    """The largest difference of two adapter files, in parts of the largest value."""
    tensors, others = load_file(one), load_file(other)
    assert tensors.keys() == others.keys()
    largest = max(tensor.abs().max() for tensor in tensors.values())
    return float(max((tensors[key] - others[key]).abs().max() for key in tensors) / largest)


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


@pytest.fixture(scope="module")
def plain(tiny_base, photos_dir, tmp_path_factory) -> Path:
    """The adapter of a run with two passes of two rows in a step."""
    torch.set_num_threads(1)
    return run_train(tiny_base, photos_dir, tmp_path_factory.mktemp("plain") / "out", *FOUR_ROWS)


@pytest.mark.trains
def test_one_pass_takes_all_rows_of_a_step_if_memory_has_room(
    plain, tiny_base, photos_dir, tmp_path, monkeypatch
):
    rows = lacking_memory(monkeypatch, 4)
    adapter = run_train(tiny_base, photos_dir, tmp_path / "out", *FOUR_ROWS, "--auto_batch")
    assert rows == [4, 4, 4]
    assert farthest(adapter, plain) < 1e-3
    assert status(tmp_path / "out")["passes"] == {"rows": 4, "gradient_checkpointing": False}


@pytest.mark.trains
def test_out_of_memory_halves_the_passes_of_the_same_rows_and_is_recorded(
    plain, tiny_base, photos_dir, tmp_path, monkeypatch, capsys
):
    rows = lacking_memory(monkeypatch, 1, from_call=2)
    adapter = run_train(tiny_base, photos_dir, tmp_path / "out", *FOUR_ROWS, "--auto_batch")
    assert rows == [4, 4, 2, *[1] * 8]  # step 2 is tried with 4 rows and with 2
    assert farthest(adapter, plain) < 1e-3
    assert status(tmp_path / "out")["passes"] == {"rows": 1, "gradient_checkpointing": False}
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    events = [record for record in map(json.loads, lines) if "out_of_memory" in record]
    assert [(event["step"], event["out_of_memory"]["rows"]) for event in events] == [(2, 2), (2, 1)]
    said = capsys.readouterr().out
    assert said.count("out of memory in step 2") == 2
    assert "from now on a pass takes one row of the 4 of a micro-batch" in said
    losses = [record["loss"] for record in running.metrics(tmp_path / "out")]
    assert losses == pytest.approx([r["loss"] for r in running.metrics(plain.parent)], rel=1e-4)


@pytest.mark.trains
def test_a_row_that_is_too_large_is_checkpointed_and_then_the_run_ends_with_its_last_step(
    plain, tiny_base, photos_dir, tmp_path, monkeypatch, capsys
):
    words = [*FOUR_ROWS, "--auto_batch", "--train_text_encoder"]
    rows = lacking_memory(monkeypatch, 0, from_call=2)
    enabled = []
    monkeypatch.setattr(recomputation, "enable", lambda unet, encoders: enabled.append(len(list(encoders))))
    with pytest.raises(SystemExit) as ended:
        run_train(tiny_base, photos_dir, tmp_path / "out", *words)
    assert ended.value.code == 1
    assert (rows, enabled) == ([4, 4, 2, 1, 1], [1])
    assert "with passes of one row and gradient checkpointing: lower" in capsys.readouterr().err
    assert status(tmp_path / "out")["step"] == 1
    assert status(tmp_path / "out")["passes"] == {"rows": 1, "gradient_checkpointing": True}


@pytest.mark.trains
def test_a_resumed_run_goes_on_with_the_smaller_passes_to_the_same_bytes(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    words = [*FOUR_ROWS, "--auto_batch", "--checkpointing_steps", "1"]
    with monkeypatch.context() as patched:
        lacking_memory(patched, 1)
        unbroken = run_train(tiny_base, photos_dir, tmp_path / "unbroken", *words)
        run_train(tiny_base, photos_dir, tmp_path / "out", *words, "--max_train_steps", "2")
    rows = lacking_memory(monkeypatch, 4)
    resumed = run_train(tiny_base, photos_dir, tmp_path / "out", *words, "--resume_from_checkpoint", "latest")
    assert rows == [1] * 4
    assert digest(resumed) == digest(unbroken)


@pytest.mark.trains
def test_a_run_that_ran_out_of_memory_goes_on_with_auto_batch(
    plain, tiny_base, photos_dir, tmp_path, monkeypatch, capsys
):
    words = [*FOUR_ROWS, "--checkpointing_steps", "1"]
    rows = lacking_memory(monkeypatch, 1, from_call=3)  # in step 2
    with pytest.raises(SystemExit):
        run_train(tiny_base, photos_dir, tmp_path / "out", *words)
    assert "--auto_batch" in capsys.readouterr().err
    adapter = run_train(
        tiny_base, photos_dir, tmp_path / "out", *words, "--resume_from_checkpoint", "latest", "--auto_batch"
    )
    assert rows[3:] == [2, *[1] * 8]
    assert farthest(adapter, plain) < 1e-3


@pytest.mark.trains
def test_micro_batches_of_one_shape_are_kept_and_only_divided(tiny_base, photos_dir, tmp_path, monkeypatch):
    """With buckets the shapes of rows depend on the micro-batches."""
    rows = lacking_memory(monkeypatch, 1, from_call=2)
    words = [*FOUR_ROWS, "--buckets", "--max_train_steps", "1"]
    run_train(tiny_base, photos_dir, tmp_path / "out", *words, "--auto_batch")
    assert rows == [2, 2, 1, 1]


@pytest.mark.trains
def test_all_processes_step_down_together(plain, tiny_base, photos_dir, tmp_path, monkeypatch):
    """Two processes with one pass of two rows each, of which the second runs out of memory."""
    lacking_memory(monkeypatch, 1, from_call=2, rank="1")
    words = train_words(tiny_base, photos_dir, tmp_path / "out", *FOUR_ROWS, "--auto_batch")
    words[words.index("--gradient_accumulation_steps") + 1] = "1"
    running.main_on_two_processes(train.main, parse(TrainOptions, "", words))
    assert status(tmp_path / "out")["passes"] == {"rows": 1, "gradient_checkpointing": False}
    assert farthest(tmp_path / "out" / plain.name, plain) < 1e-3


@pytest.mark.parametrize("flag", ["--lora_dropout", "--text_encoder_dropout"])
def test_dropout_and_auto_batch_are_refused_together(flag, tmp_path, capsys):
    words = train_words(tmp_path, tmp_path, tmp_path, "--auto_batch", "--train_text_encoder", flag, "0.1")
    with pytest.raises(SystemExit) as ended:
        parse(TrainOptions, "", words)
    assert ended.value.code == 2
    assert f"--auto_batch does not work with {flag}" in capsys.readouterr().err
