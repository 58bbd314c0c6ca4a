"""What makes steps fast must not change what is learned: losses read late, compiled blocks."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_dreambooth_lora as train
from dreambooth.adapter_files import native
from dreambooth.bases import compilation
from dreambooth.io.errors import UserError
from dreambooth.training import loss_log
from tests.running import adapter_after, digest, metrics, run_train


@pytest.mark.trains
def test_losses_read_late_are_the_same_and_so_is_the_adapter(
    tiny_base, photos_dir, plain_run, tmp_path, monkeypatch
):
    words = ["--max_train_steps", "8", "--checkpointing_steps", "5"]
    monkeypatch.setattr(loss_log, "steps_between_readings", lambda device: 3)
    late = digest(run_train(tiny_base, photos_dir, tmp_path / "late", *words))
    assert late == digest(adapter_after(plain_run, 8))
    one, other = (
        [{k: v for k, v in record.items() if k != "images_per_second"} for record in metrics(out)[:8]]
        for out in (plain_run, tmp_path / "late")
    )
    assert one == other
    assert [record["step"] for record in other] == list(range(1, 9))


@pytest.mark.trains
@pytest.mark.parametrize("what", ["the loss", "the gradients"])
def test_a_step_that_is_found_not_finite_late_was_not_taken_nor_any_after_it(
    tiny_base, photos_dir, plain_run, tmp_path, monkeypatch, capsys, what
):
    words = ["--max_train_steps", "9", "--checkpointing_steps", "9"]
    real, calls = train.dreambooth_loss, []

    def spoiled(*args, **kwargs):
        calls.append(1)
        loss, pieces = real(*args, **kwargs)
        if len(calls) == 5:
            loss = (
                loss * float("nan") if what == "the loss" else loss + 0 * (loss - loss.detach()).sqrt()
            )  # the root's slope at 0 is infinite
        return loss, pieces

    monkeypatch.setattr(train, "dreambooth_loss", spoiled)
    monkeypatch.setattr(loss_log, "steps_between_readings", lambda device: 3)
    with pytest.raises(SystemExit) as exit_:
        run_train(tiny_base, photos_dir, tmp_path / "late", *words)
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert len(calls) == 7  # the numbers of 5 to 7 were read together
    assert f"{what} of step 5 {'is' if what == 'the loss' else 'are'} not finite" in said
    assert json.loads((tmp_path / "late" / "status.json").read_text())["step"] == 4
    assert [record["step"] for record in metrics(tmp_path / "late")] == [1, 2, 3, 4]
    there = load_file(tmp_path / "late" / "checkpoint-4" / native.ADAPTER_NAME)
    wanted = load_file(adapter_after(plain_run, 4))
    assert there.keys() == wanted.keys()
    assert all(torch.equal(there[key], wanted[key]) for key in wanted)


@pytest.mark.trains
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_blocks_learn_the_same_to_rounding(tiny_base, photos_dir, tmp_path, monkeypatch, capsys):
    """Traced and differentiated by torch.compile: the three blocks in the middle, since every other shape
    takes seconds. The C++ compiler is tried by the check that a run begins with."""
    compile_blocks, counts = compilation.compile_blocks, []
    monkeypatch.setattr(
        compilation, "compile_blocks", lambda unet: counts.append(compile_blocks(unet.mid_block))
    )
    compile_module = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    words = [
        "--max_train_steps",
        "2",
        "--validation_prompt",
        "a dog",
        "--num_validation_images",
        "1",
        "--validation_steps",
        "1",
    ]
    plain = load_file(run_train(tiny_base, photos_dir, tmp_path / "plain", *words))
    compiled = load_file(run_train(tiny_base, photos_dir, tmp_path / "compiled", *words, "--compile"))
    assert counts == [3]
    assert plain.keys() == compiled.keys()
    for key, tensor in plain.items():
        # Adam's first steps are all of one size: where a gradient is next to nothing, rounding turns their
        # sign
        assert torch.nn.functional.cosine_similarity(tensor.flatten(), compiled[key].flatten(), dim=0) > 0.99
    assert "--compile" in capsys.readouterr().out  # on a CPU it does not pay, which is said
    assert (tmp_path / "compiled" / "validation" / "image_0.png").exists()


@pytest.mark.slow
def test_every_block_is_compiled_and_the_names_of_its_weights_stay(tiny_base):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    names = list(unet.state_dict())
    assert (
        compilation.compile_blocks(unet)
        == sum(type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock") for m in unet.modules())
        > 5
    )
    assert list(unet.state_dict()) == names


def test_a_compiler_that_is_missing_is_told_before_anything_slow(
    tiny_base, photos_dir, tmp_path, monkeypatch, no_models
):
    def fail(function):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(
        UserError,
        match=(
            r"^--compile does not work here: no C\+\+ compiler was found; install a C\+\+ compiler, "
            r"or leave it out$"
        ),
    ):
        run_train(tiny_base, photos_dir, tmp_path, "--compile")


def test_what_compiling_costs_is_said_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    gpu = torch.device("cuda")
    recorded = compilation.note(gpu, is_recorded=True)
    assert str(tmp_path / "compiled") in recorded
    assert "pays from 8,600 steps" in recorded
    assert "--compile hardly pays where steps are not replayed" in compilation.note(gpu, is_recorded=False)
    assert "on a CPU it compiles for minutes" in compilation.note(torch.device("cpu"), is_recorded=False)
