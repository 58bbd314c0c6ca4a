"""The benchmark of a GPU goes its whole way on tiny bases and a CPU: programs, resume, tables."""

import dataclasses
import json
import os
import re
import runpy
import sys
import traceback
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.state import AcceleratorState
from torch.autograd import DeviceType

from benchmarks import gpu, gpu_cases, gpu_kernels, gpu_tables, programs
from benchmarks.gpu_cases import CASES, Place
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.training import TrainOptions
from dreambooth.training import checks
from tests.running import train_words

# steps an optimizer as often as it is told; a real example needs more packages than the tests have
EXAMPLE = """
import sys, torch
assert __name__ == "__main__"
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=1.0)
for _ in range(int(sys.argv[sys.argv.index("--max_train_steps") + 1])):
    weight.grad = torch.ones(1)
    optimizer.step()
raise AssertionError("the probe ends the process at the last step")
"""


class Forked:
    """In the place of subprocess.Popen: forks this process, which has imported what the programs import."""

    programs: ClassVar[list[str]] = []

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str], stdout: Any, **others: Any):
        self.returncode: int | None = None
        words = words[1:]  # the interpreter
        self.programs.append(words[1] if words[0] == "-m" else Path(words[0]).name)
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setsid()
            os.chdir(cwd)
            os.environ.update(env)
            for stream in (1, 2):
                os.dup2(stdout.fileno(), stream)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
            AcceleratorState._reset_state(reset_partial_state=True)
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
            print("" if isinstance(end.code, int | None) else end.code)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Options:
    monkeypatch.setattr(gpu.subprocess, "Popen", Forked)
    monkeypatch.setattr(Forked, "programs", [])
    monkeypatch.setattr(gpu_cases, "TRACKER", "none")
    reference = tmp_path / "train_dreambooth_lora.py"
    reference.write_text(EXAMPLE)
    (tmp_path / "packages" / "torchvision").mkdir(parents=True)
    return gpu.Options(
        device="cpu",
        tiny=True,
        work=tmp_path / "work",
        reference=reference,
        reference_path=tmp_path / "packages",
    )


def results(options: gpu.Options) -> dict[str, Any]:
    return json.loads(options.results().read_text())["cases"]


@pytest.mark.trains
def test_the_benchmark_goes_its_whole_way_and_on_from_where_it_was(options, capsys):
    # the core of Stable Diffusion 1.5
    core = dataclasses.replace(options, core=True, only=("sd15",), reference=None)
    assert gpu.main(core) == 0
    assert Forked.programs == [
        *("benchmarks.speed_bases", "benchmarks.bare_step"),
        *("train_dreambooth_lora.py", "train_dreambooth_lora.py"),
    ]
    rows = results(options)["sd15"]
    assert set(rows) == set(gpu_cases.CORE)
    for program in gpu_cases.CORE:
        assert rows[program]["step_s"] > 0
    assert 0 < rows["replayed"]["first_step_s"] <= rows["replayed"]["seconds"]
    assert rows["launched"]["graph"] == "launched: --cuda_graph off"
    assert "sd15, bare, replayed: {" in capsys.readouterr().out

    # all programs of some cases: what was measured is kept
    Forked.programs.clear()
    names = ("sd15", "sd15-drawing-4", "same-sd15-bf16")
    wanted = {
        name: dataclasses.replace(
            CASES[name], programs=tuple(p for p in CASES[name].programs if "comp" not in p)
        )
        for name in names
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "CASES", wanted)
        assert gpu.main(options) == 0
        assert Forked.programs == [
            "benchmarks.gpu_probe",  # of sd15
            *("benchmarks.plain_drawing", "infer.py", "infer.py"),
            *["train_dreambooth_lora.py"] * 4,  # one is killed and resumed
        ]
        assert results(options)["sd15"]["launched"] == rows["launched"]
        Forked.programs.clear()
        assert gpu.main(options) == 0
        assert Forked.programs == []
    said = capsys.readouterr().out
    hashed = next(line for line in said.splitlines() if line.startswith("| Stable Diffusion 1.5, bfloat16"))
    assert hashed.split("|")[2:4] == [" equal ", " equal "]
    assert said.count("| equal |") >= 2
    assert "every program succeeded" in said


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_flags_that_its_programs_take(name, tmp_path):
    case = CASES[name]
    place = Place(
        tmp_path / "a folder", "cuda", is_tiny=False, reference=tmp_path / "example.py", user_photos=None
    )
    program = next(program for program in reversed(gpu_cases.OURS) if program in case.programs)
    if case.measures == "pictures":
        script, *words = gpu_cases.draw_words(case, program, place)
        kind: Any = InferOptions if "infer.py" in script else ClassImageOptions
    else:
        script, *words = gpu_cases.train_words(case, program, place)
        kind = TrainOptions
    options = parse(kind, "", words)
    assert Path(script).is_file()
    assert options.base.pretrained_model_name_or_path == str(place.base(case))
    assert options.speed.cuda_graph == "auto"
    if case.recipe:
        assert options.run.gradient_checkpointing
        assert options.adapter.rank == 8
    if kind is TrainOptions:
        assert options.run.max_train_steps == place.steps(case) > place.warm_up(case) + 1
        assert options.speed.compile is (program == gpu_cases.COMPILED)
    if gpu_cases.EXAMPLE in case.programs:
        _, module, _, _, last, script, *words = gpu_cases.example_words(case, place)
        assert (module, int(last)) == ("benchmarks.gpu_probe", place.steps(case))
        assert "--cuda_graph" not in words  # the example has no such flag


def report_of(**cases: Any) -> dict[str, Any]:
    now = gpu.setting(gpu.Options(), "NVIDIA H100 80GB HBM3")
    dated = {
        name: {program: {**figures, "date": "2026-12-01"} for program, figures in rows.items()}
        for name, rows in cases.items()
    }
    return {**now, "cases": dated}


def test_tables_have_the_figures_their_ratios_card_and_day():
    steps = {
        "diffusers' example": {"step_s": 0.2, "first_step_s": 21.5, "peak_gib": 3.731, "reserved_gib": 4.6},
        "launched": {"failed": "exit status 1"},
        "replayed": {"step_s": 0.025, "first_step_s": 12.0, "graph": "replayed"},
        "compiled, replayed": {"step_s": 0.1, "graph": "launched: a reason"},
        "bare, replayed": {"step_s": 0.02},
    }
    hashed = {"adapter": "a", "optimizer": "b"}
    report = report_of(
        sd15=steps,
        **{
            "sd15-drawing-1": {
                "plain diffusers": {"picture_s": 4.0},
                "launched": {"picture_s": 2.0, "pixels": "x"},
                "replayed": {"picture_s": 0.5, "pixels": "y"},
            },
            "same-sd15-bf16": {
                "launched": hashed,
                "replayed": hashed,
                "killed, resumed": {**hashed, "optimizer": "c"},
            },
            "subject": {"replayed": {"seconds": 41.26, "step_s": 0.025}},
        },
    )
    text = gpu_tables.tables(report)
    origin = "H100 80GB HBM3, 2026-12-01 |"
    title = "| Stable Diffusion 1.5, 512 px, batch 1 |"
    assert f"{title} 200 | failed | 25 | 100 (launched) |  | 20 | {origin}" in text
    assert f"{title}  | 8.00 | 2.00 | 1.25 |" in text
    assert f"{title} 3.73, 4.60 | failed |" in text
    assert f"batch 1, infer.py | 0.25 | 0.5 | 2 | 8.00 | **different** | {origin}" in text
    assert f"| equal | **different** | {origin}" in text
    assert f"from the command to the file |  | 41.26 | {origin}" in text
    heads = {line.count("|") for line in gpu_tables.short_table(report).splitlines()}
    assert len(heads) == 1
    assert gpu_tables.short_table(report_of(subject={})) == ""


def test_the_committed_figures_are_those_of_the_pages():
    path = gpu_cases.RESULTS
    report = json.loads(path.read_text()) if path.exists() else None
    for page, render in ((gpu_tables.README, gpu_tables.short_table), (gpu_tables.PAGE, gpu_tables.tables)):
        text = (report and render(report)) or gpu_tables.NOT_MEASURED
        assert f"{gpu_tables.MARKS[0]}\n{text}\n{gpu_tables.MARKS[1]}" in page.read_text()


def test_a_full_table_leaves_the_readme_short(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text(gpu_tables.README.read_text())
    columns = ("diffusers' example", "launched", "replayed", "compiled, replayed", "bare, replayed")
    rows = {column: {"step_s": 1.234} for column in columns}
    programs.write_page(page, gpu_tables.MARKS, gpu_tables.short_table(report_of(sd15=rows, sdxl=rows)))
    assert page.stat().st_size <= 10_240
    page.write_text("no marks")
    with pytest.raises(RuntimeError, match="has them 0 times"):
        programs.write_page(page, gpu_tables.MARKS, "new")


def test_a_wrong_flag_or_no_gpu_meets_one_line_and_status_2(options, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "card_name", lambda: "")
    assert gpu.main(dataclasses.replace(options, device="cuda", only=("sd16",), photos=options.work)) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: no CUDA GPU; --device cpu --tiny tries the benchmark itself without one"
    assert said[1].startswith("error: --only: no case 'sd16'; the cases are: sd15, sdxl, ")
    assert said[2] == f"error: --photos: {options.work} is not a folder"
    assert gpu.main(dataclasses.replace(options, tiny=False, output=options.work / "results.json")) == 2
    assert "give --tiny too" in capsys.readouterr().err
    assert gpu.main(dataclasses.replace(options, reference=options.work / "none.py")) == 2
    assert "there is no file" in capsys.readouterr().err
    assert not options.work.exists()

    # results of another card are not mixed with those of this one
    options.work.mkdir()
    options.results().write_text(json.dumps({**gpu.setting(options, "another card"), "cases": {}}))
    assert gpu.main(options) == 2
    assert "has results of another card: another card, not " in capsys.readouterr().err
    assert Forked.programs == []


def test_a_program_that_fails_is_in_the_results_and_is_measured_again(options, capsys):
    assert options.reference is not None
    options.reference.write_text("raise SystemExit('out of memory')")
    case = dataclasses.replace(CASES["sd15-checkpointing"], programs=(gpu_cases.EXAMPLE,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "CASES", {"sd15-checkpointing": case})
        patch.setattr(gpu, "prepare", lambda *_: None)
        assert gpu.main(options) == 1
        assert results(options)["sd15-checkpointing"][gpu_cases.EXAMPLE]["failed"] == "exit status 1"
        assert "out of memory" in capsys.readouterr().out
        held = json.loads(options.results().read_text())
        options.reference.write_text(EXAMPLE)
        now = gpu.setting(options, held["card"])
        options.results().write_text(json.dumps({**held, "reference_sha256": now["reference_sha256"]}))
        assert gpu.main(options) == 0
        assert results(options)["sd15-checkpointing"][gpu_cases.EXAMPLE]["step_s"] > 0


@pytest.mark.trains
def test_the_operators_of_a_step_are_counted(tiny_base, photos_dir, tmp_path, monkeypatch, capsys):
    words = train_words(tiny_base, photos_dir, tmp_path / "run")
    with pytest.raises(SystemExit):
        gpu_kernels.main([*words, "--max_train_steps", "3"])
    assert "--max_train_steps must be at least 12" in capsys.readouterr().err
    monkeypatch.setattr(gpu_kernels, "STEP", 2)
    gpu_kernels.main([*words, "--max_train_steps", "3"])
    counts = re.findall(
        r"^operators: ([\d,]+), of which aten::copy_: ([\d,]+)$", capsys.readouterr().out, re.M
    )
    assert len(counts) == 1
    operators, copies = (int(count.replace(",", "")) for count in counts[0])
    assert operators > 1000 > copies > 10


def test_kernels_are_counted_apart_from_copies_and_annotations():
    def event(name: str, device: Any, microseconds: int = 0, *, is_annotation: bool = False) -> Any:
        span = types.SimpleNamespace(elapsed_us=lambda: microseconds)
        return types.SimpleNamespace(
            name=name, device_type=device, time_range=span, is_user_annotation=is_annotation
        )

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        *(event("aten::copy_", cpu), event("aten::mm", cpu), event("cudaLaunchKernel", cpu)),
        *(event("gemm", cuda, 500), event("copy_kernel", cuda, 20), event("gemm", cuda, 300)),
        *(event("Memcpy HtoD", cuda, 10), event("Optimizer.step", cuda, 900, is_annotation=True)),
    ]
    first, second, *longest = gpu_kernels.counted(events)
    assert first == "operators: 2, of which aten::copy_: 1"
    assert second == "kernels: 3; copies between memories: 1; 0.83 ms"
    assert longest[0].split() == ["0.80", "ms", "2", "x", "gemm"]


@pytest.mark.parametrize(
    "words",
    [
        "--cuda_graph off",
        "--offload",
        "--adapter loha --rank_dropout 0.1",
        "--adapter loha --module_dropout 0.1",
        "--adapter boft",
        "--gradient_checkpointing --lora_dropout 0.1",
        "--gradient_checkpointing --train_text_encoder --text_encoder_dropout 0.1",
        "--train_text_encoder --text_encoder_use_attention_mask",
    ],
)
def test_what_keeps_steps_from_being_replayed_is_on_the_page_of_speed(words):
    flags = "--pretrained_model_name_or_path b --instance_data_dir d --instance_prompt p"
    reason = checks.reason_not_to_record(parse(TrainOptions, "", [*flags.split(), *words.split()]))
    assert reason is not None
    text = gpu_tables.PAGE.read_text()
    section = text[text.index("### Steps replayed from CUDA graphs") : text.index(gpu_tables.MARKS[0])]
    named = set(re.findall(r"--adapter boft|--(?!adapter)\w+", words))
    if "--text_encoder_dropout" in named:
        named.remove("--train_text_encoder")
        assert "--text_encoder_dropout" in reason
    assert any(all(flag in line for flag in named) for line in section.splitlines())
