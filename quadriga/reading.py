"""Bounded reading of files that somebody else may have written: JSON, text, lines.

Whatever the bytes are, a reader here returns values or raises one `UserError` that names the file and the place in
it. Only regular files are opened: a FIFO would block, a device has no end. Limits stand in `quadriga.limits`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from quadriga import limits
from quadriga.errors import Problem, UserError, shortened

NAME_SHOWN = 400  # characters of a file's name in a message
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def read_bytes(path: str | os.PathLike[str], most: int = limits.JSON_BYTES, *, what: str = "file") -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        UserError: it is missing, cannot be read, is no regular file, or is longer.
    """
    try:
        # Not blocking: a FIFO that nobody writes to would hold the caller in `open`.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                _refuse(path, f"is {_kind(status.st_mode)}, not a regular file", fix=f"name a {what} that is a file")
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(Problem(shortened(path, NAME_SHOWN), f"the {what} cannot be read: {reason}")) from error
    if len(content) > most:
        _refuse(path, f"is longer than a {what} may be", allowed=f"at most {most:,} bytes")
    return content


def read_text(path: str | os.PathLike[str], most: int = limits.JSON_BYTES, *, what: str = "file") -> str:
    """The content of a regular UTF-8 file of at most `most` bytes; a byte-order mark is left out.

    Raises:
        UserError: as `read_bytes`, or it is not UTF-8.
    """
    return decode(read_bytes(path, most, what=what), shortened(path, NAME_SHOWN))


def decode(content: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a byte-order mark.

    Raises:
        UserError: the bytes are not UTF-8; the message tells the first byte that is wrong.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "it looks like UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "convert it to UTF-8"
        what = f"is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
        raise UserError(Problem(where, what, fix=hint)) from error


def read_json(path: str | os.PathLike[str], most: int = limits.JSON_BYTES, *, what: str = "file") -> Any:
    """The value of a JSON file.

    Raises:
        UserError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, most, what=what), shortened(path, NAME_SHOWN))


def read_json_object(
    path: str | os.PathLike[str], most: int = limits.JSON_BYTES, *, what: str = "file"
) -> dict[str, Any]:
    """The value of a JSON file whose outermost value is an object.

    Raises:
        UserError: as `read_json`, or the value is of another type.
    """
    value = read_json(path, most, what=what)
    if not isinstance(value, dict):
        _refuse(path, f"holds a JSON {json_type(value)} where a JSON object is expected")
    return value


def parse_json(text: str | bytes, where: str, *, nan: bool = False, depth: int = limits.JSON_DEPTH) -> Any:
    """The value of a JSON text. `where` names its origin in messages; `nan` admits NaN and the infinities.

    Raises:
        UserError: it is not JSON, nests deeper than `depth`, or has a number of more than `limits.JSON_DIGITS` digits.
    """
    if isinstance(text, bytes):
        text = decode(text, where)
    try:
        if text.count("[") + text.count("{") > depth and nesting(text) > depth:
            raise RecursionError
        return json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_constant if nan else _no_constant)
    except json.JSONDecodeError as error:
        raise UserError(Problem(where, f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})")) from error
    except RecursionError:
        # Not chained: the traceback of a recursion is thousands of lines long.
        raise UserError(Problem(where, f"the JSON nests deeper than {depth} levels")) from None
    except ValueError as error:
        raise UserError(Problem(where, f"not JSON that can be read: {error}")) from error


def nesting(text: str) -> int:
    """How deep the brackets of a JSON text nest, those within strings left out."""
    deepest = now = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        now += 1 if bracket in "[{" else -1
        deepest = max(deepest, now)
    return deepest


def read_lines(
    path: str | os.PathLike[str], *, most: int = limits.LOG_BYTES, longest: int = limits.LINE_BYTES, what: str = "file"
) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of a regular file, one at a time.

    Raises:
        UserError: as `read_bytes`, or a line is longer than `longest`.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                _refuse(path, f"is {_kind(status.st_mode)}, not a regular file", fix=f"name a {what} that is a file")
            if status.st_size > most:
                _refuse(path, f"is longer than a {what} may be", allowed=f"at most {most:,} bytes")
            number = 0
            while line := file.readline(longest + 1):
                number += 1
                if len(line) > longest and not line.endswith(b"\n"):
                    _refuse(f"{os.fspath(path)}, line {number}", "the line is too long", f"at most {longest:,} bytes")
                yield number, line.rstrip(b"\r\n")
    except OSError as error:
        raise UserError(Problem(shortened(path, NAME_SHOWN), f"the {what} cannot be read: {error.strerror}")) from error


def json_type(value: object) -> str:
    """JSON's name for the type of a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _refuse(path: str | os.PathLike[str], what: str, allowed: str | None = None, *, fix: str | None = None) -> NoReturn:
    raise UserError(Problem(shortened(Path(path), NAME_SHOWN), what, allowed=allowed, fix=fix))


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _int(digits: str) -> int:
    if len(digits) > limits.JSON_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; at most {limits.JSON_DIGITS} are read")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > limits.JSON_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters; at most {limits.JSON_DIGITS} are read")
    return float(digits)


def _constant(name: str) -> float:
    return float(name)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
