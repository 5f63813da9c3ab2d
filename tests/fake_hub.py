"""A small Hugging Face hub on the loopback: repositories in memory, requests of uploads and downloads.

It keeps to the protocol that huggingface_hub speaks: create, preupload, LFS batch and PUT, commit,
model info, tree, and files with ETag and X-Repo-Commit. Weights go the LFS way, as on the real one,
the rest inline.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "a-token-of-the-tests"


@dataclass
class Repository:
    """Every commit is a whole set of files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        whole = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        content = b"".join(
            name.encode() + hashlib.sha1(body).digest() for name, body in sorted(whole.items())
        )
        sha = hashlib.sha1(content + branch.encode() + bytes([len(self.commits)])).hexdigest()
        self.commits[sha] = whole
        self.branches[branch] = sha
        return sha


@dataclass
class FakeHub:
    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS store, by sha256
    requests: list[str] = field(default_factory=list)  # "GET /path", in order


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run the hub in a thread until the block ends."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.strip("/").split("/")
        if parts[0] == "lfs-store":
            self._store(parts[1], body)
        elif parts[:3] == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._send(200, {"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._lfs_batch(json.loads(body))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, {"error": f"{path}: this hub knows no such request"})

    def _create(self, wanted: dict[str, Any]) -> None:
        if not self._logged_in():
            self._send(401, {"error": "not logged in"})
            return
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self._send(409, {"error": "exists", "url": f"{self.hub.address}/{name}"})
            return
        repository = Repository(private=wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[name] = repository
        self._send(200, {"url": f"{self.hub.address}/{name}", "name": name})

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        action, revision = rest[:2] if rest else ("revision", "main")
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self._send(404, {"error": f"no revision {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        elif action == "revision":
            siblings = [{"rfilename": path} for path in repository.commits[sha]]
            self._send(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings})
        elif action == "tree":
            self._send(200, [_entry(path, content) for path, content in repository.commits[sha].items()])
        elif action == "preupload":
            self._send(200, {"files": [_upload_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif action == "commit":
            files = dict(_operation(json.loads(line), self.hub) for line in body.splitlines()[1:])
            sha = repository.commit(revision, files)
            self._send(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "commitOid": sha})
        else:
            self._send(404, {"error": f"no action {action}"})

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        def answer(item: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"{self.hub.address}/lfs-store/{item['oid']}"}}
            return item if item["oid"] in self.hub.objects else {**item, "actions": upload}

        self._send(200, {"transfer": "basic", "objects": [answer(item) for item in wanted["objects"]]})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, {"error": "the content is not of that sha256"})
            return
        self.hub.objects[oid] = body
        self._send(200, {})

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        sha = repository.branches.get(revision, revision)
        content = repository.commits.get(sha, {}).get(path)
        if content is None:
            self._send(404, {"error": f"no file {path}"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(200, content, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._logged_in()):
            # The real hub too tells nobody that a private repository exists.
            self._send(401, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if _upload_mode(path)["uploadMode"] == "lfs":
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


def _operation(line: dict[str, Any], hub: FakeHub) -> tuple[str, bytes]:
    value = line["value"]
    if line["key"] == "lfsFile":
        return value["path"], hub.objects[value["oid"]]
    assert line["key"] == "file", f"this hub knows no operation {line['key']}"
    return value["path"], base64.b64decode(value["content"])
