"""Runs whose validation pictures are judged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train_dreambooth_lora as train
from dreambooth.evaluation import judges, scores
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from dreambooth.training import judging
from picturebook import subjects
from tests import tiny_judges
from tests.running import run_train, same_tensors, train_words

SUBJECT = subjects.FOLDER / "dog"
PROMPTS = ["a photo of sks dog in the snow", "a photo of sks dog at night"]
WORDS = ["--max_train_steps", "3", "--checkpointing_steps", "1", "--num_threads", "1"]
CLASS = ["--class_prompt", "a photo of dog"]
VALIDATION = ["--validation_prompt", PROMPTS[0], *CLASS]
DRAWN = ["--validation_steps", "2", "--num_validation_images", "2", "--judge_class_images", "2"]


def records(run: Path) -> dict[int, dict[str, Any]]:
    """The records of judges, by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in lines if "judge" in record}


@pytest.fixture(scope="module")
def judged_words(tiny_dino, tiny_clip, tmp_path_factory) -> list[str]:
    prompts_file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts_file.write_text("\n".join(PROMPTS))
    words = ["--validation_prompts_file", str(prompts_file), "--holdout", "1", *CLASS, *DRAWN]
    return [*WORDS, *words, "--judge_dino", str(tiny_dino), "--judge_clip", str(tiny_clip)]


@pytest.fixture(scope="module")
def judged(tiny_base, photos_dir, judged_words, tmp_path_factory) -> Path:
    return run_train(tiny_base, photos_dir, tmp_path_factory.mktemp("judged"), *judged_words).parent


@pytest.mark.trains
def test_pictures_are_judged_at_every_validation_beside_the_base(judged):
    judged_steps = records(judged)
    assert list(judged_steps) == [0, 2, 3]
    names = {"DINO", "CLIP-I", "CLIP-T"}
    for name in ("DINO", "CLIP-I"):
        endings = (
            "real",
            "DIV",
            "PRES",
            "PRES_base",
            "nearest_trained",
            "nearest_held_out",
            "copies",
        )
        names |= {f"{name}_{ending}" for ending in endings}
    assert all(record["judge"].keys() == names for record in judged_steps.values())
    assert all(record["pictures"] == 2 * 2 + 2 for record in judged_steps.values())
    first, last = judged_steps[0]["judge"], judged_steps[3]["judge"]
    assert first["DINO_PRES"] == first["DINO_PRES_base"] == last["DINO_PRES_base"] != last["DINO_PRES"]
    assert judged_steps[0]["judges"]["clip"]["words_removed"] == ["sks"]


@pytest.mark.trains
def test_scores_are_those_of_the_pictures_that_were_written(judged, photos_dir, tiny_dino, tiny_clip):
    dino = judges.load(judges.find("dino", str(tiny_dino)))
    clip = judges.load(judges.find("clip", str(tiny_clip)))
    trained = [Image.open(photos_dir / f"photo-{number}.png") for number in (0, 1)]
    names = [f"step-000002-{prompt:02d}-{number:02d}.png" for prompt in (0, 1) for number in (0, 1)]
    drawn = [Image.open(judged / "validation" / name) for name in names]
    record = records(judged)[2]["judge"]
    likeness = scores.mean_cosine(dino.embed_images(drawn), dino.embed_images(trained))
    assert record["DINO"] == pytest.approx(likeness, abs=1e-6)
    texts = ["a photo of dog in the snow"] * 2 + ["a photo of dog at night"] * 2
    cosines = scores.text_cosines(clip.embed_images(drawn), clip.embed_texts(texts))
    assert record["CLIP-T"] == pytest.approx(cosines.mean(), abs=1e-6)


@pytest.mark.trains
def test_judges_change_no_bit_of_the_adapter(judged, tiny_base, photos_dir, tmp_path):
    adapter = run_train(tiny_base, photos_dir, tmp_path, *WORDS, "--holdout", "1")
    assert same_tensors(adapter, judged / adapter.name)


@pytest.mark.trains
def test_a_run_that_ended_while_pictures_were_judged_is_resumed_with_the_same_records(
    judged, tiny_base, photos_dir, judged_words, tmp_path
):
    run = shutil.copytree(judged, tmp_path / "run")
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] < 2]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    shutil.rmtree(run / "checkpoint-3")
    run_train(tiny_base, photos_dir, run, *judged_words, "--resume_from_checkpoint", "latest")
    assert records(run) == records(judged)


@pytest.mark.trains
def test_a_picture_without_a_finite_embedding_costs_scores_and_no_run(
    judged, tiny_base, photos_dir, judged_words, tmp_path, monkeypatch, capsys
):
    run = shutil.copytree(judged, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-3")

    def zeros(self: judging.Judging, images: object) -> None:
        self.judges[0]._unit(torch.zeros(1, 8))

    monkeypatch.setattr(judging.Judging, "scores_of_subject", zeros)
    adapter = run_train(tiny_base, photos_dir, run, *judged_words, "--resume_from_checkpoint", "latest")
    assert same_tensors(adapter, judged / adapter.name)
    assert list(records(run)) == [0, 2]
    said = "warning: the pictures of step 3 have no scores: the dino judge returns values that are 0"
    assert said in capsys.readouterr().out


@pytest.mark.trains
def test_a_run_is_not_resumed_with_another_judge(
    judged, tiny_base, photos_dir, judged_words, tmp_path, no_models
):
    other = tiny_judges.build_dino(tmp_path / "other", seed=1)
    words = [*judged_words, "--judge_dino", str(other), "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=r"the hash of --judge_dino was [0-9a-f]{64} and is"):
        run_train(tiny_base, photos_dir, judged, *words)


@pytest.mark.trains
def test_the_reader_reads_pictures_of_the_drawn_world(tiny_base, tmp_path):
    words = [
        "--max_train_steps",
        "1",
        *CLASS,
        "--validation_prompt",
        PROMPTS[0],
        "--judge_reader",
        str(SUBJECT),
    ]
    words += ["--num_validation_images", "1", "--judge_class_images", "1", "--skip_final_inference"]
    run = run_train(tiny_base, SUBJECT, tmp_path, *words).parent
    record = records(run)[0]
    names = {
        "ID",
        "ID_all",
        "PA",
        "PA_all",
        "JOINT",
        "COPY",
        "PRES",
        "PRES_base",
        "LEAK",
        "LEAK_base",
        "PRIOR_TV",
    }
    assert record["judge"].keys() == names
    assert record["judge"]["PRIOR_TV"] == 0
    assert record["pictures"] == 1 + 1 + 7  # of the subject, of its class, of the seven other kinds


# --- refused before a model is loaded


def refusal(base: Path, photo_folder: Path, out: Path, *words: str) -> str:
    """The message with which a run is refused. Nothing is written."""
    with pytest.raises(UserError) as error:
        train.main(parse(TrainOptions, "", train_words(base, photo_folder, out, *words)))
    assert not (out / "metrics.jsonl").exists()
    return str(error.value)


@pytest.fixture
def refused(tiny_base, photos_dir, tmp_path, no_models):
    return lambda *words: refusal(tiny_base, photos_dir, tmp_path / "out", *words)


def test_prompts_without_the_subjects_word_are_refused(refused, tiny_dino, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of sks dog\na dog at night\na photo of dog\n")
    words = [
        "--validation_prompts_file",
        str(tmp_path / "prompts.txt"),
        *CLASS,
        "--judge_dino",
        str(tiny_dino),
    ]
    message = refused(*words)
    assert message.splitlines()[0].startswith(
        "validation prompt a dog at night: it lacks the subject's word, sks"
    )
    assert len(message.splitlines()) == 2


def test_a_class_prompt_with_the_subjects_word_is_refused(refused, tiny_dino):
    words = ["--validation_prompt", PROMPTS[0], "--class_prompt", "a photo of sks dog"]
    assert "--class_prompt has every word of --instance_prompt" in refused(
        *words, "--judge_dino", str(tiny_dino)
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [(CLASS, "give --validation_prompt"), (VALIDATION[:2], "give --class_prompt, for example")],
)
def test_a_judge_needs_validation_pictures_and_a_class_prompt(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainOptions, "", train_words(tmp_path, tmp_path, tmp_path, *words, "--judge_dino", "a/b"))
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_another_model_is_no_judge(refused, tiny_clip, tiny_base):
    assert "--judge_dino: " in refused(*VALIDATION, "--judge_dino", str(tiny_clip))
    assert "is a diffusers pipeline" in refused(*VALIDATION, "--judge_clip", str(tiny_base))


def test_a_hub_id_is_asked_for_after_all_else(refused, monkeypatch, tmp_path):
    """Without a network the message comes at once, and not before the other ones."""
    hub = ["--judge_dino", "nobody/nothing"]
    assert "as a hub id it cannot be read" in refused(*VALIDATION, *hub)
    monkeypatch.setattr(judges.huggingface_hub, "snapshot_download", None)
    assert "--resume_from_checkpoint" in refused(*VALIDATION, *hub, "--resume_from_checkpoint", str(tmp_path))


def test_the_reader_needs_a_subject_of_the_drawn_world(refused, tmp_path):
    assert "has no subject.json" in refused(*VALIDATION, "--judge_reader", str(tmp_path))
    record = json.loads((SUBJECT / "subject.json").read_text())
    for change, said in (
        ({"kind": "dragon"}, "kind must be one of dog"),
        ({"identity": {"pattern": 99}}, "identity.pattern must be a number from 0 to 5, got 99"),
    ):
        (tmp_path / "subject.json").write_text(json.dumps(record | change))
        assert said in refused(*VALIDATION, "--judge_reader", str(tmp_path))


def test_the_reader_reads_pictures_of_its_size_only(refused):
    words = [*VALIDATION, "--judge_reader", str(SUBJECT)]
    assert "64 x 64" in refused(*words, "--resolution", "128")
    assert "must name the kind" in refused(*words, "--class_prompt", "a photo of")
