"""One run per output folder: the lock on it, and what may change when a run is resumed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import train_dreambooth_lora as train
from dreambooth.adapter_files import native, reading, run_info
from dreambooth.bases import loading
from dreambooth.files import checkpoint_folders, locks
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import as_table, parse
from dreambooth.options.resolved import resolve
from dreambooth.options.training import RunOptions, TrainOptions
from dreambooth.training import checkpoints, checks, run_folder, run_identity
from tests import tiny
from tests.running import adapter_after, digest, metrics, prior_words, run_train, train_words


@pytest.fixture(scope="module")
def finished(tiny_base, photos_dir, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints at 2 and 4."""
    out = tmp_path_factory.mktemp("finished")
    run_train(tiny_base, photos_dir, out, "--max_train_steps", "4", "--checkpointing_steps", "2")
    return out


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): digest(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", ".written.jsonl", "status.json")
    }


def in_child(work) -> int:
    """Exit status of a forked process that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except UserError:
            os._exit(2)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- the lock


@pytest.mark.trains
def test_a_second_run_in_the_same_folder_is_refused_and_the_first_one_named(
    tiny_base, photos_dir, tmp_path, capfd
):
    def second():
        try:
            run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "1")
        except UserError as error:
            print(error, flush=True)
            raise

    with locks.hold(tmp_path, "--output_dir"):
        assert in_child(second) == 2
    said = capfd.readouterr().out
    assert f"--output_dir: another run is at work in {tmp_path}: process {os.getpid()} on" in said
    assert os.listdir(tmp_path) == [".lock"]
    assert in_child(second) == 0


def test_the_lock_of_a_process_that_was_killed_is_free_at_once(tmp_path):
    """Even while a child that it forked, such as a loader worker, still runs."""
    ready, done = os.pipe()
    owner = os.fork()
    if owner == 0:
        with locks.hold(tmp_path, "--output_dir"):
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            os.write(done, b"1")
            time.sleep(30)
    os.read(ready, 1)
    with pytest.raises(UserError, match="another run is at work"), locks.hold(tmp_path, "--output_dir"):
        pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    with locks.hold(tmp_path, "--output_dir") as notes:
        assert notes == []


@pytest.mark.trains
def test_class_images_that_another_run_is_making_are_waited_for(tiny_base, photos_dir, tmp_path, monkeypatch):
    """The second run then finds the set complete, and both train on the same pictures."""
    waited = []
    words = [*prior_words(tmp_path / "class"), "--max_train_steps", "1"]
    (tmp_path / "class").mkdir()
    ready, release = os.pipe(), os.pipe()
    owner = os.fork()
    if owner == 0:
        with locks.hold(tmp_path / "class", "--class_data_dir"):
            os.write(ready[1], b"1")
            os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        os.write(release[1], b"1")
        os.waitpid(owner, 0)

    monkeypatch.setattr(locks.time, "sleep", sleep)
    run_train(tiny_base, photos_dir, tmp_path / "out", *words)
    assert waited
    assert len(list((tmp_path / "class").glob("*.png"))) == 3


# --- what may change


REFUSED = {
    "rank": (["--rank", "8"], "--rank was 4 and is 8"),
    "learning rate": (["--learning_rate", "1e-3"], "--learning_rate was 0.0005 and is 0.001"),
    "prompt": (
        ["--instance_prompt", "a photo of qwe dog"],
        "--instance_prompt was a photo of sks dog and is a photo of qwe dog",
    ),
    "resolution": (["--resolution", "72"], "--resolution was 64 and is 72"),
    "seed": (["--seed", "2"], "--seed was 1 and is 2"),
    "slots": (
        ["--gradient_accumulation_steps", "2"],
        "--gradient_accumulation_steps times the processes was 1 and is 2",
    ),
    "text encoder": (["--train_text_encoder"], "--train_text_encoder was False and is True"),
    "dropout": (["--lora_dropout", "0.1"], "--lora_dropout was 0.0 and is 0.1"),
    "sync": (["--gradient_sync", "ddp"], "--gradient_sync was exact and is ddp"),
}


@pytest.mark.trains
@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "anew"])
@pytest.mark.parametrize("what", REFUSED)
def test_another_run_in_the_folder_is_refused_with_the_difference(
    finished, tiny_base, photos_dir, no_models, what, resumed
):
    """Before any model is loaded; the folder stays as it is."""
    before = files(finished)
    words, difference = REFUSED[what]
    more = ["--resume_from_checkpoint", "latest"] if resumed else []
    with pytest.raises(UserError) as refusal:
        run_train(tiny_base, photos_dir, finished, "--max_train_steps", "6", *words, *more)
    assert difference in str(refusal.value)
    assert files(finished) == before
    assert json.loads((finished / run_folder.STATUS).read_text())["state"] == "finished"


@pytest.mark.trains
def test_all_differences_are_in_one_message(finished, tiny_base, photos_dir):
    with pytest.raises(UserError) as refusal:
        run_train(
            tiny_base,
            photos_dir,
            finished,
            "--rank",
            "8",
            "--learning_rate",
            "1",
            "--resume_from_checkpoint",
            "latest",
        )
    assert "--rank was 4" in str(refusal.value)
    assert "--learning_rate was" in str(refusal.value)


@pytest.mark.trains
def test_another_base_is_refused(finished, tiny_v_base, photos_dir):
    with pytest.raises(UserError, match="the base's weights were"):
        run_train(
            tiny_v_base, photos_dir, finished, "--resume_from_checkpoint", "latest", "--max_train_steps", "6"
        )


FREE = [
    "--checkpointing_steps",
    "3",
    "--checkpoints_total_limit",
    "2",
    "--dataloader_num_workers",
    "1",
    "--gradient_checkpointing",
]


@pytest.mark.trains
def test_more_steps_and_what_leaves_the_old_ones_as_they_were_may_change(
    finished, tiny_base, photos_dir, plain_run, tmp_path
):
    """The bytes are an unbroken run's.

    Interval and limit of checkpoints, loader workers, gradient checkpointing, validation, time limit differ.
    """
    more = [
        *FREE,
        "--validation_prompt",
        "a dog",
        "--num_validation_images",
        "1",
        "--max_train_minutes",
        "60",
    ]
    words = ["--max_train_steps", "6", "--resume_from_checkpoint", str(finished / "checkpoint-2"), *more]
    resumed = run_train(tiny_base, photos_dir, tmp_path / "resumed", *words)
    assert digest(resumed) == digest(adapter_after(plain_run, 6))


@pytest.mark.trains
def test_another_number_of_steps_under_a_schedule_that_depends_on_it_is_said(
    tiny_base, photos_dir, tmp_path, capsys
):
    words = ["--lr_scheduler", "cosine", "--checkpointing_steps", "2"]
    run_train(tiny_base, photos_dir, tmp_path, *words, "--max_train_steps", "2")
    run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        *words,
        "--max_train_steps",
        "4",
        "--resume_from_checkpoint",
        "latest",
    )
    assert "--max_train_steps was 2 and is 4: --lr_scheduler depends on it" in capsys.readouterr().out


@pytest.mark.trains
def test_another_thread_count_is_said(finished, tiny_base, photos_dir, tmp_path, capsys):
    words = [
        "--max_train_steps",
        "4",
        "--resume_from_checkpoint",
        str(finished / "checkpoint-4"),
        "--num_threads",
        "2",
    ]
    run_train(tiny_base, photos_dir, tmp_path, *words)
    assert "threads was 1 and is 2: the result may differ in its last bits" in capsys.readouterr().out


@pytest.mark.trains
def test_a_record_of_a_setting_that_is_gone_is_said_and_the_run_goes_on(
    finished, tiny_base, photos_dir, tmp_path, capsys, monkeypatch
):
    """Older checkpoints record the version of layers for CPUs that were removed."""
    real = checkpoints.read_state

    def read_state(checkpoint: checkpoint_folders.Content) -> dict[str, Any]:
        state = real(checkpoint)
        return state | {"surroundings": state["surroundings"] | {"layers": 2}}

    monkeypatch.setattr(checkpoints, "read_state", read_state)
    words = ["--max_train_steps", "5", "--resume_from_checkpoint", str(finished / "checkpoint-4")]
    run_train(tiny_base, photos_dir, tmp_path, *words)
    said = "layers was 2 and is not recorded by this version: the result may differ in its last bits"
    assert said in capsys.readouterr().out


@pytest.mark.trains
@pytest.mark.parametrize("change", ["added", "removed", "changed"])
def test_changed_photos_are_refused_by_name_unless_allowed(tiny_base, tmp_path, capsys, change):
    photos = tiny.make_photos(tmp_path / "photos", 3)
    out = tmp_path / "out"
    run_train(tiny_base, photos, out, "--max_train_steps", "2", "--checkpointing_steps", "2")
    if change == "added":
        (photos / "photo-3.png").write_bytes(
            tiny.make_photos(tmp_path / "more", 1, seed=5).joinpath("photo-0.png").read_bytes()
        )
    elif change == "removed":
        (photos / "photo-2.png").unlink()
    else:
        tiny.make_photos(photos, 1, seed=7)
    name = {"added": "photo-3.png", "removed": "photo-2.png", "changed": "photo-0.png"}[change]
    words = ["--max_train_steps", "3", "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError) as refusal:
        run_train(tiny_base, photos, out, *words)
    assert f"1 instance pictures {change} ({name})" in str(refusal.value)
    run_train(tiny_base, photos, out, *words, "--allow_data_change")
    assert (
        f"1 instance pictures {change} ({name}); the run goes on with the present ones"
        in capsys.readouterr().out
    )


@pytest.mark.trains
def test_photos_may_lie_elsewhere_if_they_are_the_same(finished, tiny_base, photos_dir, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in photos_dir.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    words = ["--max_train_steps", "4", "--resume_from_checkpoint", str(finished / "checkpoint-2")]
    assert digest(run_train(tiny_base, moved, tmp_path / "out", *words)) == digest(
        finished / native.ADAPTER_NAME
    )


@pytest.mark.trains
def test_overwrite_removes_the_run_that_was_there_and_nothing_else(tiny_base, photos_dir, tmp_path):
    out = tmp_path / "out"
    run_train(tiny_base, photos_dir, out, "--max_train_steps", "4", "--checkpointing_steps", "1")
    (out / "notes.txt").write_text("mine")
    anew = run_train(
        tiny_base,
        photos_dir,
        out,
        "--max_train_steps",
        "2",
        "--checkpointing_steps",
        "2",
        "--rank",
        "2",
        "--overwrite",
    )
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (out / "notes.txt").read_text() == "mine"
    assert [record["step"] for record in metrics(out)] == [1, 2]
    assert digest(anew) == digest(
        run_train(tiny_base, photos_dir, tmp_path / "other", "--max_train_steps", "2", "--rank", "2")
    )


@pytest.mark.trains
def test_a_mistake_beside_overwrite_removes_nothing(finished, tiny_base, tmp_path):
    before = files(finished)
    with pytest.raises(UserError, match="there is no folder"):
        run_train(tiny_base, tmp_path / "missing", finished, "--overwrite")
    assert files(finished) == before


@pytest.mark.trains
def test_a_finished_run_is_not_trained_over_unasked(tiny_base, photos_dir, tmp_path):
    """The same command line would cut its metrics and, stopped early, overwrite the finished adapter."""
    words = ["--max_train_steps", "2", "--checkpointing_steps", "1"]
    run_train(tiny_base, photos_dir, tmp_path, *words)
    before = files(tmp_path)
    with pytest.raises(
        UserError,
        match="holds this run already; --resume_from_checkpoint latest continues it, --overwrite starts it",
    ):
        run_train(tiny_base, photos_dir, tmp_path, *words)
    assert files(tmp_path) == before
    run_train(tiny_base, photos_dir, tmp_path, *words, "--overwrite")
    after = files(tmp_path)
    with_times = {"metrics.jsonl", "report.html"}
    assert {name for name in before if before[name] != after.get(name)} <= with_times


@pytest.mark.trains
def test_a_run_without_a_seed_that_left_nothing_starts_again_with_the_seed_it_drew(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    """A run killed before its first checkpoint is not refused for the seed that it drew."""
    words = train_words(
        tiny_base, photos_dir, tmp_path, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"
    )
    at = words.index("--seed")
    del words[at : at + 2]
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "train", lambda self: None)  # it dies before it has saved anything
        train.main(parse(TrainOptions, "", words))
    seed = json.loads((tmp_path / run_folder.IDENTITY).read_text())["flags"]["seed"]
    train.main(parse(TrainOptions, "", words))
    assert run_info.of(reading.read_additive(tmp_path).metadata)["seed"] == seed


@pytest.mark.parametrize("was", [None, "fixed", "pixels", "latents"])
@pytest.mark.parametrize("now", ["fixed", "pixels", "latents"])
@pytest.mark.parametrize("other_pictures", [False, True])
def test_random_crops_are_cut_from_what_they_were_cut_from(tmp_path, was, now, other_pictures):
    """Whether or not pictures have changed. Older versions cut pixels and recorded nothing."""
    given = parse(TrainOptions, "", train_words(tmp_path, tmp_path, tmp_path))
    flags = as_table(resolve(given, "sd", seed=0, mixed_precision="no"))

    def identity(crops: Any, picture: str) -> dict[str, Any]:
        pictures = {"instance": {"photo.png": picture}}
        counts: dict[str, Any] = {"slots": 1, "max_steps": 2, "text_steps": 2}
        return run_identity.identity(
            flags, base="b", pictures=pictures, captions={}, start=None, crops=crops, **counts
        )

    before, after = (
        identity(None if crops == "fixed" else crops, hash_)
        for crops, hash_ in ((was, "a"), (now, "b" if other_pictures else "a"))
    )
    assert after["flags"]["crops"] == now
    if was is None:
        del before["flags"]["crops"]
    differences = run_identity.differences(before, after)
    differs = now != "fixed" and was != "fixed" and now != (was or "pixels")
    said = f"random crops were cut from {was or 'pixels'} and are cut from {now}: "
    said += "--cache_latents off cuts pixels, any other latents"
    assert [each.phrase for each in differences if not each.is_of_data] == [said] * differs
    assert any(each.is_of_data for each in differences) == other_pictures


@pytest.mark.parametrize("varies", [False, True])
def test_the_trigger_word_is_compared_where_it_decides_which_tags_vary(tmp_path, varies):
    """Elsewhere it is compared as a part of the captions."""

    def flags(*words: str) -> dict[str, Any]:
        words = (*words, "--caption_column", "text", *(["--shuffle_caption"] if varies else []))
        given = as_table(parse(TrainOptions, "", train_words(tmp_path, tmp_path, tmp_path, *words)))
        counts: dict[str, Any] = {"slots": 1, "max_steps": 2, "text_steps": 2}
        return run_identity.identity(given, base="b", pictures={}, captions={}, start=None, **counts)["flags"]

    assert (flags("--trigger_word", "sks") != flags()) == varies


@pytest.mark.trains
def test_going_on_from_another_folder_s_checkpoint_does_not_touch_the_run_that_is_here(
    finished, tiny_base, photos_dir, tmp_path
):
    here = tmp_path / "here"
    run_train(tiny_base, photos_dir, here, "--max_train_steps", "1", "--rank", "2")
    before = files(here)
    words = ["--max_train_steps", "6", "--resume_from_checkpoint", str(finished / "checkpoint-2")]
    with pytest.raises(UserError, match="holds another run"):
        run_train(tiny_base, photos_dir, here, *words)
    assert files(here) == before
    run_train(tiny_base, photos_dir, tmp_path / "new", *words)
    assert run_folder.read_identity(tmp_path / "new") is not None


@pytest.mark.trains
def test_what_was_for_one_start_only_is_not_in_run_yaml(tiny_base, photos_dir, tmp_path):
    """Otherwise --config run.yaml would remove the run, or refuse to resume it."""
    run_train(
        tiny_base, photos_dir, tmp_path, "--max_train_steps", "2", "--checkpointing_steps", "1", "--overwrite"
    )
    words = [
        "--config",
        str(tmp_path / "run.yaml"),
        "--max_train_steps",
        "3",
        "--resume_from_checkpoint",
        "latest",
    ]
    train.main(parse(TrainOptions, "", words))
    assert len(metrics(tmp_path)) == 3


@pytest.mark.trains
def test_later_checkpoints_outlive_a_run_that_goes_on_from_an_earlier_one(
    finished, tiny_base, photos_dir, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    words = [
        "--max_train_steps",
        "3",
        "--checkpointing_steps",
        "1",
        "--checkpoints_total_limit",
        "1",
        "--resume_from_checkpoint",
        "checkpoint-2",
    ]
    run_train(tiny_base, photos_dir, out, *words)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_checkpoints_that_no_run_accounts_for_are_not_mixed_with_new_ones(tiny_base, photos_dir, tmp_path):
    """They may be the reference script's."""
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(UserError, match=r"checkpoint-500 and no run\.json of its run"):
        run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "1")


@pytest.mark.trains
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"flags": {}}'])
def test_a_damaged_record_of_the_run_is_said(tiny_base, photos_dir, tmp_path, content):
    (tmp_path / run_folder.IDENTITY).write_text(content)
    with pytest.raises(UserError, match=r"run\.json"):
        run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "1")
    with pytest.raises(UserError, match=r"run\.json"):  # it may be the user's
        run_train(tiny_base, photos_dir, tmp_path, "--max_train_steps", "1", "--overwrite")
    assert (tmp_path / run_folder.IDENTITY).read_text() == content


# --- where a run starts


@pytest.mark.trains
def test_a_run_starts_from_another_run_s_adapter(finished, tiny_base, photos_dir, tmp_path):
    """At a learning rate of 0 it stays that adapter, which is not what a new run starts from."""
    started = run_train(
        tiny_base,
        photos_dir,
        tmp_path,
        "--init_adapter",
        str(finished),
        "--learning_rate",
        "0",
        "--max_train_steps",
        "1",
    )
    one, other = load_file(started), load_file(finished / native.ADAPTER_NAME)
    assert all((one[key] == other[key]).all() for key in other)
    assert any(tensor.any() for key, tensor in one.items() if "lora_B" in key)


@pytest.mark.trains
def test_an_adapter_of_another_kind_is_no_start(finished, tiny_base, photos_dir, tmp_path, no_models):
    with pytest.raises(UserError, match="rank 4; --rank must be the same"):
        run_train(tiny_base, photos_dir, tmp_path, "--init_adapter", str(finished), "--rank", "8")
    with pytest.raises(UserError, match=r"--init_adapter: .*missing: there is no such file"):
        run_train(tiny_base, photos_dir, tmp_path, "--init_adapter", str(tmp_path / "missing"))


@pytest.mark.trains
def test_an_adapter_of_the_text_encoder_too_asks_for_the_flag(tiny_base, photos_dir, tmp_path):
    run_train(tiny_base, photos_dir, tmp_path / "both", "--train_text_encoder", "--max_train_steps", "1")
    with pytest.raises(UserError, match="add --train_text_encoder"):
        run_train(tiny_base, photos_dir, tmp_path / "one", "--init_adapter", str(tmp_path / "both"))


@pytest.mark.trains
def test_of_two_ranks_that_differ_that_of_the_unet_is_named(tiny_base, photos_dir, tmp_path):
    """--rank is also the text encoder's; without --train_text_encoder there is no --text_encoder_rank."""
    steps = ("--max_train_steps", "1")
    run_train(tiny_base, photos_dir, tmp_path / "first", "--train_text_encoder", *steps)
    start = ("--init_adapter", str(tmp_path / "first"), "--rank", "2")
    for attempt in range(8):  # safetensors gives tensors in any order
        with pytest.raises(UserError, match=r"has unet of rank 4; --rank must be the same"):
            run_train(tiny_base, photos_dir, tmp_path / f"next-{attempt}", *start)


# ---- a folder that is no longer where it was, or has lost its checkpoints


@pytest.mark.trains
@pytest.mark.parametrize(("word", "is_edited"), [("latest", False), ("auto", True)])
def test_a_copied_run_goes_on_in_its_folder_and_keeps_an_edited_run_yaml(
    word, is_edited, finished, tmp_path, monkeypatch
):
    now = tmp_path / "copy"
    shutil.copytree(finished, now)
    options = (now / "run.yaml").read_text() + "# edited\n" * is_edited
    (now / "run.yaml").write_text(options)
    before = files(finished)
    monkeypatch.chdir("/")
    words = ["--config", str(now / "run.yaml"), "--resume_from_checkpoint", word, "--max_train_steps", "6"]
    train.main(parse(TrainOptions, "", words))
    assert files(finished) == before
    assert (now / "checkpoint-6").is_dir()
    if is_edited:
        assert (now / "run.yaml").read_text() == options
    else:
        assert yaml.safe_load((now / "run.yaml").read_text())["output_dir"] == str(now)


def run_without_checkpoints(finished: Path, folder: Path, **status: object) -> Path:
    """A copy of a run that lacks its checkpoints, with another end of the run."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    path = folder / run_folder.STATUS
    path.write_text(json.dumps(json.loads(path.read_text()) | status))
    return folder


ENDS = {
    "finished": ({}, 1),
    "stopped after a step": ({"state": "stopped", "step": 2}, 500),
    "failed after a step": ({"state": "failed", "step": 1}, 500),
    "killed after a checkpoint was due": ({"state": "running", "step": 0}, 1),
    "no status": (None, 500),
}


@pytest.mark.trains
@pytest.mark.parametrize("word", ["latest", "auto"])
@pytest.mark.parametrize("end", ENDS)
def test_a_record_without_a_checkpoint_is_an_error(
    end, word, finished, tiny_base, photos_dir, no_models, tmp_path
):
    status, every = ENDS[end]
    out = run_without_checkpoints(finished, tmp_path / "out", **(status or {}))
    if status is None:
        (out / run_folder.STATUS).unlink()
    before = files(out)
    words = ["--resume_from_checkpoint", word, "--max_train_steps", "6", "--checkpointing_steps", str(every)]
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {word}: .* and no checkpoint"):
        run_train(tiny_base, photos_dir, out, *words)
    assert files(out) == before


@pytest.mark.trains
@pytest.mark.parametrize(
    ("state", "step", "every"), [("running", 0, 500), ("failed", 0, 1), ("stopped", 0, 1)], ids=str
)
def test_a_run_that_ended_before_a_checkpoint_was_due_starts_again(finished, tmp_path, state, step, every):
    """A job script gives the same command until the run is finished."""
    out = run_without_checkpoints(finished, tmp_path / "out", state=state, step=step)
    checks.check_no_steps_lost("latest", RunOptions(output_dir=str(out), checkpointing_steps=every))
    checks.check_no_steps_lost("latest", RunOptions(output_dir=str(tmp_path / "absent")))


@pytest.mark.trains
def test_a_tokenizer_that_was_moved_is_the_same_one(tiny_base, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        shutil.copytree(tiny_base / "tokenizer", folder)
    assert loading.tokenizer_identity(str(first)) == loading.tokenizer_identity(str(second))
    (second / "vocab.txt").write_text("other")
    assert loading.tokenizer_identity(str(first)) != loading.tokenizer_identity(str(second))
    assert loading.tokenizer_identity("org/tokenizer") == "org/tokenizer"
