"""Buckets: which shape a photo gets, which bucket a batch takes its photos from, and runs whose photos have
odd shapes."""

import collections
import json
import os
from pathlib import Path

import pytest
from PIL import Image

import train_dreambooth_lora as train
from dreambooth.bases import families
from dreambooth.data import batches, buckets, photos
from dreambooth.data.buckets import Buckets
from dreambooth.data.crops import Crops
from dreambooth.data.photos import Photo
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import parse
from dreambooth.options.training import BaseOptions, TrainOptions
from tests import tiny
from tests.running import (
    ROOT,
    digest,
    main_on_two_processes,
    meter_records,
    prior_words,
    run_train,
    train_words,
)

# folders of photos, one for each subject
REAL = Path(os.environ.get("DREAMBOOTH_PHOTOS", ROOT.parent / "shared" / "data" / "dreambooth"))
SIZES = [(2048, 2048), (6400, 4800), (4000, 1200), (3000, 2000), (1920, 3413)]


# --- shapes


@pytest.mark.parametrize(("side", "grid"), [(512, 64), (768, 64), (1024, 32), (64, 8), (72, 16), (520, 64)])
def test_shapes_lie_on_the_grid_and_have_at_most_the_area_of_the_square(side, grid):
    chosen = Buckets((side,), grid)
    for size in SIZES:
        (shape,) = chosen.shapes_of(size)
        assert all(length % grid == 0 for length in shape)
        assert 0.75 * (side // grid * grid) ** 2 <= shape[0] * shape[1] <= side**2
        assert chosen.shapes_of(size[::-1]) == (shape[::-1],)


def test_a_bucket_keeps_what_a_square_would_cut_off():
    chosen = Buckets((512,), 64)
    assert chosen.shapes_of((512, 512)) == ((512, 512),)
    assert chosen.shapes_of((3000, 2000)) == ((576, 384),)
    for size in SIZES:
        assert buckets.kept(size, chosen.shapes_of(size)[0]) >= max(0.9, buckets.kept(size, (512, 512)))


def test_the_grid_is_that_of_vae_and_unet(tiny_base, tiny_xl, tiny_if):
    grids = [families.find(BaseOptions(str(base))).grid for base in (tiny_base, tiny_xl, tiny_if)]
    assert grids == [16, 16, 2]


def test_a_resolution_under_the_grid_is_refused():
    with pytest.raises(UserError, match=r"--resolution must be at least 64 with --buckets: .* got 32"):
        Buckets((512, 32), 64).check()


def test_no_photo_is_enlarged_more_than_the_limit():
    chosen = Buckets((512, 768), 64)
    assert chosen.shapes_of((600, 600)) == ((512, 512), (768, 768))
    assert chosen.shapes_of((400, 400)) == ((512, 512),)
    assert chosen.shapes_of((200, 200)) == ((256, 256),)
    assert chosen.shapes_of((40, 40)) == ((64, 64),)
    photos = [("a.png", (900, 600)), ("small.png", (200, 200))]
    assert buckets.notes(chosen, photos, 1) == [
        "1 of 2 photos would be enlarged more than 1.5 times for --resolution 512,768, and have smaller "
        "shapes: small.png"
    ]


def test_crops_of_a_bucket_have_its_shape_and_sizes_are_those_of_the_crop():
    crops = Crops(64, "lanczos", center_crop=False, stride=8).of((96, 32))
    assert crops.resized_size((300, 300)) == (96, 96)
    assert crops.room((300, 300)) == (0, 64)
    assert crops.box((0, 8)) == (0, 8, 96, 40)
    assert crops.time_ids((300, 300), (0, 8)) == (300, 300, 8, 0, 32, 96)
    assert Crops(64, "lanczos", center_crop=True).of((128, 128)) == Crops(128, "lanczos", center_crop=True)


# --- the order


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Five photos of three shapes."""
    return tiny.make_odd_photos(tmp_path_factory.mktemp("odd"))


def rows_of(folder: Path, batch_size: int, *sides: int) -> batches.PhotoRows:
    """The rows of the photos in a folder, with class rows beside them that take photos of the subject."""
    pictures = photos.check_folder(folder, "--instance_data_dir").photos
    sources = [batches.Source(purpose, pictures, [""] * len(pictures)) for purpose in ("instance", "prior")]
    return batches.PhotoRows(sources, 7, Crops(64, "lanczos", False), Buckets(sides, 16), batch_size)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_photo_comes_up_equally_often_in_each_of_its_shapes(odd, batch_size):
    dataset = rows_of(odd, batch_size, 64, 96)
    total = sum(len(bucket.photos) for bucket in dataset.filled)
    assert total > len(dataset.sources[0].photos)  # most are large enough for both resolutions
    for source in dataset.sources:
        visits: collections.Counter[tuple[Photo, Crops]] = collections.Counter()
        for batch in range(total):
            rows = range(batch * batch_size, (batch + 1) * batch_size)
            assert len({dataset.crops_of(row) for row in rows}) == 1
            visits.update((source.photos[dataset.photo(source, row)], dataset.crops_of(row)) for row in rows)
        assert visits == dict.fromkeys(dataset.all_crops(source), batch_size)


def test_with_several_subjects_a_batch_has_one_and_their_rows_are_balanced(odd):
    """The second subject has three photos of five, and two of three batches."""
    pictures = photos.check_folder(odd, "--instance_data_dir").photos
    shares = (batches.Share("", "", 2, 1, 1.0), batches.Share("", "", 3, 2, 0.5))
    source = batches.Source("instance", pictures, [""] * 5, shares=shares)
    dataset = batches.PhotoRows([source], 7, Crops(64, "lanczos", False), Buckets((64,), 16), batch_size=3)
    visits: collections.Counter[int] = collections.Counter()
    for batch in range(18):
        rows = range(3 * batch, 3 * batch + 3)
        indices = [dataset.photo(source, row) for row in rows]
        assert len({index < 2 for index in indices}) == len({dataset.crops_of(row) for row in rows}) == 1
        assert {(pictures[index], dataset.crops_of(rows[0])) for index in indices} <= {
            *dataset.all_crops(source)
        }
        weights = dataset.weights(rows)
        assert weights is not None
        assert weights.tolist() == [1.0 if indices[0] < 2 else 0.5] * 3
        visits.update(indices)
    assert visits == {0: 9, 1: 9, 2: 12, 3: 12, 4: 12}


def test_photos_of_one_shape_have_the_order_of_a_run_without_buckets(photos_dir):
    dataset = rows_of(photos_dir, 2, 64)
    plain = batches.PhotoRows(dataset.sources, 7, dataset.crops)
    for source in dataset.sources:
        pairs = [(dataset.photo(source, row), plain.photo(source, row)) for row in range(20)]
        assert [one for one, _ in pairs] == [other for _, other in pairs]


# --- runs


@pytest.mark.trains
def test_two_processes_and_a_resumed_run_learn_what_one_learns(tiny_xl, odd, tmp_path, capsys):
    """With class images, which are cut to the shape of the photos beside them, and a meter."""
    classes = tiny.make_photos(tmp_path / "class")
    words = ["--buckets", "--resolution", "64,96", "--random_flip", *prior_words(classes)]
    words += ["--train_batch_size", "2", "--max_train_steps", "3", "--checkpointing_steps", "1"]
    words += ["--holdout", "1"]
    alone = [*words, "--gradient_accumulation_steps", "2"]
    one = run_train(tiny_xl, odd, tmp_path / "one", *alone, "--meter_steps", "3")
    assert "buckets:\n" in capsys.readouterr().out
    resume = ["--resume_from_checkpoint", str(tmp_path / "one" / "checkpoint-1")]
    resumed = run_train(tiny_xl, odd, tmp_path / "resumed", *alone, *resume)
    main_on_two_processes(
        train.main, parse(TrainOptions, "", train_words(tiny_xl, odd, tmp_path / "two", *words))
    )
    assert digest(one) == digest(resumed) == digest(tmp_path / "two" / one.name)
    before, after = (record["meter"]["drift"]["mean"] for record in meter_records(tmp_path / "one"))
    assert before == 0 < after < 1
    page = (tmp_path / "one" / "report.html").read_text()
    assert "<h3>Buckets</h3>" in page
    assert json.loads((tmp_path / "one" / "run.json").read_text())["flags"]["resolution"] == "64,96"


REAL_SHAPES = [(512, 340), (300, 512), (512, 200), (512, 512)]


def real_photos(name: str, folder: Path) -> Path:
    """Photos of a real subject, cut to several shapes."""
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL} has no folder {name} of photos; DREAMBOOTH_PHOTOS names another place")
    for number, path in enumerate(sorted((REAL / name).glob("*.jpg"))[:4]):
        width, height = REAL_SHAPES[number]
        with Image.open(path) as image:
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image.crop((left, top, left + width, top + height)).save(folder / f"{number}.png")
    return folder


@pytest.mark.trains
@pytest.mark.parametrize(
    ("name", "base", "more"),
    [
        ("dog3", "tiny_base", "--resolution 64,96 --cache_latents disk"),
        ("duck_toy", "tiny_xl", "--resolution 64 --center_crop --cache_latents off"),
        ("rc_car", "tiny_xl", "--resolution 96 --random_flip"),
    ],
)
def test_real_photos_of_odd_shapes_train_the_same_on_two_processes_and_resumed(
    name, base, more, request, tmp_path_factory, tmp_path
):
    photos = real_photos(name, tmp_path_factory.mktemp(name))
    folder = request.getfixturevalue(base)
    words = ["--buckets", *more.split(), "--max_train_steps", "2", "--checkpointing_steps", "1"]
    alone = [*words, "--gradient_accumulation_steps", "2"]
    one = run_train(folder, photos, tmp_path / "one", *alone)
    resume = ["--resume_from_checkpoint", str(tmp_path / "one" / "checkpoint-1")]
    resumed = run_train(folder, photos, tmp_path / "resumed", *alone, *resume)
    two = parse(TrainOptions, "", train_words(folder, photos, tmp_path / "two", *words))
    main_on_two_processes(train.main, two)
    assert digest(one) == digest(resumed) == digest(tmp_path / "two" / one.name)
