"""Class images: the same set on any number of processes and after any interruption, and nobody else's pictures are touched."""

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import generate_class_images
from dreambooth.bases import families, pipelines
from dreambooth.data import class_images, sampling_order
from dreambooth.data.class_images import ClassImageSettings, file_name
from dreambooth.errors import UserError
from dreambooth.files import pictures
from dreambooth.options.command_line import parse
from dreambooth.options.photos import GenerationOptions, PriorOptions
from dreambooth.options.pictures import ClassImageOptions
from dreambooth.options.resolved import resolve_prior
from dreambooth.options.training import BaseOptions
from dreambooth.runtime import processes
from dreambooth.runtime.stops import Watch

SETTINGS = ClassImageSettings(
    base="0123456789abcdef",
    prompt="a photo of dog",
    seed=5,
    steps=20,
    guidance_scale=7.5,
    batch_size=4,
    side=64,
    precision="fp32",
    scheduler="dpm",
)
FLAG = "--class_data_dir"


class Interrupted(Exception):
    """Stands for a kill."""


class Painter:
    """Draws noise instead of a prompt. As with a real base, a picture depends on its seed and, in its last bits, on the whole batch."""

    def __init__(self, *, fail_after: int | None = None):
        self.fail_after = fail_after
        self.chunks: list[list[int]] = []
        self.loaded = 0

    def make_draw(self) -> Callable[[Sequence[int]], list[Any]]:
        self.loaded += 1
        return self.draw

    def draw(self, seeds: Sequence[int]) -> list[Image.Image]:
        if self.fail_after is not None and len(self.chunks) >= self.fail_after:
            raise Interrupted
        self.chunks.append(list(seeds))
        batch = sampling_order.key(0, *seeds)
        return [
            Image.fromarray(np.random.default_rng([seed, batch]).integers(0, 256, (8, 8, 3), dtype=np.uint8))
            for seed in seeds
        ]

    @property
    def numbers(self) -> list[int]:
        """The chunks drawn, by their number."""
        first = {
            sampling_order.key(SETTINGS.seed, "class-image", SETTINGS.batch_size * chunk): chunk
            for chunk in range(100)
        }
        return [first[seeds[0]] for seeds in self.chunks]


def fill(
    folder: Path,
    total: int,
    painter: Painter | None = None,
    settings: ClassImageSettings = SETTINGS,
    **place: Any,
) -> int:
    return class_images.fill(folder, settings, total, (painter or Painter()).make_draw, **place)


def fill_with_processes(folder: Path, total: int, painters: list[Painter]) -> list[int]:
    """Processes as threads with a real barrier; how many pictures each made."""
    barrier = threading.Barrier(len(painters), timeout=60)
    made, errors = [-1] * len(painters), []

    def work(rank: int) -> None:
        try:
            made[rank] = fill(
                folder,
                total,
                painters[rank],
                rank=rank,
                world=len(painters),
                wait=lambda: barrier.wait() and None,
            )
        except BaseException as error:
            barrier.abort()  # as a launcher ends all processes when one dies
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(painters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Ten pictures in three chunks, made at once by one process."""
    folder = tmp_path_factory.mktemp("whole")
    fill(folder, 10)
    return contents(folder)


# --- a set


def test_a_set_is_its_pictures_and_a_manifest(whole):
    assert set(whole) == {*map(file_name, range(10)), "manifest.json"}
    assert len(set(whole.values())) == 11


def test_a_missing_folder_is_made(tmp_path, whole):
    assert fill(tmp_path / "new" / "folder", 10) == 10
    assert contents(tmp_path / "new" / "folder") == whole


def test_every_picture_has_a_seed_of_its_own_and_chunks_go_by_number(tmp_path):
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 10
    seeds = [sampling_order.key(5, "class-image", number) for number in range(12)]
    assert painter.chunks == [
        seeds[:4],
        seeds[4:8],
        seeds[8:],
    ]  # the last one whole, though two of it are not kept
    assert painter.loaded == 1


def test_a_whole_set_is_left_alone_and_no_model_is_loaded(tmp_path, whole):
    fill(tmp_path, 10)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 0
    assert fill(tmp_path, 6, painter) == 0
    assert painter.loaded == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_makes_the_same_set(world, tmp_path, whole):
    """Byte for byte, manifest included; five processes have nothing to do for two of them."""
    painters = [Painter() for _ in range(world)]
    made = fill_with_processes(tmp_path, 10, painters)
    assert contents(tmp_path) == whole
    assert sum(made) == 10
    assert [painter.numbers for painter in painters] == [list(range(rank, 3, world)) for rank in range(world)]
    assert [painter.loaded for painter in painters] == [1 if rank < 3 else 0 for rank in range(world)]


def test_the_batch_size_is_part_of_what_a_set_is(tmp_path, whole):
    """The control: in other batches the pictures are others, so comparing bytes above says something."""
    fill(tmp_path, 10, settings=dataclasses.replace(SETTINGS, batch_size=3))
    assert contents(tmp_path)[file_name(0)] != whole[file_name(0)]


def test_the_manifest_says_what_the_set_is(tmp_path, whole):
    fill(tmp_path, 10)
    found = manifest(tmp_path)
    assert found["settings"] == {
        "base": "0123456789abcdef",
        "prompt": "a photo of dog",
        "seed": 5,
        "steps": 20,
        "guidance_scale": 7.5,
        "batch_size": 4,
        "side": 64,
        "precision": "fp32",
        "scheduler": "dpm",
    }
    assert found["sha256"] == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in sorted(whole.items())
        if name.endswith(".png")
    }
    assert list(found["sha256"]) == sorted(found["sha256"])


def test_every_picture_says_how_it_was_made(tmp_path):
    fill(tmp_path, 5)
    for number in range(5):
        inside = json.loads(Image.open(tmp_path / file_name(number)).text["dreambooth"])  # type: ignore[attr-defined]
        assert inside == {**dataclasses.asdict(SETTINGS), "number": number}


def test_a_prompt_cannot_forge_another_field(tmp_path):
    """A line break in a prompt stays within its own string."""
    prompt = 'dog\nseed: 1\x00tEXt", "seed": 1, "x": "狗'
    fill(tmp_path, 1, settings=dataclasses.replace(SETTINGS, prompt=prompt))
    image = Image.open(tmp_path / file_name(0))
    assert list(image.text) == ["dreambooth"]  # type: ignore[attr-defined]
    inside = json.loads(image.text["dreambooth"])  # type: ignore[attr-defined]
    assert (inside["prompt"], inside["seed"]) == (prompt, 5)


# --- interrupted


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_an_interrupted_set_is_completed_to_the_same_set(chunks, tmp_path, whole):
    """Only what is missing is drawn."""
    with pytest.raises(Interrupted):
        fill(tmp_path, 10, Painter(fail_after=chunks))
    there = {name for name in contents(tmp_path) if name.endswith(".png")}
    assert there == {file_name(number) for number in range(4 * chunks)}
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 10 - 4 * chunks
    assert painter.numbers == list(range(chunks, 3))
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_may_complete_a_set(first, then, tmp_path, whole):
    with pytest.raises(Interrupted):
        fill_with_processes(tmp_path, 10, [Painter(fail_after=1 - rank) for rank in range(first)])
    fill_with_processes(tmp_path, 10, [Painter() for _ in range(then)])
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("count", range(6))
def test_a_chunk_cut_short_is_drawn_again_whole(count, tmp_path, whole, monkeypatch):
    """Killed between two files: the missing pictures come from the same batch as in an unbroken run."""
    encode, left = pictures.png, [count]

    def until(image: Any, settings: Any) -> bytes:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        return encode(image, settings)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "png", until)
        with pytest.raises(Interrupted):
            fill(tmp_path, 10)
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 10 - count
    assert painter.numbers == list(range(count // 4, 3))
    assert contents(tmp_path) == whole


def test_killed_after_the_last_picture_the_next_run_completes_the_manifest(tmp_path, whole):
    """Nothing is left to draw, but the set is not yet written down."""
    waits: list[None] = []

    def wait() -> None:
        waits.append(None)
        if len(waits) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        fill(tmp_path, 10, wait=wait)
    assert {name for name in contents(tmp_path) if name.endswith(".png")} == {
        file_name(number) for number in range(10)
    }
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 0
    assert painter.loaded == 0
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    "data", [b"", b"no picture", "cut", "flipped"], ids=["empty", "text", "cut", "flipped"]
)
def test_a_damaged_picture_is_drawn_again(data, tmp_path, whole):
    fill(tmp_path, 10)
    good = whole[file_name(5)]
    bad = (
        {"cut": good[:-20], "flipped": good[:60] + bytes([good[60] ^ 1]) + good[61:]}.get(data, data)
        if isinstance(data, str)
        else data
    )
    assert isinstance(bad, bytes)
    (tmp_path / file_name(5)).write_bytes(bad)
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 1
    assert painter.numbers == [1]
    assert contents(tmp_path) == whole


def test_a_removed_picture_is_drawn_again_and_its_neighbours_are_not_written(tmp_path, whole):
    fill(tmp_path, 10)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    (tmp_path / file_name(6)).unlink()
    assert fill(tmp_path, 10) == 1
    assert contents(tmp_path) == whole
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert {name for name in after if after[name] != before[name]} == {file_name(6)}


def test_a_disk_that_is_full_leaves_no_half_picture(tmp_path, whole, monkeypatch):
    """A picture that is cut off would count as one of the set, or stop the training an hour later."""
    replace, left = os.replace, [8]

    def until(*names: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until)
        with pytest.raises(OSError, match="No space left"):
            fill(tmp_path, 10)
    there = contents(tmp_path)
    assert any(name.endswith(".png") for name in there)
    assert all(data == whole[name] for name, data in there.items() if name.endswith(".png"))
    assert not any(name.endswith(".tmp") for name in there)
    fill(tmp_path, 10)
    assert contents(tmp_path) == whole


# --- more pictures


@pytest.mark.parametrize("more", [11, 12, 13, 20])
def test_raising_the_number_keeps_the_old_pictures(more, tmp_path, whole):
    """Byte for byte, and the larger set is the one that would have been made at once."""
    fill(tmp_path / "grown", 10)
    painter = Painter()
    assert fill(tmp_path / "grown", more, painter) == more - 10
    assert painter.numbers == list(range(2, (more + 3) // 4))
    grown = contents(tmp_path / "grown")
    assert all(grown[name] == data for name, data in whole.items() if name.endswith(".png"))
    fill(tmp_path / "at_once", more)
    assert grown == contents(tmp_path / "at_once")


# --- other settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base", "fedcba9876543210"),
        ("prompt", "a photo of cat"),
        ("seed", 6),
        ("steps", 50),
        ("guidance_scale", 1.0),
        ("batch_size", 8),
        ("side", 512),
        ("precision", "bf16"),
        ("scheduler", "base"),
    ],
)
@pytest.mark.parametrize("interrupted", [False, True], ids=["whole", "interrupted"])
def test_a_set_made_with_other_settings_is_refused_with_the_difference(name, value, interrupted, tmp_path):
    """Two prompts in one folder would be trained on as one class."""
    if interrupted:
        with pytest.raises(Interrupted):
            fill(tmp_path, 10, Painter(fail_after=1))
    else:
        fill(tmp_path, 10)
    before = contents(tmp_path)
    painter = Painter()
    with pytest.raises(UserError) as refused:
        fill(tmp_path, 20, painter, dataclasses.replace(SETTINGS, **{name: value}))
    message = str(refused.value)
    assert message.startswith(f"{FLAG}: {tmp_path} holds class images made with other settings: ")
    assert f"{name} is {getattr(SETTINGS, name)!r} there and {value!r} now" in message
    assert message.count(" there and ") == 1
    assert (painter.loaded, contents(tmp_path)) == (0, before)


def test_all_differences_are_shown_at_once(tmp_path):
    fill(tmp_path, 4)
    with pytest.raises(UserError) as refused:
        fill(tmp_path, 4, settings=dataclasses.replace(SETTINGS, prompt="a cat", seed=9, precision="bf16"))
    for name in ("prompt", "seed", "precision"):
        assert f"{name} is " in str(refused.value)


def test_every_process_is_refused_alike(tmp_path):
    """One that went on alone would wait at the next barrier for ever."""
    fill(tmp_path, 4)
    other = dataclasses.replace(SETTINGS, seed=9)
    for rank in range(2):
        with pytest.raises(UserError, match="made with other settings"):
            fill(tmp_path, 8, settings=other, rank=rank, world=2, wait=lambda: pytest.fail("waited"))


# --- the user's own pictures


def test_the_user_s_own_pictures_count_and_are_never_touched(tmp_path, whole):
    own = {
        "holiday.jpg": b"not even read here",
        "IMG_1.PNG": b"x",
        "class-1.png": b"x",
        "class-000000.jpg": b"x",
    }
    others = {"notes.txt": b"x", ".hidden.png": b"x"}
    for name, data in (own | others).items():
        (tmp_path / name).write_bytes(data)
    assert fill(tmp_path, 10) == 6
    found = contents(tmp_path)
    assert set(found) == {*own, *others, *map(file_name, range(6)), "manifest.json"}
    assert all(found[name] == data for name, data in (own | others).items())
    assert all(found[name] == whole[name] for name in map(file_name, range(6)))


def test_enough_own_pictures_need_no_model(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    painter = Painter()
    assert fill(tmp_path, 10, painter) == 0
    assert painter.loaded == 0
    assert set(contents(tmp_path)) == {f"{number}.jpg" for number in range(10)}


def test_a_picture_under_our_name_that_is_not_ours_is_refused_not_overwritten(tmp_path):
    """It may be all that is left of somebody's set whose manifest was lost."""
    (tmp_path / file_name(0)).write_bytes(b"precious")
    painter = Painter()
    with pytest.raises(UserError) as refused:
        fill(tmp_path, 10, painter)
    assert str(refused.value).startswith(
        f"{FLAG}: {tmp_path / file_name(0)} is in no manifest and would be overwritten"
    )
    assert contents(tmp_path) == {file_name(0): b"precious"}
    assert painter.loaded == 0


def test_pictures_of_an_interrupted_run_whose_manifest_is_gone_are_refused(tmp_path):
    """Nothing says any more which prompt they show; counted in, two prompts would be trained on as one class."""
    with pytest.raises(Interrupted):
        fill(tmp_path, 10, Painter(fail_after=1))
    (tmp_path / "manifest.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"class-00000\d\.png is in no manifest"):
        fill(tmp_path, 10, settings=dataclasses.replace(SETTINGS, prompt="a photo of cat"))
    assert contents(tmp_path) == before


def test_a_foreign_picture_beside_our_set_is_refused_too(tmp_path):
    fill(tmp_path, 4)
    (tmp_path / file_name(7)).write_bytes(b"precious")
    with pytest.raises(UserError, match=rf"{file_name(7)} is in no manifest"):
        fill(tmp_path, 10)
    assert (tmp_path / file_name(7)).read_bytes() == b"precious"


def refused_as_damaged(folder: Path, text: str) -> None:
    """With `text` for a manifest, and nothing is written."""
    fill(folder, 4)
    (folder / "manifest.json").write_text(text)
    before = contents(folder)
    with pytest.raises(UserError) as refused:
        fill(folder, 4)
    assert str(refused.value).startswith(f"{FLAG}: {folder / 'manifest.json'} is damaged; remove it")
    assert contents(folder) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"settings": {}}',
        '{"settings": 3, "sha256": {}}',
        '{"settings": {}, "sha256": ["x"]}',
        "null",
    ],
)
def test_a_damaged_manifest_is_refused_with_what_to_do(text, tmp_path):
    refused_as_damaged(tmp_path, text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "50"},
        {"steps": 0},
        {"seed": -1},
        {"side": 1.5},
        {"precision": "fp8"},
        {"precision": None},
        {"scheduler": ["dpm"]},
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_gone_on_from_is_refused_as_damaged(wrong, tmp_path):
    """What the flags leave open is taken from it."""
    refused_as_damaged(tmp_path, json.dumps({"settings": dataclasses.asdict(SETTINGS) | wrong, "sha256": {}}))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^{FLAG}: .* is not a folder$"):
        fill(tmp_path / "file", 10)


# --- precision


@pytest.mark.parametrize(
    ("flag", "device", "expected"),
    [
        (None, "cpu", "bf16"),
        (None, "cuda", "bf16"),
        (None, "mps", "fp32"),
        ("no", "cuda", "fp32"),
        ("no", "cpu", "fp32"),
        ("fp32", "cuda", "fp32"),
        ("fp16", "cuda", "fp16"),
        ("bf16", "cpu", "bf16"),
    ],
)
def test_precision_is_bf16_where_the_hardware_computes_in_it(flag, device, expected, monkeypatch):
    """The reference script takes `no` and draws in half precision all the same."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert class_images.precision_of(flag, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("flag", "device", "expected"), [(None, "cpu", "fp32"), (None, "cuda", "fp16"), ("bf16", "cpu", "bf16")]
)
def test_precision_on_older_hardware_is_what_it_is_fast_in(flag, device, expected, monkeypatch):
    """A GPU that only pretends to know bf16 is slower with it than with fp16."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True, "avx512_f": True}
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert class_images.precision_of(flag, torch.device(device)) == expected


def test_half_precision_on_a_cpu_is_refused_where_pictures_are_missing(tiny_base, tmp_path, no_models):
    """A whole set of it, from a machine with a GPU, is taken."""
    words = [
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--class_prompt",
        "a dog",
        "--prior_generation_precision",
        "fp16",
    ]
    words += ["--class_data_dir", str(tmp_path / "set"), "--num_class_images", "2"]
    with pytest.raises(UserError, match="--prior_generation_precision fp16 does not work on a CPU"):
        generate_class_images.main(parse(ClassImageOptions, "", words))
    base = families.find(BaseOptions(str(tiny_base)))
    settings = ClassImageSettings(
        base.fingerprint(), "a dog", 0, 25, 7.5, 4, base.default_resolution, "fp16", "dpm"
    )
    fill(tmp_path / "set", 2, settings=settings)
    generate_class_images.main(parse(ClassImageOptions, "", words))


def test_training_takes_the_size_of_the_set_that_is_there(tiny_base, tmp_path):
    base = families.find(BaseOptions(str(tiny_base)))
    prior = resolve_prior(prior_of(tmp_path / "set"), class_seed=0)
    device = torch.device("cpu")
    wanted = class_images.settings_of(prior, base, base.fingerprint(), device)
    assert wanted.side == base.default_resolution
    fill(tmp_path / "set", 2, settings=dataclasses.replace(wanted, side=128))
    assert class_images.settings_of(prior, base, base.fingerprint(), device) == dataclasses.replace(
        wanted, side=128
    )


# --- sampler


def class_words(base: Path, folder: Path, *more: str) -> ClassImageOptions:
    words = f"--pretrained_model_name_or_path {base} --class_data_dir {folder} --num_class_images 2 --sample_batch_size 2 --resolution 16"
    return parse(ClassImageOptions, "", [*words.split(), "--class_prompt", "a dog", *more])


def prior_of(folder: Path, *, class_seed: int | None = None, **flags: Any) -> PriorOptions:
    return PriorOptions(
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=str(folder),
        generation=GenerationOptions(**flags),
        class_seed=class_seed,
    )


def wanted(base: families.Base, folder: Path, **flags: Any) -> ClassImageSettings:
    """The set that a training run with these flags wants."""
    prior = class_images.adopt(prior_of(folder, **flags), 3)
    assert prior is not None
    return class_images.settings_of(prior, base, base.fingerprint(), torch.device("cpu"))


def make_old(folder: Path) -> None:
    """What was kept of a set before there was a choice of samplers."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["settings"]["scheduler"]
    path.write_text(json.dumps(content))


BASES = ["tiny_base", "tiny_v_base", "tiny_xl", "tiny_edm", "tiny_if"]


@pytest.mark.parametrize(
    ("kind", "scheduler", "steps"),
    [(kind, *(("base", 50) if kind in ("tiny_edm", "tiny_if") else ("dpm", 25))) for kind in BASES],
)
def test_the_solver_takes_25_steps_and_bases_that_it_is_not_made_for_their_own_50(
    kind, scheduler, steps, tmp_path, request
):
    base = families.find(BaseOptions(str(request.getfixturevalue(kind))))
    found = wanted(base, tmp_path / "set")
    assert (found.scheduler, found.steps) == (scheduler, steps)
    assert wanted(base, tmp_path / "set", class_scheduler="base").steps == 50
    assert wanted(base, tmp_path / "set", class_inference_steps=7) == dataclasses.replace(found, steps=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("tiny_base", ["DPMSolverMultistepScheduler", "DDIMScheduler"]),
        ("tiny_v_base", ["DPMSolverMultistepScheduler", "DDIMScheduler"]),
        ("tiny_xl", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]),
        ("tiny_edm", ["EDMEulerScheduler"]),
        ("tiny_if", ["DPMSolverMultistepScheduler", "DDPMScheduler"]),
    ],
)
def test_each_family_draws_with_the_solver_and_with_its_own_sampler(
    kind, kinds, tmp_path, request, monkeypatch
):
    """What the sampler is told of the base stays: what it predicts, and its noise levels. The text encoders are gone by then."""
    real, seen = pipelines.draw, []

    def draw(pipeline: Any, *conditions: Any, **flags: Any) -> list[Image.Image]:
        seen.append(pipeline.scheduler)
        assert all(
            getattr(pipeline, encoder) is None
            for encoder in families.find(BaseOptions(str(base))).family.text
        )
        return real(pipeline, *conditions, **flags)

    monkeypatch.setattr(pipelines, "draw", draw)
    base, pictures = request.getfixturevalue(kind), []
    for scheduler in ["dpm", "base"][-len(kinds) :]:
        folder = tmp_path / scheduler
        generate_class_images.main(
            class_words(base, folder, "--class_scheduler", scheduler, "--class_inference_steps", "2")
        )
        assert manifest(folder)["settings"]["scheduler"] == scheduler
        pictures += [np.asarray(Image.open(folder / file_name(number))) for number in range(2)]
    assert [type(sampler).__name__ for sampler in seen] == kinds
    assert {sampler.config.prediction_type for sampler in seen} == {
        "v_prediction" if kind == "tiny_v_base" else "epsilon"
    }
    assert all(
        (a != b).any() for number, a in enumerate(pictures) for b in pictures[:number]
    )  # no two alike: not of one sampler, nor of two
    if len(kinds) == 2:
        assert torch.equal(seen[0].alphas_cumprod, seen[1].alphas_cumprod)


def test_the_solver_is_refused_for_an_edm_base_before_a_model_is_loaded(tiny_edm, tmp_path, no_models):
    """Its noise levels are others than the solver's."""
    with pytest.raises(
        UserError,
        match=r"^--class_scheduler dpm: a base with an EDM scheduler is drawn with that; leave it out, or give base$",
    ):
        generate_class_images.main(class_words(tiny_edm, tmp_path / "set", "--class_scheduler", "dpm"))
    with pytest.raises(UserError, match=r"^--class_scheduler dpm: "):
        wanted(families.find(BaseOptions(str(tiny_edm))), tmp_path / "set", class_scheduler="dpm")
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True], ids=["said", "from before there was a choice"])
def test_a_set_begun_with_the_base_s_own_sampler_is_continued_with_it_unasked(is_old, tiny_base, tmp_path):
    """And in its steps and precision: by training and by the script."""
    how = [
        "--class_scheduler",
        "base",
        "--class_inference_steps",
        "2",
        "--prior_generation_precision",
        "fp32",
    ]
    generate_class_images.main(class_words(tiny_base, tmp_path / "at_once", *how, "--num_class_images", "4"))
    generate_class_images.main(class_words(tiny_base, tmp_path / "grown", *how))
    if is_old:
        make_old(tmp_path / "grown")
    found = wanted(families.find(BaseOptions(str(tiny_base))), tmp_path / "grown")
    assert (found.scheduler, found.steps, found.precision) == ("base", 2, "fp32")
    generate_class_images.main(class_words(tiny_base, tmp_path / "grown", "--num_class_images", "4"))
    grown, at_once = (
        {name: data for name, data in contents(tmp_path / folder).items() if name != ".lock"}
        for folder in ("grown", "at_once")
    )
    assert grown == at_once


@pytest.mark.parametrize("is_old", [False, True], ids=["said", "from before there was a choice"])
def test_a_set_begun_with_one_sampler_is_refused_when_the_flag_says_the_other(
    is_old, tiny_base, tmp_path, no_models
):
    base = families.find(BaseOptions(str(tiny_base)))
    fill(tmp_path, 2, settings=wanted(base, tmp_path / "none", class_scheduler="base"))
    if is_old:
        make_old(tmp_path)
    before = contents(tmp_path)
    assert class_images.is_complete(tmp_path, wanted(base, tmp_path), 2)
    with pytest.raises(UserError) as refused:
        class_images.is_complete(tmp_path, wanted(base, tmp_path, class_scheduler="dpm"), 2)
    assert (
        "other settings: scheduler is 'base' there and 'dpm' now (--class_scheduler). Name another folder"
        in str(refused.value)
    )
    assert contents(tmp_path) == before


def test_processes_on_different_hardware_draw_in_the_precision_of_the_first(tiny_base, tmp_path, monkeypatch):
    base = families.find(BaseOptions(str(tiny_base)))
    settings, loaded = wanted(base, tmp_path, prior_generation_precision="fp32", class_inference_steps=1), []
    peers = processes.join(Watch(), peer_timeout=10)
    monkeypatch.setattr(peers, "broadcast", lambda value: "bf16" if value == "fp32" else value)
    real = pipelines.load_pipeline

    def load(base: families.Base, dtype: torch.dtype, device: torch.device) -> Any:
        loaded.append(dtype)
        return real(base, dtype, device)

    monkeypatch.setattr(pipelines, "load_pipeline", load)
    class_images.make(tmp_path / "set", settings, 1, base, peers, Watch())
    assert loaded == [torch.bfloat16]
    assert manifest(tmp_path / "set")["settings"]["precision"] == "bf16"
