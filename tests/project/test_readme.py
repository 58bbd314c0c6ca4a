"""Each command of README, notebook and docs/ runs, made short and on a tiny local base for the hub's."""

import functools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from accelerate.state import AcceleratorState

import check_photos
import convert_adapter
import evaluate
import generate_class_images
import infer
import train_dreambooth_lora
from dreambooth.options import run_table
from dreambooth.options.command_line import parse
from dreambooth.options.evaluate import EvaluateOptions
from dreambooth.options.photo_check import PhotoCheckOptions
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from dreambooth.training import many_runs
from picturebook import score, score_sets
from tests import tiny, tiny_judges

ROOT = Path(__file__).parent.parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
# in an order in which each command finds what the ones before it made
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("photos", "training", "memory", "many-runs", "adapters", "evaluation")
    ),
]
NOTEBOOK = ROOT / "examples" / "dreambooth_lora.ipynb"
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
XL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
IF_ID = "DeepFloyd/IF-I-XL-v1.0"
SCRIPTS: dict[str, Any] = {
    "train_dreambooth_lora.py": (many_runs.trainer(train_dreambooth_lora.main), TrainOptions),
    "generate_class_images.py": (generate_class_images.main, ClassImageOptions),
    "infer.py": (infer.main, InferOptions),
    "evaluate.py": (evaluate.main, EvaluateOptions),
    "check_photos.py": (check_photos.main, PhotoCheckOptions),
    "convert_adapter.py": (convert_adapter.main, None),
}
SHORT = {
    "train_dreambooth_lora.py": "--max_train_steps 2 --num_class_images 2 --class_inference_steps 1 "
    "--checkpointing_steps 1 --meter_steps 0 --report_to none",
    "generate_class_images.py": "--num_class_images 2 --class_inference_steps 1",
    "infer.py": "--num_inference_steps 1 --seeds 0 --mixed_precision no",
    "evaluate.py": "--num_inference_steps 1 --num_images 1 --num_class_images 0 --mixed_precision no "
    "--judge_dino judges/dino --judge_clip judges/clip",
    "check_photos.py": "",
}


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [command for block in blocks for command in joined_lines(block)]


def table_of(page: Path) -> str:
    """The one block of YAML of a page."""
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    return block


def joined_lines(text: str) -> list[str]:
    """Lines of a shell or a notebook, those that end with a backslash joined to the next."""
    return [" ".join(line.split()) for line in text.replace("\\\n", " ").strip().splitlines()]


def notebook_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert {cell["cell_type"] for cell in cells} == {"code"}
    return ["".join(cell["source"]) for cell in cells]


def make_recipe(target: str) -> list[str]:
    """The commands of a target, on one thread each: tests run side by side, and threads would wait."""
    words = ["make", "--dry-run", "--always-make", "THREADS=1", target]
    return joined_lines(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def run_script(words: list[str], *more: str, base: Path | None = None) -> None:
    """Run a command line in this process, shortened, with `base` in place of the hub id that it names."""
    AcceleratorState._reset_state(reset_partial_state=True)
    script = next(word for word in words if word in SCRIPTS)
    arguments = words[words.index(script) + 1 :]
    if script == "convert_adapter.py":
        replaced = [str(base) if base is not None and word == HUB_ID else word for word in arguments]
        # a tiny base has the width of no known one, so `convert` has to be told which base it is
        named_base = ["--pretrained_model_name_or_path", str(base)] if arguments[0] == "convert" else []
        convert_adapter.main(convert_adapter.parse_command([*replaced, *named_base]))
        return
    main, options = SCRIPTS[script]
    read = run_table.parse if options is TrainOptions else functools.partial(parse, options)
    if base is not None:
        more = ("--pretrained_model_name_or_path", str(base), *more)
    read("", [*arguments, *more])  # what makes it short may lack what a flag left out needs
    short = shlex.split(SHORT[script])
    if "--stop_when_worse" in arguments:  # which needs measurements
        short = [*short, "--meter_steps", "1"]
    main(read("", [*arguments, *short, *more]))


def run_command(command: str, bases: dict[str, Path]) -> str:
    """Run a documented command on one of the bases by their hub ids. Returns the script's name."""
    words = shlex.split(command)
    script = next(word for word in words if word in SCRIPTS)
    for flag, what in (("--config_file", "accelerate"), ("--config", "recipe")):
        if flag in words:
            assert yaml.safe_load(Path(words[words.index(flag) + 1]).read_text()), f"{what} of {command}"
    recipe = Path(words[words.index("--config") + 1]).read_text() if "--config" in words else ""
    assert any(name in command for name in bases) or "--config" in words or script == "convert_adapter.py"
    base = next((base for name, base in bases.items() if name in command + recipe), bases[HUB_ID])
    run_script(words, *(["--resolution", "64"] if script == "train_dreambooth_lora.py" else []), base=base)
    return script


def test_readme_is_short_and_has_the_two_commands_first():
    assert (ROOT / "README.md").stat().st_size <= 10_240
    assert commands_of(ROOT / "README.md")[:2] == ["make demo", "make test"]


def test_make_test_runs_what_ci_runs():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    recipe = "\n".join(make_recipe("test"))
    for tool in ("pip install", "ruff check", "ruff format --check", "mypy", "pytest"):
        assert tool in recipe


def prepare_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a folder that has the user's photos and what a checkout has."""
    tiny.make_photos(folder / "my_dog", 5, (80, 64))
    tiny.make_photos(folder / "my_dog_masks", 5, (80, 64))
    for name in ("configs", "picturebook"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)


def prepare_pets(folder: Path) -> None:
    """The tables of the pages, and the photos that they name."""
    for name in ("my_cat", "photos/dog", "photos/cat"):
        tiny.make_photos(folder / name, 3, seed=2)
    tiny.make_photos(folder / "my_cat_masks", 3)
    lines = [{"file_name": f"photo-{number}.png", "text": "a photo of qwe cat"} for number in range(3)]
    (folder / "my_cat" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, page in {"my_pets": "training", "pets": "many-runs"}.items():
        (folder / f"{name}.yaml").write_text(table_of(ROOT / "docs" / f"{page}.md"))


@pytest.mark.trains
def test_documented_commands_run_in_order(tmp_path, monkeypatch):
    """README's story and then those of the pages, in a folder where the user's photos lie."""
    bases = {
        XL_ID: tiny.build_xl(tmp_path / "xl"),
        IF_ID: tiny.build_if(tmp_path / "if"),
        HUB_ID: tiny.build_pipeline(tmp_path / "base"),
    }
    prepare_folder(tmp_path, monkeypatch)
    tiny_judges.build_dino(tmp_path / "judges" / "dino")
    tiny_judges.build_clip(tmp_path / "judges" / "clip")
    (tmp_path / "my_prompts.txt").write_text("a photo of sks dog in the snow\n")
    (tmp_path / "my_dog" / "photo-0.txt").write_text("a photo of sks dog on grass")
    tiny.make_photos(tmp_path / "my_face", 5, (64, 72), seed=1)
    prepare_pets(tmp_path)
    commands = [command for page in PAGES for command in commands_of(page)]
    scripts = [run_command(command, bases) for command in commands if not command.startswith("make ")]
    assert set(SCRIPTS) == set(scripts)
    assert (tmp_path / "my_dog_base" / "model_index.json").is_file()
    for name in (
        *("my_dog_lora", "my_face_lora", "my_dog_xl", "my_dog_if"),
        *(
            "my_dog_captioned",
            "my_dog_prior",
            "my_dog_buckets",
            "my_dog_masked",
            "my_dog_4gb",
            "my_dog_6gb",
            "my_dog_8gb",
        ),
    ):
        assert (tmp_path / name / "pytorch_lora_weights.safetensors").is_file()


def test_the_notebook_has_six_cells_and_the_commands_of_readme():
    cells = notebook_cells()
    assert len(cells) == 6
    assert "%pip install --quiet ." in cells[0]
    typed = [line[1:] for cell in cells for line in joined_lines(cell) if line.startswith("!")]
    of_readme = [command.replace(".venv/bin/", "") for command in commands_of(ROOT / "README.md")]
    assert typed == of_readme[2:5]


@pytest.mark.trains
def test_the_notebook_runs_on_the_embedded_base(tmp_path, monkeypatch):
    """Its shell commands are run as those of the pages are; all cells but the first are executed."""
    prepare_folder(tmp_path, monkeypatch)
    variables: dict[str, Any] = {}
    for cell in notebook_cells()[1:]:
        lines = joined_lines(cell)
        for line in lines:
            if line.startswith("!"):
                run_command(line[1:], {HUB_ID: ROOT / "picturebook" / "model"})
        if not any(line.startswith("!") for line in lines):
            exec(cell, variables)
    assert [path.is_file() for path in variables["results"]] == [True, True]
    assert (tmp_path / "pictures" / "contact_sheet.png").is_file()


def test_every_documented_command_is_known():
    """A command of a new kind needs a test of its own."""
    for page in (ROOT / "README.md", *DOCS):
        for command in commands_of(page):
            words = shlex.split(command)
            known = words[0] == "make" or (page in PAGES and any(word in SCRIPTS for word in words))
            assert known, command
            if words[0] == "make":
                assert make_recipe(words[1])


def programs_of(target: str) -> list[list[str]]:
    """The words of the target's commands that train, draw or score."""
    programs = (*SCRIPTS, "picturebook.score", "picturebook.score_sets")
    return [words for line in make_recipe(target) if set(programs) & set(words := shlex.split(line))]


def run_scorer(module: Any, words: list[str]) -> dict[str, Any]:
    """Run `python -m module` in this process."""
    arguments = words[words.index(module.__name__) + 1 :]
    return module.main(tyro.cli(module.Options, args=arguments, use_underscores=True))


@pytest.mark.trains
def test_make_demo_and_then_make_two_subjects_run_from_class_images_to_scores(tmp_path, monkeypatch):
    """Their own command lines on the embedded base, with fewer steps, pictures and seeds."""
    for name in ("configs", "picturebook"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    *runs, scoring = programs_of("demo")
    assert [SCRIPTS.keys() & set(words) for words in runs] == [
        {"train_dreambooth_lora.py"},
        {"infer.py"},
        {"infer.py"},
    ]
    for words in runs:
        run_script(words)
    scores = run_scorer(score, scoring)
    assert scores["subject prompts, adapter"]["pictures"] == 8
    assert scores["class prompts, base"]["pictures"] == 1
    for name in (
        *("pytorch_lora_weights.safetensors", "scores.json", "report.html"),
        *("subject/contact_sheet.png", "class/contact_sheet.png"),
    ):
        assert (tmp_path / "runs" / "demo" / name).is_file(), name

    # the target makes the demo first where its adapter is missing
    *runs, scoring = programs_of("two_subjects")[-3:]
    assert [SCRIPTS.keys() & set(words) for words in runs] == [{"train_dreambooth_lora.py"}, {"infer.py"}]
    for words in runs:
        run_script(words)
    sets = run_scorer(score_sets, scoring)
    assert list(sets) == ["base", "the dog", "the cat", "both"]
    assert all(values["pictures"] == 2 for of_set in sets.values() for values in of_set.values())
    for name in ("scores.json", "pictures/contact_sheet.png"):
        assert (tmp_path / "runs" / "two_subjects" / name).is_file(), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configs_are_short_and_every_flag_in_them_exists(path):
    assert len(path.read_text().splitlines()) <= 26
    content = yaml.safe_load(path.read_text())
    kind: Any = InferOptions if "prompt" in content or "prompts_file" in content else TrainOptions
    rest = {
        TrainOptions: "--instance_data_dir d --instance_prompt p --class_prompt c --class_data_dir e",
        InferOptions: "--output_dir o" if "adapters_file" in content else "--adapter a --output_dir o",
    }[kind]
    parse(kind, "", ["--config", str(path), *rest.split()])


def test_the_architecture_page_names_every_package_and_no_other():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```\n")[2]
    named = set(re.findall(r"^    (\w+)/", tree, re.MULTILINE))
    assert named == {path.parent.name for path in (ROOT / "dreambooth").glob("*/__init__.py")}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in DOCS)]
)
def test_files_and_links_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    anchors = {path: headings(path) for path in (ROOT / "README.md", *DOCS)}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (folder / name).resolve() if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors[target], link
    for name in re.findall(r"`((?:dreambooth|configs|tests|benchmarks|docs)/[\w/.]+)`", text):
        assert (ROOT / name).exists() or "results/" in name, name


def headings(page: Path) -> set[str]:
    """The anchors of a page: of its headings, and those that it names."""
    text = page.read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return set(re.findall(r'<a id="([^"]+)">', text)) | {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
    }
