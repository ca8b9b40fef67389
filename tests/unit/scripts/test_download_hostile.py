"""scripts/download_hf_assets.py and a hub that lies: nothing outside the target, no half file, one message, an end."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib.util
import json
import re
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import git_sha1  # noqa: E402

BODY = b'{"dim": 1}' * 700
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("download_hf_assets", ROOT / "scripts" / "download_hf_assets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(name: str = "config.json", body: bytes = BODY, **changes: Any) -> dict[str, Any]:
    return {"rfilename": name, "size": len(body), "blobId": git_sha1(body), **changes}


def listing(*entries: Any, **changes: Any) -> bytes:
    return json.dumps({"sha": COMMIT, "siblings": list(entries or [entry()]), **changes}).encode()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, length: int | None = None, **headers: str):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


@contextmanager
def serving(about: bytes | Answer, file: bytes | Answer = BODY) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A hub with one answer to every listing and one to every file; its address and what it was asked, with headers."""
    requests: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append((self.path, self.headers))
            answer = about if self.path.startswith("/api/") else file
            with suppress(OSError):  # the client has left
                send(self, answer) if isinstance(answer, bytes) else answer(self)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def run(script, tmp_path, monkeypatch, capsys):
    """Call the script with a hub, in a folder `here` beside `outside`: exit code, errors, files of the target."""
    (tmp_path / "here").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(script.time, "sleep", lambda seconds: None)  # between tries

    def call(endpoint: str, *argv: str) -> tuple[int, str, dict[str, bytes]]:
        code = script.main(["--repo_id", "org/name", "--assets", "config", *argv], {"HF_ENDPOINT": endpoint})
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert not [c for c in printed.err + printed.out if not c.isprintable() and c != "\n"]
        assert {path.name: path.read_text() for path in (tmp_path / "outside").iterdir()} == {"kept": "mine"}
        below = [path for path in tmp_path.rglob("*") if not path.is_dir() and "outside" not in path.parts]
        target = tmp_path / "here" / "assets" / "hf" / "name"
        assert all(path.is_relative_to(target) for path in below), below
        left = {str(path.relative_to(target)): path.read_bytes() for path in below if path.is_file()}
        return code, printed.err, {name: body for name, body in left.items() if not name.startswith(".cache")}

    return call


def test_an_honest_hub(run):
    with serving(listing(entry(), entry("README.md", b"x", blobId=git_sha1(b"x")))) as (endpoint, requests):
        code, output, files = run(endpoint)
        assert (code, files) == (0, {"config.json": BODY})
        assert "[1/1] config.json" in output
        assert requests[1][0] == f"/org/name/resolve/{COMMIT}/config.json"


LFS = {"sha256": hashlib.sha256(BODY).hexdigest(), "size": len(BODY), "pointerSize": 128}
OID = {"oid": hashlib.sha256(BODY).hexdigest(), "size": len(BODY)}


@pytest.mark.parametrize("stated", [{}, {"lfs": LFS, "blobId": "0" * 40}, {"lfs": OID}], ids=["git", "lfs", "tree"])
@pytest.mark.parametrize("honest", [True, False])
def test_content_has_the_hash_that_the_hub_states(run, stated, honest):
    """Of equal length, so that no size tells it."""
    with serving(listing(entry(**stated)), BODY if honest else BODY[:-1] + b"!") as (endpoint, _):
        code, output, files = run(endpoint)
    assert (code, files) == ((0, {"config.json": BODY}) if honest else (1, {}))
    assert honest or "does not have the hash that the Hub states" in output


def test_what_is_there_is_compared_too(run, tmp_path):
    target = tmp_path / "here" / "assets" / "hf" / "name"
    target.mkdir(parents=True)
    (target / "config.json").write_bytes(BODY[:-1] + b"!")
    with serving(listing()) as (endpoint, requests):
        assert run(endpoint)[2] == {"config.json": BODY}
        assert run(endpoint)[0] == 0
        assert len(requests) == 3, "two listings and one file"


def endless(piece: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        while True:
            handler.wfile.write(piece)

    return answer


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    for byte in BODY:
        handler.wfile.write(bytes([byte]))
        Event().wait(0.05)  # `time.sleep` is replaced


def drip_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        handler.wfile.write(b"a")
        Event().wait(0.05)  # `time.sleep` is replaced


def silent(handler: BaseHTTPRequestHandler) -> None:
    Event().wait(30)


def to(where: str) -> Answer:
    return lambda handler: send(handler, b"", 302, Location=where)


BODIES: dict[str, tuple[bytes | Answer, str]] = {
    "longer": (lambda handler: send(handler, BODY + b"more"), "sends more of config.json than the 7,000 bytes"),
    "endless": (endless(b"a" * 5000), "sends more of config.json"),
    "shorter": (BODY[:100], "ended after 100 of 7,000 bytes"),
    "length too long": (lambda handler: send(handler, BODY[:500], length=7000), "broke off"),
    "length too short": (lambda handler: send(handler, BODY, length=400), "ended after 400 of 7,000 bytes"),
    "compressed": (lambda handler: send(handler, gzip.compress(BODY), Content_Encoding="gzip"), "broke off"),
    "no HTTP": (lambda handler: handler.wfile.write(b"\x00\xff\x1b[31m nonsense\r\n" * 10), "broke off"),
    "other range": (
        lambda handler: send(handler, BODY, 206, Content_Range="bytes 5-6999/7000"),
        "",
    ),
    "a loop": (lambda handler: send(handler, b"", 302, Location=handler.path), "infinite loop"),
    "to a file": (to("file:///etc/passwd"), "answered 302"),
    "to ftp": (to("ftp://127.0.0.1/x"), "redirected to ftp://127.0.0.1/x"),
    "500": (lambda handler: send(handler, b"x" * 100, 500), "answered 500"),
    "to nowhere": (to("http://[::1"), "broke off"),
    "to a port": (to("http://127.0.0.1:99999/x"), "broke off"),
    "404": (lambda handler: send(handler, b"", 404, X_Error_Message="\x1b[31mgone"), "answered 404 for org/name: \\x"),
    "slow": (drip, "did not come"),
    "slow headers": (drip_headers, "did not come"),
    "silent": (silent, "broke off"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BODIES)
def test_bodies(run, script, monkeypatch, kind):
    """Whatever is sent, no half file stands under the final name, and it ends soon."""
    monkeypatch.setattr(script, "WHOLE_SECONDS", 3.0 if "slow" in kind else 60.0)
    monkeypatch.setattr(script, "SILENT_SECONDS", 1.0 if kind == "silent" else 20.0)
    body, says = BODIES[kind]
    with serving(listing(), body) as (endpoint, _):
        code, output, files = run(endpoint)
    assert says in output
    assert (code, files) == ((0, {"config.json": BODY}) if kind == "other range" else (1, {}))


@pytest.mark.parametrize("kind", [ssl.SSLError, ssl.SSLEOFError])
@pytest.mark.parametrize("times", [1, 99])
def test_a_body_that_breaks_off_within_tls_is_a_fault_of_the_network(run, monkeypatch, kind, times):
    """Such an error is an OSError, as those of the disk are."""
    read, failed = http.client.HTTPResponse.read1, []

    def broken(response: http.client.HTTPResponse, size: int = -1) -> bytes:
        if len(failed) < times:
            failed.append(size)
            raise kind(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed")
        return read(response, size)

    monkeypatch.setattr(http.client.HTTPResponse, "read1", broken)
    with serving(listing(), BODY) as (endpoint, _):
        code, output, files = run(endpoint)
    assert (code, files) == ((0, {"config.json": BODY}) if times == 1 else (1, {}))
    assert ("broke off" in output) == (times > 1)
    assert len(failed) > 1 or times == 1


def test_a_token_does_not_go_to_another_host(script, run, monkeypatch):
    with serving(listing(), BODY) as (elsewhere, requests):
        there = elsewhere.replace("127.0.0.1", "localhost") + f"/org/name/resolve/{COMMIT}/config.json"
        with serving(listing(), to(there)) as (endpoint, first):
            code, _, files = run(endpoint, "--hf_token", "hf_secret")
        assert (code, files) == (0, {"config.json": BODY})
        assert first[0][1]["Authorization"] == first[1][1]["Authorization"] == "Bearer hf_secret"
        assert requests[0][1]["Authorization"] is None


LISTINGS: dict[str, bytes | Answer] = {
    "empty": b"",
    "not JSON": b"<html>\x1b[2J",
    "an array": b"[]",
    "null": b"null",
    "deep": b"[" * 200_000,
    "no commit": listing(sha=None),
    "a commit that is a path": listing(sha="../../../etc"),
    "a number as commit": listing(sha=3),
    "siblings null": listing(siblings=None),
    "siblings an object": listing(siblings={"config.json": 1}),
    "a sibling is null": listing(None),
    "a sibling is text": listing("config.json"),
    "no name": listing({"size": 3}),
    "a name is a number": listing(entry(rfilename=7)),
    "a name is an array": listing(entry(rfilename=["config.json"])),
    "twice": listing(entry(), entry()),
    "size is text": listing(entry(size="7000")),
    "size is negative": listing(entry(size=-1)),
    "size is a fraction": listing(entry(size=1.5)),
    "size is true": listing(entry(size=True)),
    "size is null": listing(entry(size=None)),
    "size is huge": listing(entry(size=10**300)),
    "digits": listing(entry(size=1)).replace(b'"size": 1', b'"size": ' + b"9" * 5000),
    "NaN": listing(entry(size=float("nan"))),
    "no hash": listing(entry(blobId=None)),
    "a short hash": listing(entry(blobId="abc")),
    "a hash that is a path": listing(entry(blobId="../" * 13 + "a")),
    "hash is a number": listing(entry(blobId=12)),
    "lfs is text": listing(entry(lfs="yes")),
    "lfs without a hash": listing(entry(lfs={"size": 3})),
    "lfs with a git hash": listing(entry(lfs={"size": 3, "sha256": git_sha1(BODY)})),
    "lfs size is text": listing(entry(lfs={**LFS, "size": "3"})),
    "endless": endless(b" " * (1 << 20)),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_listings(run, kind):
    with serving(LISTINGS[kind]) as (endpoint, _):
        code, output, files = run(endpoint)
    assert (code, files) == (2, {})
    assert output.startswith("quadriga: 1 problem\n\n")
    assert f"{endpoint}/api/models/org/name?blobs=true\n    the listing of org/name cannot be used: " in output


def test_a_listing_that_drips(run, script, monkeypatch):
    monkeypatch.setattr(script, "WHOLE_SECONDS", 3.0)
    with serving(drip) as (endpoint, _):
        code, output, _ = run(endpoint)
    assert code == 1
    assert "gave no listing of org/name" in output


NAMES = [
    *("../config.json", "../../outside/kept", "/etc/passwd.safetensors", "..", ".", "", "a/../config.json", "./x"),
    *("..\\x.safetensors", "a\x1b[2J.safetensors", "a\n.safetensors", "a\x00.safetensors", ".cache/x.safetensors"),
    *("\u202eevil.safetensors", "a" * 600 + ".safetensors", "original/../../tokenizer.model", "c//config.json"),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_are_no_plain_paths_are_left_out(run, name):
    with serving(listing(entry(), entry(name))) as (endpoint, _):
        code, output, files = run(endpoint)
        assert (code, files) == (0, {"config.json": BODY})
        code, output, files = run(endpoint, "--assets", "safetensors")
    assert code == 2
    assert "has no file for it" in output


def test_links_in_the_target_are_not_followed(run, tmp_path):
    target = tmp_path / "here" / "assets" / "hf" / "name"
    target.mkdir(parents=True)
    outside = tmp_path / "outside"
    (target / "config.json").symlink_to(outside / "kept")
    parts = target / ".cache" / "download"
    parts.mkdir(parents=True)
    (parts / f"{git_sha1(BODY)}.part").symlink_to(outside / "kept")
    with serving(listing()) as (endpoint, _):
        assert run(endpoint)[2] == {"config.json": BODY}
        assert not (target / "config.json").is_symlink()
        (target / "config.json").unlink()
        (target / ".cache").symlink_to(outside)
        code, output, files = run(endpoint)
        assert (code, files) == (2, {})
        assert "a link or a file, where a folder is needed" in output
    (target / ".cache").unlink()
    (target / "original").symlink_to(outside)
    with serving(listing(entry("original/tokenizer.model"))) as (endpoint, _):
        code, output, files = run(endpoint, "--assets", "tokenizer")
    assert (code, files) == (2, {})
    assert "original" in output


@pytest.mark.parametrize("left", [BODY[:3000], b"?" * 3000, b"?" * len(BODY), b"?" * 9000], ids=len)
def test_what_an_earlier_call_left_is_gone_on_with_or_begun_anew(run, tmp_path, left):
    def ranged(handler: BaseHTTPRequestHandler) -> None:
        start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])
        send(handler, BODY[start:], 206 if start else 200, Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")

    parts = tmp_path / "here/assets/hf/name/.cache/download"
    parts.mkdir(parents=True)
    (parts / f"{git_sha1(BODY)}.part").write_bytes(left)
    with serving(listing(), ranged) as (endpoint, requests):
        assert run(endpoint)[2] == {"config.json": BODY}
    assert (requests[1][1]["Range"] is not None) == (len(left) == 3000)


@pytest.mark.parametrize("endpoint", ["file:///etc", "ftp://localhost", "nonsense", "http://[::1"])
def test_addresses_that_are_none(run, endpoint):
    code, output, _ = run(endpoint)
    assert code == 2
    assert "HF_ENDPOINT" in output


@pytest.mark.parametrize("name", ["../x", "a/../b", "a/b/c", "a", "-a/b", "a/b\n", "a/b\x1b", "a/..", "a b/c", ""])
def test_repositories_that_are_none(script, name, capsys):
    assert script.main(["--repo_id=" + name], {"HF_ENDPOINT": "http://127.0.0.1:9"}) == 2
    assert "not the name of a repository" in capsys.readouterr().err
