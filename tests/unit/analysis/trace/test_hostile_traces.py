"""Files that are made to break a reader: one message each, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import os
import time

import pytest
from made_traces import two_steps

from quadriga import limits
from quadriga.analysis.trace.analysis import analyse
from quadriga.cli.main import main
from quadriga.errors import UserError

NAMES = {"all_gather": "ncclDevKernel_AllGather", "reduce_scatter": "ncclDevKernel_ReduceScatter"}
ROW = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 5.0, "dur": 1.0, "args": {}}


def text(**changed) -> str:
    return json.dumps({"traceEvents": [ROW, {**ROW, **changed}]})


def raw(field: str, value: str) -> str:
    return text(**{field: 12321}).replace("12321", value)


RECORD = {"Collective name": "allreduce", "dtype": "Float"}
HOSTILE = {
    "name of 5,000 digits": raw("name", "9" * 5000),
    "time of 5,000 digits": raw("ts", "9" * 5000),
    "endless time": raw("ts", "1e999"),
    "no time": raw("ts", "NaN"),
    "time beyond all clocks": raw("ts", "1e300"),
    "time as words": text(ts="now"),
    "time that is true": text(ts=True),
    "an endless duration": raw("dur", "Infinity"),
    "a list as name": text(name=["a"]),
    "no name": text(name=None),
    "args that are text": text(args="none"),
    "args that are a list": text(args=[1]),
    "a duration that is a list": text(dur=[]),
    "a duration that is empty": text(dur=""),
    "a duration that is false": text(dur=False),
    "args that are an empty list": text(args=[]),
    "a time with an underscore": text(ts="1_0"),
    "a time of other digits": text(ts="\u0661\u0662"),
    "a list as thread": text(tid=[1]),
    "an object as process": text(pid={}),
    "an id beyond 64 bits": text(args={"External id": 2**64}),
    "a correlation that is text": text(args={"correlation": "x"}),
    "a correlation with a fraction": text(args={"correlation": 1.5}),
    "a size that is text": text(name="record_param_comms", args={**RECORD, "In msg nelems": "many"}),
    "a negative size": text(name="record_param_comms", args={**RECORD, "In msg nelems": -4}),
    "a group of no size": text(name="record_param_comms", args={**RECORD, "Group size": []}),
    "a collective that is a number": text(name="record_param_comms", args={"Collective name": [7]}),
    "shapes that are text": text(name="c10d::allreduce_", args={"Input Dims": ["ab"], "Input type": ["float"]}),
    "a shape of words": text(name="c10d::allreduce_", args={"Input Dims": [["a"]], "Input type": ["float"]}),
    "a shape beyond memory": text(name="c10d::allreduce_", args={"Input Dims": [[2**40] * 50], "Input type": [""]}),
    "ranks of no numbers": text(name="c10d::allreduce_", args={**RECORD, "Process Group Ranks": [{}]}),
    "deep nesting": '{"traceEvents": ' + "[" * 200_000,
    "deep nesting in an event": text(args=12321).replace("12321", '{"a":' * 100_000),
    "deep metadata": '{"a": ' + "[" * 200_000,
    "no colon": '{"traceEvents" 5}',
    "zeros": "\0" * 1000,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_one_message_and_no_traceback(tmp_path, capsys, content):
    path = tmp_path / "rank0_trace.json"
    path.write_text(content)
    assert main(["trace", str(tmp_path)]) == 2
    output = capsys.readouterr().err
    assert str(path) in output
    assert len(output) < 1500


def test_an_event_that_is_wrong_is_named_by_its_number(tmp_path, capsys):
    (tmp_path / "rank0_trace.json").write_text(HOSTILE["time as words"])
    assert main(["trace", str(tmp_path)]) == 2
    assert "event 2: ts is 'now', not a number of microseconds" in capsys.readouterr().err


def test_rows_that_end_before_they_begin_and_strays_are_reported_and_left_out(tmp_path):
    trace = two_steps(0, NAMES)
    whole = analyse_at(tmp_path / "whole", trace)
    trace.events += [7, "text", None, {**ROW, "dur": -5, "ts": 100}]
    found = analyse_at(tmp_path / "odd", trace)
    assert found["by_rank"] == whole["by_rank"]
    warnings = " ".join(found["warnings"])
    assert "1 rows of rank0_trace.json end before they begin" in warnings
    assert "3 of the events of rank0_trace.json are not objects" in warnings


def analyse_at(place, trace):
    trace.write(place / "rank0_trace.json")
    return analyse(place)


def test_a_fifo_and_a_device_are_refused_at_once(tmp_path, capsys):
    os.mkfifo(tmp_path / "rank0_trace.json")
    assert main(["trace", str(tmp_path / "rank0_trace.json")]) == 2
    assert main(["trace", str(tmp_path)]) == 2
    (tmp_path / "rank1_trace.json").symlink_to("/dev/zero")
    assert main(["trace", str(tmp_path / "rank1_trace.json")]) == 2
    assert capsys.readouterr().out == ""


def bomb(middle: bytes, times: int) -> bytes:
    """A packed trace with `middle` so many times before its events; packed in parts, so that it is made fast."""
    part = gzip.compress(middle)
    return gzip.compress(b'{"a": 1, ') + part * times + gzip.compress(b'"traceEvents": []}')


@pytest.mark.parametrize("middle", [b" " * (1 << 24), b'"b": "' + b"b" * (1 << 24) + b'", '], ids=["spaces", "text"])
def test_what_unpacks_to_far_more_than_a_trace_does_is_refused(tmp_path, capsys, monkeypatch, middle):
    monkeypatch.setattr(limits, "TRACE_SMALL", 1 << 20)
    content = bomb(middle, 40)  # 640 MB in 640 KB
    path = tmp_path / "rank0_trace.json.gz"
    path.write_bytes(content)
    assert main(["trace", str(path)]) == 2
    output = capsys.readouterr().err
    assert "decompressed, it has over" in output or "is longer than" in output


def test_one_value_without_an_end_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "TRACE_VALUE", 1 << 20)
    path = tmp_path / "rank0_trace.json"
    path.write_text('{"traceEvents": [{"name": "' + "a" * (32 << 20) + '"}]}')
    assert main(["trace", str(path)]) == 2
    assert "one value is longer than 1,048,576 characters" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["TRACE_ROWS", "TRACE_CALLS", "TRACE_NAMES", "TRACE_STEPS"])
def test_more_than_is_read_is_refused(tmp_path, capsys, monkeypatch, limit):
    monkeypatch.setattr(limits, limit, 1)
    two_steps(0, NAMES).write(tmp_path / "rank0_trace.json")
    assert main(["trace", str(tmp_path)]) == 2
    assert "profile fewer steps" in capsys.readouterr().err


def test_a_broken_event_late_in_a_large_file_costs_one_reading(tmp_path, capsys):
    """Not one for each event before it."""
    events = ",".join([json.dumps(ROW)] * 20_000)
    (tmp_path / "rank0_trace.json").write_text('{"traceEvents": [' + events + ", {nonsense}, " + events + "]}")
    start = time.process_time()
    assert main(["trace", str(tmp_path)]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert time.process_time() - start < 20


def test_names_cannot_move_the_cursor(tmp_path, capsys):
    trace = two_steps(0, {**NAMES, "all_gather": "nccl\x1b[2J\u202eAllGather\ud800"})
    trace.write(tmp_path / "rank0_trace.json")
    assert main(["trace", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    out.encode()
    (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_byte_order_mark_is_no_part_of_a_trace(tmp_path):
    file = tmp_path / "rank0_trace.json"
    file.write_text("\ufeff" + text())
    assert analyse(file)
    file.write_text(text(), encoding="utf-16")
    with pytest.raises(UserError, match="iconv -f UTF-16"):
        analyse(file)
    file.write_text(raw("ts", "9" * 5000))
    with pytest.raises(UserError, match="a number of too many digits is in"):
        analyse(file)


@pytest.mark.parametrize(("name", "says"), [("fifo", "is a FIFO"), ("null", "is a device"), ("x", "is a link that")])
def test_what_is_no_file_is_named(tmp_path, name, says):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "x").symlink_to("x")
    with pytest.raises(UserError, match=says):
        analyse(tmp_path / name)


def test_a_trace_whose_target_is_gone_is_named(tmp_path):
    (tmp_path / "rank0_trace.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"rank0_trace\.json(?s:.*)a link that leads nowhere"):
        analyse(tmp_path)
