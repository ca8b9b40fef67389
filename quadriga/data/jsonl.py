"""JSON lines: one object a line, whose `text` is the document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from quadriga.data.files import File, cut_points, decode, fingerprint, line_at, lines_of, open_bytes
from quadriga.data.sources import Document, Record
from quadriga.errors import Problem, UserError

LEAST_RANGE = 1 << 16
MOST_RANGE = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonlSource:
    """A shard is a range of a plain file, which owns the lines that begin in it, or a whole compressed file."""

    trusted = False

    def __init__(self, files: Sequence[File], *, lanes: int = 1) -> None:
        self.files = files
        self.disk_bytes = sum(file.size for file in files)
        self.fingerprint = fingerprint("jsonl", files)
        step = cut_points(self.disk_bytes, lanes=lanes, least=LEAST_RANGE, most=MOST_RANGE).step
        self._ranges: list[tuple[int, int, int]] = []  # file, start, end
        for index, file in enumerate(files):
            if file.compressed:
                self._ranges.append((index, 0, 0))
            else:
                self._ranges += [(index, at, min(at + step, file.size)) for at in range(0, file.size, step)]
        self.shards = len(self._ranges)

    def read(self, shard: int) -> Iterator[Record]:
        index, start, end = self._ranges[shard]
        file = self.files[index]
        lines = lines_of(file) if file.compressed else _lines_between(file, start, end)
        return (Record(shard, offset, line) for offset, line in lines if not line.isspace())

    def parse(self, record: Record) -> Document:
        file = self.files[self._ranges[record.shard][0]]
        assert isinstance(record.data, bytes)
        line = record.data.removeprefix(BYTE_ORDER_MARK) if record.number == 0 else record.data
        said = decode(file, record.number, line)
        try:
            value = json.loads(said)
        except json.JSONDecodeError as error:
            raise _refused(file, record, f"not JSON: {error.msg} (column {error.colno})") from error
        text = value.get("text") if isinstance(value, dict) else None
        if isinstance(text, str) and (text.isascii() or _has_no_surrogate(text)):
            return Document(text)
        raise _refused(file, record, _what_is_wrong(value))


def _lines_between(file: File, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines whose first byte lies in [start, end), with their offsets."""
    with open_bytes(file) as stream:
        offset = start
        if start > 0:
            stream.seek(start - 1)
            offset += len(stream.readline()) - 1
        while offset < end and (line := stream.readline()):
            yield offset, line
            offset += len(line)


def _has_no_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _what_is_wrong(value: object) -> str:
    if not isinstance(value, dict):
        return f"the line is a JSON {_json_type(value)}, not an object with a `text`"
    if "text" not in value:
        return f"the object has no `text`; its keys are {', '.join(map(repr, list(value)[:8])) or 'none'}"
    if isinstance(value["text"], str):
        return "the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return f"`text` is a JSON {_json_type(value['text'])}, not a string"


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _refused(file: File, record: Record, what: str) -> UserError:
    where = f"{file.path}, line {line_at(file, record.number)}"
    return UserError(Problem(where, what, allowed='one object a line: {"text": "..."}'))
