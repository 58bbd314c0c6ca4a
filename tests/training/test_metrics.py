"""metrics.jsonl: what a resumed run keeps of it."""

import json
import os
from pathlib import Path

import pytest
from accelerate import Accelerator

from dreambooth.io import writer
from dreambooth.training import metrics

RECORDS = [b'{"step": 1, "loss": 0.5}', b'{"step": 2, "loss": NaN}', b'{"step": 3, "loss": 0.25}']


def begin(folder: Path, first_step: int) -> metrics.Progress:
    progress = metrics.Progress(
        Accelerator(cpu=True),
        folder / "metrics.jsonl",
        first_step=first_step,
        last_step=9,
        images_per_step=1,
        phases={},
    )
    progress.bar.close()
    return progress


def resumed(folder: Path, content: bytes) -> list[bytes]:
    """The lines of metrics.jsonl after a resume from step 2 of a run that wrote `content` after its begin."""
    begin(folder, 0)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(content)
    begin(folder, 2)
    return (folder / "metrics.jsonl").read_bytes().splitlines()


ODD = {
    "half a line in the middle": b'{"step": 2, "lo',
    "the end of a line": b'tep": 2, "loss": 0.5}',
    "zeros": b"\0" * 4096,
    "zeros before a line": b'\0\0{"step": 2}',
    "not UTF-8": b'{"step": 2, "loss": "\xff\xfe"}',
    "a UTF-16 mark": b"\xff\xfe{\0}\0",
    "deep": b"[" * 100_000,
    "deep objects": b'{"step":' * 5000,
    "a list": b"[1, 2]",
    "a number": b"2",
    "no step": b'{"loss": 0.5}',
    "a step that is text": b'{"step": "2"}',
    "a step that is true": b'{"step": true}',
    "a step that is negative": b'{"step": -1}',
    "a step of 400 digits": b'{"step": ' + b"9" * 400 + b"}",
    "a loss that is text": b'{"step": 1, "loss": "low"}',
    "a meter without bands": b'{"step": 1, "meter": {"gap": {"mean": 1.0, "noise": 0.1}}}',
    "a meter of another number of bands": json.dumps(
        {"step": 1, "meter": {"gap": {"mean": 1.0, "noise": 0.1, "bands": [1.0], "noise_bands": [0.1]}}}
    ).encode(),
    "scores that are a number": b'{"step": 1, "judge": 5}',
    "a reading without its phase": b'{"step": 1, "memory": {"seconds": 3.0}}',
    "a choice without its reason": b'{"step": 1, "best": {"step": 1}}',
    "an empty line": b"",
    "a note": b"lowered the rate here",
}


@pytest.mark.parametrize("line", ODD.values(), ids=ODD.keys())
def test_an_odd_line_costs_itself_and_no_resume(line, tmp_path, capsys):
    content = b"\n".join([RECORDS[0], line, *RECORDS[1:], b""])
    assert resumed(tmp_path, content) == RECORDS[:2]
    assert capsys.readouterr().out.count("its 2 records up to step 2 are kept") == 1
    assert (tmp_path / ".bad-metrics.jsonl").read_bytes() == content


@pytest.mark.parametrize("end", [b"", b'{"step": 4, "lo', b"\0\0\0", b"\xff"])
def test_half_a_record_at_the_end_is_dropped_in_silence(end, tmp_path, capsys):
    assert resumed(tmp_path, b"\n".join([*RECORDS, end])) == RECORDS[:2]
    assert "note" not in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == [".written.jsonl", "metrics.jsonl"]


def test_a_file_that_was_edited_after_its_run_keeps_its_records(tmp_path):
    begin(tmp_path, 0)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*RECORDS, b""]))
    progress = begin(tmp_path, 3)
    progress.close()
    content = (tmp_path / "metrics.jsonl").read_bytes() + b'{"step'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    begin(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == RECORDS[:2]
    assert (tmp_path / ".bad-metrics.jsonl").read_bytes() == content


def test_a_kill_while_the_file_is_made_new_leaves_the_old_one(tmp_path, monkeypatch):
    begin(tmp_path, 0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join([*RECORDS, b""]))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_new", die)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == RECORDS


def test_no_record_is_written_through_a_link(tmp_path, capsys):
    progress = begin(tmp_path, 0)
    (tmp_path / "diary").write_bytes(b"a user's")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "diary")
    for step in (1, 2):
        progress._write({"step": step})
    assert (tmp_path / "diary").read_bytes() == b"a user's"
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1


def test_a_disk_that_is_full_for_a_while_costs_whole_records_only(tmp_path, monkeypatch):
    progress = begin(tmp_path, 0)
    real, calls = os.write, []

    def half(descriptor: int, data: memoryview) -> int:
        calls.append(data)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:5] if len(calls) == 1 else data)

    progress._write({"step": 1})
    monkeypatch.setattr(os, "write", half)
    progress._write({"step": 2})
    monkeypatch.undo()
    progress._write({"step": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_records_of_evaluations_are_read_again_up_to_the_step_of_a_resume(tmp_path):
    progress = begin(tmp_path, 0)
    for step in (0, 2, 4):
        progress.evaluation(step, "meter", {"drift": step / 8}, seconds=1.5)
    progress.evaluation(2, "judge", {"ID": 0.5}, pictures=3)
    progress.close()
    resumed_progress = begin(tmp_path, 2)
    assert resumed_progress.evaluations == [
        {"step": 0, "meter": {"drift": 0.0}, "seconds": 1.5},
        {"step": 2, "meter": {"drift": 0.25}, "seconds": 1.5},
        {"step": 2, "judge": {"ID": 0.5}, "pictures": 3},
    ]
    assert resumed_progress.is_evaluated(2, "judge")
    assert not resumed_progress.is_evaluated(0, "judge")
