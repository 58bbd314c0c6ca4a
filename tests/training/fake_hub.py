"""A hub that listens on the loopback device, and a run to upload."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dreambooth.options.command_line import as_table, without_token
from dreambooth.options.photos import InstanceOptions
from dreambooth.options.reports import ReportOptions
from dreambooth.options.resolved import ResolvedTrainOptions, resolve
from dreambooth.options.training import BaseOptions, TrainOptions
from dreambooth.training import model_card

TOKEN = "hf_NotARealTokenButOneToLookFor/+=="


PICTURES = ["validation/image_0.png", "validation/image_1.png"]


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
    """A hub in memory. `faults` maps parts of paths to statuses of answers, which repeat the token."""

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
        """How a file is uploaded: large formats beside the commit. `oid` is the stored file's."""
        is_large = path.endswith(".safetensors")
        answer: dict[str, Any] = {
            "path": path,
            "uploadMode": "lfs" if is_large else "regular",
            "shouldIgnore": path in self.ignored,
        }
        if path in files:
            git = hashlib.sha1(b"blob %d\0" % len(files[path]) + files[path]).hexdigest()
            answer["oid"] = hashlib.sha256(files[path]).hexdigest() if is_large else git
        return answer


def reports(**values: Any) -> ReportOptions:
    given: dict[str, Any] = {"push_to_hub": True, "hub_token": TOKEN, "report_to": "none"}
    return ReportOptions(**given | values)


def chosen(family: str = "sd", **values: Any) -> ResolvedTrainOptions:
    """Resolved options; `values` replace flags by name, whatever their checks say."""
    given = TrainOptions(
        BaseOptions("org/base"),
        InstanceOptions("a photo of sks dog", instance_data_dir="photos"),
        reports=reports(),
    )
    options = resolve(given, family, seed=0, mixed_precision="no")
    groups = [getattr(options, field.name) for field in dataclasses.fields(options)]
    inner = [getattr(group, field.name) for group in groups for field in dataclasses.fields(group)]
    groups += filter(dataclasses.is_dataclass, inner)
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
    single_file: dict[str, Any] | None = None,
    passes: dict[str, Any] | None = None,
    **values: Any,
) -> str:
    options = chosen(family, **values)
    return model_card.model_card(
        without_token(as_table(options)),
        base_folder=base_folder,
        family=family,
        pictures=dict.fromkeys(pictures, options.validation.validation_prompt or "a dog"),
        repository=repository,
        token=options.reports.hub_token,
        single_file=single_file,
        passes=passes,
    )
