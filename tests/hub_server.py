"""A local server that speaks the Hub's paths for model repositories, for tests of what downloads from it.

    with HubServer({"org/name": Repository({"config.json": b"{}"})}) as hub:
        subprocess.run([...], env={"HF_ENDPOINT": hub.endpoint})

GET /api/models/ORG/NAME[/revision/REV] lists a repository, HEAD and GET /ORG/NAME/resolve/REV/PATH give a file, with
ETag, commit, length and byte ranges. Errors carry the Hub's X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LISTING = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)")


@dataclass
class Repository:
    """Files by path. `gated`: files need a token of `members`. `breaks`: so many bodies end half-way, then none."""

    files: Mapping[str, bytes]
    gated: bool = False
    members: frozenset[str] = frozenset()
    breaks: int = 0

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class HubServer:
    """Serves repositories on 127.0.0.1 until the `with` block ends. `tokens` are those that the server knows."""

    repositories: Mapping[str, Repository]
    tokens: frozenset[str] = frozenset()
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_state.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server_state.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif match := LISTING.fullmatch(path):
            self._list(match[1])
        elif match := FILE.fullmatch(path):
            self._send_file(match[1], match[2], token)
        else:
            self._refuse(404, "", "no such path")

    def _repository(self, name: str) -> Repository | None:
        repository = self.server_state.repositories.get(name)
        if repository is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        return repository

    def _list(self, name: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        files = [{"rfilename": path, **self._facts(path, body)} for path, body in repository.files.items()]
        facts = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": repository.commit,
            "private": False,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": files,
        }
        self._send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def _facts(path: str, body: bytes) -> dict[str, Any]:
        """As the Hub lists a file: git's hash of it, or of the pointer to it, whose content is known by its SHA-256."""
        if not path.endswith(".safetensors"):
            return {"size": len(body), "blobId": git_sha1(body)}
        oid = hashlib.sha256(body).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(body)}\n".encode()
        lfs = {"sha256": oid, "size": len(body), "pointerSize": len(pointer)}
        return {"size": len(body), "blobId": git_sha1(pointer), "lfs": lfs}

    def _send_file(self, name: str, path: str, token: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        if repository.gated and token not in repository.members:
            who = "your token is not in the authorized list" if token else "you have to be authenticated"
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted: {who}")
            return
        if path not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        body = repository.files[path]
        facts = {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            first = int(start[1])
            facts["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            body = body[first:]
        breaks_off = self.command == "GET" and repository.breaks > 0
        repository.breaks -= breaks_off
        self._send(206 if start else 200, body, facts, len(body) // 2 if breaks_off else None)

    def _refuse(self, status: int, code: str, message: str) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), {**named, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def git_sha1(body: bytes) -> str:
    """The hash of a file in git."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
