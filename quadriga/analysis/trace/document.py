"""Reads the JSON of a trace as a stream of events: a few megabytes of memory for files of any size.

Files of other trainers are read too: one line or many, `{"traceEvents": [...]}` or the bare array that Chrome's format
allows, plain or compressed with gzip (detected by the first bytes). The limits are in `quadriga.limits`.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quadriga import limits
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import FROM_UTF_16, opened

CHUNK = 1 << 22  # characters read at once
GZIP = b"\x1f\x8b"
SPACE = re.compile(r"[ \t\r\n]*")
BORDER, TAIL = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*\{"), 1 << 16  # between events; characters to search for it
EVENTS = "traceEvents"
LONGEST_WORD = 10  # characters of a literal or an escape that may be cut off at the end of a chunk
CUT_OFF = "the file is truncated"
AGAIN = "copy the file again, or profile again; a run writes complete traces only"


class TraceDocument:
    """An iterable of the events. After the iteration, `metadata` has the other keys of the file, and `non_objects` the
    number of events that are not JSON objects. `has_more`: text follows the end.

    Raises UserError if the file cannot be read, is not JSON, is truncated, exceeds a limit, or has no events.
    """

    def __init__(self, path: Path, chunk: int = CHUNK) -> None:
        self.metadata: dict[str, Any] = {}
        self.non_objects = 0
        self.has_more = False
        self._path, self._chunk = path, chunk
        self._text, self._at, self._ended = "", 0, False
        self._one_by_one = False  # the text that was read cannot be decoded at once
        self._length = self._kept = 0  # characters of the last value, and of all metadata
        self._decode = json.JSONDecoder(strict=False).raw_decode  # names may hold control characters

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with opened(self._path, what="trace") as file:
            self._file = _Text(file)
            try:
                yield from self._document()
                self.has_more = self._follows()
            except (OSError, EOFError, zlib.error) as error:
                raise self._wrong(f"the file cannot be read to its end: {error}") from None
            except LimitExceeded as error:
                raise self._wrong(str(error), "profile fewer steps, or without with_stack") from None

    def _document(self) -> Iterator[dict[str, Any]]:
        if self._peek() == "[":
            yield from self._array()
            self._at -= 1
            return
        if self._text.startswith("\ufffd\ufffd"):  # the mark of UTF-16, which is not UTF-8
            raise self._wrong("the file is not UTF-8", FROM_UTF_16)
        if self._peek() != "{":
            raise self._wrong("the file is not a JSON object or array")
        self._at += 1
        seen = False
        while self._peek() != "}":
            key = self._value()
            self._expect(":")
            if key == EVENTS:
                seen = True
                yield from self._array()
            else:
                self.metadata[str(key)] = self._value()
                self._kept += self._length
                if self._kept > limits.TRACE_VALUE:
                    raise LimitExceeded(f"the metadata is longer than {limits.TRACE_VALUE:,} characters")
            if self._peek() == ",":
                self._at += 1
        if not seen:
            raise self._wrong(f"the file has no {EVENTS}: it is not a trace of torch.profiler", "name another folder")

    def _array(self) -> Iterator[dict[str, Any]]:
        self._expect("[")
        while self._peek() != "]":
            yield from self._objects(self._many())
            yield from self._objects([self._value()])
            if self._peek() == ",":
                self._at += 1
        self._at += 1

    def _objects(self, values: list[Any]) -> Iterator[dict[str, Any]]:
        for value in values:
            if isinstance(value, dict):
                yield value
            else:
                self.non_objects += 1

    def _many(self) -> list[Any]:
        """Decode all events before the last border at once, which is twice as fast as one by one.

        Empty if the match is not a border between events, but within an event or a string.
        """
        if self._one_by_one:
            return []
        borders = list(BORDER.finditer(self._text, max(self._at, len(self._text) - TAIL)))
        try:
            if not borders:
                raise ValueError
            text = "[" + self._text[self._at : borders[-1].start() + 1] + "]"
            values: list[Any]
            values, end = self._decode(text)
            if end < len(text):  # the events end before this border, which is in the metadata that follows
                raise ValueError
        except (ValueError, RecursionError):
            self._one_by_one = True  # until more is read; decoding one by one reports the error
            return []
        self._at = borders[-1].end() - 1
        return values

    def _peek(self) -> str:
        """The next character that is not whitespace. The position is before it."""
        while True:
            match = SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                raise self._wrong(CUT_OFF)

    def _follows(self) -> bool:
        """Whether anything except whitespace and zeros follows the last bracket, which is the next character."""
        self._at += 1
        while not self._text[self._at :].strip(" \t\r\n\0"):
            self._at = len(self._text)
            if not self._fill():
                return False
        return True

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._wrong(f"`{character}` is expected, not `{self._near(self._at)}`")
        self._at += 1

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - LONGEST_WORD
                if unfinished and len(self._text) - self._at > limits.TRACE_VALUE:
                    raise LimitExceeded(f"one value is longer than {limits.TRACE_VALUE:,} characters") from None
                if unfinished and self._fill():
                    continue
                what = f"{error.msg} at `{self._near(error.pos)}`"
                raise self._wrong(CUT_OFF if unfinished else what) from None
            except RecursionError:
                raise self._wrong("a value is nested too deeply for a trace of torch.profiler") from None
            except ValueError:  # a number with more digits than Python converts
                raise self._wrong(f"a number of too many digits is in `{self._near(self._at)}`") from None
            if end == len(self._text) and self._fill():  # a number may continue
                continue
            self._length, self._at = end - self._at, end
            return value

    def _near(self, at: int) -> str:
        return shortened(self._text[at : at + 40])

    def _fill(self) -> bool:
        """Read more text and drop what was consumed. Returns whether there was more."""
        more = "" if self._ended else self._file.read(max(self._chunk, len(self._text) - self._at))
        self._ended, self._one_by_one = not more, False
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _wrong(self, what: str, fix: str = AGAIN) -> UserError:
        return trace_error(self._path, what, fix)


def trace_error(path: Path, what: str, fix: str | None) -> UserError:
    """The error of a file that cannot be analysed."""
    return UserError(Problem(shortened(path, 400), what, fix=fix))


class LimitExceeded(Exception):
    """A limit is exceeded; the message names it."""


class _Text:
    """The characters of a file, compressed or not."""

    def __init__(self, file: BinaryIO) -> None:
        packed = file.read(2) == GZIP
        file.seek(0)
        self._size = os.fstat(file.fileno()).st_size
        self._most = min(limits.TRACE_BYTES, max(limits.TRACE_RATIO * self._size, limits.TRACE_SMALL))
        self._source = gzip.GzipFile(fileobj=file) if packed else file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._done = 0

    def read(self, size: int) -> str:
        """At most `size` characters; "" only at the end. Raises EOFError if a compressed file is truncated."""
        while True:
            raw = self._source.read(size)
            self._done += len(raw)
            if self._done > self._most:
                what = f"the trace is longer than {limits.TRACE_BYTES:,} bytes"
                packed = f"decompressed, it has over {limits.TRACE_RATIO} times its {self._size:,} bytes: not a trace"
                raise LimitExceeded(what if self._most == limits.TRACE_BYTES else packed)
            text = self._decode(raw, final=not raw)
            if text or not raw:
                return text
