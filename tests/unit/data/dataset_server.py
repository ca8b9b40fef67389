"""A server on this machine that speaks the paths of the Hub that `datasets` asks for, for one small repository."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "a" * 40
README = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


def c4_repository(shards: int, rows: int) -> dict[str, bytes]:
    """Files as in allenai/c4: `shards` of the train split and one of the validation split."""
    files = {"README.md": README}
    for split, count in (("train", shards), ("validation", 1)):
        for shard in range(count):
            lines = [{"text": f"{split} {shard} {row}\n", "timestamp": "", "url": ""} for row in range(rows)]
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            files[f"en/c4-{split}.{shard:05d}-of-{count:05d}.json.gz"] = gzip.compress(content)
    return files


@contextmanager
def hub_server(repository: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Yields the endpoint and the list of requests, which grows."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            requests.append(f"{self.command} {self.path}")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            if path.startswith(f"/api/datasets/{repository}/tree/"):
                self.answer_json(tree(path.split("/tree/")[1].partition("/")[2], files))
            elif path.startswith(f"/api/datasets/{repository}"):
                siblings = [{"rfilename": name} for name in files]
                self.answer_json({"id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
            elif path.startswith(f"/datasets/{repository}/resolve/"):
                self.answer_file(path.split("/resolve/")[1].partition("/")[2])
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def answer_file(self, name: str) -> None:
            if name not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            data = files[name]
            headers = {"ETag": f'"{sha(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range")
            if not wanted:
                return self.answer(200, data, headers)
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.answer(206, data[start : end + 1], headers)

        def answer_json(self, content: object) -> None:
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()
        thread.join()


def tree(folder: str, files: dict[str, bytes]) -> list[dict[str, object]]:
    """The entries right inside a folder."""
    prefix = folder + "/" if folder else ""
    inside = [name for name in files if name.startswith(prefix)]
    folders = {name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]}
    entries: list[dict[str, object]] = [
        {"type": "file", "oid": sha(files[name]), "size": len(files[name]), "path": name}
        for name in inside
        if "/" not in name[len(prefix) :]
    ]
    return entries + [{"type": "directory", "oid": COMMIT, "size": 0, "path": prefix + name} for name in folders]


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
