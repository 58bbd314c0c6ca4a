"""The token of the hub is in the requests to the hub, and nowhere else: in no file, message or record."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.options.command_line import parse
from dreambooth.options.pictures import InferOptions
from dreambooth.options.training import TrainOptions
from tests.running import ROOT, as_main, train_words
from tests.training.fake_hub import TOKEN

MARK = "NotARealTokenButOneToLookFor"
OTHER = "my-0wn.hub+token"  # a hub of one's own may have tokens of any form


def environment(folder: Path, **more: str) -> dict[str, str]:
    """That of a process which keeps all its files in `folder`."""
    for name in ("home", "temporary"):
        (folder / name).mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    places = {"HOME": folder / "home", "HF_HOME": folder / "home/hf", "TMPDIR": folder / "temporary"}
    return kept | {name: str(place) for name, place in places.items()} | more


def leaks(folder: Path, said: str) -> list[str]:
    """Files whose content or name holds the token, and lines that show it."""
    data = MARK.encode()
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    named = [str(path) for path in files if data in bytes(path) or data in path.read_bytes()]
    return named + [line for line in said.splitlines() if MARK in line]


@pytest.mark.trains
def test_a_run_whose_upload_fails_leaves_the_token_nowhere(server, tiny_base, photos_dir, tmp_path):
    """The hub's answers repeat the token. The run has a tracker."""
    server.faults = {"/commit/": 403}
    words = train_words(tiny_base, photos_dir, tmp_path / "run")
    words += ["--max_train_steps", "1", "--checkpointing_steps", "1", "--report_to", "tensorboard"]
    words += ["--push_to_hub", "--hub_model_id", "dog-lora", f"--hub_token={TOKEN}"]
    result = subprocess.run(
        [sys.executable, "train_dreambooth_lora.py", *words],
        cwd=ROOT,
        env=environment(tmp_path, HF_ENDPOINT=server.address, HF_HUB_DISABLE_XET="1"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    assert "<token>" in result.stderr, result.stderr[-900:]
    assert any(request.headers.get("authorization") == f"Bearer {TOKEN}" for request in server.requests)
    assert (tmp_path / "run" / "README.md").exists()
    assert list((tmp_path / "run" / "logs").rglob("hparams.yml"))
    assert leaks(tmp_path, result.stdout + result.stderr) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", ["infer.py", "generate_class_images.py"])
def test_a_token_of_the_environment_is_written_nowhere(script, tiny_base, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = (
        f"--pretrained_model_name_or_path {tiny_base} --resolution 64 "
        + {
            "infer.py": f"--prompt dog --num_inference_steps 1 --output_dir {tmp_path}/out",
            "generate_class_images.py": "--class_prompt dog --num_class_images 1 --class_inference_steps 1"
            f" --class_data_dir {tmp_path}/out",
        }[script]
    )
    status, errors = as_main(script, *words.split())
    assert status == 0
    assert list((tmp_path / "out").glob("*.png"))
    assert leaks(tmp_path, errors + "".join(capfd.readouterr())) == []


# --- messages on flags


@pytest.mark.parametrize("secret", [TOKEN, OTHER, "eyJ" + "a1." * 100, "hf_x"])
@pytest.mark.parametrize(
    "words",
    [
        ["--hub_tokn", "{}"],
        ["--hub-tokne={}"],
        ["--hubtoken", "{}"],
        ["--hf_token={}"],
        ["--hub_token", "{}", "--no_such_flag", "1"],
        ["--hub_token={}", "--max_train_steps", "many"],
        ["--hub_token", "{}", "--instance_prompt", "{}", "--max_train_steps", "{}"],
        ["--hub_token", "{}", "--resolution", "7", "--output_dir", "{}"],
    ],
)
def test_no_message_on_a_flag_repeats_a_token(words, secret, capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainOptions, "", [word.format(secret) for word in words])
    assert end.value.code == 2
    said = "".join(capsys.readouterr())
    assert said
    assert secret[:20] not in said.replace("\n", "")


@pytest.mark.parametrize("secret", [TOKEN, OTHER])
@pytest.mark.parametrize(
    "text",
    [
        "hub_tokn: {}",
        "hub_token: {}\nrank: many",
        "hub_token: {}\nno_such_flag: 1",
        "rank: 4\nhub_token: {}: [",
        "hub_token: [{}, {}]",
        "hub_token: {{{}: 1}}",
        "max_train_steps: 4\n  hub_token: {}",
    ],
)
def test_no_message_on_a_file_of_flags_repeats_a_token(text, secret, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("{}", secret).replace("{{", "{").replace("}}", "}"))
    with pytest.raises(SystemExit) as end:
        parse(TrainOptions, "", ["--config", str(path)])
    assert end.value.code == 2
    said = "".join(capsys.readouterr())
    assert str(path) in said or "Required" in said
    assert secret not in said


def test_a_script_without_the_flag_does_not_repeat_a_token_either(capsys):
    with pytest.raises(SystemExit):
        parse(InferOptions, "", ["--hub_token", OTHER])
    assert OTHER not in "".join(capsys.readouterr())
