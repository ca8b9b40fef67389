"""Bounded reading of untrusted files: JSON, TOML, text, lines.

For any bytes, a reader returns values or raises one `UserError` that names the file and the place in it. Only regular
files are opened, because a FIFO would block and a device has no end. The limits are in `quadriga.limits`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from quadriga import limits
from quadriga.errors import Problem, UserError, shortened

MAX_NAME_CHARS = 400  # characters of a file's name in a message
FROM_UTF_16 = "convert it, because it looks like UTF-16: iconv -f UTF-16 -t UTF-8 FILE > NEW"
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){100}""")
_DIGITS = re.compile(r"[0-9][0-9_]{399,}")
_BRACKET = re.compile(r"[\[\]{}]")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], *, what: str = "file") -> Iterator[BinaryIO]:
    """A regular file, open for reading bytes. Failures while the caller reads it are reported as failures to open it.

    Raises:
        UserError: it is missing, cannot be read, or is not a regular file.
    """
    try:
        # Not blocking: `open` would wait for the writer of a FIFO.
        with os.fdopen(_open(path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                _refuse(path, f"is {file_kind(mode)}, not a regular file", fix=f"name a {what} that is a file")
            yield file
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            reason = f"it is {file_kind(stat.S_IFLNK)}"
        raise UserError(Problem(shortened(path, MAX_NAME_CHARS), f"the {what} cannot be read: {reason}")) from error


def _open(path: str | os.PathLike[str]) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null character in the name
        raise OSError(0, str(error)) from error


def read_bytes(path: str | os.PathLike[str], most: int = limits.JSON_BYTES, *, what: str = "file") -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        UserError: it is missing, cannot be read, is not a regular file, or is longer.
    """
    with opened(path, what=what) as file:
        content = file.read(most + 1)
    if len(content) > most:
        _refuse(path, f"is longer than a {what} may be", allowed=f"at most {most:,} bytes")
    return content


def read_text(path: str | os.PathLike[str], most: int = limits.JSON_BYTES, *, what: str = "file") -> str:
    """The content of a regular UTF-8 file of at most `most` bytes, without a byte-order mark.

    Raises:
        UserError: as `read_bytes`, or it is not UTF-8.
    """
    return decode(read_bytes(path, most, what=what), shortened(path, MAX_NAME_CHARS))


def decode(content: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a byte-order mark.

    Raises:
        UserError: the bytes are not UTF-8; the message names the first wrong byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = FROM_UTF_16 if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "convert it to UTF-8"
        what = f"is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
        raise UserError(Problem(where, what, fix=hint)) from error


def read_json(path: str | os.PathLike[str], most: int = limits.JSON_BYTES, *, what: str = "file") -> Any:
    """The value of a JSON file.

    Raises:
        UserError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, most, what=what), shortened(path, MAX_NAME_CHARS))


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


def read_toml(path: str | os.PathLike[str], most: int = limits.TOML_BYTES, *, what: str = "file") -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: as `read_text`, it is not TOML, or its tables nest deeper than `limits.JSON_DEPTH`.
    """
    return parse_toml(read_text(path, most, what=what), shortened(path, MAX_NAME_CHARS))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text. `where` names its origin in messages, which add the line.

    Raises:
        UserError: as `read_toml`.
    """
    try:
        if _LONG_KEY.search(text):  # for which tomllib takes quadratic time
            raise RecursionError
        found = tomllib.loads(text)
    except RecursionError:
        raise UserError(Problem(where, f"the TOML nests deeper than {limits.JSON_DEPTH} levels")) from None
    except ValueError as error:  # TOMLDecodeError, or a number of too many digits
        at, digits = re.search(r"at line (\d+)", str(error)), _DIGITS.search(text)
        reason, line = (
            shortened(error, 200),
            text.count("\n") + 1,
        )  # tomllib gives no line if the text ends too early
        if at is not None:
            line = int(at.group(1))
        elif not isinstance(error, tomllib.TOMLDecodeError) and digits is not None:
            reason, line = "a number of too many digits", text.count("\n", 0, digits.start()) + 1
        fix = "see https://toml.io for the format"
        raise UserError(Problem(f"{where}, line {line}", f"this is not TOML: {reason}", fix=fix)) from error
    if _depth(found) > limits.JSON_DEPTH:
        raise UserError(Problem(where, f"the TOML nests deeper than {limits.JSON_DEPTH} levels"))
    if (key := _oversized_integer(found)) is not None:
        raise UserError(Problem(where, f"`{shortened(key)}` holds a whole number of more than 64 bits"))
    return found


def _oversized_integer(table: dict[str, Any]) -> str | None:
    """The key of an integer that does not fit in TOML's 64 bits. tomllib reads such integers anyway."""
    parts: list[tuple[str, Any]] = [("", table)]
    while parts:
        key, part = parts.pop()
        if isinstance(part, dict):
            parts += [(f"{key}.{name}" if key else name, value) for name, value in part.items()]
        elif isinstance(part, list):
            parts += [(key, value) for value in part]
        elif isinstance(part, int) and not -limits.TOML_INTEGER <= part < limits.TOML_INTEGER:
            return key
    return None


def _depth(value: Any) -> int:
    """The number of nested levels of tables and lists, found without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for own in parts for part in own if isinstance(part, dict | list)]
    return depth


def parse_json(text: str | bytes, where: str, *, nan: bool = False, depth: int = limits.JSON_DEPTH) -> Any:
    """The value of a JSON text. `where` names its origin in messages. `nan` allows NaN and the infinities.

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
        # Not chained, because the traceback of a recursion is thousands of lines long.
        raise UserError(Problem(where, f"the JSON nests deeper than {depth} levels")) from None
    except ValueError as error:
        raise UserError(Problem(where, f"not JSON that can be read: {error}")) from error


def nesting(text: str) -> int:
    """How deep the brackets of a JSON text nest. Brackets within strings do not count."""
    deepest = now = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        now += 1 if bracket in "[{" else -1
        deepest = max(deepest, now)
    return deepest


def read_lines(
    path: str | os.PathLike[str],
    *,
    most: int = limits.LOG_BYTES,
    longest: int = limits.LINE_BYTES,
    what: str = "file",
    keep_ends: bool = False,
) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) for each line of a regular file. `keep_ends` keeps the ends of lines.

    Raises:
        UserError: as `read_bytes`, or a line is longer than `longest`.
    """
    with opened(path, what=what) as file:
        if os.fstat(file.fileno()).st_size > most:
            _refuse(path, f"is longer than a {what} may be", allowed=f"at most {most:,} bytes")
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest and not line.endswith(b"\n"):
                _refuse(f"{os.fspath(path)}, line {number}", "the line is too long", f"at most {longest:,} bytes")
            yield number, line if keep_ends else line.rstrip(b"\r\n")


def read_tail(path: str | os.PathLike[str], most: int, *, what: str = "file") -> bytes:
    """The last `most` bytes of a regular file.

    Raises:
        UserError: as `read_bytes`, except for the length.
    """
    with opened(path, what=what) as file:
        file.seek(max(os.fstat(file.fileno()).st_size - most, 0))
        return file.read(most)


def json_type(value: object) -> str:
    """JSON's name for the type of a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _refuse(path: str | os.PathLike[str], what: str, allowed: str | None = None, *, fix: str | None = None) -> NoReturn:
    raise UserError(Problem(shortened(Path(path), MAX_NAME_CHARS), what, allowed=allowed, fix=fix))


def file_kind(mode: int) -> str:
    """The kind of an entry by its `st_mode`, with an article."""
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFLNK: "a link that leads nowhere",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _int(digits: str) -> int:
    if len(digits) > limits.JSON_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; at most {limits.JSON_DIGITS} are allowed")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > limits.JSON_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters; at most {limits.JSON_DIGITS} are allowed")
    return float(digits)


def _constant(name: str) -> float:
    return float(name)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
