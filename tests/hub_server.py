"""A small hub on localhost for the real client: repositories, large files, commits, downloads; and faults on request.

It speaks what huggingface_hub 2.4 asks for when it makes a repository, uploads by LFS, commits and downloads, and
counts what arrives. A `Fault` stands in the way of the next requests that fit it: an answer with a status, a connection
cut in the middle of the body ("cut"), or one closed after the work was done but before the answer ("lost").
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml

WRITE, READ = "hf_mayWriteHere", "hf_mayOnlyRead"
LARGE = (".safetensors", ".bin")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path the pattern is found in."""

    method: str
    pattern: str
    kind: int | str
    times: int = 1
    message: str = "injected"


@dataclass
class Repo:
    """One repository: what its branch holds ({path: (sha256 or None, bytes)}), and every commit."""

    private: bool
    files: dict[str, tuple[str | None, bytes]] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[str | None, bytes]]] = field(default_factory=dict)
    pull_requests: int = 0

    def head(self) -> str:
        return next(reversed(self.commits))

    def commit(self, files: dict[str, tuple[str | None, bytes]], n: int) -> str:
        oid = hashlib.sha1(
            repr((n, sorted((p, hashlib.sha1(b).digest()) for p, (_, b) in files.items()))).encode()
        )
        self.commits[oid.hexdigest()] = dict(files)
        return oid.hexdigest()

    def change(self, **files: bytes) -> None:
        """What somebody else commits."""
        self.files |= {path: (None, data) for path, data in files.items()}
        self.commit(self.files, len(self.commits))


class Hub(ThreadingHTTPServer):
    """The server; `arrived` counts whole large files by sha256, `requests` all requests by method and path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.arrived: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def add(self, name: str, folder: Path) -> str:
        """A repository that is there already; returns the commit."""
        self.repos[name] = Repo(private=False)
        self.repos[name].change(**{path.name: path.read_bytes() for path in folder.iterdir()})
        return self.repos[name].head()

    def count(self, method: str, pattern: str) -> int:
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


def connect(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Hub:
    """A fresh hub that the client in this process talks to as a user with write access; waits are left out."""
    hub, constants = Hub(), huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return hub


class Refused(Exception):  # noqa: N818
    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.more = more
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do(self) -> None:
        path, self.query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        with self.server.lock:
            self.server.requests.append((self.command, path))
        fault = self.server.take_fault(self.command, path)
        if fault and fault.kind == "cut":
            self.rfile.read(max(1, int(self.headers.get("Content-Length", 2)) // 2))
            return self.hang_up()
        body = self.read_body()
        try:
            if fault and isinstance(fault.kind, int):
                raise Refused(fault.kind, fault.message)
            for method, pattern, action in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    with self.server.lock:
                        answer = action(self, body, *found.groups())
                    return self.hang_up() if fault else self.send_json(200, answer)
            raise Refused(404, f"no {self.command} {path}", "EntryNotFound")
        except Refused as error:
            if not fault and "/resolve/" not in path and error.status == 400:
                return self.send_json(400, {"errors": [{"message": error.message}], "warnings": []})
            headers = {"X-Error-Message": error.message} | (
                {"X-Error-Code": error.code} if error.code else {}
            )
            problem = {
                "error": error.message,
                "errors": [{"message": error.message}],
                "warnings": [],
            } | error.more
            return self.send_json(error.status, problem, headers)

    do_GET = do_POST = do_PUT = do_HEAD = do  # noqa: N815

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if isinstance(content, tuple):  # a file and its headers
            data, headers = content
        else:
            data, headers = (
                json.dumps(content).encode(),
                {"Content-Type": "application/json", **(headers or {})},
            )
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self, *, writes: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITE, READ):
            if writes or token:
                raise Refused(401, "Invalid username or password.")
            return None
        if writes and token == READ:
            raise Refused(403, "this token may not write")
        return "me"

    def repo(self, name: str, *, writes: bool = False) -> Repo:
        user = self.user(writes=writes)
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and user is None):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if writes and name.split("/")[0] != user:
            raise Refused(403, "you are no member")
        return repo

    def whoami(self, body: bytes) -> Any:
        if self.user() is None:
            raise Refused(401, "Invalid username or password.")
        role = "read" if READ in self.headers["Authorization"] else "write"
        return {
            "type": "user",
            "name": "me",
            "orgs": [{"name": "ours"}],
            "auth": {"accessToken": {"role": role}},
        }

    def create(self, body: bytes) -> Any:
        asked, user = json.loads(body), self.user(writes=True)
        name = f"{asked['organization'] or user}/{asked['name']}"
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.server.endpoint}/{name}")
        repo = self.server.repos[name] = Repo(asked.get("visibility") == "private")
        repo.commit({}, 0)
        return {"url": f"{self.server.endpoint}/{name}"}

    def validate(self, body: bytes) -> Any:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if found is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
        data = yaml.safe_load(found[1])
        if data.get("base_model_relation") not in (None, "quantized", "finetune", "adapter", "merge"):
            raise Refused(400, '"base_model_relation" is none of the known ones')
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
            raise Refused(400, '"base_model" with value is not valid. Use a model id from the hub.')
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, name: str, rev: str) -> Any:
        files = self.repo(name, writes=True).files
        lines = []
        for file in json.loads(body)["files"]:
            sha, data = files.get(file["path"], (None, None))
            blob = None if data is None else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            lines.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": sha or blob}
            )
        return {"files": lines}

    def batch(self, body: bytes, name: str) -> Any:
        self.repo(name, writes=True)
        lines = []
        for wanted in json.loads(body)["objects"]:
            oid = wanted["oid"]
            href = {k: {"href": f"{self.server.endpoint}/lfs/{k}/{oid}"} for k in ("upload", "verify")}
            lines.append({**wanted, **({} if oid in self.server.objects else {"actions": href})})
        return {"transfer": "basic", "objects": lines}

    def upload(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "sha256 does not match")
        self.server.objects[oid] = body
        self.server.arrived[oid] += 1
        return {}

    def verify(self, body: bytes, oid: str) -> Any:
        if len(self.server.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, "no such object")
        return {}

    def commit(self, body: bytes, name: str, rev: str) -> Any:
        repo = self.repo(name, writes=True)
        files = dict(repo.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (None, base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = (value["oid"], self.server.objects[value["oid"]])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files, len(repo.commits))
        answer = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}",
        }
        if "create_pr=1" in self.query:
            repo.pull_requests += 1
            return {**answer, "pullRequestUrl": f"{self.server.endpoint}/{name}/discussions/1"}
        repo.files = files
        return answer

    def snapshot(self, name: str, rev: str | None) -> tuple[str, dict[str, tuple[str | None, bytes]]]:
        repo = self.repo(name)
        sha = rev if rev in repo.commits else repo.head()
        if rev not in (None, "main", sha):
            raise Refused(404, "no such revision", "RevisionNotFound")
        return sha, repo.commits[sha]

    def info(self, body: bytes, name: str, rev: str | None = None) -> Any:
        sha, files = self.snapshot(name, rev)
        there = [{"rfilename": path} for path in files]
        return {"id": name, "sha": sha, "private": self.repo(name).private, "siblings": there}

    def tree(self, body: bytes, name: str, rev: str) -> Any:
        _, files = self.snapshot(name, rev)
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, (_, data) in files.items()
        ]

    def resolve(self, body: bytes, name: str, rev: str, path: str) -> Any:
        sha, files = self.snapshot(name, rev)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        etag, data = files[path]
        headers = {"ETag": f'"{etag or hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha}
        return data, {**headers, "Accept-Ranges": "bytes"}


NAME, REV = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/preupload/{REV}", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/upload/(.*)", Handler.upload),
    ("POST", "/lfs/verify/(.*)", Handler.verify),
    ("POST", f"/api/models/{NAME}/commit/{REV}", Handler.commit),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REV}", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/{REV}", Handler.tree),
    *((method, f"/{NAME}/resolve/{REV}/(.*)", Handler.resolve) for method in ("GET", "HEAD")),
]
