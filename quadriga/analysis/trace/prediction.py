"""The predicted calls and bytes of a step, for the start of the run that made a trace.

A run folder has `estimate.json` of its newest start, and `estimates/attempt-N.json` of each start. The notes of a trace
name the start (`attempt`). A trace without it is compared with the newest estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.analysis.trace import fields
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import read_json_object

ESTIMATE, BY_ATTEMPT = "estimate.json", "estimates/attempt-{}.json"
MOST_CALLS = 100_000  # of one estimate


@dataclass(frozen=True)
class PredictedCalls:
    """`calls` per step, of `bytes` each."""

    axis: str
    collective: str
    calls: float
    bytes: float


def read_prediction(run: Path, attempt: int | None) -> tuple[list[PredictedCalls] | None, str]:
    """The calls predicted for start `attempt` of the run (None: unknown), and ""; or None and the reason.

    Raises UserError if a file is not an estimate.
    """
    own = run / BY_ATTEMPT.format(attempt)
    if attempt is not None and own.exists():
        return _read(own), ""
    newest = run / ESTIMATE
    found = read_json_object(newest, what="run's estimate")
    estimated_attempt = found.get("attempt")
    if attempt is not None and estimated_attempt is not None and estimated_attempt != attempt:
        return (
            None,
            f"the traces are of start {attempt} of the run, but its only estimate is that of start {estimated_attempt}",
        )
    return _calls(newest, found), ""


def _read(path: Path) -> list[PredictedCalls]:
    return _calls(path, read_json_object(path, what="run's estimate"))


def _calls(path: Path, estimate: Mapping[str, Any]) -> list[PredictedCalls]:
    calls = estimate.get("communication")
    calls = [] if calls is None else calls
    try:
        if not isinstance(calls, list) or len(calls) > MOST_CALLS:
            raise fields.FieldError("communication is not a list of calls")
        return [_call(call) for call in calls]
    except fields.FieldError as error:
        where = shortened(path, 400)
        raise UserError(
            Problem(where, f"the file is not an estimate of a run: {error}", fix="move it out of the folder")
        ) from None


def _call(call: Any) -> PredictedCalls:
    if not isinstance(call, dict):
        raise fields.FieldError("a call in communication is not an object")
    axis, collective = (fields.text(name, call.get(name)) for name in ("axis", "collective"))
    return PredictedCalls(axis, collective, _amount("calls", call.get("calls")), _amount("bytes", call.get("bytes")))


def _amount(name: str, value: Any) -> float:
    if (type(value) is not int and type(value) is not float) or not 0 <= value < 2**63:
        raise fields.FieldError(f"{name} is {shortened(repr(value))}, not a number of 0 or more")
    return value
