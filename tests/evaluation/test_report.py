"""The page of a run: what it shows, that text of users stays text, its size, and how a browser shows it."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth.evaluation import report, report_data
from dreambooth.files import pictures
from dreambooth.io import console

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"
NOTHING = report.Thumbnails()


def noise(number: int, side: int = 256) -> Image.Image:
    """The picture that takes the most bytes."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8))


def records(steps: int, every: int) -> list[dict[str, Any]]:
    """What metrics.jsonl holds of a run with meters and judges."""
    lines: list[dict[str, Any]] = [
        {"step": 0, "memory": {"phase": "imports", "seconds": 2.0, "peak_resident_gib": 0.5}},
        {"step": 0, "memory": {"phase": "UNet loaded", "seconds": 5.5, "peak_resident_gib": 3.25}},
    ]
    for step in range(steps + 1):
        if step:
            lines.append({"step": step, "loss": 0.5 - step / 1e3, "lr": 1e-4, "images_per_second": 2.0})
        if step % every == 0:
            bands = [step / 1e4 * band for band in range(10)]
            meter = {name: {"bands": bands, "mean": step / 1e3, "noise": 0.01} for name in report_data.METERS}
            meter |= {
                name: {"bands": [0.1 + band for band in bands], "mean": 0.2}
                for name in ("loss_trained", "loss_held_out")
            }
            lines.append({"step": step, "meter": {**meter, "seconds": 1.0}})
            lines.append({"step": step, "judge": {"DINO": 0.3 + step / 1e3, HOSTILE: 0.5}, "pictures": 2})
    lines.append({"step": steps, "best": {"step": every, "why": f"{HOSTILE} copying grows"}})
    return lines


def run_of(
    folder: Path, *, steps: int = 40, every: int = 10, prompts: int = 2, text: str = HOSTILE
) -> report.Run:
    """A finished run of two pictures a prompt, whose every text is `text`."""
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    names = []
    for prompt in range(prompts):
        for number in range(2):
            data = pictures.png(noise(number), {"prompt": f"{prompt} {text}"})
            for step in range(0, steps, every):
                names.append(f"validation/step-{step:06d}-{prompt:02d}-{number:02d}.png")
                (folder / names[-1]).write_bytes(data)
    for name in ("image_00_0", "weight-0.50", "weight-1.25"):
        names.append(f"validation/{name}.png")
        settings = {"prompt": f"0 {text}", "step": steps}
        (folder / names[-1]).write_bytes(pictures.png(noise(5), settings))
    uses: list[report.Use] = ["trained", "held out", "class"]
    return report.Run(
        folder=folder,
        flags={"instance_prompt": text, "output_dir": f"/runs/{text}", "rank": 4},
        status={"state": "finished", "reason": text},
        records=records(steps, every),
        pictures=report_data.drawn(names),
        photos=[
            report.Photo(f"{text}.png", f"{use} {text}", use, report.thumbnail(noise(9))) for use in uses
        ],
        counts={"trained": 1, "held out": 1, "class": 200},
        max_steps=steps,
        about=[("Base", text)],
        command=f"train {text}",
        draw_command=f"infer {text}",
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> report.Run:
    return run_of(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def hostile_page(hostile) -> str:
    return report.page(hostile, NOTHING, "today")


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data):
        self.text += data


# --- text and safety


def test_text_of_users_stays_text(hostile_page):
    page = Elements(hostile_page)
    assert {tag for tag, _ in page.elements} & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "form",
    } == set()
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    # prompts, captions, file names, flags, reasons, sentences, names of scores and commands are all there
    assert page.text.count(HOSTILE) > 12
    assert f"trained {HOSTILE}" in page.text


def test_nothing_is_loaded_and_a_policy_forbids_it(hostile_page):
    page = Elements(hostile_page)
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:image/jpeg;base64,", "#"))
    style = hostile_page[hostile_page.index("<style>") : hostile_page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", hostile_page))


def test_a_token_is_shown_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_secrets", set())
    console.hide("my-very-own-secret")
    run = run_of(tmp_path, text="hf_AbCdEfGh1234567890 my-very-own-secret")
    page = report.page(run, report.Thumbnails(), "today")
    assert "hf_AbCdEfGh" not in page
    assert "my-very-own-secret" not in page
    assert "&lt;token&gt;" in page


def test_characters_that_do_not_print_are_spelled_out(tmp_path):
    page = report.page(run_of(tmp_path, text="a\x1b[2J\u202edog"), report.Thumbnails(), "today")
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "a\\x1b[2J\\u202edog" in page


# --- content


def test_the_answer_comes_first(hostile_page):
    text = Elements(hostile_page).text
    parts = [
        "Use the adapter after step 10",
        "copying grows",
        "best/pytorch_lora_weights.safetensors",
        "The same prompts and noise",
    ]
    places = [text.rindex(parts[0]), *(text.index(part) for part in parts[1:])]
    assert places == sorted(places)


def test_every_section_shows_what_the_records_hold(hostile_page):
    text = Elements(hostile_page).text
    for part in (
        *("40 of 40 steps", "step 30", "step 40", "Gap", "Drift", "DINO", "0.310"),
        *("weight 0.5", "weight 1.25", "Loss on held-out photos", "Held out", "Class images", "200"),
        *("UNet loaded", "3.5 s", "3.25 GiB", "2 pictures a second", "All 3 settings", "rank"),
    ):
        assert part in text, part
    assert hostile_page.count("<svg ") == 7


def test_the_grid_has_a_column_a_step_and_a_row_a_picture(hostile_page):
    grid = hostile_page[hostile_page.index('<table class="grid">') :]
    grid = grid[: grid.index("</table>")]
    assert grid.count('<th class="step') == 5  # 0, 10, 20, 30, and the finished adapter's 40
    assert grid.count("<img ") == 4 * 4 + 1
    assert grid.count("chosen") == 1 + 4  # heading and cells of step 10


def test_a_run_without_pictures_meters_or_end_has_a_page(tmp_path):
    run = report.Run(folder=tmp_path, flags={}, status={"state": "running"}, records=[], pictures=[])
    text = Elements(report.page(run, report.Thumbnails(), "today")).text
    assert "running" in text
    assert "--meter_steps" in text


def test_a_run_whose_choice_names_no_step_says_why(hostile):
    lines = [*hostile.records, {"step": 40, "best": {"step": None, "why": "no photo is held out"}}]
    run = dataclasses.replace(hostile, records=lines)
    text = Elements(report.page(run, report.Thumbnails(), "today")).text
    assert "Use the adapter after the last step, 40" in text
    assert "No step is named: no photo is held out." in text


def test_the_same_run_gives_the_same_bytes(hostile, hostile_page):
    assert report.page(hostile, report.Thumbnails(), "today") == hostile_page


def test_a_hundred_validations_fit_into_the_limit_and_keep_first_chosen_and_last(tmp_path):
    run = run_of(tmp_path, steps=1000, every=10, prompts=7)
    run = dataclasses.replace(run, photos=list(run.photos) * 8)
    page = report.page(run, report.Thumbnails(), "today")
    assert len(page.encode()) < report.LARGEST
    steps = [int(step) for step in re.findall(r'scope="col">step ([0-9]+)', page)]
    assert len(steps) == report.MOST_STEPS
    assert {0, 10, 1000} <= set(steps)
    assert steps == sorted(steps)
    assert "pictures of 89 other steps" in page


def test_pictures_that_are_damaged_or_gone_leave_their_cells_empty(tmp_path):
    run = run_of(tmp_path, prompts=1)
    (tmp_path / run.pictures[0].name).write_bytes(b"no picture")
    (tmp_path / run.pictures[1].name).unlink()
    assert report.page(run, report.Thumbnails(), "today").count('class="empty"') > 1


# --- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (390, 1280)
# The page stands in frames of its own widths: a window has a least width. It keeps its policy there.
FRAME = '<iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe>'
MEASURE = """<script>
const frames = () => [...document.querySelectorAll("iframe")];
onload = () => console.log("measured " + JSON.stringify(frames().map(frame => {
  const page = frame.contentDocument, root = page.documentElement, images = [...page.images];
  return [frame.contentWindow.innerWidth, root.scrollWidth - root.clientWidth, images.length,
    images.filter(image => !image.naturalWidth).length];
})));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_all_pictures_without_an_error_and_no_page_scrolls_sideways(hostile_page, tmp_path):
    assert CHROMIUM is not None
    frames = [FRAME.format(width=width, page=html.escape(hostile_page)) for width in WIDTHS]
    path = tmp_path / "frames.html"
    path.write_text("<!DOCTYPE html><meta charset=utf-8>" + "".join(frames) + MEASURE)
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    seen = subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=120, check=True)
    # any error of the pages, such as something that their policy forbids, would be a line more
    (line,) = [line for line in seen.stderr.splitlines() if "CONSOLE" in line]
    (measured,) = re.findall(r"measured (\[.*\])\"", line)
    assert json.loads(measured) == [[width, 0, hostile_page.count("<img "), 0] for width in WIDTHS]
