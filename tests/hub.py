"""A stand-in of the Hub's API on localhost: all that huggingface_hub asks of it to commit files, and to read one."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin"
LARGE = (".safetensors", ".gguf")  # what the Hub wants through LFS


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    branches: set[str] = field(default_factory=lambda: {"main"})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the stand-in holds. requests: method and path of all requests. refuse: the end of a path -> its status."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answered()

    def do_GET(self) -> None:
        self.answered()

    def do_POST(self) -> None:
        self.answered()

    def do_PUT(self) -> None:
        self.answered()

    def answered(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(self.hub.repositories.get(found[1]), found[3])
            return
        status, answer = self.answer(path, body)
        self.send(status, json.dumps(answer).encode(), {"X-Error-Code": "RepoNotFound"} if status == 404 else {})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, place: Repository | None, name: str) -> None:
        """A file as hf_hub_download asks for it."""
        if place is None or name not in place.files:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound" if place is None else "EntryNotFound"})
            return
        data = place.files[name]
        self.send(200, data, {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": sha256(data).hexdigest()[:40]})

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        hub = self.hub
        for end, status in hub.refuse.items():
            if path.endswith(end):
                return status, {"error": f"refused with {status}"}
        if found := re.fullmatch(r"/objects/(\w+)", path):  # as a storage: its address is signed, and needs no token
            assert sha256(body).hexdigest() == found[1]
            hub.objects[found[1]] = body
            return 200, {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{hub.endpoint}/{name}"}
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.repositories[name] = Repository(bool(private))
            return 200, {"url": f"{hub.endpoint}/{name}", "name": name}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.endpoint}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path)
        assert found, path
        name, what, branch = found.groups()
        if name not in hub.repositories:
            return 404, {"error": "Repository not found"}
        return self.of_repository(name, what, branch, body)

    def of_repository(self, name: str, what: str | None, branch: str | None, body: bytes) -> tuple[int, Any]:
        place = self.hub.repositories[name]
        if what is None:
            siblings = [{"rfilename": file} for file in place.files]
            return 200, {"id": name, "private": place.private, "sha": "0" * 40, "siblings": siblings}
        if what == "branch":
            assert branch is not None
            place.branches.add(branch)
            return 200, {}
        assert branch in place.branches
        if what == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        assert what == "commit"
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                place.messages.append(value["summary"])
            elif entry["key"] == "file":
                place.files[value["path"]] = base64.b64decode(value["content"])
            else:
                place.files[value["path"]] = self.hub.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextmanager
def running() -> Iterator[Hub]:
    """A stand-in that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
