"""The speed benchmark: its records of a run, its figures, and the tables of docs/speed.md."""

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train_dreambooth_lora
from benchmarks import machine, programs, speed, speed_cases, speed_probe, speed_tables
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions
from dreambooth.options.training import TrainOptions

ROOT = Path(__file__).parent.parent.parent
STEPPING = """
import sys, torch
from PIL import Image
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=1.0)
for number in range(int(sys.argv[1])):
    weight.grad = torch.ones(1)
    optimizer.step()
    Image.new("RGB", (8, 8)).save(f"{number}.png")
print("the last words", __name__)
"""


def report_of(step_seconds: float, *, peak: float = 100.0, start: float = 7.0) -> dict[str, Any]:
    """A process that took six steps, the first after 5 s, the second after 9 s more."""
    steps = [[start + 5, peak - 1], *([start + 14 + k * step_seconds, peak] for k in range(5))]
    return {"steps": steps, "pictures": [], "end": [start + 99, peak + 50]}


def case(**changes: Any) -> speed_cases.Case:
    return dataclasses.replace(
        speed_cases.Case("a case", "embedded", 64, speed_cases.TRAINING, steps=6), **changes
    )


def measured(tmp_path: Path, *, reference: bool = True) -> dict[str, Any]:
    """A report with a case of each kind."""
    here, there = (
        {"step_s": s, "first_step_s": 10 * s, "peak_mib": 1000 * s, "picture_s": s} for s in (0.5, 1.0)
    )
    options = speed.Options(output=tmp_path / "speed.json", threads=2)
    cases: dict[str, Any] = {}
    for name in ("m35", "class-images", "pictures-10"):
        found = {
            "here": here,
            "bare": {"step_s": 0.4},
            "again": here,
            **({"reference": there} if reference else {}),
        }
        found = {
            program: values
            for program, values in found.items()
            if program in speed_cases.CASES[name].programs
        }
        cases[name] = {"title": speed_cases.CASES[name].title, "rounds": 3, "medians": found}
    return {**speed.setting(options), "cases": cases}


@pytest.mark.trains
def test_the_probe_sees_every_step_of_a_run_and_leaves_nothing_behind(tiny_base, photos_dir, tmp_path):
    words = f"--pretrained_model_name_or_path {tiny_base} --instance_data_dir {photos_dir} --seed 0"
    words += " --resolution 64 --max_train_steps 3"
    words += f" --train_batch_size 1 --instance_prompt sks --report_to none --output_dir {tmp_path / 'out'}"
    before = time.monotonic()
    with speed_probe.recorded() as moments:
        train_dreambooth_lora.main(parse(TrainOptions, "", words.split()))
    assert len(moments["steps"]) == 3
    assert moments["pictures"] == []
    seconds, peaks = zip(*moments["steps"], strict=True)
    in_turn = [before, *seconds, time.monotonic()]
    assert in_turn == sorted(in_turn)
    assert peaks[0] > 100
    assert all(
        after > before - 2 for before, after in itertools.pairwise(peaks)
    )  # the system counts pages in batches, for each core
    kept = len(moments["steps"])
    with speed_probe.recorded() as others:
        pass
    train_dreambooth_lora.main(parse(TrainOptions, "", [*words.split(), "--overwrite"]))
    assert len(moments["steps"]) == kept
    assert others["steps"] == []


@pytest.mark.slow
def test_a_script_under_the_probe_is_main_and_its_report_is_of_this_clock(tmp_path):
    script = tmp_path / "stepping.py"
    script.write_text(STEPPING)
    (report,), started = speed.launch([str(script), "5"], tmp_path, {}, limit=60)
    assert set(report) == {"steps", "pictures", "end"}
    assert len(report["steps"]) == len(report["pictures"]) == 5
    assert started < report["steps"][0][0] < report["end"][0] < time.monotonic()
    assert 20 < report["end"][1] < 2000
    assert "the last words __main__" in (tmp_path / "log.txt").read_text()
    found = speed.figures([report], started, case(steps=5))
    assert set(found) == {"step_s", "first_step_s", "peak_mib", "peak_to_end_mib"}
    assert 0 < found["step_s"] < found["first_step_s"] < 60


@pytest.mark.slow
def test_a_run_that_fails_hangs_or_reports_nothing_is_told_with_its_last_words(tmp_path, monkeypatch):
    stand_in = tmp_path / "probe.py"  # one that imports nothing
    stand_in.write_text(
        "import sys, time\nprint('the last words', flush=True)\n"
        "time.sleep(float(sys.argv[3]))\nsys.exit(int(sys.argv[2]))"
    )
    monkeypatch.setattr(speed, "PROBE", stand_in)
    with pytest.raises(programs.Failed, match=r"(?s)exit status 3, 0 of 1 reports.*the last words"):
        speed.launch(["3", "0"], tmp_path, {}, limit=60)
    with pytest.raises(programs.Failed, match=r"(?s)exit status 0, 0 of 1 reports.*the last words"):
        speed.launch(["0", "0"], tmp_path, {}, limit=60)
    before = time.monotonic()
    with pytest.raises(programs.Failed, match=r"(?s)not done after 1 s, 0 of 1 reports"):
        speed.launch(["0", "99"], tmp_path, {}, limit=1)
    assert time.monotonic() - before < 60


def test_a_failed_case_is_in_the_results_and_in_the_exit_status_and_others_go_on(
    tmp_path, monkeypatch, capsys
):
    def fake(words: Any, *others: Any) -> Any:
        if "64" in words:
            raise programs.Failed("exit status 3, 0 of 1 reports\nout of memory")
        return [report_of(1.0)], 7.0

    monkeypatch.setattr(speed, "launch", fake)
    monkeypatch.setattr(speed, "prepare", lambda *_: None)
    monkeypatch.setattr(speed, "load_of_others", lambda: 0.0)
    bad = case(
        programs={
            "here": speed_cases.train_here,
            "reference": speed_cases.train_reference,
            "bare": speed_cases.train_bare,
        }
    )
    for module in (speed, speed_tables):
        monkeypatch.setattr(module, "CASES", {"bad": bad, "good": dataclasses.replace(bad, side=32)})
    options = speed.Options(output=tmp_path / "speed.json", work=tmp_path / "work", rounds=2)
    assert speed.main(options) == 1
    report = json.loads(options.output.read_text())
    assert report["cases"]["bad"] == {"title": "a case", "failed": "here: exit status 3, 0 of 1 reports"}
    assert report["cases"]["good"]["medians"]["here"] == {
        "peak_mib": 100.0,
        "peak_to_end_mib": 150.0,
        "first_step_s": 5.0,
        "step_s": 1.0,
    }
    assert len(report["cases"]["good"]["runs"]["here"]) == 2
    assert report["cases"]["good"]["ratios"]["here/bare"]["step_s"] == 1.0
    assert "| a case | failed |" in speed_tables.table(report)
    assert "out of memory" in capsys.readouterr().out

    done = []

    def slower(words: Any, *others: Any) -> Any:
        done.append(words)
        return [report_of(2.0)], 7.0

    monkeypatch.setattr(speed, "launch", slower)
    assert speed.main(dataclasses.replace(options, resume=True, rounds=1)) == 0
    assert len(done) == 2, "only what had failed, and without the reference"
    again = json.loads(options.output.read_text())["cases"]
    assert again["good"] == report["cases"]["good"]
    assert again["bad"]["medians"]["here"]["step_s"] == 2.0


def test_results_of_other_versions_and_wrong_flags_are_refused(tmp_path, capsys):
    options = speed.Options(
        output=tmp_path / "speed.json",
        work=tmp_path / "work",
        only=("tinny",),
        reference_path=tmp_path,
        rounds=0,
        resume=True,
    )
    setting = speed.setting(options)
    options.output.write_text(json.dumps({**setting, "versions": {"torch": "1.0"}, "cases": {}}))
    assert speed.main(options) == 2
    said = capsys.readouterr().err
    for part in (
        "no case 'tinny'; there are: tiny",
        "has no torchvision",
        "--rounds must be at least 1",
        "is of another versions: {'torch': '1.0'}",
    ):
        assert part in said
    assert speed.main(speed.Options(reference=tmp_path / "none.py")) == 2
    assert "there is no file" in capsys.readouterr().err
    assert not options.work.exists()


def test_figures_leave_out_the_warm_up_and_take_the_process_with_most_memory():
    reports = [report_of(2.0), report_of(2.0, peak=300.0)]
    found = speed.figures(reports, 7.0, case(processes=2))
    assert found == {"peak_mib": 300.0, "peak_to_end_mib": 350.0, "first_step_s": 5.0, "step_s": 2.0}
    assert speed.figures(reports[:1], 7.0, case(warm_up=0))["step_s"] == 2.0
    drawn = {
        "steps": [],
        "pictures": [[10, 50], *([20, 60] for _ in range(3)), *([40, 70] for _ in range(4))],
        "end": [50, 80],
    }
    assert speed.figures([drawn], 0.0, case(drawn=8)) == {
        "peak_mib": 70,
        "peak_to_end_mib": 80,
        "picture_s": 5.0,
    }
    with pytest.raises(programs.Failed, match="7 steps were expected, got 6"):
        speed.figures([report_of(1.0)], 0.0, case(steps=7))


def test_medians_are_by_figure_and_ratios_of_what_both_have():
    runs = [
        {"step_s": 1.0, "peak_mib": 30.0},
        {"step_s": 9.0, "peak_mib": 10.0},
        {"step_s": 2.0, "peak_mib": 20.0},
    ]
    assert speed.medians(runs) == {"step_s": 2.0, "peak_mib": 20.0}
    assert speed.medians(runs[:2]) == {"step_s": 5.0, "peak_mib": 20.0}
    assert speed.ratios({"step_s": 3.0, "picture_s": 1.0}, {"step_s": 2.0, "peak_mib": 5.0}) == {
        "step_s": 1.5
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", speed_cases.CASES)
def test_every_case_has_flags_that_this_program_takes(name, tmp_path):
    tried = speed_cases.CASES[name]
    script, *words = tried.programs["here"](tried, speed_cases.Place(tmp_path / "a folder", None))
    kind: Any = ClassImageOptions if tried.drawn else TrainOptions
    options = parse(kind, "", words)
    assert Path(script).is_file()
    assert options.base.pretrained_model_name_or_path == str(
        speed_cases.Place(tmp_path / "a folder", None).base(tried.base)
    )
    if not tried.drawn:
        assert options.run.max_train_steps == tried.steps > tried.warm_up + 1
        assert options.instance.resolution == tried.side


@pytest.mark.parametrize("with_reference", [True, False], ids=["with the reference", "without it"])
def test_the_table_has_a_row_for_every_case_in_three_tables(tmp_path, with_reference):
    text = speed_tables.table(measured(tmp_path, reference=with_reference))
    for head in (speed_tables.HEAD, speed_tables.DRAWING_HEAD, speed_tables.TWICE_HEAD):
        assert head in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 6
    assert len({row.count("|") for row in rows[:2]}) == 1
    training = (
        "| 0.5 (1, 2.00 x) | 5 (10, 2.00 x) | 500 (1,000, 2.00 x) |"
        if with_reference
        else "| 0.5 | 5 | 500 |"
    )
    assert f"batch 1, fp32 {training} 0.4 (1.25 x) |" in text
    assert ("| 2 (1, 2.00 x) |" if with_reference else "| 2 | 500 |") in text
    assert "| 10 pictures | 5 | 5 | 0.5 | 500 |" in text
    assert "Medians of 3 runs" in text


def test_the_committed_figures_are_those_of_the_page():
    text = (
        speed_tables.table(json.loads(speed.RESULTS.read_text()))
        if speed.RESULTS.exists()
        else speed_tables.NOT_MEASURED
    )
    assert f"{speed_tables.MARKS[0]}\n{text}\n{speed_tables.MARKS[1]}" in speed_tables.PAGE.read_text()


def test_the_page_is_written_between_its_marks_alone(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{speed_tables.MARKS[0]}\nold\n{speed_tables.MARKS[1]}\nafter\n")
    programs.write_page(page, speed_tables.MARKS, "new \\1")
    assert page.read_text() == f"before\n{speed_tables.MARKS[0]}\nnew \\1\n{speed_tables.MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(RuntimeError, match="has them 0 times"):
        programs.write_page(page, speed_tables.MARKS, "new")


def test_operators_are_declared_only_where_their_library_does_not_load(tmp_path, monkeypatch):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert speed_probe.declare_operators() is None
    (package / "_C.so").write_bytes(b"no library")
    library = speed_probe.declare_operators()
    assert library is not None
    assert torch.ops.torchvision.nms is not None
    library._destroy()  # as at the end of the process: torchvision itself may be imported by another test


def test_processors_of_one_name_are_told_apart(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
    )
    monkeypatch.setattr(machine, "Path", lambda name: info)
    assert machine.processor() == "AMD EPYC (family 25, model 17)"
