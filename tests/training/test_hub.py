"""The upload and the card: only what is meant to be seen leaves the machine, and a failed upload neither loses anything nor looks like success.

A hub of our own listens on the loopback device and speaks the part of the protocol that the library uses.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import traceback
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import _http
from peft import LoraConfig, get_peft_model_state_dict

from dreambooth.adapter_files import native
from dreambooth.errors import UserError
from dreambooth.options.command_line import as_table, fields_of, without_token
from dreambooth.options.photos import InstanceOptions
from dreambooth.options.resolved import ResolvedTrainOptions, resolve
from dreambooth.options.training import BaseOptions, ReportOptions, TrainOptions
from dreambooth.training import hub, model_card

TOKEN = "hf_NotARealTokenButOneToLookFor/+=="
PICTURES = ["image_0.png", "image_1.png"]
UPLOADED = ["pytorch_lora_weights.safetensors", "README.md", *PICTURES]
ACCOUNT = {
    "name": "me",
    "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
}


@dataclasses.dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Hub:
    """A hub in memory. `faults` maps a part of a path to the status that requests with it get, with the caller's token in the answer."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.commits: list[tuple[str, list[str]]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}
        self.ignored: set[str] = set()
        self.faults: dict[str, int] = {}
        self.account: Any = ACCOUNT
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = Request(
                    self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body
                )
                hub.requests.append(request)
                status, content = hub.answer(request)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status >= 400:
                    self.send_header("X-Error-Message", f"not with {request.headers.get('authorization')}")
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # whoever asked may not have waited
                    self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: Request) -> tuple[int, Any]:
        path = urlsplit(request.path).path
        for part, status in self.faults.items():
            if part in path:
                return status, {"error": f"{request.headers.get('authorization')} is not good"}
        if request.headers.get("authorization") not in (f"Bearer {TOKEN}", None):
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, self.account
        if path == "/api/repos/create":
            wanted = json.loads(request.body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            is_new = name not in self.files
            if is_new:
                self.files[name], self.private[name] = {}, wanted.get("visibility") == "private"
            return (200 if is_new else 409), {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path.startswith("/storage/"):
            self.stored[path.rpartition("/")[2]] = request.body
            return 200, {}
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(request.body)["objects"]
            return 200, {
                "objects": [
                    o | {"actions": {"upload": {"href": f"{self.address}/storage/{o['oid']}"}}}
                    for o in objects
                ]
            }
        found = re.fullmatch(
            r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|preupload|commit|paths-info)/(\w+))?", path
        )
        if not found or found[1] not in {*self.files, *self.cards}:
            return 404, {"error": "Repository not found"}
        return self.answer_about(found[1], found[2], request)

    def answer_about(self, name: str, what: str | None, request: Request) -> tuple[int, Any]:
        files = self.files.get(name, {})
        if what == "preupload":
            return 200, {
                "files": [self.how(files, file["path"]) for file in json.loads(request.body)["files"]]
            }
        if what == "commit":
            header, *rows = [json.loads(line) for line in request.body.splitlines()]
            for row in rows:
                value = row["value"]
                files[value["path"]] = (
                    base64.b64decode(value["content"]) if row["key"] == "file" else self.stored[value["oid"]]
                )
            self.commits.append((header["value"]["summary"], [row["value"]["path"] for row in rows]))
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40}
        if what == "paths-info":
            asked = parse_qs(request.body.decode())["paths"]
            return 200, [
                {"type": "file", "path": path, "size": len(files[path]), "oid": "0"}
                for path in asked
                if path in files
            ]
        info = {
            "id": name,
            "private": self.private.get(name, False),
            "sha": "a" * 40,
            "siblings": [{"rfilename": file} for file in files],
        }
        return 200, info | {"cardData": self.cards.get(name)}

    def how(self, files: dict[str, bytes], path: str) -> dict[str, Any]:
        """The way a file goes up: large formats beside the commit, as on the real hub. `oid` is that of the same file there."""
        is_large = path.endswith(".safetensors")
        found: dict[str, Any] = {
            "path": path,
            "uploadMode": "lfs" if is_large else "regular",
            "shouldIgnore": path in self.ignored,
        }
        if path in files:
            git = hashlib.sha1(b"blob %d\0" % len(files[path]) + files[path]).hexdigest()
            found["oid"] = hashlib.sha256(files[path]).hexdigest() if is_large else git
        return found


@pytest.fixture
def connected(monkeypatch, tmp_path):
    """The library online, logged in nowhere, in a home of its own, and not waiting between its tries."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that only the real hub speaks
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    _http.close_session()
    yield
    _http.close_session()


@pytest.fixture
def server(connected, monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    yield server
    server.close()


@pytest.fixture
def out(tmp_path) -> Path:
    """The output folder of a run, with much that is nobody's business."""
    folder = tmp_path / "dog-lora"
    for name in (
        *UPLOADED,
        *("metrics.jsonl", "run.yaml", "run.json", "status.json", ".lock", "image_7.png", "notes.txt"),
        *(
            "checkpoint-4/optimizer.safetensors",
            "checkpoint-4/state.json",
            "logs/dreambooth-lora/events.out.tfevents.1",
            "validation/step-000004-00.png",
        ),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 50 + os.urandom(100))
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (folder / "README.md").write_text(card(base_folder=base), encoding="utf-8")
    return folder


def reports(**values: Any) -> ReportOptions:
    given: dict[str, Any] = {"push_to_hub": True, "hub_token": TOKEN, "report_to": "none"}
    return ReportOptions(**given | values)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def chosen(family: str = "sd", **values: Any) -> ResolvedTrainOptions:
    """Resolved options; `values` replace flags by name, whatever their checks say."""
    given = TrainOptions(
        BaseOptions("org/base"),
        InstanceOptions("a photo of sks dog", instance_data_dir="photos"),
        reports=reports(),
    )
    options = resolve(given, family, seed=0, mixed_precision="no")
    groups = [getattr(options, field.name) for field in dataclasses.fields(options)]
    for name, value in values.items():
        (group,) = [group for group in groups if hasattr(group, name)]
        setattr(group, name, value)
    return options


def card(
    family: str = "sd",
    *,
    base_folder: Path = Path("nowhere"),
    pictures: list[str] = PICTURES,
    repository: str | None = None,
    **values: Any,
) -> str:
    options = chosen(family, **values)
    return model_card.model_card(
        without_token(as_table(options)),
        base_folder=base_folder,
        family=family,
        pictures=pictures,
        repository=repository,
        token=options.reports.hub_token,
    )


def front_of(text: str) -> dict[str, Any]:
    found = REGEX_YAML_BLOCK.search(text)  # where the hub's library finds it
    assert found is not None
    return yaml.safe_load(found[2])


def block_of(text: str, language: str) -> str:
    """A code block as Markdown reads it: up to a fence that is as long or longer, and may be indented by three."""
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)\n {{0,3}}\1`*$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[2]


def prose_of(text: str) -> str:
    """A card without front matter and code blocks, whose fences become equally long."""
    text = REGEX_YAML_BLOCK.sub("", text)
    for language in ("python", "yaml"):
        text = text.replace(block_of(text, language), "")
    return re.sub("^`{3,}", "```", text, flags=re.MULTILINE)


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
    (out / "image_1.png").write_bytes(b"another")
    assert hub.push(reports(), out, PICTURES) == first
    assert server.commits[1:] == [("End of training", ["image_1.png"])]
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
    with pytest.raises(hub.UploadFailed, match=r"hf upload dog-lora .*--include image_1\.png"):
        hub.push(reports(), out, PICTURES)


def test_a_missing_file_is_a_failed_upload_and_not_half_of_one(server, out):
    (out / "image_1.png").unlink()
    with pytest.raises(hub.UploadFailed, match=r"image_1\.png"):
        hub.push(reports(), out, PICTURES)
    assert server.commits == []


def test_files_that_the_repository_ignores_are_a_failed_upload(server, out):
    server.ignored.add("image_0.png")
    with pytest.raises(hub.UploadFailed, match=r"without image_0\.png"):
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


# --- the card

HOSTILE = [
    "---\nlicense: mit",
    "\n---\nlicense: mit\n---\n# mine",
    "license: mit\r\n---\r",
    "```\n# mine\n````\n`````",
    "<script>alert(1)</script>\n<!-- ",
    "[a](http://b) ![c](d) *e* _f_ | g |\n\n# mine\n- h",
    "\"quoted\" 'twice': # {not: [yaml]} & more",
    "x\u2028y\x85z\x1b[2J\x07",
    "'); import os #",
    "yes",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_users_typed_is_text_in_the_card_and_nothing_more(text):
    values: dict[str, Any] = {
        "instance_prompt": text,
        "validation_prompt": text,
        "with_prior_preservation": True,
        "class_prompt": text,
        "class_data_dir": "c",
    }
    harmless: dict[str, Any] = {name: "plain" if value == text else value for name, value in values.items()}
    plain, hostile = card(**harmless), card(**values)
    front = front_of(hostile)
    assert front.keys() == front_of(plain).keys()
    assert (front["instance_prompt"], front["widget"][0]["text"]) == (text, text)
    table = yaml.safe_load(block_of(hostile, "yaml"))
    assert [table[name] for name in ("instance_prompt", "validation_prompt", "class_prompt")] == [text] * 3
    compile(block_of(hostile, "python"), "card", "exec")
    assert repr(text) in block_of(hostile, "python")
    # what is left is prose: as many lines as ever, each beginning as ever, no tag, and no code, link or emphasis that is not ours
    prose, expected = prose_of(hostile), prose_of(plain)
    assert [line[:12] for line in prose.splitlines()] == [line[:12] for line in expected.splitlines()]
    assert "<" not in prose
    for sign in "`[]()*#!|":
        assert len(re.findall(rf"(?<!\\)(?:\\\\)*{re.escape(sign)}", prose)) == expected.count(sign), sign
    assert "\x1b" not in hostile


def test_a_hostile_name_of_the_output_folder_is_text_too(tmp_path):
    text = card(output_dir=str(tmp_path / "a\n# b\udcff<b>`"))
    assert text.encode("utf-8").count(b"\n# ") == 1
    assert "<b>" not in prose_of(text)


@pytest.mark.parametrize(
    ("family", "tag"), [("sd", "stable-diffusion"), ("sdxl", "stable-diffusion-xl"), ("if", "deepfloyd-if")]
)
def test_the_front_matter_says_what_the_hub_sorts_by(family, tag):
    front = front_of(card(family, validation_prompt="a sks dog in snow", repository="me/dog"))
    assert front["library_name"] == "diffusers"
    assert front["base_model"] == "org/base"
    assert front["tags"] == ["text-to-image", "diffusers", "lora", "dreambooth", "template:sd-lora", tag]
    assert front["widget"] == [{"text": "a sks dog in snow", "output": {"url": name}} for name in PICTURES]
    assert "widget" not in front_of(card(family, pictures=[]))


@pytest.mark.parametrize(
    ("readme", "stated"),
    [
        ("---\nlicense: openrail++\ntags: [a]\n---\n# Base", {"license": "openrail++"}),
        (
            "---\nlicense: other\nlicense_name: club\nlicense_link: https://example.org/L\n---\n",
            {"license": "other", "license_name": "club", "license_link": "https://example.org/L"},
        ),
        (
            "---\nlicense: other\nlicense_link: /home/me/LICENSE\n---\n",
            {"license": "other"},
        ),  # leads nowhere from another repository
        ("# Base\n\nlicense: mit\n", {}),
        ("---\ntags: [a]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: {a: b}\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_one_that_the_base_states_and_never_another(tmp_path, readme, stated):
    base = tmp_path / "base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme, encoding="utf-8")
    text = card(base_folder=base, pretrained_model_name_or_path=str(base))
    front = front_of(text)
    assert {key: value for key, value in front.items() if key.startswith("license")} == stated
    assert ("The base states no licence." in text) == (not stated)
    assert "base_model" not in front


def test_the_hub_is_asked_for_the_licence_of_a_base_that_came_without_its_card(server):
    server.cards["org/base"] = {"license": "other", "license_name": "club", "license_link": "LICENSE.md"}
    expected = {
        "license": "other",
        "license_name": "club",
        "license_link": f"{server.address}/org/base/blob/main/LICENSE.md",
    }
    assert expected.items() <= front_of(card()).items()
    server.cards["org/base"] = {"tags": ["a"]}
    assert "The base states no licence." in card()


@pytest.mark.parametrize("trouble", ["offline", "gone", "refused"])
def test_a_licence_that_cannot_be_read_is_left_out_and_the_card_says_so(server, monkeypatch, trouble):
    server.cards["org/base"] = {"license": "mit"}
    server.faults["/api/models/"] = 403
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if trouble == "gone":
        server.close()
    text = card()
    assert "license" not in front_of(text)
    assert "could not be read" in text
    assert TOKEN not in text


def test_no_path_of_the_machine_and_no_token_is_in_the_card(tmp_path, server):
    for name in ("base", "vae", "tokenizer", "data"):
        (tmp_path / "secret" / name).mkdir(parents=True)
    prompts = {"instance_prompt", "class_prompt", "validation_prompt"}
    not_places = {
        "class_labels_conditioning",
        "image_column",
        "caption_column",
        "dataset_config_name",
        "revision",
        "variant",
        "lora_layers",
        "text_encoder_layers",
        "rank_pattern",
        "lr_pattern",
        "optimizer",
        "hub_model_id",
        "hub_token",
    }
    texts = {name for name, field in fields_of(TrainOptions).items() if field.type in (str, str | None)}
    places = texts - prompts - not_places
    assert places == {*model_card._PLACES, *model_card._PLACES_OR_IDS}  # a new flag is one or the other
    at = {
        "pretrained_model_name_or_path": "base",
        "pretrained_vae_model_name_or_path": "vae",
        "tokenizer_name": "tokenizer",
        "dataset_name": "data",
    }
    values: dict[str, Any] = {
        name: str(tmp_path / "secret" / at.get(name, f"{name}-folder")) for name in places
    }
    text = card(
        base_folder=tmp_path / "secret" / "base", with_prior_preservation=True, class_prompt="a dog", **values
    )
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert TOKEN not in text
    assert yaml.safe_load(block_of(text, "yaml"))["init_adapter"] == "init_adapter-folder"
    gone = card(base_folder=tmp_path / "moved", pretrained_model_name_or_path=str(tmp_path / "moved"))
    assert str(tmp_path) not in gone


def test_the_card_says_whether_the_text_encoder_was_trained():
    assert "The text encoder was not trained." in card()
    assert "The text encoder was trained too." in card(train_text_encoder=True)


def test_the_example_of_the_card_draws_with_the_adapter(tiny_base, tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.symlink_to(tiny_base)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "out", unet_lora_layers=get_peft_model_state_dict(unet)
    )
    text = card(
        base_folder=base,
        pretrained_model_name_or_path=str(base),
        output_dir=str(tmp_path / "out"),
        pretrained_vae_model_name_or_path=str(base / "vae"),
        tokenizer_name=str(base / "tokenizer"),
        prediction_type="v_prediction",
        clip_skip=1,
        instance_prompt="a 'photo' of\nsks dog",
    )
    for name in ("vae", "tokenizer"):  # the card names folders without what is above them
        (tmp_path / name).symlink_to(base / name)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    example = block_of(text, "python").replace("clip_skip=1", "clip_skip=1, num_inference_steps=1")
    exec(compile(example, "card", "exec"), space)
    assert (tmp_path / "picture.png").is_file()
    assert space["pipeline"].get_active_adapters() == ["default_0"]
    assert space["pipeline"].scheduler.config.prediction_type == "v_prediction"


def test_a_repository_is_what_the_example_loads():
    assert "load_lora_weights('me/dog', " in card(repository="me/dog")
    assert "load_lora_weights('out', " in card(output_dir=os.path.join(os.sep, "a", "out"))


def test_the_card_has_every_flag_of_the_run_but_the_token():
    table = yaml.safe_load(block_of(card(resume_from_checkpoint="latest"), "yaml"))
    assert table == without_token(as_table(chosen(resume_from_checkpoint="latest")))
