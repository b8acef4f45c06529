"""A stand-in Hugging Face Hub over HTTP, for tests: repositories in memory, faults on demand.

    with Hub(tokens={"hf_writer": "me"}) as hub:
        environment = hub_environment(hub, tmp_path, token="hf_writer")   # for a subprocess
        hub.fail("POST .*/commit/", status=503, times=1)

Every commit is an immutable mapping of path to blob; branches, tags and pull-request refs point to commits. Every file
is base64 in the commit, which works with every client. It knows what huggingface_hub, timm and datasets ask for, no
more: no organizations, pagination, LFS, Xet, or gated repositories.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

BOTH_WAYS = pytest.mark.parametrize("hub", ["pipeline", "single commit"], indirect=True)
"""huggingface_hub uploads a folder in two ways."""
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
API = re.compile(r"^/api/(models|datasets|spaces)/([^/]+)/([^/]+)(?:/(.*))?$")
RESOLVE = re.compile(r"^/(?:(datasets|spaces)/)?([^/]+)/([^/]+)/(?:resolve|raw)/(.+)$")
FRONT_MATTER = re.compile(r"^---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


def hub_environment(hub: Hub, folder: Path, *, token: str | None) -> dict[str, str]:
    """Environment for a subprocess that must see this Hub, and nothing of the user's own cache or login."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    return environment | ({"HF_TOKEN": token} if token else {})


def use_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path, token: str, *, pipeline: bool = False) -> None:
    """Make this process use the Hub with a token; ``pipeline`` is the first of the ways to upload a folder."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": not pipeline,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)


class RefusalError(Exception):
    """Answered with an HTTP status; ``code`` is the Hub's X-Error-Code."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class Request(NamedTuple):
    """One line of ``hub.log``; ``status`` is None if the connection was dropped."""

    method: str
    path: str
    status: int | None
    size: int


@dataclass
class Fault:
    """A fault for the next ``times`` requests whose "METHOD /path" matches.

    kind "status": answered with ``status`` and ``headers``; "drop": the connection closes when half of the body has
    been read; "lose_reply": the request takes effect, and the connection closes instead of the answer; "hang": the
    body is read, and no answer ever comes; "cut": the answer promises all of its bytes, and the connection closes
    after half of them; "first": ``action`` is done before the request is answered as ever.
    """

    pattern: str
    kind: str
    times: int
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    action: Callable[[], object] = lambda: None


class Blob:
    """A file of a commit."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    id: str
    tree: Mapping[str, Blob]
    parent: str | None
    title: str
    description: str
    date: str = field(default_factory=lambda: now())


class Repo:
    """A repository: commits by id, and the names that point to them."""

    def __init__(self, kind: str, name: str, *, private: bool) -> None:
        self.kind, self.name, self.private = kind, name, private
        self.commits: dict[str, Commit] = {}
        self.tags: dict[str, str] = {}
        self.refs = {"main": self.add_commit({".gitattributes": Blob(b"*.safetensors -text\n")}, None)}

    def add_commit(
        self, tree: Mapping[str, Blob], parent: str | None, title: str = "initial commit", description: str = ""
    ) -> str:
        content = [parent, title, time.time_ns(), sorted((path, blob.oid) for path, blob in tree.items())]
        commit_id = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[commit_id] = Commit(commit_id, tree, parent, title, description)
        return commit_id

    def resolve(self, revision: str) -> str:
        revision = unquote(revision)
        for names in (self.refs, self.tags):
            if revision.removeprefix("refs/heads/") in names:
                return names[revision.removeprefix("refs/heads/")]
        if revision in self.commits:
            return revision
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def tree(self, revision: str = "main") -> Mapping[str, Blob]:
        return self.commits[self.resolve(revision)].tree

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of ``revision``, the newest first."""
        commits, commit_id = [], self.resolve(revision)
        while commit_id:
            commits.append(self.commits[commit_id])
            commit_id = commits[-1].parent
        return commits


class _Server(ThreadingHTTPServer):
    def handle_error(self, *client: object) -> None:
        """A client that gave up waiting is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*client)


class Hub:
    """The server, a context manager; ``tokens`` maps a token to its user, those in ``read_only`` may not write."""

    def __init__(self, tokens: Mapping[str, str] | None = None, *, read_only: Collection[str] = ()) -> None:
        self.tokens = {"hf_test": "me"} if tokens is None else dict(tokens)
        self.read_only = frozenset(read_only)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern: str, *, status: int, times: int = 1, headers: Mapping[str, str] | None = None) -> None:
        self.faults.append(Fault(pattern, "status", times, status, headers or {}))

    def disturb(self, kind: str, pattern: str, *, times: int = 1) -> None:
        """A fault of a kind without settings: drop, lose_reply, hang or cut."""
        self.faults.append(Fault(pattern, kind, times))

    def before(self, pattern: str, action: Callable[[], object], *, times: int = 1) -> None:
        self.faults.append(Fault(pattern, "first", times, action=action))

    def add(self, kind: str, name: str, files: Mapping[str, bytes], *, private: bool = False) -> Repo:
        """A repository with one commit of these files."""
        repo = self.repos[kind, name] = Repo(kind, name, private=private)
        repo.refs["main"] = repo.add_commit({path: Blob(data) for path, data in files.items()}, None)
        return repo

    def commit(self, name: str, files: Mapping[str, bytes], title: str = "commit") -> None:
        """Somebody's commit of these files to the model's main branch."""
        repo = self.model(name)
        tree = {**repo.tree(), **{path: Blob(data) for path, data in files.items()}}
        repo.refs["main"] = repo.add_commit(tree, repo.resolve("main"), title)

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    def next_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.status: int | None = None
        self.silent = False
        with self.hub.lock:
            fault = self.hub.next_fault(f"{self.command} {parts.path}")
        if fault and fault.kind == "drop":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.hang_up()
            self.hub.log.append(Request(self.command, self.path, None, 0))
            return
        body = self.read_body()
        if fault and fault.kind == "hang":
            self.hub.log.append(Request(self.command, self.path, None, len(body)))
            self.hub.closing.wait()
            self.hang_up()
            return
        self.cut = fault is not None and fault.kind == "cut"
        try:
            with self.hub.lock:
                if fault and fault.kind == "status":
                    raise RefusalError(fault.status, "injected", headers=fault.headers)
                if fault and fault.kind == "first":
                    fault.action()
                self.silent = fault is not None and fault.kind == "lose_reply"
                self.route(parts.path, body)
        except RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(refusal.status, {"error": refusal.message}, headers)
        if self.silent or self.cut:
            self.hang_up()
        self.hub.log.append(Request(self.command, self.path, None if self.silent else self.status, len(body)))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 (names of the base class)

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def send(
        self, status: int, body: object = b"", headers: Mapping[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        self.status = status
        if self.silent:
            return
        data = bytes(body) if isinstance(body, (bytes, memoryview)) else json.dumps(body).encode()
        self.send_response(status)
        defaults = {"Content-Length": str(len(data)), "Content-Type": kind, "X-Request-Id": "local"}
        for key, value in (defaults | dict(headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)

    def send_file(self, data: bytes, headers: Mapping[str, str]) -> None:
        span = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range") or "")
        kind = "application/octet-stream"
        if not span or span[0] == "bytes=-":
            self.send(200, data, {**headers, "Content-Length": str(len(data))}, kind)
            return
        start = int(span[1]) if span[1] else len(data) - int(span[2])
        end = min(int(span[2]) if span[1] and span[2] else len(data) - 1, len(data) - 1)
        content = {"Content-Range": f"bytes {start}-{end}/{len(data)}", "Content-Length": str(end - start + 1)}
        self.send(206, data[start : end + 1], {**headers, **content}, kind)

    def read_body(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def user(self, *, required: bool = False) -> str | None:
        authorization = self.headers.get("Authorization") or ""
        token = authorization.removeprefix("Bearer ") if authorization.startswith("Bearer ") else None
        if token is not None and token not in self.hub.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        if required and token is None:
            raise RefusalError(401, "Invalid username or password.")
        self.may_write = token not in self.hub.read_only
        return self.hub.tokens.get(token) if token else None

    def repo(self, kind: str, namespace: str, name: str, *, write: bool = False) -> Repo:
        user = self.user(required=write)
        repo = self.hub.repos.get((kind, f"{namespace}/{name}"))
        if repo is None or (repo.private and user != namespace):
            # The real Hub answers 401 to an anonymous caller and 404 to a signed-in one.
            raise RefusalError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (user != namespace or not self.may_write):
            raise RefusalError(403, f"You don't have the rights to write to {namespace}/{name}")
        return repo

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            user = self.user(required=True)
            self.send(200, {"type": "user", "id": user, "name": user, "orgs": [], "auth": {"type": "access_token"}})
        elif path == "/api/repos/create":
            self.create_repo(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate_yaml(json.loads(body).get("content", ""))
        elif found := API.match(path):
            self.api(KINDS[found[1]], found[2], found[3], (found[4] or "").rstrip("/"), body)
        elif found := RESOLVE.match(path):
            repo_kind, namespace, name, rest = found.groups()
            self.resolve(self.repo(KINDS.get(repo_kind, "model"), namespace, name), rest)
        else:
            raise RefusalError(404, f"no route {self.command} {path}")

    def create_repo(self, wanted: dict[str, Any]) -> None:
        user = self.user(required=True)
        namespace, kind = wanted.get("organization") or user, wanted.get("type") or "model"
        if namespace != user or not self.may_write:
            raise RefusalError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        name = f"{namespace}/{wanted['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repos:
            message = f"You already created this {kind} repo: {name}"
            self.send(409, {"error": message, "url": url}, {"X-Error-Message": message})
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[kind, name] = Repo(kind, name, private=private)
        self.send(200, {"url": url, "name": name, "id": name})

    def validate_yaml(self, content: str) -> None:
        errors = []
        front_matter = FRONT_MATTER.match(content)
        if front_matter:
            try:
                metadata = yaml.safe_load(front_matter[1]) or {}
            except yaml.YAMLError as error:
                errors.append({"message": f"invalid YAML: {error}"})
            else:
                if not isinstance(metadata.get("model-index", []), list):
                    errors.append({"message": '"model-index" must be an array'})
        warnings = [] if front_matter else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def resolve(self, repo: Repo, rest: str) -> None:
        revision, _, path = rest.partition("/")
        commit_id = repo.resolve(revision)
        blob = repo.commits[commit_id].tree.get(unquote(path))
        if blob is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit_id})
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        self.send_file(blob.data, headers)

    def api(self, kind: str, namespace: str, name: str, rest: str, body: bytes) -> None:
        action, _, rest = rest.partition("/")
        changes = action in ("preupload", "commit", "branch")
        # Whoever may read may open a pull request.
        write = changes and self.command != "GET" and not self.query.get("create_pr")
        repo = self.repo(kind, namespace, name, write=write)
        if self.query.get("create_pr"):
            self.user(required=True)
        handler = {
            "": lambda: self.send(200, repo_info(repo, "main")),
            "revision": lambda: self.send(200, repo_info(repo, rest)),
            "tree": lambda: self.tree(repo, rest),
            "paths-info": lambda: self.paths_info(repo, rest, body),
            "preupload": lambda: self.preupload(repo, rest, json.loads(body)),
            "commit": lambda: self.commit(repo, unquote(rest), body),
            "commits": lambda: self.send(200, [commit_info(commit) for commit in repo.history(rest)]),
            "branch": lambda: self.branch(repo, unquote(rest), json.loads(body or b"{}")),
        }.get(action)
        if handler is None:
            raise RefusalError(404, f"no api route {self.command} {action}")
        handler()

    def tree(self, repo: Repo, rest: str) -> None:
        revision, _, folder = rest.partition("/")
        folder = unquote(folder).rstrip("/")
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        entries, folders = [], set()
        for path, blob in sorted(repo.tree(revision).items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            folders |= {prefix + "/".join(parts[:n]) for n in range(1, len(parts)) if recursive or n == 1}
            if recursive or len(parts) == 1:
                entries.append(file_info(path, blob))
        if folder and not entries and not folders:
            raise RefusalError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        directory = {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0}
        self.send(200, [{**directory, "path": path} for path in sorted(folders)] + entries)

    def paths_info(self, repo: Repo, revision: str, body: bytes) -> None:
        form = (self.headers.get("Content-Type") or "").startswith("application/x-www-form")
        paths = parse_qs(body.decode()).get("paths", []) if form else json.loads(body)["paths"]
        tree = repo.tree(revision)
        self.send(200, [file_info(path, tree[path]) for path in paths if path in tree])

    def preupload(self, repo: Repo, revision: str, wanted: dict[str, Any]) -> None:
        tree, answers = repo.tree(revision), []
        for entry in wanted["files"]:
            answer = {"path": entry["path"], "uploadMode": "regular", "shouldIgnore": False}
            if entry["path"] in tree:  # lets the client leave out what has not changed
                answer["oid"] = tree[entry["path"]].oid
            answers.append(answer)
        self.send(200, {"files": answers, "commitOid": repo.resolve(revision)})

    def commit(self, repo: Repo, revision: str, body: bytes) -> None:
        operations = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(operation["value"] for operation in operations if operation["key"] == "header")
        parent = repo.resolve(revision)
        if not parent.startswith(header.get("parentCommit") or ""):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[parent].tree)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif operation["key"] == "deletedFile":
                del tree[value["path"]]
        commit_id = repo.add_commit(tree, parent, header["summary"], header.get("description", ""))
        opened = {}
        if self.query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            revision = f"refs/pr/{number}"
            opened = {"pullRequestUrl": f"{self.hub.url}/{repo.name}/discussions/{number}"}
        repo.refs[revision] = commit_id
        url = f"{self.hub.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.name}/commit/{commit_id}"
        self.send(200, {"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": "", **opened})

    def branch(self, repo: Repo, name: str, wanted: dict[str, Any]) -> None:
        if name in repo.refs:
            raise RefusalError(409, f"Reference refs/heads/{name} already exists")
        if quote(name, safe="/") != name:
            raise RefusalError(400, f"Invalid reference for a branch: {name}")
        repo.refs[name] = repo.resolve(wanted.get("startingPoint", "main"))
        self.send(201, {})


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def file_info(path: str, blob: Blob) -> dict[str, Any]:
    return {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}


def commit_info(commit: Commit) -> dict[str, Any]:
    return {"id": commit.id, "title": commit.title, "message": commit.description, "authors": [], "date": commit.date}


def repo_info(repo: Repo, revision: str) -> dict[str, Any]:
    commit_id = repo.resolve(revision)
    commit = repo.commits[commit_id]
    card = card_data(commit.tree)
    info = {
        "id": repo.name,
        "sha": commit_id,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "tags": list(card.get("tags") or []),
        "cardData": card,
        "siblings": [{"rfilename": path, "size": len(blob.data)} for path, blob in sorted(commit.tree.items())],
    }
    if repo.kind == "model":
        info |= {key: card.get(key) for key in ("library_name", "pipeline_tag", "model-index")}
    return info


def card_data(tree: Mapping[str, Blob]) -> dict[str, Any]:
    readme = tree.get("README.md")
    front_matter = FRONT_MATTER.match(readme.data.decode()) if readme else None
    return (yaml.safe_load(front_matter[1]) or {}) if front_matter else {}
