"""Prior preservation without class images: the base's own predictions are the targets."""

import json
import shutil
from pathlib import Path

import pytest

import train_dreambooth_lora as train
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import as_table, parse
from dreambooth.options.training import TrainOptions
from dreambooth.training import run_identity
from tests import tiny
from tests.running import (
    digest,
    main_on_two_processes,
    metrics,
    prior_words,
    run_train,
    same_tensors,
    train_words,
)

BASE = ["--with_prior_preservation", "--prior_source", "base", "--class_prompt", "dog"]


@pytest.mark.trains
@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("tiny_base", "--train_text_encoder --snr_gamma 5 --lora_dropout 0.2 --gradient_checkpointing"),
        ("tiny_base", "--use_dora"),
        ("tiny_base", "--adapter loha --module_dropout 0.5"),
        ("tiny_base", "--adapter lokr --mixed_precision bf16"),
        ("tiny_base", "--adapter oft --oft_block_size 4"),
        ("tiny_base", "--adapter boft"),
        ("tiny_base", "--adapter hra"),
        ("tiny_xl", "--train_text_encoder"),
        ("tiny_edm", "--use_rslora"),
        ("tiny_if", "--resolution 16"),
    ],
)
def test_the_target_is_what_the_base_predicts(request, base, words, photos_dir, tmp_path):
    """A new adapter changes nothing, so that the first loss is 0 up to rounding; the next is not."""
    more = [*words.split(), *BASE, "--max_train_steps", "3", "--learning_rate", "0.01"]
    adapter = run_train(request.getfixturevalue(base), photos_dir, tmp_path / "out", *more)
    losses = [record["loss_prior"] for record in metrics(adapter.parent)]
    rounding = 1e-3 if "bf16" in words else 1e-7
    assert losses[0] < rounding < losses[2]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no class images


@pytest.mark.trains
def test_the_photos_are_trained_as_with_class_images(tiny_base, photos_dir, tmp_path):
    """With a weight of 0 what is trained towards does not matter: dropout and photos draw the same numbers,
    and given pictures are noised alike."""
    classes = tiny.make_photos(tmp_path / "class", seed=1)
    common = ["--max_train_steps", "3", "--lora_dropout", "0.3", "--train_text_encoder"]
    common += ["--prior_loss_weight", "0"]
    images = run_train(tiny_base, photos_dir, tmp_path / "images", *prior_words(classes), *common)
    given = ["--class_data_dir", str(classes)]
    predicted = run_train(tiny_base, photos_dir, tmp_path / "base", *BASE, *given, *common)
    alone = run_train(tiny_base, photos_dir, tmp_path / "alone", *BASE, *common)
    assert same_tensors(images, predicted)
    losses = [[record["loss_instance"] for record in metrics(a.parent)] for a in (images, predicted, alone)]
    assert losses[0] == losses[1] == losses[2]
    assert sorted(path.name for path in classes.iterdir()) == [f"photo-{n}.png" for n in range(3)]


@pytest.mark.trains
def test_two_processes_and_a_resumed_run_give_the_same_adapter(tiny_base, photos_dir, tmp_path):
    words = [*BASE, *["--max_train_steps", "4", "--checkpointing_steps", "2", "--train_text_encoder"]]
    words += ["--train_text_encoder_frac", "0.5", "--random_flip"]
    two = train_words(tiny_base, photos_dir, tmp_path / "two", *words)
    main_on_two_processes(train.main, parse(TrainOptions, "", two))
    alone = run_train(tiny_base, photos_dir, tmp_path / "one", *words, "--gradient_accumulation_steps", "2")
    assert digest(tmp_path / "two" / alone.name) == digest(alone)
    shutil.copytree(alone.parent / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    more = ["--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "latest"]
    assert digest(run_train(tiny_base, photos_dir, tmp_path / "resumed", *words, *more)) == digest(alone)


@pytest.mark.trains
def test_the_adapter_stays_nearer_to_the_base(tiny_base, photos_dir, tmp_path):
    """The meter's drift, which is measured on the photos as without class images, is smaller."""
    measured = ["--max_train_steps", "10", "--learning_rate", "0.02", "--meter_steps", "10"]
    measured += ["--class_prompt", "dog"]
    drifts = []
    for name, words in (("without", []), ("with", [*BASE, "--prior_loss_weight", "10"])):
        adapter = run_train(tiny_base, photos_dir, tmp_path / name, *measured, *words)
        lines = (adapter.parent / "metrics.jsonl").read_text().splitlines()
        (last,) = [line for line in lines if '"meter"' in line and '"step": 10' in line]
        drifts.append(json.loads(last)["meter"]["drift"]["mean"])
    assert drifts[1] < drifts[0] / 2


def refused(base: Path, photos: Path, out: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        run_train(base, photos, out, *words)
    assert not out.exists()
    return str(error.value)


def test_given_pictures_must_exist_and_not_show_the_subject(no_models, tiny_base, photos_dir, tmp_path):
    given = [*BASE, "--class_data_dir"]
    out = tmp_path / "out"
    said = refused(tiny_base, photos_dir, out, *given, str(tmp_path / "none"))
    assert said.startswith("--class_data_dir: ")
    (tmp_path / "empty").mkdir()
    said = refused(tiny_base, photos_dir, out, *given, str(tmp_path / "empty"))
    assert "--class_data_dir: no picture" in said
    copies = shutil.copytree(photos_dir, tmp_path / "copies")
    said = refused(tiny_base, photos_dir, out, *given, str(copies))
    assert "of the class images are photos of the subject" in said


def test_flags_of_class_images_have_no_effect(photos_dir, tmp_path):
    def notes(*words: str) -> list[str]:
        return parse(TrainOptions, "", train_words(tmp_path, photos_dir, tmp_path, *words)).notes()

    assert "You need not use --num_class_images without --prior_source images." in notes(
        *BASE, "--num_class_images", "7"
    )
    assert "You need not use --prior_source without --with_prior_preservation." in notes(
        "--prior_source", "base"
    )
    assert notes(*BASE) == []


def test_a_run_from_before_the_flag_is_the_same_run_as_one_with_class_images():
    def record(*words: str) -> dict:
        flags = as_table(parse(TrainOptions, "", train_words(Path("b"), Path("p"), Path("o"), *words)))
        return run_identity.identity(
            flags, slots=1, base="", pictures={}, captions={}, max_steps=1, text_steps=1, start=None
        )

    assert "prior_source" not in record(*prior_words(Path("c")))["flags"]
    differences = run_identity.differences(
        record(*prior_words(Path("c"), "--class_prompt", "dog")), record(*BASE)
    )
    assert [difference.subject for difference in differences] == ["prior_source"]
