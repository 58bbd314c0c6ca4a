"""report.html of real runs: written as they go, whole at any moment, the same after kill -9 and a resume."""

import errno
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest

import train_dreambooth_lora as train
from dreambooth.files.ownership import WrittenFiles
from tests.running import adapter_after, digest, run_train

WORDS = "--max_train_steps 4 --checkpointing_steps 2 --num_validation_images 1 --validation_steps 2"
PROMPT = "a <i>sks</i> dog & cat"


def words(*more: str) -> list[str]:
    return [*WORDS.split(), "--validation_prompt", PROMPT, *more]


def text_of(page: str) -> str:
    """The text of a page, without styles, times and speeds. The page must be whole."""
    assert page.endswith("</html>\n")
    texts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = texts.append  # type: ignore[method-assign, assignment]
    parser.feed(
        re.sub(r"<style>.*?</style>|<time>.*?</time>|<dt>Speed</dt><dd>.*?</dd>", "", page, flags=re.S)
    )
    parser.close()
    return re.sub(r"\s+", " ", re.sub(r"[0-9.]+ (s|GiB|min)\b", "", "".join(texts)))


def comparable(run: Path) -> str:
    """The page of a run without times and speeds, and without a phase that only a start at step 0 has."""
    page = (run / "report.html").read_text()
    page = re.sub(r"<time>.*?</time>|<dt>Speed</dt><dd>.*?</dd>", "", page)
    page = re.sub(r'<td class="number">[0-9.]+ (?:s|GiB|min [0-9]+ s)</td>', "", page)
    return re.sub(r"\s*<tr><td>first evaluation</td>\s*</tr>", "", page)


@pytest.fixture(scope="module")
def run(tiny_base, photos_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run_train(tiny_base, photos_dir, out, *words())
    return out


@pytest.mark.trains
def test_a_finished_run_has_a_page_of_its_photos_prompts_steps_and_settings(run):
    text = text_of((run / "report.html").read_text())
    for part in (
        *("finished", "4 of 4 steps", "3 photos", "Use the adapter after the last step, 4", PROMPT),
        *("step 0", "step 2", "step 4", "weight 0.5", "weight 1.25", "photo-0.png", "UNet loaded"),
        *("lora of rank 4, on UNet", "--validation_prompt", "max_train_steps", "torch"),
    ):
        assert part in text, part
    assert digest(run / "pytorch_lora_weights.safetensors") != digest(run / "report.html")


@pytest.mark.trains
def test_every_page_is_whole_and_the_first_comes_before_the_first_step(
    tiny_base, photos_dir, tmp_path, monkeypatch
):
    pages: list[str] = []
    write = WrittenFiles.write

    def noted(self: WrittenFiles, name: str, data: bytes, **more: bool) -> None:
        if name == "report.html":
            pages.append(data.decode())
        write(self, name, data, **more)

    monkeypatch.setattr(WrittenFiles, "write", noted)
    monkeypatch.setattr("dreambooth.training.run_report._SHORTEST_PAUSE", 0.0)
    monkeypatch.setattr("dreambooth.training.run_report._PAUSE_FACTOR", 0)
    run_train(tiny_base, photos_dir, tmp_path, *words())
    states = [(re.findall(r"(running|finished)", text_of(page))[0], page.count("<img ")) for page in pages]
    # before any picture, before the first step, after steps 2 and 4, at the end
    assert states[0][0] == "running"
    assert "0 of 4 steps" in pages[0]
    assert [state for state, _ in states] == ["running"] * (len(states) - 1) + ["finished"]
    assert [count for _, count in states] == sorted(count for _, count in states)
    assert len(states) == 5


@pytest.mark.trains
def test_after_kill_9_the_page_is_whole_and_the_resumed_run_ends_with_that_of_an_unbroken_one(
    run, tiny_base, photos_dir, tmp_path
):
    out = tmp_path / run.name  # the page shows the name
    step = train.Training.step

    def killed(self: train.Training, number: int, batches: object) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, number, batches)  # type: ignore[arg-type]

    child = os.fork()
    if child == 0:
        train.Training.step = killed  # type: ignore[method-assign, assignment]
        run_train(tiny_base, photos_dir, out, *words())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert "running" in text_of((out / "report.html").read_text())
    run_train(tiny_base, photos_dir, out, *words("--resume_from_checkpoint", "latest"))
    assert comparable(out) == comparable(run)


@pytest.mark.trains
def test_a_run_that_ends_early_says_so_on_its_page(tiny_base, photos_dir, tmp_path, monkeypatch):
    step = train.Training.step

    def fails(self: train.Training, number: int, batches: object) -> None:
        if number == 2:
            raise RuntimeError("the <b>fan</b> stopped")
        step(self, number, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(train.Training, "step", fails)
    with pytest.raises(RuntimeError, match="fan"):
        run_train(tiny_base, photos_dir, tmp_path, *WORDS.split())
    text = text_of((tmp_path / "report.html").read_text())
    assert "failed" in text
    assert "2 of 4 steps" in text
    assert "RuntimeError: the <b>fan</b> stopped" in text


@pytest.mark.trains
def test_a_line_that_somebody_added_to_the_metrics_costs_the_page_and_no_step(
    tiny_base, photos_dir, plain_run, tmp_path, monkeypatch, capsys
):
    step = train.Training.step

    def with_a_note(self: train.Training, number: int, batches: object) -> None:
        if number == 1:
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"note": "looks good"}\n')
        step(self, number, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(train.Training, "step", with_a_note)
    adapter = run_train(tiny_base, photos_dir, tmp_path, *WORDS.split())
    assert digest(adapter) == digest(adapter_after(plain_run, 4))
    assert capsys.readouterr().out.count("report.html cannot be written: metrics.jsonl: line ") == 1


@pytest.mark.trains
def test_a_full_disk_costs_the_page_and_no_step(
    tiny_base, photos_dir, plain_run, tmp_path, monkeypatch, capsys
):
    write = WrittenFiles.write

    def full(self: WrittenFiles, name: str, data: bytes, **more: bool) -> None:
        if name == "report.html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        write(self, name, data, **more)

    monkeypatch.setattr(WrittenFiles, "write", full)
    adapter = run_train(tiny_base, photos_dir, tmp_path, *WORDS.split())
    assert digest(adapter) == digest(adapter_after(plain_run, 4))
    assert capsys.readouterr().out.count("report.html cannot be written: No space left on device") == 1


def test_a_report_of_the_user_is_not_replaced(tiny_base, photos_dir, tmp_path, no_models):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(Exception, match=r"holds report\.html, to be written now"):
        run_train(tiny_base, photos_dir, tmp_path, *WORDS.split())
    assert (tmp_path / "report.html").read_text() == "mine"
