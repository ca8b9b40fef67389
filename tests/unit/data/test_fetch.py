"""`quadriga data fetch`: the bytes of the store, whatever ends the copy, and nothing of the user's is overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from quadriga.cli.data_fetch import format_fetch_progress
from quadriga.cli.main import main
from quadriga.data import fetch, fetch_file, fetch_stores
from quadriga.data.fetch import FetchProgress, fetch_into
from quadriga.data.files import find_files
from quadriga.data.token_files import open_token_files
from quadriga.data.unfinished import FETCH, INCOMPLETE
from quadriga.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE, UserError

BLOCK = 1 << 16
CONTENT = np.random.default_rng(0).integers(0, 256, 40 * BLOCK + 123, np.uint8).tobytes()
DRIVER = f"""
import sys
from quadriga.data import fetch_file, fetch_stores
fetch_stores.READ_BYTES = fetch_file.SYNC_BYTES = {BLOCK}
from quadriga.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


class Server(ThreadingHTTPServer):
    """A server of CONTENT. hold: bytes after which an answer waits for `release`. cuts: after how many bytes the next
    answers end. failures: status codes of the next answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.ranges, self.etag = True, '"1"'
        self.hold: int | None = None
        self.release = threading.Event()
        self.cuts: list[int] = []
        self.failures: list[int] = []
        self.asked: list[str | None] = []  # the ranges of requests for content

    def url(self, name: str = "a.bin") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and server.ranges else 0
        if asked != "bytes=0-0":
            server.asked.append(asked)
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("ETag", server.etag)
        self.end_headers()
        end = len(CONTENT)
        if server.cuts and asked != "bytes=0-0":
            end = start + server.cuts.pop(0)
        try:
            if server.hold is not None and asked != "bytes=0-0":
                self.wfile.write(CONTENT[start : server.hold])
                self.wfile.flush()
                server.release.wait(60)
                start = max(start, server.hold)
            self.wfile.write(CONTENT[start:end])
        except OSError:
            pass  # the client was killed, or wanted only the headers

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.release.set()
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_stores, "READ_BYTES", BLOCK)
    monkeypatch.setattr(fetch_file, "SYNC_BYTES", BLOCK)
    for module in (fetch, fetch_file):
        monkeypatch.setattr(module, "PAUSES", (0.001, 0.001, 0.001))


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    for name, content in {"a.bin": b"abc", "sub/b.bin": b"", "sub/c.npy": CONTENT}.items():
        system.pipe_file(f"/store/{name}", content)
    yield system
    system.rm("/", recursive=True)


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = EXIT_OK) -> str:
    """Runs the command; what it printed."""
    capsys.readouterr()
    assert main(["data", "fetch", *map(str, argv)]) == code
    shown = capsys.readouterr()
    return shown.out + shown.err


def copies(folder: Path) -> dict[str, bytes]:
    """The visible files of a folder."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {name: path.read_bytes() for path in found if not (name := str(path.relative_to(folder))).startswith(".")}


def manifest(folder: Path) -> dict[str, dict[str, object]]:
    lines = (folder / ".fetch/manifest.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


# --- what is copied -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("memory://store", {"a.bin", "sub/b.bin", "sub/c.npy"}),
        ("memory://store/sub/c.npy", {"c.npy"}),
        ("memory://store/**/*.bin", {"b.bin"}),
        ("memory://store/*/*.npy", {"sub/c.npy"}),
    ],
)
def test_a_file_a_folder_and_a_glob_are_copied(memory, tmp_path, capsys, url, names):
    if "**" in url:
        names = {"a.bin", "sub/b.bin"}
    assert f"{len(names)} file" in run(capsys, url, tmp_path / "out")
    found = copies(tmp_path / "out")
    assert found.keys() == names
    stored = {
        name: memory.cat_file(f"/store/{name if '/' in name or name == 'a.bin' else 'sub/' + name}") for name in names
    }
    assert found == stored
    for name, record in manifest(tmp_path / "out").items():
        assert (record["size"], record["sha256"]) == (len(stored[name]), hashlib.sha256(stored[name]).hexdigest())
    assert not (tmp_path / "out/.fetch/incomplete").exists()


def test_a_local_folder_is_copied_without_a_driver(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.bin").write_bytes(CONTENT)
    run(capsys, f"file://{tmp_path}/in", tmp_path / "out")
    run(capsys, tmp_path / "in", tmp_path / "plain")
    assert copies(tmp_path / "out") == copies(tmp_path / "plain") == {"x.bin": CONTENT}


def test_a_later_call_copies_what_is_new_and_keeps_the_rest(memory, tmp_path, capsys):
    out = tmp_path / "out"
    run(capsys, "memory://store", out)
    before = (out / "a.bin").stat().st_mtime_ns
    memory.pipe_file("/store/new.bin", b"new")
    (out / "notes.txt").write_text("mine")
    assert "1 file copied; 3 files of earlier calls unchanged" in run(capsys, "memory://store", out)
    assert "0 files copied; 4 files of earlier calls verified" in run(capsys, "memory://store", out, "--verify")
    assert copies(out).keys() == {"a.bin", "sub/b.bin", "sub/c.npy", "new.bin", "notes.txt"}
    assert (out / "a.bin").stat().st_mtime_ns == before


def test_changed_copies_and_originals_are_refused(memory, tmp_path, capsys):
    out = tmp_path / "out"
    run(capsys, "memory://store", out)
    status = (out / "a.bin").stat()
    (out / "a.bin").write_bytes(b"abX")
    assert "is not what was copied" in run(capsys, "memory://store", out, code=EXIT_USAGE)
    os.utime(out / "a.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    run(capsys, "memory://store", out)  # size and time are those of the copy
    assert "is not what was copied" in run(capsys, "memory://store", out, "--verify", code=EXIT_USAGE)
    (out / "a.bin").unlink()  # the remedy of the message
    assert "1 file copied" in run(capsys, "memory://store", out, "--verify")
    memory.pipe_file("/store/a.bin", b"ABC")
    assert "was changed at the URL" in run(capsys, "memory://store", out, code=EXIT_USAGE)
    (out / "a.bin").unlink()
    run(capsys, "memory://store", out)
    assert copies(out)["a.bin"] == b"ABC"


# --- what ends a copy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [None, "no ranges", "another version"])
def test_a_killed_copy_continues(server, tmp_path, capsys, change):
    """At the byte that is safe on the disk; from the start where the server has no ranges, or has other bytes now."""
    out, server.hold = tmp_path / "out", 10 * BLOCK
    process = subprocess.Popen([sys.executable, "-c", DRIVER, "data", "fetch", server.url(), str(out)])
    while not (states := list(out.glob(".fetch/*.json"))) or json.loads(states[0].read_text())["length"] < 9 * BLOCK:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    safe = json.loads(states[0].read_text())["length"]
    assert copies(out) == {}
    with pytest.raises(UserError, match="run the same `quadriga data fetch` again"):
        open_token_files(str(out), token_dtype="uint8")
    server.hold = None
    server.ranges = change != "no ranges"
    server.etag = '"2"' if change == "another version" else '"1"'
    run(capsys, server.url(), out)
    assert copies(out) == {"a.bin": CONTENT}
    assert open_token_files(str(out), token_dtype="uint8").length == len(CONTENT)
    assert server.asked[1] == (None if change == "another version" else f"bytes={safe}-")
    assert len(server.asked) == (3 if change == "no ranges" else 2)
    assert not list(out.glob(".fetch/*.part"))


def test_a_kill_between_manifest_and_rename_loses_nothing(server, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(fetch, "rename_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "is kept in" in run(capsys, server.url(), out, code=128 + signal.SIGINT)
    monkeypatch.undo()
    assert (copies(out), len(manifest(out))) == ({}, 1)
    with (out / ".fetch/manifest.jsonl").open("ab") as file:
        file.write(b'{"name": "half of a li')
    run(capsys, server.url(), out)
    assert copies(out) == {"a.bin": CONTENT}
    assert "1 file of earlier calls verified" in run(capsys, server.url(), out, "--verify")


def test_connections_that_break_are_continued_as_long_as_they_bring_bytes(server, tmp_path, capsys):
    server.cuts = [3 * BLOCK] * 9  # more than the repetitions of one position
    run(capsys, server.url(), tmp_path / "out")
    assert copies(tmp_path / "out") == {"a.bin": CONTENT}
    starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in server.asked[1:]]
    assert starts == [3 * BLOCK * number for number in range(1, 10)]


def test_a_store_that_fails_is_a_fault_with_a_remedy(server, tmp_path, capsys):
    server.failures = [503] * 2
    run(capsys, server.url(), tmp_path / "out")
    server.cuts = [2 * BLOCK] + [0] * 4
    shown = run(capsys, server.url("b.bin"), tmp_path / "out", code=EXIT_FAULT)
    assert "What was copied is kept: run the same command again to continue" in shown
    assert "1 file copied" in run(capsys, server.url("b.bin"), tmp_path / "out")
    assert server.asked[-1] == f"bytes={2 * BLOCK}-"
    assert copies(tmp_path / "out") == {"a.bin": CONTENT, "b.bin": CONTENT}
    for code, says in ((404, "404"), (403, "403")):
        server.failures = [code]
        assert says in run(capsys, server.url("c.bin"), tmp_path / "out", code=EXIT_USAGE)


def test_a_file_that_changes_under_the_copy_is_begun_again(server, tmp_path, capsys, monkeypatch):
    real, calls = fetch_stores.HttpFile.described, []

    def described(self, file):
        calls.append(file)
        if len(calls) == 2:  # after the first copy
            server.etag = '"2"'
        return real(self, file)

    monkeypatch.setattr(fetch_stores.HttpFile, "described", described)
    run(capsys, server.url(), tmp_path / "out")
    assert server.asked == [None, None]
    assert manifest(tmp_path / "out")["a.bin"]["version"] == {"ETag": '"2"'}


def test_a_full_disk_is_reported_before_and_during_the_copy(server, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        shown = run(capsys, server.url(), tmp_path / "out", code=EXIT_USAGE)
        assert "the disk has 1000 B free" in shown
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, "data", "fetch", server.url(), str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20 * BLOCK, 20 * BLOCK)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == EXIT_USAGE
    assert "cannot be written: File too large" in process.stderr
    assert "run the same command again to continue" in process.stderr
    run(capsys, server.url(), tmp_path / "out")
    assert server.asked[-1] == f"bytes={20 * BLOCK}-"
    assert copies(tmp_path / "out") == {"a.bin": CONTENT}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_files_of_others_are_not_overwritten(memory, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.bin").write_text("mine")
    assert "is there already" in run(capsys, "memory://store", out, code=EXIT_USAGE)
    assert copies(out) == {"a.bin": b"mine"}
    run(capsys, "memory://store/sub", out)
    memory.pipe_file("/other/c.npy", CONTENT)
    assert "was copied from memory://store/sub" in run(capsys, "memory://other", out, code=EXIT_USAGE)
    assert "is not a folder" in run(capsys, "memory://store", out / "a.bin", code=EXIT_USAGE)


@pytest.mark.parametrize("name", ["../evil.bin", "a/../../evil.bin", ".fetch/manifest.jsonl", "a\0b", "a//b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, capsys, monkeypatch, name):
    file = fetch_stores.StoredFile(name, name, 1, {})
    monkeypatch.setattr(fetch_stores.FsspecFiles, "files", lambda self: [file])
    assert "whose name cannot be copied" in run(capsys, "memory://x", tmp_path / "out", code=EXIT_USAGE)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(memory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such file" in run(capsys, "memory://none", "out", code=EXIT_USAGE)
    assert "pip install s3fs" in run(capsys, "s3://bucket/x", "out", code=EXIT_USAGE)
    assert "does not name a file" in run(capsys, "https://127.0.0.1/folder/", "out", code=EXIT_USAGE)
    Path("a.bin").write_bytes(b"1")
    assert "is inside of the folder" in run(capsys, f"file://{tmp_path}", "out", code=EXIT_USAGE)
    os.mkfifo(tmp_path / "fifo")
    assert "is not a regular file" in run(capsys, f"file://{tmp_path}", tmp_path.parent / "out", code=EXIT_USAGE)
    both = [fetch_stores.StoredFile(name, name, 1, {}) for name in ("x", "x/y")]  # as object stores allow
    monkeypatch.setattr(fetch_stores.FsspecFiles, "files", lambda self: both)
    assert "a file and a folder of one name" in run(capsys, "memory://both", "out", code=EXIT_USAGE)
    assert not Path("out").exists()


def test_two_commands_do_not_write_one_folder(server, tmp_path, capsys):
    server.hold = 2 * BLOCK
    out = tmp_path / "out"
    first = threading.Thread(target=fetch_into, args=(server.url(), out, 1, lambda _: None))
    first.start()
    while not list(out.glob(".fetch/*.json")):
        time.sleep(0.01)
    assert "another process is writing" in run(capsys, server.url(), out, code=EXIT_USAGE)
    server.release.set()
    first.join()
    assert copies(out) == {"a.bin": CONTENT}


def test_passwords_and_signatures_are_not_written_down(server, tmp_path, capsys):
    url = f"{server.url()}?signature=secret"
    run(capsys, url, tmp_path / "out")
    server.failures = [403]
    assert "secret" not in run(capsys, url, tmp_path / "other", code=EXIT_USAGE)
    assert "secret" not in (tmp_path / "out/.fetch/manifest.jsonl").read_text()
    assert fetch_stores.without_secrets("s3://user:word@bucket/a?x=1") == "s3://bucket/a"


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_folder_of_data_can_be_named_as_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fetch").mkdir()
    Path("fetch/a.txt").write_text("a text")
    assert main(["data", "./fetch", "--seq-len", "4"]) == EXIT_OK
    assert "documents    1\n" in capsys.readouterr().out
    assert main(["data", "fetch"]) == EXIT_USAGE
    assert "quadriga data ./fetch" in capsys.readouterr().err


def test_progress_has_speed_and_time_left():
    progress = FetchProgress(total_bytes=1000, files=3, bytes=400, received=100, finished=1)
    assert format_fetch_progress(progress, 10.0) == "400 B of 1000 B, 1 of 3 files, 10 B/s, 1m00s left"
    assert "left" not in format_fetch_progress(FetchProgress(0, 1), 1.0)


def test_texts_of_an_unfinished_folder_are_refused(tmp_path):
    """A run would train on the files that have come so far."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / FETCH).mkdir()
    find_files("jsonl", str(tmp_path))
    (tmp_path / FETCH / INCOMPLETE).touch()
    with pytest.raises(UserError, match="are not complete") as refused:
        find_files("jsonl", str(tmp_path))
    assert "quadriga data fetch" in str(refused.value)
