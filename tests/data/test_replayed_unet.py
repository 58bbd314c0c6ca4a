"""Pictures drawn with a UNet that is recorded and replayed: those of launched kernels, bit for bit."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, PNDMScheduler, TCDScheduler

import generate_class_images
import infer
from dreambooth.adapter_files import writing
from dreambooth.data import replayed_unet
from dreambooth.options.command_line import parse
from dreambooth.options.pictures import ClassImageOptions, InferOptions
from dreambooth.options.speed import GraphOptions
from dreambooth.runtime.graphs import Graphs
from dreambooth.runtime.stops import Stop
from tests import drawing
from tests.drawn_adapters import ATTENTION, adapter_of, dora, lora
from tests.running import digest, run_train
from tests.tape import TapeRecorder

CPU = torch.device("cpu")


class Recorder(TapeRecorder):
    """Counts its recordings and their replays."""

    counts: list[int] = []  # noqa: RUF012, by recording

    def record(self, function: Callable[[], object]) -> Callable[[], None]:
        replay = super().record(function)
        number = len(self.counts)
        self.counts.append(0)

        def counted() -> None:
            self.counts[number] += 1
            replay()

        return counted


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Drawing records on this CPU. How often each recording was replayed."""

    def make(device: torch.device, reason: str | None, note: Callable[[str], None]) -> Graphs:
        made = Graphs(device, reason, pytest.fail, Recorder)
        made.reason = reason  # not that it is a CPU
        return made

    monkeypatch.setattr(replayed_unet, "Graphs", make)
    monkeypatch.setattr(Recorder, "counts", [])
    return Recorder.counts


def load(folder: Path, sampler: Any = None) -> tuple[Any, Callable[..., list[bytes]]]:
    """(pipeline, function that draws one batch of these seeds)."""
    return drawing.load(folder, steps=3, dtype=torch.float32, device=CPU, sampler=sampler)


@pytest.mark.parametrize(
    ("base", "sampler"),
    [
        ("tiny_base", None),  # DDIM
        ("tiny_base", DPMSolverMultistepScheduler),
        ("tiny_base", PNDMScheduler),
        ("tiny_base", LCMScheduler),
        ("tiny_xl", TCDScheduler),
        ("tiny_xl", None),  # Euler
        ("tiny_if", None),  # DDPM
    ],
)
def test_pictures_are_those_of_launched_kernels(base, sampler, request, replays):
    pipeline, draw = load(request.getfixturevalue(base), sampler)
    batches = [([1, 2], 7.5), ([3], 7.5), ([4, 5], 1.0)]
    launched = [draw(*batch) for batch in batches]
    assert len({picture for pictures in launched for picture in pictures}) == 5
    with replayed_unet.replaying(pipeline, replayed_unet.graphs_of(GraphOptions(), CPU, pytest.fail)):
        assert [draw(*batch) for batch in batches] == launched
    assert draw(*batches[0]) == launched[0]
    # one recording for each shape: two pictures without guidance are a batch as large as one with guidance
    calls = 4 if sampler is PNDMScheduler else 3
    assert replays == [calls, 2 * calls]


def test_timestep_may_be_a_number_or_a_tensor_and_predictions_are_kept(tiny_base, replays):
    pipeline, _ = load(tiny_base)
    unet = pipeline.unet
    generator = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (77, 32)))
    rows = torch.tensor([1, 2]), torch.tensor([3, 900])
    timesteps = [1, 999, 7.5, 500.25, torch.tensor(3), torch.tensor(900), *rows]
    with torch.no_grad():
        launched = [unet(sample, timestep, text).sample for timestep in timesteps]
        with replayed_unet.replaying(pipeline, replayed_unet.graphs_of(GraphOptions(), CPU, pytest.fail)):
            replayed = [unet(sample, timestep, text).sample for timestep in timesteps]
            (prediction,) = unet(sample, 1, encoder_hidden_states=text, return_dict=False)
    assert all(map(torch.equal, replayed, launched))
    assert torch.equal(prediction, launched[0])
    assert len({tensor.sum().item() for tensor in launched}) == len(timesteps)
    assert len(replays) == 3  # for whole numbers, fractions, and a timestep for each row


def test_other_tensors_are_inputs_too_and_what_is_no_tensor_is_launched(tiny_base, replays):
    pipeline, _ = load(tiny_base)
    text = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(0))
    unet = functools.partial(pipeline.unet, torch.ones(2, 4, 8, 8), 1, text)
    masks = [(torch.arange(77)[None] < tokens).float().expand(2, 77) for tokens in (5, 9, 20)]
    calls: list[dict[str, Any]] = [{"encoder_attention_mask": mask} for mask in masks]
    calls += [{"cross_attention_kwargs": {}}, {"class_labels": None, "encoder_attention_mask": None}]
    with torch.no_grad():
        launched = [unet(**call).sample for call in calls]
        with replayed_unet.replaying(pipeline, replayed_unet.graphs_of(GraphOptions(), CPU, pytest.fail)):
            assert all(map(torch.equal, [unet(**call).sample for call in calls], launched))
    assert len({prediction.numpy().tobytes() for prediction in launched}) == 4
    assert replays == [3]


def test_pipeline_and_graphs_are_as_before_after_drawing(tiny_base, replays):
    pipeline, draw = load(tiny_base)
    before = {**vars(pipeline.unet)}
    recorded = replayed_unet.graphs_of(GraphOptions(), CPU, pytest.fail)

    def draw_and_stop() -> None:
        with replayed_unet.replaying(pipeline, recorded):
            draw([1])
            assert [len(function.recordings) for function in recorded.functions] == [1]
            raise Stop("a signal")

    with pytest.raises(Stop):
        draw_and_stop()
    assert recorded.functions == []
    assert {**vars(pipeline.unet)} == before
    assert "set_timesteps" not in vars(pipeline.scheduler)


def test_timesteps_stay_in_main_memory_while_pictures_are_drawn(replays):
    class Sampler:
        timesteps: Any = None

        def set_timesteps(self, count: int, device: str) -> None:
            self.timesteps = SimpleNamespace(cpu=lambda: f"{count} timesteps, from {device} to main memory")

    pipeline = SimpleNamespace(unet=torch.nn.Identity(), scheduler=Sampler())
    with replayed_unet.replaying(pipeline, replayed_unet.graphs_of(GraphOptions(), CPU, pytest.fail)):
        pipeline.scheduler.set_timesteps(3, device="cuda")
    assert pipeline.scheduler.timesteps == "3 timesteps, from cuda to main memory"


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_recordings_are_dropped_where_memory_runs_out(part, tiny_base, replays, monkeypatch):
    pipeline, draw = load(tiny_base)
    launched = [draw([1, 2]), draw([3])]
    notes: list[str] = []
    recorded = Graphs(CPU, None, notes.append, Recorder)
    recorded.reason = None
    kind, method = (type(pipeline.unet), "forward") if part == "unet" else (type(pipeline.vae), "decode")
    real = getattr(kind, method)

    def full(*args: Any, **keywords: Any) -> Any:
        if any(function.recordings for function in recorded.functions) and len(replays) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args, **keywords)

    monkeypatch.setattr(kind, method, full)
    with replayed_unet.replaying(pipeline, recorded):
        assert [draw([1, 2]), draw([3])] == launched
    assert notes == [
        "steps are launched kernel by kernel, not replayed from a CUDA graph: OutOfMemoryError: out of memory"
    ]
    assert replays[0] >= 2


def test_nothing_is_recorded_without_a_gpu_and_with_the_flag_off(tiny_base, replays, monkeypatch):
    pipeline, draw = load(tiny_base)
    off = replayed_unet.graphs_of(GraphOptions(cuda_graph="off"), CPU, pytest.fail)
    monkeypatch.undo()
    for launched in (off, replayed_unet.graphs_of(GraphOptions(), CPU, pytest.fail)):
        with replayed_unet.replaying(pipeline, launched):
            draw([1])
            assert "forward" not in vars(pipeline.unet)
    assert Recorder.counts == []


def pictures_in(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(folder.rglob("*.png"))}


def test_class_images_are_those_of_launched_kernels(tiny_base, tmp_path, replays):
    def make(name: str, *more: str) -> dict[str, str]:
        words = f"--pretrained_model_name_or_path {tiny_base} --class_data_dir {tmp_path / name} "
        words += "--num_class_images 5 --class_inference_steps 2 --sample_batch_size 2 --class_prompt dog"
        generate_class_images.main(parse(ClassImageOptions, "", [*words.split(), *more]))
        return pictures_in(tmp_path / name)

    assert make("replayed") == make("launched", "--cuda_graph", "off")
    assert replays == [3 * 2]


def test_pictures_with_adapters_are_those_of_launched_kernels(tiny_base, layers, tmp_path, replays):
    for name, make in (("live", lora), ("fused", dora)):
        adapter = adapter_of(layers, make, ATTENTION)
        (tmp_path / f"{name}.safetensors").write_bytes(writing.write_native(adapter, {}))
    sets = "".join(f"{name}: [{tmp_path}/{name}.safetensors:0.5]\n" for name in ("live", "fused"))
    (tmp_path / "sets.yaml").write_text(sets)

    def make_pictures(name: str, *more: str) -> dict[str, str]:
        words = f"--pretrained_model_name_or_path {tiny_base} --output_dir {tmp_path / name} --compare "
        words += f"--adapters_file {tmp_path}/sets.yaml --num_inference_steps 2 --seeds 1 2 --prompt dog"
        infer.main(parse(InferOptions, "", [*words.split(), *more]))
        return pictures_in(tmp_path / name)

    pictures = make_pictures("replayed")
    assert len(set(pictures.values())) == 7  # with the contact sheet
    assert replays == [2, 2, 2]  # an adapter changes the UNet, which is recorded anew
    assert make_pictures("launched", "--cuda_graph", "off") == pictures


@pytest.mark.trains
def test_validation_pictures_are_those_of_launched_kernels(tiny_base, photos_dir, tmp_path, replays):
    words = "--max_train_steps 2 --validation_steps 1 --num_validation_images 1 --validation_prompt dog"
    words += " --learning_rate 0.01 --use_dora"
    run_train(tiny_base, photos_dir, tmp_path / "replayed", *words.split())
    pictures = pictures_in(tmp_path / "replayed")
    # before the first step, after it, at the end, and at three other weights
    assert len(set(pictures.values())) == 6
    assert replays == [4] * 6
    run_train(tiny_base, photos_dir, tmp_path / "launched", *words.split(), "--cuda_graph", "off")
    assert pictures_in(tmp_path / "launched") == pictures
