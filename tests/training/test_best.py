"""best/: what it holds while a run goes on, and after a run that was killed and resumed."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from dreambooth.evaluation import choice
from dreambooth.io import writer
from dreambooth.training import metrics
from dreambooth.training.best import BestAdapter

SCORES = {0: 0.0, 1: 0.5, 2: 0.4, 3: 0.6, 4: 0.3, 5: 0.7, 6: 0.1}
CHECKPOINTS = (2, 4)


class Killed(BaseException):
    """The process is killed at a write."""


@pytest.fixture(autouse=True)
def highest_score(monkeypatch):
    """The rule of these tests: the step with the highest score."""

    def choose(records: list[dict[str, Any]]) -> choice.Choice:
        scores = {record["step"]: record["meter"]["score"] for record in records if "meter" in record}
        best = max(scores, key=lambda step: scores[step])
        worse = "the score fell" if scores[max(scores)] < scores[best] else None
        return choice.Choice(best, f"its score is {scores[best]}", worse)

    monkeypatch.setattr(choice, "choose", choose)


def run(
    folder: Path, first_step: int = 0, scores: dict[int, float] = SCORES, saved: list[int] | None = None
) -> list[str]:
    """Measure and choose after every step from `first_step` on. The steps of checkpoints are added to
    `saved`. Returns what was printed."""
    said: list[str] = []
    peers = types.SimpleNamespace(is_main=True, say=said.append, broadcast=lambda value: value)
    options = types.SimpleNamespace(meter=types.SimpleNamespace(meter_steps=1))
    start: Any = types.SimpleNamespace(peers=peers, output_dir=folder, options=options)
    saver: Any = types.SimpleNamespace(saved=first_step, pack=lambda step: f"adapter {step}".encode())
    progress = metrics.Progress(
        Accelerator(cpu=True),
        folder / "metrics.jsonl",
        first_step=first_step,
        last_step=max(scores),
        images_per_step=1,
        phases={},
    )
    progress.bar.close()
    best = BestAdapter(start, saver)
    for step in range(first_step, max(scores) + 1):
        if step in CHECKPOINTS:
            saver.saved = step
            if saved is not None:
                saved.append(step)
        if not progress.is_evaluated(step, "meter"):
            progress.evaluation(step, "meter", {"score": scores[step]})
        best.update(step, progress)
    progress.close()
    best.say()
    return said


def content(folder: Path) -> dict[str, bytes]:
    names = ["metrics.jsonl", *(f"best/{path.name}" for path in (folder / "best").iterdir())]
    return {name: (folder / name).read_bytes() for name in names}


def test_best_holds_the_bytes_of_the_chosen_step_and_says_why(tmp_path):
    said = run(tmp_path)
    assert (tmp_path / "best/pytorch_lora_weights.safetensors").read_bytes() == b"adapter 5"
    assert json.loads((tmp_path / "best/why.json").read_text()) == {"step": 5, "why": "its score is 0.7"}
    assert said == [f"best: step 5: its score is 0.7 ({tmp_path}/best/pytorch_lora_weights.safetensors)"]


def test_every_choice_is_recorded_and_no_more_candidates_are_kept_than_can_be_chosen(tmp_path):
    run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    choices = [record["best"]["step"] for record in map(json.loads, lines) if "best" in record]
    assert choices == [0, 1, 1, 3, 3, 5, 5]
    candidates = sorted(path.name for path in (tmp_path / "best").glob("candidate-*"))
    # a run that is resumed from the newest checkpoint, of step 4, begins with step 3 as its best
    assert candidates == ["candidate-000003.safetensors", "candidate-000005.safetensors"]


def test_a_run_killed_at_any_write_and_resumed_has_the_same_best(tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    straight.mkdir()
    run(straight)
    for number in range(1000):
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch:
            left = iter(range(number))

            def counted(function, left=left):
                def called(*args, **kwargs):
                    if next(left, None) is None:
                        raise Killed
                    return function(*args, **kwargs)

                return called

            for name in ("write", "append", "remove"):
                patch.setattr(writer, name, counted(getattr(writer, name)))
            saved = [0]
            try:
                run(folder, saved=saved)
                break
            except Killed:
                pass
        run(folder, saved[-1])
        assert content(folder) == content(straight), number
    assert number > 30


def test_a_resumed_run_goes_back_to_the_best_of_its_first_step(tmp_path):
    run(tmp_path)
    run(tmp_path, 4, {**SCORES, 5: 0.2})
    assert (tmp_path / "best/pytorch_lora_weights.safetensors").read_bytes() == b"adapter 3"


def test_a_full_disk_is_a_warning_and_the_next_choice_is_written(tmp_path, monkeypatch):
    from dreambooth.files.ownership import WrittenFiles

    write = WrittenFiles.write

    def fails_once(self, name, data, **more):
        if name.endswith("candidate-000003.safetensors"):
            raise OSError(28, "No space left on device")
        return write(self, name, data, **more)

    monkeypatch.setattr(WrittenFiles, "write", fails_once)
    said = run(tmp_path)
    assert said[0] == "warning: best/ of step 3 cannot be written: No space left on device"
    assert (tmp_path / "best/pytorch_lora_weights.safetensors").read_bytes() == b"adapter 5"
