"""Several subjects in one run: the table, the rows, and what is measured of each subject."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import train_dreambooth_lora as train
from dreambooth.data import subject_table
from dreambooth.data.batches import PhotoRows, Share, Source
from dreambooth.data.crops import Crops
from dreambooth.data.photos import Photo
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.training import TrainOptions
from tests import tiny
from tests.running import digest, main_on_two_processes, meter_records, train_words

DOG = {"photos": "dog", "prompt": "a photo of sks dog", "class_prompt": "a photo of dog"}
CAT = {"photos": "cat", "prompt": "a photo of qwe cat", "class_prompt": "a photo of cat"}


def table(folder: Path, *rows: Any) -> Path:
    """A table with these rows, whose photos are in `folder`."""
    placed = [{**row, "photos": str(folder / row["photos"])} for row in rows]
    file = folder / "subjects.yaml"
    file.write_text(json.dumps(placed))  # JSON is YAML
    return file


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Two subjects, with 2 and 4 photos of the same names."""
    folder = tmp_path_factory.mktemp("pair")
    tiny.make_photos(folder / "dog", 2, seed=1)
    tiny.make_photos(folder / "cat", 4, seed=2)
    return folder


def words_of(base: Path, file: Path, out: Path, *more: str) -> list[str]:
    words = train_words(base, Path("none"), out, *more)
    for flag in ("--instance_data_dir", "--instance_prompt"):
        del words[words.index(flag) : words.index(flag) + 2]
    return [*words, "--subjects", str(file)]


def run(base: Path, file: Path, out: Path, *more: str) -> Path:
    train.main(parse(TrainOptions, "", words_of(base, file, out, *more)))
    return out / "pytorch_lora_weights.safetensors"


# --- rows


def rows_of(*shares: tuple[int, int, float]) -> tuple[PhotoRows, Source]:
    """The rows of subjects with (photos, repeats, weight)."""
    photos = [
        Photo(Path(f"{number}-{n}.png"), (8, 8), f"{number}{n}", f"{number}{n}")
        for number, (count, _, _) in enumerate(shares)
        for n in range(count)
    ]
    parts = tuple(Share("", "", count, repeats, weight) for count, repeats, weight in shares)
    source = Source("instance", photos, [str(n) for n in range(len(photos))], shares=parts)
    return PhotoRows([source], 5, Crops(8, "lanczos", True)), source


def test_each_turn_has_the_rows_of_every_subject_in_another_order():
    dataset, source = rows_of((2, 1, 1.0), (3, 2, 1.0))
    subjects = [source.photos[dataset.photo(source, row)].path.name[0] for row in range(60)]
    turns = ["".join(subjects[at : at + 3]) for at in range(0, 60, 3)]
    assert {"".join(sorted(turn)) for turn in turns} == {"011"}
    assert set(turns) == {"011", "101", "110"}


def test_all_photos_of_a_subject_are_visited_before_one_comes_again():
    dataset, source = rows_of((2, 1, 1.0), (3, 2, 1.0))
    assert source.rows_of_pass == 6
    for first in (0, 18):  # the least common multiple of all turns
        visits = Counter(dataset.photo(source, row) for row in range(first, first + 18))
        assert visits == {0: 3, 1: 3, 2: 4, 3: 4, 4: 4}
    assert {dataset.photo(source, row) for row in range(source.rows_of_pass)} == set(range(5))


def test_a_row_has_the_weight_of_its_subject():
    dataset, source = rows_of((2, 1, 1.0), (3, 1, 0.25))
    weights = dataset.weights(range(8))
    assert weights is not None
    assert weights.tolist() == [1.0 if dataset.photo(source, row) < 2 else 0.25 for row in range(8)]
    assert rows_of((2, 1, 1.0), (3, 1, 1.0))[0].weights(range(8)) is None


# --- runs


@pytest.mark.trains
def test_a_run_of_two_subjects_is_exact_measured_and_drawn(tiny_base, pair, tmp_path, capsys):
    """The same adapter on two processes, and resumed. The page says how the subjects mix."""
    file = table(pair, {**DOG, "validation_prompts": ["sks dog"]}, {**CAT, "weight": 0.5, "repeats": 2})
    common = [
        "--with_prior_preservation",
        "--prior_source",
        "base",
        "--max_train_steps",
        "4",
        "--holdout",
        "1",
    ]
    common += ["--train_text_encoder", "--checkpointing_steps", "2"]
    one = [*common, "--gradient_accumulation_steps", "2"]
    drawn = ["--meter_steps", "4", "--num_validation_images", "1", "--skip_final_inference"]
    adapter = run(tiny_base, file, tmp_path / "one", *one, *drawn)
    assert "row 0: photo-" in capsys.readouterr().out
    two = words_of(tiny_base, file, tmp_path / "two", *common)
    main_on_two_processes(train.main, parse(TrainOptions, "", two))
    assert digest(tmp_path / "two" / adapter.name) == digest(adapter)
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resume = ["--resume_from_checkpoint", "latest"]
    assert digest(run(tiny_base, file, tmp_path / "resumed", *one, *resume)) == digest(adapter)
    # the measures
    first, last = [record["meter"] for record in meter_records(tmp_path / "one")]
    for name in ("binding_1", "binding_2", "bleed_1_2", "bleed_2_1"):
        assert first[name]["since_base"]["mean"] == 0 != last[name]["since_base"]["mean"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert "How the subjects mix, at step 4" in page
    assert f"{last['bleed_1_2']['since_base']['mean']:+.4f}" in page
    pictures = {path.name for path in (tmp_path / "one" / "validation").iterdir()}
    assert "step-000000-00.png" in pictures
    # another weight is another run
    changed = table(pair, {**DOG, "validation_prompts": ["sks dog"]}, {**CAT, "weight": 0.25, "repeats": 2})
    with pytest.raises(UserError, match="--subjects was"):
        run(tiny_base, changed, tmp_path / "resumed", *one, *resume)


# --- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a list of rows, `- photos: my_dog`, got nothing"),
        ("photos: dog", "must be a list of rows, `- photos: my_dog`, got dict"),
        ("- dog", "row 1 must be a table with photos, prompt, class_prompt, got str"),
        ("- {photos: dog, prompt: a}", "row 1 lacks class_prompt; a row needs photos, prompt, class_prompt"),
        ("- {photos: d, promt: a, class_prompt: b}", "row 1 has 'promt'; did you mean prompt?"),
        ("- {photos: d, prompt: 3, class_prompt: b}", "row 1: prompt must be a text, got '3'"),
        ("- {photos: d, prompt: a, class_prompt: ''}", "row 1: class_prompt must be a text, got ''"),
        ("- {photos: d, prompt: a, class_prompt: b, weight: 0}", "row 1: weight must be a number over 0"),
        ("- {photos: d, prompt: a, class_prompt: b, weight: .nan}", "row 1: weight must be a number over 0"),
        ("- {photos: d, prompt: a, class_prompt: b, repeats: 1.5}", "row 1: repeats must be a whole number"),
        ("- {photos: d, prompt: a, class_prompt: b, repeats: true}", "row 1: repeats must be a whole number"),
        ("- {photos: d, prompt: a, class_prompt: b, captions: 3}", "row 1: captions must be a text, got '3'"),
        (
            "- {photos: d, prompt: a, class_prompt: b, validation_prompts: x}",
            "row 1: validation_prompts must be a list of texts, got 'x'",
        ),
        (
            "[{photos: d, prompt: a b, class_prompt: b}, {photos: c, prompt: a  b, class_prompt: b}]",
            "row 2: prompt is that of",
        ),
        (
            "[{photos: d, prompt: a, class_prompt: b}, {photos: ./d, prompt: c, class_prompt: b}]",
            "row 2: photos is the folder of",
        ),
        ("- {photos: d", "line"),
    ],
)
def test_a_wrong_table_is_answered_with_row_and_key(text, message, tmp_path):
    file = tmp_path / "table.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        subject_table.read(str(file))
    assert str(error.value).startswith(f"--subjects {file}: ")
    assert message in str(error.value)


def test_a_wrong_photo_is_named_with_its_row(no_models, tiny_base, pair, tmp_path):
    shutil.copytree(pair, tmp_path / "pair")
    (tmp_path / "pair" / "cat" / "photo-0.png").write_bytes(b"no picture")
    file = table(tmp_path / "pair", DOG, CAT)
    with pytest.raises(UserError) as error:
        run(tiny_base, file, tmp_path / "out")
    assert f"--subjects {file}: row 2: " in str(error.value)
    assert "photo-0.png" in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="row 1: photos names: they must lie apart"):
        run(tiny_base, file, tmp_path / "pair" / "dog" / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--instance_prompt", "a"], "--instance_prompt is for one subject, and --subjects names several"),
        (
            ["--instance_data_dir", "d", "--repeats", "3"],
            "leave it out, and give each row of that file its repeats",
        ),
        (["--class_prompt", "a"], "--class_prompt: for one subject"),
        (["--class_data_dir", "a"], "--class_data_dir: for one subject"),
        (["--holdout_data_dir", "a"], "--holdout N holds out N photos of each"),
        (["--trigger_word", "a"], "--trigger_word: for one subject"),
        (["--mask_dir", "a"], "leave it out, and give each row of that file its masks"),
        (["--with_prior_preservation"], "needs --prior_source base: there are no class images"),
        (
            ["--judge_dino", "a", "--validation_prompt", "a"],
            "compare pictures with the photos of one subject",
        ),
    ],
)
def test_flags_of_one_subject_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainOptions, "", words_of(Path("base"), Path("table.yaml"), Path("out"), *words))
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
