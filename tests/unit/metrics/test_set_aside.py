"""Whatever lies where a run appends: it is told, set aside where need be, and the run goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from quadriga.config.run_spec import Degrees, Folders
from quadriga.metrics import append
from quadriga.metrics.append import Appender
from quadriga.metrics.events import EventLog, read_events
from quadriga.metrics.guarded import Guarded, WriteFailures
from quadriga.metrics.jsonl import JsonLines, read_metrics
from quadriga.train.run_files import open_event_log

SOUND = '{"kind": "train", "step": 1, "attempt": 4, "event": "start", "time": 1.0, "rank": 0}\n'


class Spec:
    """What `open_event_log` reads of a run's numbers."""

    world_size, degrees = 1, Degrees()

    def __init__(self, dump: Path) -> None:
        self.folders = Folders(str(dump), *(str(dump / name) for name in "abcde"))


def lay(path: Path, kind: str) -> None:
    kinds = {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}
    kinds |= {"dangling": lambda: path.symlink_to("/nowhere/x"), "loop": lambda: path.symlink_to(path.name)}
    kinds |= {"device": lambda: path.symlink_to("/dev/full")}
    kinds[kind]()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling", "loop", "device"])
def test_what_is_no_file_is_set_aside_and_reported(tmp_path, lines, name, kind):
    for _ in range(2):  # a second time, which takes another name
        lay(tmp_path / name, kind)
        open_event_log(Spec(tmp_path), "gloo")
        metrics = JsonLines(tmp_path / "metrics.jsonl")
        metrics.write({"kind": "train", "step": 1, "attempt": 1})
        metrics.close()
        if name == "metrics.jsonl" or kind != "device":
            assert (tmp_path / name).is_file()
        (tmp_path / name).unlink()
    assert [line.split(": set aside as ")[1] for line in lines if "set aside" in line] == [
        f"{name}.unreadable-1",
        f"{name}.unreadable-2",
    ]
    assert all(os.path.lexists(tmp_path / f"{name}.unreadable-{number}") for number in (1, 2))


CONTENTS = {
    "binary": bytes(range(256)) * 100,
    "one long line": b"x" * 300_000,
    "wrong types": b'[1]\n"a"\n7\nnull\n{"attempt": "x", "step": -1, "time": "now"}\n{"attempt": 1e999, "step": 2}\n',
    "a long number": b'{"attempt": ' + b"9" * 5000 + b', "step": 1}\n',
    "deep": b'{"attempt": ' + b"[" * 100_000 + b"\n",
    "half lines": SOUND.encode() + b'{"kind": "tra\n{"kind": "train", "st',
    "NUL": SOUND.encode() + b"\0" * 5000,
    "UTF-16": SOUND.encode("utf-16"),
    "empty": b"",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_any_content_lets_a_run_start_and_is_not_lost(tmp_path, content):
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes(CONTENTS[content])
    events = open_event_log(Spec(tmp_path), "gloo")
    assert events.attempt == (5 if content in ("half lines", "NUL") else 1)
    metrics = JsonLines(tmp_path / "metrics.jsonl")
    metrics.write({"kind": "train", "step": 2, "attempt": events.attempt})
    metrics.close()
    assert [event["event"] for event in read_events(tmp_path)][-1] == "start"
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 2
    kept = CONTENTS[content].rpartition(b"\n")[0]
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(kept)
    if not CONTENTS[content].rpartition(b"\n")[2].startswith(b"{"):
        assert (tmp_path / "metrics.jsonl").read_bytes().startswith(CONTENTS[content]), (
            "nothing is cut but a torn record"
        )


def test_a_file_without_permission_is_set_aside(tmp_path, monkeypatch, lines):
    (tmp_path / "metrics.jsonl").write_text(SOUND)
    real = os.open

    def refuse(path, flags, *rest, **keys):
        if str(path).endswith("metrics.jsonl") and flags & os.O_RDWR:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *rest, **keys)

    monkeypatch.setattr(append.os, "open", refuse)
    append.ensure_appendable(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl.unreadable-1").read_text() == SOUND
    assert "Permission denied" in lines[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch, lines, code):
    path = tmp_path / "metrics.jsonl"
    failures = WriteFailures(stops=False)
    one = Guarded(lambda: JsonLines(path), str(path), failures)
    one.write({"step": 1, "attempt": 1})
    real, left = os.write, [5]

    def filling(handle, data):
        if not left[0]:
            raise OSError(code, os.strerror(code))
        done, left[0] = real(handle, bytes(data)[: left[0]]), 0
        return done

    monkeypatch.setattr(os, "write", filling)
    for step in (2, 3):
        one.write({"step": step, "attempt": 1})
    monkeypatch.undo()
    one.write({"step": 4, "attempt": 1})
    one.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 4]
    assert lines == [
        f"{path} cannot be written ({os.strerror(code)}): new content is lost, the run continues",
        f"{path} can be written again; lost: 2 writes",
    ]
    assert failures.reason is None


def test_where_that_is_wanted_the_run_is_to_stop(tmp_path, lines):
    failures = WriteFailures(stops=True)
    (tmp_path / "file").write_text("")
    one = Guarded(lambda: JsonLines(tmp_path / "file" / "metrics.jsonl"), "metrics.jsonl", failures)
    one.write({"step": 1})
    one.close()
    assert "the run saves and stops" in lines[0]
    assert failures.reason.startswith("metrics.jsonl cannot be written")


def test_an_event_into_a_fifo_holds_up_nothing(tmp_path):
    events = EventLog(tmp_path, 1, 1)
    os.mkfifo(tmp_path / "events.jsonl")
    events.log_event("fault", 3)


def test_an_appender_does_not_wait_for_a_reader(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(OSError, match="No such device"):
        Appender(tmp_path / "a")
