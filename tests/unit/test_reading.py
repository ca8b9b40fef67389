"""Bounded reading: values, or one message that names the place; never a traceback, never a block."""

from __future__ import annotations

import json
import os

import pytest

from quadriga import limits
from quadriga.errors import Problem, UserError
from quadriga.reading import (
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
    read_lines,
    read_text,
    read_toml,
)


def test_json_is_read(tmp_path):
    value = {"a": [1, -2.5e-3, None, True, {"b": "[[[{{{"}], "c": '\u00e9\\"'}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(value))
    assert read_json_object(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "line 1, column 2"),
        ("[" * 200_000, "nests deeper than 100"),
        ("[" * 101 + "]" * 101, "nests deeper than 100"),
        ("[" + "9" * 5000 + "]", "a number of 5000 digits"),
        ("[0." + "1" * 5000 + "]", "a number of 5002 characters"),
        ("[NaN]", "NaN is not a JSON number"),
        ("", "line 1, column 1"),
    ],
)
def test_what_is_not_json_is_refused(text, expected):
    with pytest.raises(UserError) as refused:
        parse_json(text, "f.json")
    assert refused.value.report.startswith("quadriga: 1 problem\n\nf.json\n    ")
    assert expected in refused.value.report


def test_100_levels_and_400_digits_are_read():
    assert parse_json("[" * 100 + "]" * 100, "f") is not None
    assert parse_json("9" * 400, "f") == int("9" * 400)
    assert parse_json('{"a": "' + "[" * 5000 + '"}', "f") == {"a": "[" * 5000}
    assert parse_json("[NaN]", "f", nan=True)[0] != 0


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "utf16").write_bytes("{}".encode("utf-16"))
    (tmp_path / "list").write_text("[]")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, expected in [
        (tmp_path / "missing", "No such file"),
        (tmp_path / "dangling", "it is a link that leads nowhere"),
        (tmp_path, "Is a directory"),
        (tmp_path / "fifo", "a FIFO"),
        ("/dev/zero", "a device"),
        (tmp_path / "latin", "byte 0xe9 at offset 3"),
        (tmp_path / "utf16", "it looks like UTF-16: iconv"),
        (tmp_path / "list", "a JSON array where a JSON object is expected"),
        ("a\0b", "null"),
    ]:
        with pytest.raises(UserError) as refused:
            read_json_object(path)
        assert expected in refused.value.report, refused.value.report
        assert "\0" not in refused.value.report


def test_a_file_beyond_the_limit_is_refused(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b"x" * 11)
    assert len(read_bytes(path, 11)) == 11
    with pytest.raises(UserError, match="at most 10 bytes"):
        read_text(path, 10)
    os.truncate(path, limits.JSON_BYTES + 1)
    with pytest.raises(UserError, match=f"at most {limits.JSON_BYTES:,} bytes"):
        read_json(path)


def test_lines_are_numbered_and_bounded(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\r\n\nthree")
    assert list(read_lines(path)) == [(1, b"one"), (2, b""), (3, b"three")]
    path.write_bytes(b"one\n" + b"x" * 101)
    with pytest.raises(UserError, match="line 2"):
        list(read_lines(path, longest=100))


def test_a_report_holds_no_control_characters():
    problem = Problem(
        "a\x1b[2Jb\nc", "what\x07", value="v\r\x00", source="s\x9b", nearest="n\t", fix="f\nx", allowed="\u202e"
    )
    report = UserError(problem).report
    assert not {c for c in report if not c.isprintable()} - {"\n"}
    assert "a\\x1b[2Jb\\nc" in report
    assert "f\n        x" in report, "further lines are indented"


HOSTILE_TOML = {
    "half": b"[a\nb = 1",
    "not UTF-8": b"a = '\xff'",
    "5,000 digits": b"a = " + b"9" * 5000,
    "deep lists": b"a = " + b"[" * 200_000 + b"]" * 200_000,
    "deep tables": b"a = " + b"{a=" * 100_000,
    "a long key": b"a" + b".a" * 1_000_000 + b" = 1",
    "a long quoted key": b'"a"' + b' . "a"' * 300_000 + b" = 1",
    "a long name of a table": b"[" + b"a." * 1_000_000 + b"a]\n",
    "one word": b"a" * 4_000_000,
    "tables within tables": b"a = " + b"{a.a.a.a.a.a.a.a.a.a = " * 30 + b"1" + b"}" * 30,
}


@pytest.mark.parametrize("content", HOSTILE_TOML.values(), ids=HOSTILE_TOML)
def test_toml_is_refused_with_one_message(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_toml(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_sound_toml_is_read(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[a]\nb.c = [1.5, 2.5, " + "3.5, " * 200 + "]\n")
    assert read_toml(path)["a"]["b"]["c"][:3] == [1.5, 2.5, 3.5]
