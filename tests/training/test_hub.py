"""The upload: nothing private leaves the machine; a failed upload is an error and loses nothing.

A hub in this process listens on the loopback device and answers the requests that the library makes.
"""

import os
import re
import shlex
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants

from dreambooth.adapter_files import native
from dreambooth.io.errors import UserError
from dreambooth.options.command_line import as_table, without_token
from dreambooth.training import hub
from tests.training.fake_hub import PICTURES, TOKEN, UPLOADED, card, chosen, reports


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what goes up


def test_adapter_card_and_pictures_arrive_byte_for_byte_in_one_commit_and_nothing_else_does(server, out):
    before = contents(out)
    assert hub.push(reports(), out, PICTURES) == f"{server.address}/me/dog-lora"
    assert server.files == {"me/dog-lora": {name: before[name] for name in UPLOADED}}
    assert server.commits == [("End of training", UPLOADED)]
    assert contents(out) == before


def test_the_other_format_goes_up_where_it_was_written(server, out):
    (out / native.KOHYA_NAME).write_bytes(b"kohya")
    hub.push(reports(hub_model_id="club/dog"), out, [])
    assert server.files["club/dog"].keys() == {
        "pytorch_lora_weights.safetensors",
        native.KOHYA_NAME,
        "README.md",
    }
    assert server.files["club/dog"][native.KOHYA_NAME] == b"kohya"


def test_a_second_upload_replaces_what_changed_and_one_without_changes_is_no_failure(server, out):
    first = hub.push(reports(), out, PICTURES)
    (out / "validation/image_1.png").write_bytes(b"another")
    assert hub.push(reports(), out, PICTURES) == first
    assert server.commits[1:] == [("End of training", ["validation/image_1.png"])]
    assert hub.push(reports(), out, PICTURES) == first
    assert len(server.commits) == 2


def test_the_token_is_in_authorization_headers_and_nowhere_else(server, out, capfd):
    (out / "README.md").write_text(card(hub_token=TOKEN), encoding="utf-8")
    hub.check(reports(), out)
    hub.push(reports(), out, PICTURES)
    sent = [request for request in server.requests if not request.path.startswith("/storage/")]
    assert {request.headers.pop("authorization") for request in sent} == {f"Bearer {TOKEN}"}
    assert len(sent) < len(server.requests)  # the storage is another's: it has no header to take out
    everything = [
        part for r in server.requests for part in (r.path.encode(), repr(r.headers).encode(), r.body)
    ]
    everything += [
        *server.files["me/dog-lora"].values(),
        *contents(out).values(),
        *map(str.encode, capfd.readouterr()),
    ]
    assert all(TOKEN.encode() not in part for part in everything)


def test_a_private_repository_is_asked_for_as_one(server, out):
    hub.push(reports(hub_private_repo=True), out, PICTURES)
    hub.push(reports(hub_model_id="open"), out, PICTURES)
    assert server.private == {"me/dog-lora": True, "me/open": False}


def test_nothing_private_goes_into_a_public_repository_that_was_there(server, out):
    server.files["me/dog-lora"], server.private["me/dog-lora"] = {}, False
    wanted = reports(hub_private_repo=True)
    with pytest.raises(UserError, match="--hub_private_repo: me/dog-lora exists and is public"):
        hub.check(wanted, out)
    with pytest.raises(hub.UploadFailed, match="public repository"):
        hub.push(wanted, out, PICTURES)
    assert server.files == {"me/dog-lora": {}}
    server.private["me/dog-lora"] = True
    assert hub.check(wanted, out) == "me/dog-lora"


# --- an upload that fails


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize(
    "step", ["/api/repos/create", "/preupload/", "/storage/", "/commit/", "/paths-info/"]
)
def test_a_failed_upload_says_so_without_the_token_and_loses_nothing(server, out, capfd, step, status):
    before = contents(out)
    server.faults[step] = status
    with pytest.raises(hub.UploadFailed) as caught:
        hub.push(reports(), out, PICTURES)
    text = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert TOKEN not in text
    assert TOKEN[:12] not in text  # cut off in the middle
    assert (caught.value.__cause__, caught.value.__context__) == (
        None,
        None,
    )  # the library's errors have the request with its headers
    assert "\n" not in str(caught.value)
    assert "dog-lora failed: " in str(caught.value)
    assert contents(out) == before


def test_the_command_in_the_message_does_what_the_upload_did_not(server, out):
    server.faults["/commit/"] = 500
    with pytest.raises(hub.UploadFailed) as caught:
        hub.push(reports(hub_private_repo=True), out, PICTURES)
    server.faults.clear()
    words = shlex.split(str(caught.value).partition("try again with: ")[2])
    program = Path(sys.executable).parent / words.pop(0)
    here = {
        "HF_ENDPOINT": server.address,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    result = subprocess.run(
        [program, *words], env=os.environ | here, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert server.files["me/dog-lora"] == {name: (out / name).read_bytes() for name in UPLOADED}


def test_a_hub_that_is_gone_is_a_failed_upload(server, out):
    server.close()
    with pytest.raises(hub.UploadFailed, match=r"hf upload dog-lora .*--include validation/image_1\.png"):
        hub.push(reports(), out, PICTURES)


def test_a_missing_file_is_a_failed_upload_and_not_half_of_one(server, out):
    (out / "validation/image_1.png").unlink()
    with pytest.raises(hub.UploadFailed, match=r"image_1\.png"):
        hub.push(reports(), out, PICTURES)
    assert server.commits == []


def test_files_that_the_repository_ignores_are_a_failed_upload(server, out):
    server.ignored.add("validation/image_0.png")
    with pytest.raises(hub.UploadFailed, match=r"without validation/image_0\.png"):
        hub.push(reports(), out, PICTURES)


def test_an_answer_that_never_comes_ends_the_upload(server, out, monkeypatch):
    monkeypatch.setattr(hub, "_COMMIT_WITHIN", 0.2)
    done, answer = threading.Event(), server.answer
    monkeypatch.setattr(
        server,
        "answer",
        lambda request: answer(request) if "/commit/" not in request.path else (500 + done.wait(30), {}),
    )
    try:
        with pytest.raises(hub.UploadFailed, match="timed out"):
            hub.push(reports(), out, PICTURES)
    finally:
        done.set()


def test_logged_out_during_training_is_a_failed_upload(server, out):
    with pytest.raises(hub.UploadFailed, match="hf auth login"):
        hub.push(reports(hub_token=None), out, PICTURES)


# --- before training


def test_the_check_names_the_repository_and_asks_the_hub_once(server, out):
    assert hub.check(reports(), out) == "me/dog-lora"
    assert hub.check(reports(hub_model_id="dog"), out) == "me/dog"
    assert hub.check(reports(hub_model_id="club/dog"), out) == "club/dog"
    assert [request.path for request in server.requests] == ["/api/whoami-v2"] * 3


def test_without_push_to_hub_the_hub_is_not_asked(server, out):
    assert hub.check(reports(push_to_hub=False), out) is None
    assert server.requests == []


def test_the_token_of_a_login_is_found(server, out, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.check(reports(hub_token=None), out) == "me/dog-lora"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hub_token": "hf_wrong"}, "refuses the token of --hub_token"),
        ({"hub_token": None}, "needs a token: log in with `hf auth login`"),
        ({"hub_token": ""}, "is empty"),
        ({"hub_token": "hf_secretword\n"}, "characters that no token has"),
        ({"hub_token": "hf_secretwörd"}, "characters that no token has"),
        ({"hub_model_id": "me/my dog"}, "--hub_model_id: .*'me/my dog'"),
        ({"hub_model_id": "a/b/c"}, "--hub_model_id: "),
        ({"hub_model_id": "dog..lora"}, "--hub_model_id: "),
        ({"hub_model_id": "\x1b[2J"}, r"--hub_model_id: .*\\x1b"),
    ],
)
def test_what_would_stop_the_upload_is_found_before_training(server, out, values, said):
    with pytest.raises(UserError, match=said) as caught:
        hub.check(reports(**values), out)
    text = "".join(traceback.format_exception(caught.value))
    assert not any(word in text for word in (TOKEN, "hf_wrong", "hf_secret"))
    assert caught.value.__context__ is None


def test_an_output_folder_whose_name_no_repository_can_have_asks_for_a_name(server, tmp_path):
    with pytest.raises(UserError, match="give one as --hub_model_id"):
        hub.check(reports(), tmp_path / "my dog")


def test_a_token_that_can_only_read_is_found_before_training(server, out):
    server.account = {"name": "me", "auth": {"accessToken": {"role": "read"}}}
    with pytest.raises(UserError, match="can only read"):
        hub.check(reports(), out)


@pytest.mark.parametrize(
    ("answer", "status"), [(b"<html>log in to the network</html>", 200), ([], 200), ({"error": "busy"}, 503)]
)
def test_a_hub_in_trouble_is_found_before_training(server, out, monkeypatch, answer, status):
    monkeypatch.setattr(server, "answer", lambda request: (status, answer))
    with pytest.raises(
        UserError, match=rf"{re.escape(server.address)} did not name the account .*HTTP status {status}"
    ):
        hub.check(reports(), out)


def test_no_network_is_found_before_training(server, out):
    server.close()
    with pytest.raises(UserError, match=r"cannot be reached: .*leave out --push_to_hub"):
        hub.check(reports(), out)


def test_offline_mode_is_found_before_training(server, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        hub.check(reports(), out)
    assert server.requests == []


@pytest.mark.parametrize("report_to", ["wandb", "all"])
def test_a_token_on_a_command_line_that_a_tracker_records_is_refused(out, monkeypatch, report_to):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: name == "wandb" or None)
    with pytest.raises(UserError, match="--hub_token cannot be used with --report_to wandb"):
        hub.check(reports(push_to_hub=False, report_to=report_to), out)


def test_hub_flags_without_an_upload_are_noted():
    given = reports(push_to_hub=False, hub_model_id="me/dog")
    assert hub.notes(given) == [
        f"You need not use --{name} without --push_to_hub." for name in ("hub_token", "hub_model_id")
    ]
    assert hub.notes(reports(hub_model_id="me/dog")) == []


def test_what_is_written_down_has_every_flag_but_the_token():
    table = as_table(chosen())
    assert {name: table[name] for name in table if name != "hub_token"} == without_token(table)
    assert table["hub_token"] == TOKEN
