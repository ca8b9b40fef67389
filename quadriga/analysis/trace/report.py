"""The analysis as text for a terminal: first the verdict, then tables, last what could not be measured and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quadriga.analysis.pages.numbers import Column, format_table
from quadriga.units import format_bytes

Analysis = Mapping[str, Any]
PARTS = (
    ("compute_s", "computing"),
    ("exposed_communication_s", "waiting for communication"),
    ("exposed_memcpy_s", "copying without overlap"),
    ("data_wait_s", "waiting for data"),
    ("host_idle_s", "idle (the host launched nothing in time)"),
)
REST = ("rest_s", "in none of these (Python between operations)")
FOUND_BY_MARKS = {"linkage": "", "annotation": " (annotated)", "name": " (by name)"}
MAX_ROWS = 12  # rows of one table


def format_time(value: float, digits: int = 3) -> str:
    """`0.0123` -> `12.3 ms`."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= scale:
            return f"{value / scale:.{digits}g} {unit}" if abs(value) < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value * 1e6:.{digits}g} us"


def _count(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _speed(value: float) -> str:
    return f"{value:.3g}"


STEP_COLUMNS = (
    *(Column("rank", "rank"), Column("step", "seconds", format_time), Column("compute", "compute_s", format_time)),
    Column("communication", "communication_s", format_time),
    Column("exposed", "exposed_communication_s", format_time),
    *(Column("copies", "memcpy_s", format_time), Column("data wait", "data_wait_s", format_time)),
)
AXIS, COLLECTIVE = Column("axis", "axis"), Column("collective", "collective")
COLLECTIVE_COLUMNS = (
    *(AXIS, Column("collective", "name"), Column("over", "backend"), Column("ranks", "ranks", _count)),
    *(Column("calls", "calls_a_step", _count), Column("bytes", "bytes_a_step", format_bytes)),
    *(Column("time", "seconds_a_step", format_time), Column("exposed", "exposed_s_a_step", format_time)),
    Column("overlap", "overlap_share", lambda share: f"{share:.0%}"),
    *(Column("skew", "start_skew_s", format_time), Column("transfer", "transfer_s", format_time)),
    *(Column("alg GB/s", "algorithm_gb_s", _speed), Column("bus GB/s", "bus_gb_s", _speed)),
)
SIZE_COLUMNS = (
    *(AXIS, COLLECTIVE, Column("bytes", "bytes", format_bytes), Column("calls", "calls", _count)),
    *(Column("transfer", "transfer_s", format_time), Column("bus GB/s", "bus_gb_s", _speed)),
)
ESTIMATE_COLUMNS = (
    *(AXIS, COLLECTIVE, Column("calls", "calls", _count), Column("estimated", "predicted_calls", _count)),
    *(Column("bytes", "bytes", _count), Column("estimated", "predicted_bytes", _count)),
)
KERNEL_COLUMNS = (
    Column("per step", "seconds_a_step", format_time),
    Column("share", "share", lambda share: f"{share:.1%}"),
)


def format_trace(analysis: Analysis) -> Iterator[str]:
    """The lines of the report."""
    yield format_verdict(analysis)
    yield ""
    yield from _overview(analysis)
    yield ""
    yield from _where(analysis)
    yield ""
    yield from _collectives(analysis)
    yield from _by_size(analysis)
    yield from _estimate(analysis)
    yield from _kernels(analysis)
    yield from _unknown(analysis)


def format_verdict(analysis: Analysis) -> str:
    """Where the time of a step went, in one line."""
    step = format_time(analysis["step_time_s"]["mean"], 4)
    parts = [*PARTS, *([REST] if analysis["by_rank"][0]["mean"]["host_idle_s"] is None else [])]
    found = mean_shares(analysis, [key for key, _ in parts])
    shares = sorted(((name, found[key]) for key, name in parts if key in found), key=lambda part: -part[1])
    return f"a step takes {step} on average: " + ", ".join(
        f"{part:.1%} {name}" for name, part in shares if part >= 0.005
    )


def mean_shares(analysis: Analysis, parts: Iterable[str]) -> dict[str, float]:
    """The share of the step of each part that was measured on all ranks. Over all ranks."""
    means = [entry["mean"] for entry in analysis["by_rank"]]
    whole = sum(mean["seconds"] for mean in means)
    known = [key for key in parts if all(mean.get(key) is not None for mean in means)]
    return {key: sum(mean[key] for mean in means) / whole for key in known if whole}


def _overview(analysis: Analysis) -> Iterator[str]:
    ranks, steps, times = analysis["ranks"], analysis["steps"], analysis["step_time_s"]
    where = f"iteration {analysis['iteration']}, " if analysis["iteration"] is not None else ""
    yield (
        f"  {analysis['source']}: {where}{len(ranks)} rank{'s' * (len(ranks) != 1)} of {analysis['world_size']} on "
        f"{analysis['device_type']}, steps {steps[0]} to {steps[-1]} ({len(steps)} profiled)"
    )
    low, middle, high = (format_time(times[name]) for name in ("min", "median", "max"))
    yield f"  steps: from {low} to {high}, median {middle}; the profiler slows steps down"
    if (slowest := analysis["slowest"]) is not None:
        by = f"{format_time(slowest['by_s'])} per step ({slowest['by_share']:.1%}) above the median rank"
        yield f"  slowest rank: {slowest['rank']}, by {by}, without exposed communication"


def _where(analysis: Analysis) -> Iterator[str]:
    """One line per rank: mean seconds per step."""
    rest = "rest" if analysis["device_type"] == "cpu" else "host idle"
    rows = [{**entry["mean"], "rank": entry["rank"]} for entry in analysis["by_rank"]]
    if len(rows) > MAX_ROWS:
        order = sorted(range(len(rows)), key=lambda at: -(rows[at]["compute_s"] or 0))
        rows = [rows[at] for at in sorted(order[:MAX_ROWS])]
        yield f"  the {MAX_ROWS} ranks that compute longest:"
    yield from format_table([*STEP_COLUMNS, Column(rest, "rest_s", format_time)], rows)


def _collectives(analysis: Analysis) -> Iterator[str]:
    rows = [{**row, "name": row["collective"] + FOUND_BY_MARKS[row["found_by"]]} for row in analysis["collectives"]]
    if rows:
        yield "  per step and rank; medians: skew, from first to last start; transfer, from last start to first end"
        yield from format_table(COLLECTIVE_COLUMNS, rows)
        yield ""


def _by_size(analysis: Analysis) -> Iterator[str]:
    rows = [
        {**row, **size}
        for row in analysis["collectives"]
        if len(row["sizes"]) > 1
        for size in sorted(row["sizes"], key=lambda size: -size["bytes"])[:4]
    ]
    if rows:
        yield "  by size of a call"
        yield from format_table(SIZE_COLUMNS, rows[:MAX_ROWS])
        yield ""


def _estimate(analysis: Analysis) -> Iterator[str]:
    if analysis["estimate"] is None:
        return
    rows = analysis["estimate"]["rows"]
    wrong = [row for row in rows if not row["equal"]]
    if not wrong:
        yield f"  bytes and calls per step equal the estimate in all {len(rows)} rows of axis and collective"
    else:
        yield "  NOT as estimated (per step):"
        yield from format_table(ESTIMATE_COLUMNS, wrong)
    yield ""


def _kernels(analysis: Analysis) -> Iterator[str]:
    kernels = analysis["kernels"]
    calls = Column("calls", "calls_a_step", lambda number: f"{number:,.1f}")
    for title, key, more in (("family", "families", ()), ("block", "blocks", ()), ("kernel", "top", (calls,))):
        if rows := [{**entry, "name": shorten_name(entry["name"])} for entry in kernels[key][:MAX_ROWS]]:
            yield from format_table([Column(title, "name"), *KERNEL_COLUMNS, *more], rows)
            yield ""


def _unknown(analysis: Analysis) -> Iterator[str]:
    for name, why in analysis["not_measurable"].items():
        yield f"  not measurable: {name}: {why}"
    for warning in analysis["warnings"]:
        yield f"  warning: {warning}"


def shorten_name(name: str, width: int = 70) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."
