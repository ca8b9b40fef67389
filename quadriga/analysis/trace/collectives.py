"""Matches the calls of all ranks: start skew, transfer time and bandwidth of each collective. Compares them with the
calls and bytes that were predicted for the start of the run that made the trace.

A run folder has `estimate.json` of its newest start, and `estimates/attempt-N.json` of each start. The notes of a trace
name the start (`attempt`). A trace without it is compared with the newest estimate.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quadriga.analysis.trace import fields
from quadriga.analysis.trace.calls import NAME, Call
from quadriga.analysis.trace.document import trace_error
from quadriga.analysis.trace.rank import CallKey, RankResult, key_of, without_host_calls
from quadriga.errors import shortened
from quadriga.reading import read_json_object

# --- predictions -----------------------------------------------------------------------------------------------------

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
        return _calls(own, read_json_object(own, what="run's estimate")), ""
    found = read_json_object(run / ESTIMATE, what="run's estimate")
    other = found.get("attempt")
    if attempt is not None and other not in (None, attempt):
        why = f"the traces are of start {attempt} of the run, but its only estimate is that of start {other}"
        return None, why
    return _calls(run / ESTIMATE, found), ""


def _calls(path: Path, estimate: Mapping[str, Any]) -> list[PredictedCalls]:
    calls = estimate.get("communication")
    calls = [] if calls is None else calls
    try:
        if not isinstance(calls, list) or len(calls) > MOST_CALLS:
            raise fields.FieldError("communication is not a list of calls")
        return [_call(call) for call in calls]
    except fields.FieldError as error:
        what = f"the file is not an estimate of a run: {error}"
        raise trace_error(path, what, "move it out of the folder") from None


def _call(call: Any) -> PredictedCalls:
    if not isinstance(call, dict):
        raise fields.FieldError("a call in communication is not an object")
    axis, collective = (fields.text(name, call.get(name)) for name in ("axis", "collective"))
    return PredictedCalls(axis, collective, _amount("calls", call.get("calls")), _amount("bytes", call.get("bytes")))


def _amount(name: str, value: Any) -> float:
    if (type(value) is not int and type(value) is not float) or not 0 <= value < 2**63:
        raise fields.FieldError(f"{name} is {shortened(repr(value))}, not a number of 0 or more")
    return value


# --- calls of all ranks ----------------------------------------------------------------------------------------------


GIGA = 1e9
POINT_TO_POINT = ("send", "recv", "send_recv")  # not all ranks start and end these together
BUS_FACTORS = {"all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0, "all_reduce": 2.0}  # times (n - 1) / n


@dataclass(frozen=True)
class Transfer:
    """One call on all its ranks. `size`: bytes. `skew`: seconds from the first start to the last. `seconds`: from the
    last start to the first end."""

    key: CallKey
    size: int | None
    skew: float
    seconds: float


def why_not_comparable(ranks: list[RankResult]) -> str | None:
    """The reason why times of different ranks cannot be compared; None if they can."""
    machines = {rank.metadata.machine for rank in ranks}
    if len(ranks) < 2:
        return "there is the trace of one rank only"
    if any(rank.origin_ns is None for rank in ranks):
        return "the traces do not have their start time (baseTimeNanoseconds)"
    if None in machines:
        return "the traces do not show whether their ranks shared one machine, and so one clock (host_name)"
    if len(machines) > 1:
        return f"the ranks ran on {len(machines)} machines, whose clocks differ by more than a transfer takes"
    return None


def match_transfers(ranks: list[RankResult]) -> tuple[list[Transfer], int]:
    """Calls that are in the traces of all ranks of their group, and the number of contradictions: calls that ended on
    one rank before they began on another. The clocks must be comparable."""
    first_origin_ns = min(rank.origin_ns or 0 for rank in ranks)
    matched: dict[Any, list[tuple[float, float, Call]]] = defaultdict(list)
    for rank in ranks:
        shift = ((rank.origin_ns or 0) - first_origin_ns) * 1e-9
        for identity, call in _identified(rank):
            matched[identity].append((call.start + shift, call.end + shift, call))
    found, contradictions = [], 0
    for calls in matched.values():
        first = calls[0][2]
        if len(calls) != (first.info.group_size or 0) or len({key_of(call) for _, _, call in calls}) > 1:
            continue
        starts, ends = [start for start, _, _ in calls], [end for _, end, _ in calls]
        if min(ends) <= max(starts):
            contradictions += 1
            continue
        found.append(Transfer(key_of(first), first.info.size, max(starts) - min(starts), min(ends) - max(starts)))
    return found, contradictions


def _identified(rank: RankResult) -> Iterable[tuple[Any, Call]]:
    """Each call with a key that is equal on all ranks of its group: its number if the trace has it, else its position
    among the calls of the step."""
    counts = Counter[Any]()
    for call in rank.calls:
        info = call.info
        if info.kind in POINT_TO_POINT or not len(call.rows) or call.found_by == NAME or call.axis == "?":
            continue
        group = (info.group, info.ranks) if info.group else (call.axis, info.group_size)
        within = rank.steps[call.step].number if info.sequence is None else f"call {info.sequence}"
        place = (group, info.kind, within)  # coalesced calls share their number
        counts[place] += 1
        yield (*place, counts[place]), call


def collective_rows(ranks: list[RankResult], matched: list[Transfer] | None) -> list[dict[str, Any]]:
    """The rows of the table of collectives, the longest first. `matched` None: times of ranks cannot be compared."""
    keys = {key for rank in ranks for key in rank.seconds}
    by_key: dict[CallKey, list[Transfer]] = defaultdict(list)
    for transfer in matched or ():
        by_key[transfer.key].append(transfer)
    by_rank: dict[CallKey, list[Call]] = defaultdict(list)
    for call in (call for rank in ranks for call in rank.calls):
        by_rank[key_of(call)].append(call)
    found = [_row(key, ranks, by_rank[key], by_key.get(key, [])) for key in keys]
    return sorted(found, key=lambda row: (-(row["seconds_a_step"] or 0.0), row["axis"], row["collective"]))


def _row(key: CallKey, ranks: list[RankResult], calls: list[Call], matched: list[Transfer]) -> dict[str, Any]:
    axis, kind, backend, found_by, size = key
    ranks_with_calls = [rank for rank in ranks if key in rank.seconds]
    steps = sum(len(rank.steps) for rank in ranks_with_calls)
    sizes = [call.info.size for call in calls if call.info.size is not None]
    sizes_known = len(sizes) == len(calls)
    has_rows = any(len(call.rows) for call in calls)
    of_ranks = zip(*(rank.seconds[key] for rank in ranks_with_calls), strict=True)
    seconds, exposed = (float(np.mean(each)) if has_rows else None for each in of_ranks)
    timed = [transfer for transfer in matched if transfer.size]
    return {
        "axis": axis,
        "collective": kind,
        "backend": backend,
        "found_by": found_by,
        "ranks": size,
        "calls_a_step": _whole(len(calls) / steps),
        "bytes_a_step": _whole(sum(sizes) / steps) if sizes_known else None,
        "bytes_a_call": [min(sizes), _whole(statistics.median(sizes)), max(sizes)] if sizes_known else None,
        "seconds_a_step": seconds,
        "exposed_s_a_step": exposed,
        "start_skew_s": _median([each.skew for each in matched]),
        "transfer_s": _median([each.seconds for each in matched]),
        "matched_calls": len(matched),
        **bandwidths(kind, size, sum(each.size or 0 for each in timed), sum(each.seconds for each in timed)),
        "overlap_share": 1 - exposed / seconds if seconds and exposed is not None else None,
        "sizes": _by_size(kind, size, calls, timed, steps) if sizes_known else [],
    }


def bandwidths(kind: str, ranks: int | None, size: int, seconds: float) -> dict[str, float | None]:
    """Algorithm and bus bandwidth in GB/s (1e9 bytes/s); the bus bandwidth is the load of a link of a ring.

    `size`: bytes of the largest tensor, such as the whole output of an all-gather. None without size or time.
    """
    if not seconds or not size:
        return {"algorithm_gb_s": None, "bus_gb_s": None}
    speed, share = size / seconds / GIGA, BUS_FACTORS.get(kind)
    if share is None:
        return {"algorithm_gb_s": speed, "bus_gb_s": speed}
    return {"algorithm_gb_s": speed, "bus_gb_s": speed * share * (ranks - 1) / ranks if ranks else None}


def _by_size(
    kind: str, ranks: int | None, calls: list[Call], matched: list[Transfer], steps: int
) -> list[dict[str, Any]]:
    found = []
    for size, count in sorted(Counter(call.info.size or 0 for call in calls).items()):
        middle = _median([each.seconds for each in matched if each.size == size])
        speed = bandwidths(kind, ranks, size, middle or 0.0)["bus_gb_s"]
        found.append({"bytes": size, "calls": _whole(count / steps), "transfer_s": middle, "bus_gb_s": speed})
    return found


def compare_with_estimate(ranks: list[RankResult], estimate: Sequence[PredictedCalls]) -> list[dict[str, Any]]:
    """Measured and predicted calls and bytes per step, by axis and collective, for the rank that sends most, as in the
    estimate. Calls that serve the host are not included. Axes that share a group, such as
    `world` and an axis of all ranks, are one row."""
    aliases = ranks[0].metadata.notes.axis_aliases
    predicted: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for call in estimate:
        entry = predicted[aliases.get(call.axis, call.axis), call.collective]
        entry[0] += call.calls
        entry[1] += call.calls * call.bytes
    measured = max((_sums(rank) for rank in ranks), key=lambda sums: sum(size or 0 for _, size in sums.values()))
    found = []
    for axis, kind in sorted({*predicted, *measured}):
        calls, size = measured.get((axis, kind), (0, 0))
        expected = predicted.get((axis, kind), [0, 0])
        named = {"axis": axis, "collective": kind, "calls": _whole(calls), "predicted_calls": _whole(expected[0])}
        sizes = {"bytes": None if size is None else _whole(size), "predicted_bytes": _whole(expected[1])}
        found.append({**named, **sizes, "equal": [calls, size] == expected})
    return found


def _sums(rank: RankResult) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Mean calls and bytes per step by (axis, kind). Bytes are None if those of a call are not known."""
    sums: dict[tuple[str, str], tuple[float, float | None]] = {}
    for call in without_host_calls(rank.calls):
        calls, size = sums.get((call.axis, call.info.kind), (0.0, 0.0))
        own = call.info.size
        sums[call.axis, call.info.kind] = (calls + 1, None if size is None or own is None else size + own)
    count = len(rank.steps)
    return {key: (calls / count, None if size is None else size / count) for key, (calls, size) in sums.items()}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _whole(value: float) -> int | float:
    """An int if the value is whole, which it is if every step makes the same calls."""
    return int(value) if float(value).is_integer() else value
