"""Runs that keep best/: its adapter, --stop_when_worse on one process and two, resumed, and bad input."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import infer
import train_dreambooth_lora as train
from dreambooth.evaluation import choice
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import TrainOptions
from tests import tiny
from tests.running import adapter_after, digest, main_on_two_processes, run_train, train_words

BEST, WORSE_FROM = 2, 4
METERED = (
    *("--max_train_steps", "6", "--meter_steps", "2", "--checkpointing_steps", "3"),
    *("--class_prompt", "a photo of dog"),
)
BEST_FILE = "best/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[str, ...]:
    """The flags of a run that ends early, and trains on the photos of other runs."""
    other = tiny.make_photos(tmp_path_factory.mktemp("held_out"), count=1, seed=1)
    return (*METERED, "--stop_when_worse", "--holdout_data_dir", str(other))


@pytest.fixture
def fixed_rule(monkeypatch):
    """In place of the rule: step BEST is the best once it is measured, and step WORSE_FROM is worse."""

    def choose(records: list[dict[str, Any]]) -> choice.Choice:
        last = max(record["step"] for record in records)
        return choice.Choice(min(last, BEST), "it is", "it got worse" if last >= WORSE_FROM else None)

    monkeypatch.setattr(choice, "choose", choose)


def status(out: Path) -> tuple[Any, ...]:
    record = json.loads((out / "status.json").read_text())
    return tuple(record[name] for name in ("state", "step", "exit_code", "reason"))


@pytest.mark.trains
@pytest.mark.usefixtures("fixed_rule")
def test_best_has_the_adapter_of_its_step_and_infer_draws_with_it(
    tiny_base, photos_dir, plain_run, tmp_path, capsys
):
    out = tmp_path / "run"
    last = run_train(tiny_base, photos_dir, out, *METERED)
    assert digest(out / BEST_FILE) == digest(adapter_after(plain_run, BEST))
    assert digest(last) == digest(adapter_after(plain_run, 6))
    lines = f"best: step 2: it is ({out / BEST_FILE})\npage of the run: {out / 'report.html'}\n"
    assert capsys.readouterr().out.count(lines) == 1
    drawn = tmp_path / "drawn"
    words = f"--pretrained_model_name_or_path {tiny_base} --adapter {out / 'best'} --output_dir {drawn}"
    draw = [*words.split(), "--prompt", "a dog", "--num_inference_steps", "2"]
    infer.main(parse(InferOptions, "", draw))
    (picture,) = json.loads((drawn / "images.json").read_text())
    sha256 = hashlib.sha256((out / BEST_FILE).read_bytes()).hexdigest()
    assert picture["adapters"][0]["sha256"] == sha256[:16]
    # --overwrite removes it
    run_train(tiny_base, photos_dir, out, "--max_train_steps", "1", "--overwrite")
    assert list((out / "best").iterdir()) == []


@pytest.mark.trains
@pytest.mark.usefixtures("fixed_rule")
def test_stop_when_worse_ends_a_finished_run_early_and_so_does_its_resumed_run(
    tiny_base, photos_dir, plain_run, stopped, tmp_path, capsys
):
    last = run_train(tiny_base, photos_dir, tmp_path, *stopped)
    assert digest(last) == digest(adapter_after(plain_run, WORSE_FROM))
    assert digest(tmp_path / BEST_FILE) == digest(adapter_after(plain_run, BEST))
    reason = "--stop_when_worse: ended after step 4 of 6: it got worse"
    assert status(tmp_path) == ("finished", WORSE_FROM, 0, reason)
    assert capsys.readouterr().out.splitlines().count(reason) == 1
    records = (tmp_path / "metrics.jsonl").read_text()
    run_train(tiny_base, photos_dir, tmp_path, *stopped, "--resume_from_checkpoint", "latest")
    assert digest(last) == digest(adapter_after(plain_run, WORSE_FROM))
    assert status(tmp_path) == ("finished", WORSE_FROM, 0, reason)
    assert _evaluations((tmp_path / "metrics.jsonl").read_text()) == _evaluations(records)


def _evaluations(text: str) -> list[dict[str, Any]]:
    """The records of evaluations, without their times."""
    records = [record for record in map(json.loads, text.splitlines()) if {"meter", "best"} & record.keys()]
    for record in records:
        record.get("meter", {}).pop("seconds", None)
    return records


@pytest.mark.trains
@pytest.mark.usefixtures("fixed_rule")
def test_two_processes_end_early_together(tiny_base, photos_dir, stopped, tmp_path):
    words = [*stopped, "--gradient_accumulation_steps"]
    alone = run_train(tiny_base, photos_dir, tmp_path / "alone", *words, "2")
    options = parse(TrainOptions, "", train_words(tiny_base, photos_dir, tmp_path / "two", *words, "1"))
    main_on_two_processes(train.main, options)
    assert status(tmp_path / "two") == status(tmp_path / "alone")
    assert digest(tmp_path / "two" / alone.name) == digest(alone)
    assert digest(tmp_path / "two" / BEST_FILE) == digest(tmp_path / "alone" / BEST_FILE)


@pytest.mark.trains
def test_the_named_step_is_that_of_the_rule_on_the_records(tiny_base, photos_dir, tmp_path, capsys):
    words = ["--learning_rate", "1e-2", "--holdout", "1"]
    run_train(tiny_base, photos_dir, tmp_path, *METERED, *words)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    chosen = choice.choose(list(map(json.loads, lines)))
    assert chosen.step in (2, 4, 6)
    why = {"step": chosen.step, "why": chosen.why}
    assert json.loads((tmp_path / "best/why.json").read_text()) == why
    assert [record["best"] for record in map(json.loads, lines) if "best" in record][-1] == why
    assert f"best: step {chosen.step}: {chosen.why} (" in capsys.readouterr().out


@pytest.mark.trains
def test_a_run_that_can_name_no_step_says_why_in_one_line(tiny_base, photos_dir, tmp_path, capsys):
    run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "1", "--meter_steps", "1", *METERED[-2:])
    line = "best: no step is named: no photo is held out (--holdout or --holdout_data_dir)"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert not (tmp_path / "best").exists()


@pytest.mark.trains
def test_a_run_that_measures_nothing_says_nothing_of_a_best_step(tiny_base, photos_dir, tmp_path, capsys):
    run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "1")
    assert "best" not in capsys.readouterr().out
    assert not (tmp_path / "best").exists()


def test_a_users_file_in_best_is_refused_before_models_load(tiny_base, photos_dir, tmp_path, no_models):
    (tmp_path / "best").mkdir()
    (tmp_path / BEST_FILE).write_bytes(b"a user's")
    with pytest.raises(UserError, match=r"--output_dir: .* holds best/pytorch_lora_weights.safetensors"):
        run_train(tiny_base, photos_dir, tmp_path, *METERED)
    assert (tmp_path / BEST_FILE).read_bytes() == b"a user's"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--holdout 1", "--stop_when_worse needs measurements: give --meter_steps"),
        ("--meter_steps 5", "--stop_when_worse needs photos that are not trained on: give --holdout or"),
    ],
)
def test_stop_when_worse_needs_the_meter_and_a_held_out_photo(
    words, message, tiny_base, photos_dir, tmp_path, capsys
):
    words = [*words.split(), "--class_prompt", "a photo of dog", "--stop_when_worse"]
    with pytest.raises(SystemExit):
        parse(TrainOptions, "", train_words(tiny_base, photos_dir, tmp_path, *words))
    assert message in capsys.readouterr().err
