"""Shared by the readers of foreign checkpoints, without torch: their error, the names of dtypes, and the format of
values in messages."""

from __future__ import annotations

from typing import Any

FORMAT = "quadriga-plan-1"  # of `plan.json`
PLAN_FILE = "plan.json"
LINK = "is a link, not a file of this folder"
# The name of every dtype of torch in a plan; a test compares them with torch.
DTYPE_NAMES = {
    *("bcomplex32", "bfloat16", "bits16", "bits1x8", "bits2x4", "bits4x2", "bits8", "bool"),
    *("complex128", "complex32", "complex64", "float16", "float32", "float4_e2m1fn_x2", "float64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int1", "int16"),
    *("int2", "int3", "int32", "int4", "int5", "int6", "int64"),
    *("int7", "int8", "qint32", "qint8", "quint2x4", "quint4x2", "quint8"),
    *("uint1", "uint16", "uint2", "uint3", "uint32", "uint4", "uint5"),
    *("uint6", "uint64", "uint7", "uint8"),
}


class PlanError(Exception):
    """A plan is refused. The message says what is wrong, and where."""


def format_raw(value: Any) -> str:
    """An untrusted value for a message: on one line, and short."""
    if type(value) in (list, tuple):
        parts = ", ".join("[...]" if type(part) in (list, tuple) else format_raw(part) for part in value[:8])
        return f"[{parts}, ...]" if len(value) > 8 else f"[{parts}]"
    if type(value) is int and abs(value) >> 128:
        return "a huge number"  # printing takes quadratic time
    if type(value) in (str, int, float, bool, type(None)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"a value of type {type(value).__name__}"
