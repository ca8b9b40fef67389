"""JSON lines: one object per line; one field of the object is the document. Reads the lines of text files too.

A line is found by its byte in the file, decompressed if it ends in .gz or .zst; its length is bounded.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from quadriga import limits
from quadriga.config.schema import TextKeys
from quadriga.data.byte_files import DAMAGED, open_bytes
from quadriga.data.files import File, layout_state, saved_cuts
from quadriga.data.recognize import damaged_file, refuse_if_foreign
from quadriga.data.sources import (
    Anchor,
    BadRecord,
    Document,
    FileSource,
    Record,
    bad_record,
    field_fix,
    format_names,
    template_of,
    too_long,
)
from quadriga.data.stored_arrays import path_of
from quadriga.errors import Problem, UserError, shortened
from quadriga.log import logger
from quadriga.reading import json_type

LEAST_RANGE = 1 << 16
MOST_RANGE = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WINDOW = 1 << 20  # bytes before and after in which the first line of a shard is searched
WIDE = 1 << 26  # if it is not found: as many bytes as the file grew or shrank, at most so many


class ByteRangeSource(FileSource):
    """A shard is a byte range of a plain file, or a whole compressed file, which has no random access: (0, size)."""

    def __init__(
        self, kind: str, files: Sequence[File], keys: TextKeys | None, streams: int, least: int, most: int
    ) -> None:
        super().__init__(kind, files, keys)
        # At least four shards per stream, if they are above `least` bytes; at most about 2^17 shards, because each
        # epoch sorts them.
        self._step = min(max(self.disk_bytes // (4 * streams), least), max(most, self.disk_bytes >> 17))
        self._moved: dict[int, list[int]] = {}  # cuts of files that changed since a checkpoint, by file
        self._cut(saved_cuts(files, self.layout()), [file.size for file in files])

    def layout(self) -> dict[str, Any]:
        return layout_state(self.files, self._step, self._moved)

    def load_layout(self, saved: Mapping[str, Any], anchors: Mapping[int, Anchor]) -> None:
        cuts = saved_cuts(self.files, saved)
        self._step = saved["step"]
        self._moved = {int(index): starts for index, starts in saved["cuts"].items()}
        first = 0
        for index, (file, size) in enumerate(zip(self.files, saved["sizes"], strict=True)):
            count = len(cuts[index])
            if file.size != size and not file.compressed:
                own = {shard - first: known for shard, known in anchors.items() if first <= shard < first + count}
                cuts[index] = self._moved[index] = self._move(file, cuts[index], size, own)
            first += count
        self._cut(cuts, [file.size for file in self.files])

    def _move(self, file: File, starts: list[int], size: int, anchors: Mapping[int, Anchor]) -> list[int]:
        """The starts of the shards of a plain file that had `size` bytes and now has another size."""
        return [min(start, file.size) for start in starts]

    def format_location(self, shard: int, number: int) -> str:
        return format_location(self.file_of(shard), number)


class JsonlSource(ByteRangeSource):
    """A shard has the lines that begin in its byte range."""

    def __init__(self, files: Sequence[File], keys: TextKeys, *, streams: int = 1) -> None:
        self.keys, self.template = keys, template_of(keys)
        self._field = self.template.names[0] if self.template.is_one_field else None
        super().__init__("jsonl", files, keys, streams, LEAST_RANGE, MOST_RANGE)

    def anchor(self, shard: int) -> Anchor | None:
        index, start, end = self._spans[shard]
        return None if self.files[index].compressed else find_anchor(self.files[index], start, end)

    def _move(self, file: File, starts: list[int], size: int, anchors: Mapping[int, Anchor]) -> list[int]:
        return move_cuts(file, starts, size, anchors)

    def read(self, shard: int) -> Iterator[Record]:
        index, start, end = self._spans[shard]
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
            value = json.loads(line.decode("utf-8"))
            text, prompt = self._joined(value) if self._field is None else (value[self._field], 0)
            if isinstance(text, str) and (text.isascii() or _has_no_surrogate(text)):
                return Document(text, prompt=prompt)
        except (ValueError, RecursionError, LookupError, TypeError):
            pass  # diagnosed below, so that valid lines do not pay for it
        return self._diagnose(record, line)

    def _joined(self, value: Any) -> tuple[str | None, int]:
        """The document of several fields, and the characters of its prompt; None if they are too long together. Raises
        TypeError or LookupError."""
        texts = [value[name] for name in self.template.names]
        return self.template.join(texts) if sum(map(len, texts)) <= limits.DOCUMENT_BYTES else (None, 0)

    def _diagnose(self, record: Record, line: bytes) -> Document:
        """The document of a line that `parse` could not read directly. Raises BadRecord with the reason, or UserError.

        Numbers of any length are accepted, because only the text counts."""
        refuse_if_foreign(self.file_of(record.shard), "jsonl")
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
        names = self.template.names
        if not isinstance(value, dict):
            what = f"the line is a JSON {json_type(value)}, not an object with a `{names[0]}`"
            raise self._refused(record, what)
        for name in names:
            if (wrong := self._what_is_wrong(value, name)) is not None:
                raise self._refused(record, wrong, fix=None if name in value else field_fix(self.keys, value))
        texts = [value[name] for name in names]
        if sum(map(len, texts)) > limits.DOCUMENT_BYTES:
            raise too_long(self, record)
        text, prompt = self.template.join(texts)
        return Document(text, prompt=prompt)

    def _what_is_wrong(self, value: dict[str, object], name: str) -> str | None:
        if name not in value:
            return f"the object has no `{name}`; its keys are {format_names(map(repr, value))}"
        text = value[name]
        if not isinstance(text, str):
            return f"`{name}` is a JSON {json_type(text)}, not a string"
        if not _has_no_surrogate(text):
            return f"`{name}` holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
        return None

    def _refused(self, record: Record, what: str, *, fix: str | None = None) -> BadRecord:
        fields = ", ".join(f'"{name}": "..."' for name in dict.fromkeys(self.template.names))
        return bad_record(self, record, what, f"one object per line: {{{fields}}}", fix)


def _ignore_number(digits: str) -> int:
    return 0


def _has_no_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines_of(file: File, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """Yields (offset, line) of the lines whose first byte is in [start, end); of all lines of a compressed file.

    A line that is longer than `limits.DOCUMENT_BYTES` is None.
    Raises UserError if a compressed file is damaged, or if there is no line end within `limits.LINE_SKIPPED_BYTES`.
    """
    number, longest = 0, limits.DOCUMENT_BYTES
    with open_bytes(file) as stream:
        offset = start
        if start > 0:
            stream.seek(start - 1)
            offset += _to_line_end(stream, file, start) - 1
        try:
            while (end is None or offset < end) and (line := stream.readline(longest + 1)):
                number += 1
                if len(line) <= longest or line.endswith(b"\n"):
                    yield offset, line
                    offset += len(line)
                else:
                    begins = offset
                    offset += len(line) + _to_line_end(stream, file, begins)
                    yield begins, None
        except DAMAGED as error:
            raise UserError(damaged_file(file, number, error)) from error


def _to_line_end(stream: BinaryIO, file: File, begins: int) -> int:
    """Reads to the end of the line. Returns the number of bytes read."""
    passed = 0
    while piece := stream.readline(1 << 20):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
        if passed > limits.LINE_SKIPPED_BYTES:
            what = f"the line that holds byte {begins:,} has no end within {limits.LINE_SKIPPED_BYTES:,} bytes"
            fix = "write one JSON object per line; or check whether this is a data file"
            raise UserError(Problem(path_of(file), what, fix=fix))
    return passed


def line_at(file: File, offset: int) -> int:
    """The number (from 1) of the line with the byte at `offset` of the decompressed file."""
    lines = 1
    with open_bytes(file) as stream:
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 16))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def format_location(file: File, offset: int) -> str:
    """The position of a byte for a message: the line, or the byte (of the decompressed file) if counting the lines
    before it would take long or is not possible. Raises UserError if the file cannot be read."""
    name = path_of(file)
    if offset <= (limits.LINES_COUNTED_PACKED if file.compressed else limits.LINES_COUNTED):
        with suppress(*DAMAGED):
            return f"{name}, line {line_at(file, offset)}"
    return f"{name}, byte {offset:,}"


def find_anchor(file: File, start: int, end: int) -> Anchor | None:
    """The first line of a shard of a plain file; None if it has no line or cannot be read."""
    try:
        offset, line = next(lines_of(file, start, end), (0, None))
    except UserError:
        return None
    return None if line is None else Anchor(offset, zlib.crc32(line))


def move_cuts(file: File, starts: Sequence[int], size: int, anchors: Mapping[int, Anchor]) -> list[int]:
    """Moves the starts of the shards of a file that had `size` bytes and now has another size.

    `anchors`: of the partly read shards, by number of the shard in the file. Each of them starts at its first line,
    wherever that is now. Shards between them move like the next one. So if a file was changed within a partly read
    shard, all other lines stay in their shards. A partly read shard that would become empty keeps its length, because
    the removed lines are behind it.
    """
    by_all = file.size - size
    found: dict[int, int] = {}
    shift = lost = 0
    for number, known in sorted(anchors.items()):
        at = _find(file, known, by_all, shift)
        if at is None and _begins_line(file, known.start + shift):
            at = known.start + shift  # the first line itself changed
        if at is not None:
            found[number], shift = at, at - known.start
        lost += at is None
    if lost:
        name = shortened(file.name)
        what = f"the first lines of {lost} partly read shards were not found in it"
        logger.warning("data: %s changed, and %s: documents may be read twice or skipped", name, what)
    cuts: list[int] = []
    shift = by_all
    for number in range(len(starts) - 1, -1, -1):
        if number in found:
            shift = found[number] - anchors[number].start
        at = found[number] if number in found else starts[number] + shift if number else 0
        if number - 1 in found and number not in found and at <= found[number - 1]:
            at = starts[number] + found[number - 1] - anchors[number - 1].start
        cuts.append(at)
    cuts.reverse()
    least = 0
    for number, at in enumerate(cuts):
        least = max(least, min(at, file.size))
        cuts[number] = least
    return cuts


def _find(file: File, known: Anchor, by_all: int, shift: int) -> int | None:
    """The new position of a line: near its old one, or moved by the growth of the file, or by `shift` like the line
    before it. If it is not there, searches farther from these positions, because lines may have been added or removed
    on both sides."""
    centers = {known.start, known.start + by_all, known.start + shift}
    for window in (WINDOW, min(abs(by_all), WIDE)):
        places = [at for center in centers for at in _matches(file, known.checksum, center, window)]
        if places or abs(by_all) <= WINDOW:
            return min(places, key=lambda at: min(abs(at - center) for center in centers), default=None)
    return None


def _begins_line(file: File, at: int) -> bool:
    with open_bytes(file) as stream:
        stream.seek(max(at - 1, 0))
        return at == 0 or (at > 0 and stream.read(1) == b"\n")


def _matches(file: File, checksum: int, center: int, window: int) -> list[int]:
    """The starts of lines with this checksum, within `window` bytes of `center`."""
    start = max(center - window, 0)
    with open_bytes(file) as stream:
        stream.seek(start)
        data = stream.read(center + window - start) if center + window > start else b""
    at = data.find(b"\n") + 1 if start else 0
    places = []
    while at < len(data):
        end = data.find(b"\n", at) + 1 or len(data)
        if zlib.crc32(data[at:end]) == checksum:
            places.append(start + at)
        at = end
    return places
