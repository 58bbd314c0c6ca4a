"""Runs that end early: what ends them, what they leave, and that a resumed run equals an unbroken one."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import generate_class_images
import train_dreambooth_lora as train
from dreambooth.adapter_files import native, reading, run_info
from dreambooth.bases import autoencoder, pipelines
from dreambooth.data import class_images
from dreambooth.files import pictures
from dreambooth.io import writer
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions
from dreambooth.runtime import stops
from tests.running import adapter_after, digest, metrics, prior_words, run_train

STEPS = ["--max_train_steps", "5", "--checkpointing_steps", "50"]


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def at_step(monkeypatch, step: int, action) -> None:
    """Do `action` in the middle of a step, counted from 1: after its forward and backward pass."""
    real = train.Training.micro_step

    def wrapped(self, batch):
        result = real(self, batch)
        if batch.step + 1 == step:
            action()
        return result

    monkeypatch.setattr(train.Training, "micro_step", wrapped)


@pytest.fixture
def unbroken(plain_run) -> str:
    """The digest of the adapter that five steps give."""
    return digest(adapter_after(plain_run, 5))


def resume(tiny_base, photos_dir, out: Path, *more: str) -> str:
    return digest(run_train(tiny_base, photos_dir, out, *STEPS, "--resume_from_checkpoint", "latest", *more))


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """SIGHUP as outside nohup, also where the tests themselves were started with it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.trains
@pytest.mark.parametrize("number", stops.SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_with_its_last_step_saved(
    tiny_base, photos_dir, tmp_path, monkeypatch, no_nohup, unbroken, number
):
    """The status is 128 + n, the current step is dropped, the adapter is written; resumed, it has the same
    bytes."""
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path, *STEPS)
    assert stop.value.code == 128 + number
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert status(tmp_path) | {"pid": 0, "host": ""} == {
        "state": "stopped",
        "step": 3,
        "reason": f"stopped by {number.name}",
        "exit_code": 128 + number,
        "pid": 0,
        "host": "",
        "cuda_graph": "launched: only CUDA GPUs have graphs",
    }
    assert run_info.of(reading.read_additive(tmp_path).metadata)["steps"] == 3
    monkeypatch.undo()
    assert resume(tiny_base, photos_dir, tmp_path) == unbroken
    assert status(tmp_path)["state"] == "finished"
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.trains
def test_signals_belong_to_their_owner_again_after_a_run(tiny_base, photos_dir, tmp_path):
    before = [signal.getsignal(number) for number in stops.SIGNALS]
    run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "1")
    assert [signal.getsignal(number) for number in stops.SIGNALS] == before


@pytest.mark.trains
def test_a_signal_while_class_images_are_made_stops_between_two_sampling_steps(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    """Finished pictures stay; the next run completes the set, which equals that of an unbroken run."""
    real, calls = pipelines._after_each_step, []

    def counting(check):
        def counted():
            calls.append(1)
            if len(calls) == 3:  # chunks of 2 pictures, 2 steps each: in the second chunk
                os.kill(os.getpid(), signal.SIGTERM)
            check()

        return real(counted)

    monkeypatch.setattr(pipelines, "_after_each_step", counting)
    words = [*prior_words(tmp_path / "class"), *STEPS]
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path / "out", *words)
    assert stop.value.code == 143
    assert len(calls) == 3
    assert sorted(path.name for path in (tmp_path / "class").glob("*.png")) == [
        class_images.file_name(0),
        class_images.file_name(1),
    ]
    assert status(tmp_path / "out")["step"] == 0
    assert not (tmp_path / "out" / native.ADAPTER_NAME).exists()
    monkeypatch.undo()
    again = run_train(tiny_base, photos_dir, tmp_path / "out", *words)
    other = [*prior_words(tmp_path / "class-2"), *STEPS]
    assert digest(again) == digest(run_train(tiny_base, photos_dir, tmp_path / "other", *other))


def test_a_signal_ends_the_making_of_class_images(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(class_images, "_save", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    words = f"--pretrained_model_name_or_path {tiny_base} --class_data_dir {tmp_path} --num_class_images 4"
    words += " --sample_batch_size 1"
    with pytest.raises(SystemExit) as stop:
        generate_class_images.main(
            parse(
                ClassImageOptions,
                "",
                [*words.split(), "--class_prompt", "a dog", "--class_inference_steps", "1"],
            )
        )
    assert stop.value.code == 130


@pytest.mark.trains
def test_a_signal_while_photos_are_encoded_stops_before_the_next_photo(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    real, calls = autoencoder.encode, []

    def counted(*args):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(autoencoder, "encode", counted)
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path, *STEPS)
    assert (stop.value.code, len(calls)) == (143, 1)


@pytest.mark.trains
def test_a_signal_in_a_validation_saves_the_step_before_it(
    tiny_base, photos_dir, tmp_path, monkeypatch, unbroken
):
    real, calls = pipelines.pipeline_of, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 2:  # the first validation is before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(pipelines, "pipeline_of", stopped)
    validation = ["--validation_prompt", "a dog", "--num_validation_images", "1", "--validation_epochs", "1"]
    with pytest.raises(SystemExit) as stop:  # an epoch is three steps
        run_train(tiny_base, photos_dir, tmp_path, *STEPS, *validation)
    assert stop.value.code == 143
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    assert resume(tiny_base, photos_dir, tmp_path, *validation) == unbroken


def test_the_second_signal_ends_the_process_at_once():
    """If it comes a second or more after the first: launchers repeat their signal within a second."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        watch = stops.Watch()
        os.write(told, b"1")
        while watch.received is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)  # at once again
        time.sleep(0.1)
        os.write(told, b"2")
        watch.received_at -= 1  # a second later
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    assert os.read(ready, 1) == b"2", "the repeated signal killed it"
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    _, result = os.waitpid(child, 0)
    assert os.WTERMSIG(result) == signal.SIGTERM


def test_what_nohup_wants_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watch = stops.Watch()
        os.kill(os.getpid(), signal.SIGHUP)
        watch.check()
        watch.close()
        stops.default_signals()
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.trains
def test_the_time_limit_ends_the_run_with_status_75_and_it_goes_on_from_there(
    tiny_base, photos_dir, tmp_path, monkeypatch, unbroken
):
    clock = [0.0]
    monkeypatch.setattr(stops.time, "monotonic", lambda: clock[0])
    at_step(monkeypatch, 3, lambda: clock.__setitem__(0, 600.0))
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path, *STEPS, "--max_train_minutes", "10")
    assert stop.value.code == stops.EXIT_TIME == 75
    assert status(tmp_path)["reason"] == "--max_train_minutes 10 are over"
    assert status(tmp_path)["step"] == 2
    monkeypatch.undo()
    assert resume(tiny_base, photos_dir, tmp_path) == unbroken


@pytest.mark.trains
def test_a_run_whose_launcher_died_saves_and_ends(tiny_base, photos_dir, tmp_path, monkeypatch, unbroken):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    real = os.getppid
    at_step(monkeypatch, 2, lambda: monkeypatch.setattr(os, "getppid", lambda: 1))
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path, *STEPS)
    assert stop.value.code == 1
    assert status(tmp_path)["reason"] == "the launcher died"
    monkeypatch.setattr(os, "getppid", real)
    monkeypatch.undo()
    assert resume(tiny_base, photos_dir, tmp_path) == unbroken


def test_a_run_started_from_a_shell_outlives_the_shell(monkeypatch):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    watch = stops.Watch()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    watch.check()
    watch.close()


@pytest.mark.trains
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_out_is_said_with_what_helps(
    tiny_base, photos_dir, tmp_path, monkeypatch, capsys, unbroken, error
):
    def run_out():
        raise error

    at_step(monkeypatch, 3, run_out)
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path, *STEPS)
    assert stop.value.code == 1
    assert (
        "out of memory: go on with --resume_from_checkpoint latest and --auto_batch"
        in capsys.readouterr().err
    )
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("failed", 2)
    monkeypatch.undo()
    assert resume(tiny_base, photos_dir, tmp_path) == unbroken


@pytest.mark.trains
def test_an_error_of_the_program_s_own_keeps_its_traceback_and_the_steps_so_far(
    tiny_base, photos_dir, tmp_path, monkeypatch, unbroken
):
    def fail():
        raise ZeroDivisionError("a bug")

    at_step(monkeypatch, 3, fail)
    with pytest.raises(ZeroDivisionError):
        run_train(tiny_base, photos_dir, tmp_path, *STEPS)
    assert status(tmp_path)["reason"] == "ZeroDivisionError: a bug"
    monkeypatch.undo()
    assert resume(tiny_base, photos_dir, tmp_path) == unbroken


@pytest.mark.trains
def test_an_update_cut_in_half_is_not_saved(tiny_base, photos_dir, tmp_path, monkeypatch):
    """Some parameters would be a step ahead of the others."""

    def half(self, *args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(SystemExit):
        run_train(tiny_base, photos_dir, tmp_path, *STEPS)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not (tmp_path / native.ADAPTER_NAME).exists()


# --- a full disk


@pytest.mark.trains
def test_a_checkpoint_that_does_not_fit_is_said_and_the_run_goes_on(
    tiny_base, photos_dir, tmp_path, monkeypatch, capsys, unbroken
):
    real, in_checkpoints = writer.write_new, []

    def full(path, data):
        if path.parent != tmp_path:
            in_checkpoints.append(path)
            if len(in_checkpoints) == 1:
                raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(writer, "write_new", full)
    adapter = run_train(tiny_base, photos_dir, tmp_path, *STEPS, "--checkpointing_steps", "2")
    assert digest(adapter) == unbroken
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    said = capsys.readouterr().out
    assert "warning: checkpoint-2 could not be saved" in said
    assert "No space left on device" in said
    assert "bytes" in said


@pytest.mark.trains
def test_an_adapter_that_does_not_fit_in_the_end_is_an_error(
    tiny_base, photos_dir, tmp_path, monkeypatch, capsys, unbroken
):
    real = writer.write

    def full(path, data, *temporary):
        if path.name == native.ADAPTER_NAME:
            raise writer.WriteError(28, "No space left on device", str(path))
        real(path, data, *temporary)

    monkeypatch.setattr(writer, "write", full)
    with pytest.raises(SystemExit) as stop:
        run_train(tiny_base, photos_dir, tmp_path, *STEPS)
    assert stop.value.code == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    monkeypatch.undo()
    assert resume(tiny_base, photos_dir, tmp_path) == unbroken


@pytest.mark.trains
def test_records_and_pictures_that_do_not_fit_do_not_end_the_run(
    tiny_base, photos_dir, tmp_path, monkeypatch, capsys, unbroken
):
    """metrics.jsonl, validation pictures and status.json are worth less than the steps."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    real, real_append = writer.write, writer.append
    monkeypatch.setattr(
        writer,
        "append",
        lambda path, *data, **named: (
            full() if path.name == "metrics.jsonl" else real_append(path, *data, **named)
        ),
    )
    monkeypatch.setattr(pictures, "png", full)
    monkeypatch.setattr(
        writer,
        "write",
        lambda path, *rest: full() if path.name == "status.json" else real(path, *rest),
    )
    validation = ["--validation_prompt", "a dog", "--num_validation_images", "1"]
    assert digest(run_train(tiny_base, photos_dir, tmp_path, *STEPS, *validation)) == unbroken
    said = capsys.readouterr()
    assert said.out.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert "pictures of step 5 cannot be written" in said.out
    assert "status.json cannot be written" in said.out


@pytest.mark.trains
def test_a_checkpoint_that_failed_at_its_interval_is_written_when_the_run_is_stopped(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    real, calls = writer.write_new, []

    def full_once(path, data):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(writer, "write_new", full_once)
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run_train(tiny_base, photos_dir, tmp_path, *STEPS, "--checkpointing_steps", "3")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
