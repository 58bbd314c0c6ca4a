"""Tables of subjects, in YAML and CSV, and the flags of one subject."""

from pathlib import Path

import pytest

from dreambooth.evaluation import plan, protocol, subjects
from dreambooth.io.errors import UserError
from dreambooth.options.evaluate import SubjectOptions
from tests.project.architecture import ROOT

ROW = "subject: dog6, adapter: a.safetensors, photos: p, rare_word: sks"

QUOTED_BRACES, QUOTED_WEIGHT = "'s{1}'", "'.:1000'"


def cases_of(path: Path, *names: str) -> list[subjects.Case]:
    return subjects.of(SubjectOptions(subjects_file=str(path), subjects=names), None)


def written(folder: Path, text: str, ending: str = "yaml") -> Path:
    path = folder / f"table.{ending}"
    path.write_text(text)
    return path


def test_yaml_and_csv_give_the_same_cases(tmp_path):
    rows = (
        "- {subject: dog6, adapter: 'runs/dog6:0.5', photos: photos/dog6, rare_word: sks}\n"
        "- {subject: my_cup, adapter: runs/cup, photos: photos/cup, rare_word: qwe, class_noun: cup,"
        " live: no, method: loha, reader: world}\n"
    )
    lines = (
        "subject,adapter,photos,rare_word,class_noun,live,method,reader\n"
        "dog6,runs/dog6:0.5,photos/dog6,sks,,,,\n\n"
        "my_cup,runs/cup,photos/cup,qwe,cup,no,loha,world\n"
    )
    of_yaml = cases_of(written(tmp_path, rows))
    of_csv = cases_of(written(tmp_path, lines, "csv"))
    for one, other in zip(of_yaml, of_csv, strict=True):
        assert one.about_subject == other.about_subject
        assert (one.subject, one.method, one.adapter) == (other.subject, other.method, other.adapter)
    dog, cup = of_yaml
    assert (dog.class_noun, dog.is_live, dog.method, dog.adapter.weight) == ("dog", True, "adapter", 0.5)
    assert (cup.class_noun, cup.is_live, cup.reader) == ("cup", False, Path("world"))


def test_a_subset_of_the_subjects_is_selected(tmp_path):
    names = ("dog", "cat", "can")
    rows = "".join(f"- {{subject: {n}, adapter: a, photos: {n}, rare_word: sks}}\n" for n in names)
    path = written(tmp_path, rows)
    assert [case.subject for case in cases_of(path, "can", "dog")] == ["dog", "can"]
    with pytest.raises(UserError, match=r"--subjects: the table has no subject dgo; did you mean dog\?"):
        cases_of(path, "dgo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"table\.yaml: no subject in it"),
        ("subject: dog\n", "must be a list of rows"),
        ("- dog\n", "row 1 must be a table with subject, adapter"),
        (f"- {{{ROW}}}\n- {{{ROW}, prompt: x}}\n", r"row 2 \(dog6\) has 'prompt'; it may have"),
        (f"- {{{ROW}, clas_noun: x}}\n", "has 'clas_noun'; did you mean class_noun"),
        ("- {subject: dog6, adapter: a, photos: p}\n", r"row 1 \(dog6\) lacks rare_word"),
        (f"- {{{ROW.replace('dog6', 'rex')}}}\n", "lacks class_noun: rex is no subject of the DreamBooth"),
        (f"- {{{ROW}, live: perhaps}}\n", "live must be yes or no, got 'perhaps'"),
        (f"- {{{ROW}, class_noun: [dog]}}\n", "class_noun must be a text, got"),
        (f"- {{{ROW.replace('dog6', 'a/b')}, class_noun: dog}}\n", "subject must be letters, digits"),
        (f"- {{{ROW}, method: base}}\n", "method must be letters, digits, .* and not the word base"),
        (f"- {{{ROW.replace('sks', QUOTED_BRACES)}}}\n", "rare_word must have no braces"),
        (f"- {{{ROW}}}\n- {{{ROW}}}\n", r"row 2 \(dog6\): subject dog6 with method adapter is .*row 1"),
        (
            f"- {{{ROW}}}\n- {{{ROW.replace('sks', 'qwe')}, method: b}}\n",
            r"row 2 \(dog6\): all but adapter and method must be as in .*row 1",
        ),
        (f"- {{{ROW.replace('a.safetensors', QUOTED_WEIGHT)}}}\n", "weight of . must be a number from -100"),
    ],
)
def test_a_wrong_row_is_refused_by_its_number_and_name(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        cases_of(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"table\.csv: no subject in it"),
        ("subject,subject\na,b\n", "the column subject is there twice"),
        ("subject,adapter\ndog\n", "row 1 has 1 cells and the first line 2"),
        ('subject,adapter\n"dog,a\n', "not a CSV file"),
        ("subject,adapter,photos,rare_word\ndog,a,,sks\n", r"row 1 \(dog\) lacks photos"),
    ],
)
def test_a_wrong_csv_file_is_refused(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        cases_of(written(tmp_path, text, "csv"))


def test_one_reader_is_not_for_several_subjects(tmp_path):
    path = written(tmp_path, f"- {{{ROW}}}\n- {{{ROW.replace('dog6', 'cat')}}}\n")
    with pytest.raises(UserError, match="--judge_reader is the folder of one subject, and the table has 2"):
        subjects.of(SubjectOptions(subjects_file=str(path)), "picturebook/subjects/dog")


def test_several_adapters_of_the_flags_are_methods():
    options = SubjectOptions(
        adapter=("runs/a", "b.safetensors"), photos="x/rex", class_noun="dog", rare_word="s"
    )
    assert [(case.subject, case.method) for case in subjects.of(options, None)] == [
        ("rex", "a"),
        ("rex", "b"),
    ]
    options = SubjectOptions(adapter=("a", "a"), photos="my dog", class_noun="dog", rare_word="s")
    assert [case.method for case in subjects.of(options, None)] == ["a", "a-2"]
    assert subjects.of(options, None)[0].subject == "my_dog"


def test_the_shipped_table_has_all_subjects_of_the_paper():
    cases = cases_of(ROOT / "configs" / "evaluation" / "dreambooth_subjects.yaml")
    assert {case.subject: case.class_noun for case in cases} == protocol.CLASSES
    assert sum(case.is_live for case in cases) == 9
    rows = plan.rows_of(cases, None, 4, "a {1}", 0, lambda template, k: 0)
    assert sum(len(row.pictures.pictures) for row in rows if row.method != subjects.BASE) == 3000


def test_seeds_are_of_prompt_and_picture_alone(tmp_path):
    path = written(tmp_path, f"- {{{ROW}}}\n- {{{ROW.replace('dog6', 'can')}}}\n")
    rows = plan.rows_of(
        cases_of(path), ("a {0} {1}", "{0} {1}"), 2, "a {1}", 1, lambda template, k: hash((template, k))
    )
    seeds = {tuple(picture.seed for picture in row.pictures.pictures) for row in rows}
    assert len(rows) == 4
    assert len(seeds) == 1
    assert len(set(*seeds)) == 5
    chunks = plan.chunks_of(rows[0].pictures.pictures, 4)
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
