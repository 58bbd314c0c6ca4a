"""Flags that take paths: home folders and variables in them, and the paths that a run's own file holds."""

import dataclasses
import json
import os
import pathlib
from pathlib import Path

import pytest
import yaml

from dreambooth.io.errors import UserError
from dreambooth.options import adapter_sets, paths
from dreambooth.options.command_line import fields_of, parse
from dreambooth.options.conversion import COMMANDS
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions

SCRIPTS = [TrainOptions, ClassImageOptions, InferOptions, EvaluateOptions]
KINDS = [*SCRIPTS, *(kind for kind, _, _ in COMMANDS.values())]
PATH_FLAGS = [
    (kind, name) for kind in KINDS for name, field in fields_of(kind).items() if paths.mark_of(field.type)
]
NEEDED = [
    "--pretrained_model_name_or_path",
    "org/base",
    "--instance_data_dir",
    "photos",
    "--instance_prompt",
    "x",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder is an empty one, which is not the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", "/data/runs")
    monkeypatch.delenv("NO_SUCH", raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_every_script_has_flags_that_take_paths():
    assert {kind for kind, _ in PATH_FLAGS} == set(KINDS)
    unmarked = {
        name
        for kind in KINDS
        for name, field in fields_of(kind).items()
        if name.endswith(("_dir", "_file", "_or_path", "output", "merge_to"))
        and not paths.mark_of(field.type)
    }
    assert unmarked == set()


@pytest.mark.parametrize(("kind", "name"), PATH_FLAGS, ids=lambda value: getattr(value, "__name__", value))
def test_home_and_variables_are_replaced_on_every_path_flag(kind: type, name: str, home: Path):
    fields = fields_of(kind)
    for words in ([f"--{name}=~/x"], [f"--{name}", "~/x"], [f"--{name.replace('_', '-')}=$HOME/x"]):
        assert paths.expand_words(words, fields)[-1].endswith(f"{home}/x")
    with pytest.raises(UserError, match=f"--{name}: the variable NO_SUCH"):
        paths.expand_words([f"--{name}=$NO_SUCH/x"], fields)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "{home}"),
        ("~/a b/~c", "{home}/a b/~c"),
        ("$HOME", "{home}"),
        ("${HOME}/x:0.6", "{home}/x:0.6"),
        ("$RUNS/${RUNS}", "/data/runs//data/runs"),
        ("~/$RUNS", "{home}//data/runs"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("org/name", "org/name"),
        ("cost$5", "cost$5"),
        ("a$", "a$"),
        ("", ""),
    ],
)
def test_a_path_is_expanded_as_a_shell_does(text: str, path: str, home: Path):
    assert paths.expanded(text, "--output_dir") == path.format(home=home)


@pytest.mark.parametrize(
    "text", ["$NO_SUCH", "a/${NO_SUCH}/b", "~no_such_user/x", "$(pwd)", "${HOME", "${HOME:-x}"]
)
def test_what_cannot_be_expanded_is_refused(text: str):
    with pytest.raises(UserError, match="--output_dir: "):
        paths.expanded(text, "--output_dir")


@pytest.mark.parametrize("name", ["a$NO_SUCH.safetensors", "~old", "${NO_SUCH}"])
def test_a_file_that_has_such_a_name_is_that_file(name: str):
    Path(name).touch()
    assert paths.expanded(name, "--adapter") == name
    assert paths.expanded(f"./{name}:0.5", "--adapter") == f"./{name}:0.5"


def test_prompts_and_names_are_left_alone(home: Path):
    prompt = "~ a $HOME dog"
    options = parse(TrainOptions, "", [*NEEDED[:-1], prompt, "--output_dir=~/out", "--hub_model_id=$x"])
    assert options.instance.instance_prompt == prompt
    assert options.run.output_dir == f"{home}/out"
    assert options.reports.hub_model_id == "$x"
    assert options.base.pretrained_model_name_or_path == "org/base"


def test_configuration_files_are_expanded_and_named_with_a_home_folder(home: Path):
    table = {"output_dir": "${RUNS}/a", "instance_data_dir": "~/photos", "instance_prompt": "$HOME"}
    (home / "a.yaml").write_text(yaml.safe_dump({"pretrained_model_name_or_path": "~/sd", **table}))
    for words in (["--config=~/a.yaml"], ["--config", "$HOME/a.yaml"]):
        options = parse(TrainOptions, "", words)
        assert options.run.output_dir == "/data/runs/a"
        assert options.instance.instance_data_dir == f"{home}/photos"
        assert options.instance.instance_prompt == "$HOME"


def test_adapters_and_their_sets_are_expanded(home: Path):
    base = ["--pretrained_model_name_or_path", "~/sd", "--prompt", "a"]
    assert parse(InferOptions, "", [*base, "--adapter", "a", "~/b:0.5"]).adapter == ("a", f"{home}/b:0.5")
    (home / "sets.yaml").write_text("dog: [~/a, $RUNS/b:0.5]\n")
    (pair,) = adapter_sets.of((), (), str(home / "sets.yaml"))
    assert [str(adapter.path) for adapter in pair.adapters] == [f"{home}/a", "/data/runs/b"]


def test_an_unset_variable_is_one_message_and_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(TrainOptions, "", [*NEEDED, "--output_dir=$NO_SUCH/x"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --output_dir: the variable NO_SUCH")


# ---- the paths of run.yaml


def make_run(folder: Path, **flags: str) -> Path:
    """A folder with the files by which a run is known; its flags are relative to the working folder."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"flags": {}, "pictures": {}, "slots": 1, "base": ""}))
    table = {
        "pretrained_model_name_or_path": "org/base",
        "instance_prompt": "x",
        "output_dir": str(folder),
        **flags,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(table))
    return folder


def flags_of(*words: str) -> dict[str, str | None]:
    options = parse(TrainOptions, "", words)
    return {
        "output_dir": options.run.output_dir,
        "photos": options.instance.instance_data_dir,
        "base": options.base.pretrained_model_name_or_path,
        "encoded_dir": options.speed.encoded_dir,
    }


def test_paths_are_stored_absolute_and_ids_as_they_are():
    Path("local").mkdir()
    fields = fields_of(TrainOptions)
    table = {
        "output_dir": "out",
        "pretrained_model_name_or_path": "org/base",
        "tokenizer_name": "local",
        "judge_dino": "local@sha256:00",
        "judge_clip": "org/clip@sha256:00",
        "logging_dir": "logs",
        "instance_prompt": "a/b",
        "rank": 4,
    }
    work = os.getcwd()
    changed = {"output_dir": f"{work}/out", "tokenizer_name": f"{work}/local"}
    changed["judge_dino"] = f"{work}/local@sha256:00"
    assert paths.absolute(table, fields) == table | changed


@pytest.mark.parametrize("how", ["renamed", "copied", "linked", "from elsewhere"])
def test_the_folder_of_a_run_yaml_is_the_run(how: str, tmp_path: Path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    run = make_run(tmp_path / "a", instance_data_dir=str(photos), encoded_dir=str(tmp_path / "a" / "cache"))
    now = tmp_path / "b"
    if how == "renamed":
        run.rename(now)
    elif how == "copied":
        make_run(now).joinpath("run.yaml").write_text((run / "run.yaml").read_text())
    elif how == "linked":
        now.symlink_to(run)
    else:
        now = run
        monkeypatch.chdir("/")
    flags = flags_of("--config", str(now / "run.yaml"))
    said = capsys.readouterr().out
    assert os.path.samefile(flags["output_dir"] or "", now)
    assert flags["photos"] == str(photos)
    assert flags["base"] == "org/base"
    if how in ("renamed", "copied"):
        assert flags["encoded_dir"] == str(now / "cache")
        assert said.count("note:") == 1
        assert f"now in {now}" in said
    else:
        assert said == ""


def test_a_moved_tree_keeps_its_photos(tmp_path: Path, capsys):
    tree = tmp_path / "tree"
    run = make_run(tree / "runs" / "a", instance_data_dir=str(tree / "photos"))
    (tree / "photos").mkdir()
    tree.rename(tmp_path / "moved")
    flags = flags_of(f"--config={tmp_path}/moved/runs/a/run.yaml")
    assert flags["photos"] == f"{tmp_path}/moved/photos"
    assert flags["output_dir"] == f"{tmp_path}/moved/runs/a"
    assert not run.exists()
    assert f"--instance_data_dir: {tree}/photos does not exist" in capsys.readouterr().out


def test_relative_paths_of_older_versions_hold_from_another_folder(tmp_path: Path, monkeypatch):
    make_run(tmp_path / "project" / "runs" / "a", output_dir="runs/a", instance_data_dir="photos")
    (tmp_path / "project" / "photos").mkdir()
    flags = flags_of("--config", f"{tmp_path}/project/runs/a/run.yaml")
    assert flags["photos"] == f"{tmp_path}/project/photos"
    (tmp_path / "project" / "runs" / "a").rename(tmp_path / "project" / "runs" / "b")
    monkeypatch.chdir(tmp_path / "project" / "runs")
    assert flags_of("--config", "b/run.yaml")["photos"] == f"{tmp_path}/project/photos"


def test_an_output_folder_on_the_command_line_wins(tmp_path: Path):
    make_run(tmp_path / "a", instance_data_dir="photos", output_dir="/nowhere")
    assert flags_of("--config", f"{tmp_path}/a/run.yaml", "--output_dir", "new")["output_dir"] == "new"


@pytest.mark.parametrize("record", [None, "", "[]", '{"flags": 1}', '{"flags": {}}', "\udcff"])
def test_a_run_yaml_that_is_beside_no_record_is_a_plain_file(record: str | None, tmp_path: Path):
    make_run(tmp_path / "a", instance_data_dir="photos", output_dir="elsewhere")
    (tmp_path / "a" / "run.json").unlink()
    if record is not None:
        (tmp_path / "a" / "run.json").write_text(record, errors="surrogateescape")
    assert flags_of("--config", f"{tmp_path}/a/run.yaml")["output_dir"] == "elsewhere"


def test_the_marks_of_types_are_read_at_any_depth():
    @dataclasses.dataclass
    class Flags:
        plain: str | None
        several: tuple[paths.FilePath, ...] | None

    kinds = {field.name: field.type for field in dataclasses.fields(Flags)}
    assert paths.mark_of(kinds["plain"]) is None
    assert paths.mark_of(kinds["several"]) == paths.PathMark("file")
    assert paths.mark_of(pathlib.Path) is None
