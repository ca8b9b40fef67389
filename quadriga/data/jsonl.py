"""JSON lines: one object per line; one field of the object is the document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from quadriga import limits
from quadriga.data.fields import TEXT, Field
from quadriga.data.files import File, fingerprint
from quadriga.data.layout import Anchor, Cuts, find_anchor, layout_state, move_cuts, saved_cuts
from quadriga.data.line_reader import cut_points, format_location, lines_of
from quadriga.data.recognize import refuse_if_foreign
from quadriga.data.sources import BadRecord, Document, Record
from quadriga.errors import Problem, UserError
from quadriga.reading import json_type

LEAST_RANGE = 1 << 16
MOST_RANGE = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonlSource:
    """A shard is a byte range of a plain file, with the lines that begin in it, or a whole compressed file."""

    trusted = False

    def __init__(self, files: Sequence[File], *, streams: int = 1, field: Field = TEXT) -> None:
        self.files = files
        self.field = field
        self.disk_bytes = sum(file.size for file in files)
        self.fingerprint = fingerprint("jsonl", files) + field.fingerprint_suffix
        self._step = cut_points(self.disk_bytes, streams=streams, least=LEAST_RANGE, most=MOST_RANGE).step
        self._moved: dict[int, list[int]] = {}  # cuts of files that changed since a checkpoint, by file
        self._cut([[0] if file.compressed else list(range(0, file.size, self._step)) for file in files])

    def _cut(self, cuts: Cuts) -> None:
        ends = ((starts, file.size) for starts, file in zip(cuts, self.files, strict=True))
        self._ranges = [
            (index, start, end)  # (0, size on disk) for a compressed file
            for index, (starts, size) in enumerate(ends)
            for start, end in pairwise([*starts, size])
        ]
        self.shards = len(self._ranges)

    def file_of(self, shard: int) -> File:
        return self.files[self._ranges[shard][0]]

    def layout(self) -> dict[str, Any]:
        return layout_state(self.files, self._step, self._moved)

    def anchor(self, shard: int) -> Anchor | None:
        index, start, end = self._ranges[shard]
        return None if self.files[index].compressed else find_anchor(self.files[index], start, end)

    def load_layout(self, saved: Mapping[str, Any], anchors: Mapping[int, Anchor]) -> None:
        cuts = saved_cuts(self.files, saved)
        self._step = saved["step"]
        self._moved = {int(index): starts for index, starts in saved["cuts"].items()}
        first = 0
        for index, (file, size) in enumerate(zip(self.files, saved["sizes"], strict=True)):
            count = len(cuts[index])
            if file.size != size and not file.compressed:
                own = {shard - first: known for shard, known in anchors.items() if first <= shard < first + count}
                cuts[index] = self._moved[index] = move_cuts(file, cuts[index], size, own)
            first += count
        self._cut(cuts)

    def read(self, shard: int) -> Iterator[Record]:
        index, start, end = self._ranges[shard]
        file = self.files[index]
        lines = lines_of(file) if file.compressed else lines_of(file, start, end)
        blank = 0
        for offset, line in lines:
            if line is None or not line.isspace():
                blank = 0
                yield Record(shard, offset, line)
            elif (blank := blank + 1) > limits.BLANK_LINES:
                what = f"more than {limits.BLANK_LINES:,} empty lines end here"
                raise UserError(
                    Problem(self.format_location(shard, offset), what, fix="check whether this is a data file")
                )

    def parse(self, record: Record) -> Document:
        line = record.data
        if line is None:
            what = f"the line is longer than the limit of {limits.DOCUMENT_BYTES:,} bytes per document"
            raise self._refused(record, what, fix="split the document")
        assert isinstance(line, bytes)
        if record.number == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            text = json.loads(line.decode("utf-8"))[self.field.name]
            if isinstance(text, str) and (text.isascii() or _has_no_surrogate(text)):
                return Document(text)
        except (ValueError, RecursionError, LookupError, TypeError):
            pass  # diagnosed below, so that valid lines do not pay for it
        return self._diagnose(record, line)

    def format_location(self, shard: int, number: int) -> str:
        return format_location(self.files[self._ranges[shard][0]], number)

    def _diagnose(self, record: Record, line: bytes) -> Document:
        """The document of a line that `parse` could not read directly. Raises BadRecord with the reason, or UserError.

        Numbers of any length are accepted, because only the text counts."""
        refuse_if_foreign(self.files[self._ranges[record.shard][0]], "jsonl")
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError as error:
            at = record._replace(number=record.number + error.start)  # 3 bytes less after a removed byte order mark
            what = f"byte 0x{line[error.start]:02x} is not UTF-8 text"
            fix = "convert the file to UTF-8 (iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
            raise self._refused(at, what, fix=fix) from error
        try:
            value = json.loads(decoded, parse_int=_ignore_number)
        except json.JSONDecodeError as error:
            whole = decoded.strip() in ("[", "{")  # a JSON document of several lines
            hint = "write one object per line: jq -c '.[]' IN > OUT" if whole else None
            raise self._refused(record, f"not JSON: {error.msg} (column {error.colno})", fix=hint) from error
        except RecursionError:
            raise self._refused(record, "the JSON of this line is nested too deeply to be read") from None
        text = value.get(self.field.name) if isinstance(value, dict) else None
        if isinstance(text, str) and _has_no_surrogate(text):
            return Document(text)
        hint = self.field.fix(value) if isinstance(value, dict) and self.field.name not in value else None
        raise self._refused(record, self._what_is_wrong(value), fix=hint)

    def _what_is_wrong(self, value: object) -> str:
        name = self.field.name
        if not isinstance(value, dict):
            return f"the line is a JSON {json_type(value)}, not an object with a `{name}`"
        if name not in value:
            return f"the object has no `{name}`; its keys are {self.field.format_names(map(repr, value))}"
        if isinstance(value[name], str):
            return f"`{name}` holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
        return f"`{name}` is a JSON {json_type(value[name])}, not a string"

    def _refused(self, record: Record, what: str, *, fix: str | None = None) -> BadRecord:
        allowed = f'one object per line: {{"{self.field.name}": "..."}}'
        shard, number = record.shard, record.number
        return BadRecord(what, lambda: self.format_location(shard, number), allowed, fix)


def _ignore_number(digits: str) -> int:
    return 0


def _has_no_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
