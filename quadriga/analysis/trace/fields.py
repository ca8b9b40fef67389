"""Validates values of a trace's events: numbers, ids, texts, shapes of tensors.

Invalid values raise `FieldError`. Old versions write numbers as text, and 64-bit ids without a sign. Both are accepted.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from typing import Any

from quadriga import limits
from quadriga.errors import shortened

Args = Mapping[str, Any]
LONGEST_TIME = 1e17  # microseconds, 3,000 years: since 1970, or since the start of the machine
LONGEST_DURATION = 1e13  # microseconds, 115 days
TEXTS = ("Collective name", "dtype", "Process Group Name", "Process Group Description")
COUNTS = ("In msg nelems", "Out msg nelems", "Group size")


class FieldError(ValueError):
    """A value does not have the type or range of its field."""


def _field_error(what: str, value: Any, allowed: str) -> FieldError:
    return FieldError(f"{what} is {shortened(repr(value))}, not {allowed}")


def microseconds(what: str, value: Any, most: float = LONGEST_TIME) -> float:
    """A finite number of microseconds, also as text."""
    found = value if type(value) in (float, int) else None
    if isinstance(value, str) and len(value) < limits.JSON_DIGITS and value.isascii() and "_" not in value:
        with contextlib.suppress(ValueError):
            found = float(value)
    if found is None:
        raise _field_error(what, value, "a number of microseconds")
    if not -most <= found <= most:  # False for NaN too
        raise _field_error(what, value, f"a time within {most:g} us")
    return float(found)


def whole_number(what: str, value: Any, least: int = 0, most: int = 2**63 - 1) -> int:
    """An integer, also as text or as a float without a fraction."""
    digits = isinstance(value, str) and value.isascii() and len(value) < 40 and value.removeprefix("-").isdecimal()
    is_whole = type(value) is float and math.isfinite(value) and value.is_integer()
    found = int(value) if type(value) is int or is_whole or digits else None
    if found is None or not least <= found <= most:
        raise _field_error(what, value, f"an integer from {least:,} to {most:,}")
    return found


def signed_id(what: str, value: Any) -> int:
    """A 64-bit id as the signed integer with the same bits; 0 if there is none."""
    if value is None or value == 0:
        return 0
    found = whole_number(what, value, -(2**63), 2**64 - 1)
    return found - 2**64 if found >= 2**63 else found


def text(what: str, value: Any) -> str:
    if type(value) is int:
        return str(whole_number(what, value))
    if not isinstance(value, str):
        raise _field_error(what, value, "text")
    return value[: limits.TRACE_NAME]


def call_args(args: Args) -> Args:
    """The validated arguments of a collective or a look-up that the analysis reads."""
    found: dict[str, Any] = {name: text(name, args[name]) for name in TEXTS if args.get(name) is not None}
    found |= {name: whole_number(name, args[name]) for name in COUNTS if args.get(name) is not None}
    if (ranks := args.get("Process Group Ranks")) is not None:
        found["Process Group Ranks"] = _ranks_in_text(ranks) if isinstance(ranks, str) else ranks_of(ranks)
    found["Seq"] = _sequence(args.get("Seq"))
    dims, types = args.get("Input Dims", args.get("Input dims")), args.get("Input type")  # lower case before torch 1.9
    if dims is not None:
        found["Input Dims"] = _list("Input Dims", dims)
        for each in dims:
            numel(each)
    if types is not None:
        found["Input type"] = [kind if isinstance(kind, str) else "" for kind in _list("Input type", types)]
    return found


def _sequence(value: Any) -> int | None:
    """The number of a call in its group; None if the trace has none."""
    try:
        return whole_number("Seq", value) if type(value) in (int, str) else None
    except FieldError:
        return None


def _ranks_in_text(value: str) -> tuple[int, ...]:
    """The ranks of `[0, 1]`; () if Kineto has truncated the list."""
    shown = value[: limits.TRACE_NAME]
    return () if "..." in shown else tuple(int(number) for number in re.findall(r"\d{1,9}", shown))


def ranks_of(value: Any) -> tuple[int, ...]:
    return tuple(whole_number("a rank", each, 0, limits.RANKS - 1) for each in _list("ranks", value))


def numel(value: Any) -> int:
    """Elements of a tensor of this shape, or of all tensors of a list; 0 if it is not a tensor ("")."""
    if value == "" or value is None:
        return 0
    dims = _list("Input Dims", value)
    if dims and isinstance(dims[0], list):
        return sum(map(numel, dims))
    count = 1
    for length in dims:
        count *= whole_number("a length in Input Dims", length)
        if count >= 2**63:
            raise _field_error("Input Dims", value, "the shape of a tensor")
    return count


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > limits.RANKS:
        raise _field_error(what, value, "a list")
    return value
