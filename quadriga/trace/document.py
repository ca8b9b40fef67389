"""A trace's JSON, element by element: files of any size pass through a few megabytes.

Read as others write it too: one line or many, `{"traceEvents": [...]}` or the bare array that Chrome's format allows,
plain or packed with gzip (told by its first bytes, whatever the name says).
"""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from quadriga.errors import Problem, UserError

CHUNK = 1 << 22  # characters read at once
RATIO = 12  # by about which a trace is packed
GZIP = b"\x1f\x8b"
SPACE = re.compile(r"[ \t\r\n]*")
BORDER, TAIL = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*\{"), 1 << 16  # between two events; where the last one is looked for
EVENTS = "traceEvents"
LONGEST_WORD = 10  # characters of a literal or an escape that the end of what was read may cut through
CUT_OFF = "the file is cut off: it ends in the middle"
AGAIN = "copy the file once more, or profile again; a run writes a trace whole or not at all"


class Document:
    """Iterate over it for the events; whatever else stands in the file is in `metadata` afterwards.

    Raises UserError where the file cannot be read, is no JSON, is cut off, or holds no events.
    """

    def __init__(self, path: Path, chunk: int = CHUNK) -> None:
        self.metadata: dict[str, Any] = {}
        self._path, self._chunk = path, chunk
        self._text, self._at, self._ended = "", 0, False
        self._decode = json.JSONDecoder(strict=False).raw_decode  # names may hold control characters

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                self._file = _Text(file)
                yield from self._document()
        except (OSError, EOFError, zlib.error) as error:
            raise self._wrong(f"the file cannot be read to its end: {error}") from None

    def _document(self) -> Iterator[dict[str, Any]]:
        if self._peek() == "[":
            yield from self._array()
            return
        if self._peek() != "{":
            raise self._wrong("this is no JSON object or array")
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
            if self._peek() == ",":
                self._at += 1
        if not seen:
            raise self._wrong(f"no {EVENTS} stand in it: this is no trace of torch.profiler", "name another folder")

    def _array(self) -> Iterator[dict[str, Any]]:
        self._expect("[")
        while self._peek() != "]":
            yield from self._many()
            event = self._value()
            if isinstance(event, dict):
                yield event
            if self._peek() == ",":
                self._at += 1
        self._at += 1

    def _many(self) -> list[dict[str, Any]]:
        """As many events as end before the last border in what has been read: decoded at once, which is twice as fast
        as one by one. None where the border turns out to be none, since it lies within an event or a text."""
        borders = list(BORDER.finditer(self._text, max(self._at, len(self._text) - TAIL)))
        if not borders:
            return []
        end = borders[-1].start() + 1
        try:
            values = self._decode("[" + self._text[self._at : end] + "]")[0]
        except json.JSONDecodeError:
            return []  # read one by one, it is said what is wrong with it
        self._at = borders[-1].end() - 1
        return [value for value in values if isinstance(value, dict)]

    def _peek(self) -> str:
        """The next character that is no space; the reading stands before it."""
        while True:
            match = SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                raise self._wrong(CUT_OFF)

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._wrong(f"`{character}` is due, and `{self._text[self._at : self._at + 30]}` stands there")
        self._at += 1

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - LONGEST_WORD
                if unfinished and self._fill():
                    continue
                near = self._text[error.pos : error.pos + 40]
                raise self._wrong(CUT_OFF if unfinished else f"{error.msg} at `{near}`") from None
            if end == len(self._text) and self._fill():  # a number may go on
                continue
            self._at = end
            return value

    def _fill(self) -> bool:
        """Read on; whether there was more. What has been read is dropped."""
        more = "" if self._ended else self._file.read(max(self._chunk, len(self._text) - self._at))
        self._ended = not more
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _wrong(self, what: str, fix: str = AGAIN) -> UserError:
        return UserError(Problem(str(self._path), what, fix=fix))


class _Text:
    """The characters of a file, packed or not."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._packed = file.read(2) == GZIP
        file.seek(0)
        self._unpack = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read(self, size: int) -> str:
        """About so many characters; "" at the end, and only there. Raises EOFError where a packed file is cut off."""
        while True:
            raw = self._file.read(max(size // RATIO, 1) if self._packed else size)
            text = self._decode(self._unpacked(raw) if self._packed else raw, final=not raw)
            if text or not raw:
                return text

    def _unpacked(self, raw: bytes) -> bytes:
        if not raw and not self._unpack.eof:
            raise EOFError("the packed data ends too soon")
        content = self._unpack.decompress(raw)
        while self._unpack.unused_data:  # another file, packed on its own, behind the first
            rest = self._unpack.unused_data.lstrip(b"\0")
            self._unpack = zlib.decompressobj(zlib.MAX_WBITS | 16)
            content += self._unpack.decompress(rest)
        return content
