"""What several test files share: a tiny base of each kind and a folder of photos, built once a session,
without a network."""

import functools
import gc
import importlib.metadata
import inspect
import os
import signal
import sys

# Before torch is imported: what these tests promise, they promise of a CPU, whether or not the machine has a
# GPU. Those of tests/gpu promise it of a GPU; they run on their own.
if not any("tests/gpu" in word for word in sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline

import train_dreambooth_lora as train
from dreambooth.adapter_files.layer_names import Layers
from dreambooth.bases import families
from dreambooth.options.training import BaseOptions
from dreambooth.training import meter, validation
from tests import single_files, tiny, tiny_judges
from tests.running import run_train

# tyro looks for the help of every flag in the source of the options, anew for each command line; a run looks
# for the versions of libraries several times, and flushes a dozen files, which no test needs.
inspect.getsource = functools.cache(inspect.getsource)  # type: ignore[assignment]
importlib.metadata.version = functools.cache(importlib.metadata.version)  # type: ignore[assignment]
os.fsync = lambda descriptor: None  # type: ignore[assignment,misc]
torch.set_num_threads(1)  # the same last bits on any machine
# Steps of a validation picture. tests/bases/test_families.py holds the number that users get.
validation._INFERENCE_STEPS = 4
# Draws of a measurement in each band. tests/training/test_meter.py holds the number that users get.
DRAWS_OF_USERS, meter.DRAWS = meter.DRAWS, 2
# A shell that runs the tests in its background leaves SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported lives as long as the process: each run here collects garbage twice, and need not
    visit it."""
    gc.collect()
    gc.freeze()


_TRAIN = train.Training.train


def _refuse_to_train(self: train.Training) -> None:
    pytest.fail("this test trains: mark it with @pytest.mark.trains")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """`make quick` leaves out what is marked, so whatever trains must be marked, its fixtures included."""
    marked = item.get_closest_marker("trains") is not None
    train.Training.train = _TRAIN if marked else _refuse_to_train  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def one_thread():
    """A run with --num_threads sets it for the whole process; another number gives other last bits."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5 in miniature: predicts noise, 77 tokens, text 32 wide."""
    return tiny.build_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_v_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a scheduler that predicts velocity, as Stable Diffusion 2.1."""
    return tiny.build_pipeline(tmp_path_factory.mktemp("v_base"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL in miniature."""
    return tiny.build_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="session")
def tiny_edm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an EDM scheduler, as Playground 2.5."""
    return tiny.build_xl(tmp_path_factory.mktemp("edm"), edm=True)


@pytest.fixture(scope="session")
def tiny_if(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepFloyd IF, first stage, in miniature."""
    return tiny.build_if(tmp_path_factory.mktemp("if"))


@pytest.fixture(scope="session")
def file_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny bases as folders, one of each kind that there is as a single file, with CLIP's own tokenizers."""
    folder = tmp_path_factory.mktemp("file_bases")
    return {kind: single_files.build_folder(folder / kind, kind) for kind in single_files.KINDS}


@pytest.fixture(scope="session")
def file_configs(file_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of the shapes of `file_bases`, in place of those of the published bases."""
    return single_files.make_configs(tmp_path_factory.mktemp("file_configs"), file_bases)


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINO in the format of facebook/dino-vits16, 28 pixels and 24 values."""
    return tiny_judges.build_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP in the format of openai/clip-vit-base-patch32, 28 pixels and 16 values."""
    return tiny_judges.build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of 64x64 pixels."""
    return tiny.make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def plain_run(tiny_base: Path, photos_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of nine steps with no flag but what a run needs, and a checkpoint after each.

    checkpoint-N has the adapter of a run of N steps. Other runs are compared with it: read it only.
    """
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path_factory.mktemp("plain_run")
    run_train(tiny_base, photos_dir, out, "--max_train_steps", "9", "--checkpointing_steps", "1")
    return out


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the precision of a process's first run for all later ones."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_models(monkeypatch):
    """Loading a model fails the test."""
    from dreambooth.bases import loading, pipelines

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    for name in ("load_encoders", "load_vae", "load_unet"):
        monkeypatch.setattr(loading, name, refuse)
    monkeypatch.setattr(pipelines, "load_pipeline", refuse)


@pytest.fixture(scope="module")
def layers(tiny_base) -> Layers:
    return families.find(BaseOptions(str(tiny_base))).layers()


@pytest.fixture
def pipeline(base_pipeline) -> StableDiffusionPipeline:
    return copy.deepcopy(base_pipeline)


@pytest.fixture(scope="module")
def base_pipeline(tiny_base) -> StableDiffusionPipeline:
    found = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found
