"""The analysis as text for a terminal: first the verdict, then tables, last what could not be measured and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    parts = sorted(_shares(analysis), key=lambda part: -part[1])
    shares = ", ".join(f"{share:.1%} {name}" for name, share in parts if share >= 0.005)
    return f"a step takes {step} on average: {shares}"


def format_time(value: float | None, digits: int = 3) -> str:
    """`0.0123` -> `12.3 ms`; None -> `-`."""
    if value is None:
        return "-"
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= scale:
            return f"{value / scale:.{digits}g} {unit}" if abs(value) < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value * 1e6:.{digits}g} us"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Aligned columns: the first `left` to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _shares(analysis: Analysis) -> list[tuple[str, float]]:
    """The parts of the step, means over ranks, which add up to it."""
    means = [entry["mean"] for entry in analysis["by_rank"]]
    whole = sum(mean["seconds"] for mean in means)
    parts = [*PARTS, *([REST] if means[0]["host_idle_s"] is None else [])]
    found = [(name, [mean[key] for mean in means]) for key, name in parts]
    return [(name, sum(values) / whole) for name, values in found if None not in values]


def _overview(analysis: Analysis) -> Iterator[str]:
    ranks, steps, times = analysis["ranks"], analysis["steps"], analysis["step_time_s"]
    where = f"iteration {analysis['iteration']}, " if analysis["iteration"] is not None else ""
    yield (
        f"  {analysis['source']}: {where}{_count(len(ranks), 'rank')} of {analysis['world_size']} on "
        f"{analysis['device_type']}, steps {steps[0]} to {steps[-1]} ({len(steps)} profiled)"
    )
    low, middle, high = (format_time(times[name]) for name in ("min", "median", "max"))
    spread = f"from {low} to {high}, median {middle}"
    yield f"  steps: {spread}; the profiler slows steps down"
    if (slowest := analysis["slowest"]) is not None:
        by = f"{format_time(slowest['by_s'])} per step ({slowest['by_share']:.1%}) above the median rank"
        yield f"  slowest rank: {slowest['rank']}, by {by}, without exposed communication"


def _where(analysis: Analysis) -> Iterator[str]:
    """One line per rank: mean seconds per step."""
    rest = "rest" if analysis["device_type"] == "cpu" else "host idle"
    header = ("rank", "step", "compute", "communication", "exposed", "copies", "data wait", rest)
    keys = ("seconds", "compute_s", "communication_s", "exposed_communication_s", "memcpy_s", "data_wait_s", "rest_s")
    rows = [(str(entry["rank"]), *(format_time(entry["mean"][key]) for key in keys)) for entry in analysis["by_rank"]]
    if len(rows) > MAX_ROWS:
        order = sorted(range(len(rows)), key=lambda at: -(analysis["by_rank"][at]["mean"]["compute_s"] or 0))
        rows = [rows[at] for at in sorted(order[:MAX_ROWS])]
        yield f"  the {MAX_ROWS} ranks that compute longest:"
    yield from format_table(header, rows)


def _collectives(analysis: Analysis) -> Iterator[str]:
    rows = analysis["collectives"]
    if not rows:
        return
    header = (
        *("axis", "collective", "over", "ranks", "calls", "bytes", "time", "exposed", "overlap"),
        *("skew", "transfer", "alg GB/s", "bus GB/s"),
    )
    shown = [
        (
            row["axis"],
            row["collective"] + FOUND_BY_MARKS[row["found_by"]],
            row["backend"],
            _number(row["ranks"]),
            _number(row["calls_a_step"]),
            "-" if row["bytes_a_step"] is None else format_bytes(row["bytes_a_step"]),
            format_time(row["seconds_a_step"]),
            format_time(row["exposed_s_a_step"]),
            "-" if row["overlap_share"] is None else f"{row['overlap_share']:.0%}",
            format_time(row["start_skew_s"]),
            format_time(row["transfer_s"]),
            _speed(row["algorithm_gb_s"]),
            _speed(row["bus_gb_s"]),
        )
        for row in rows
    ]
    yield "  per step and rank; medians: skew, from first to last start; transfer, from last start to first end"
    yield from format_table(header, shown, left=3)
    yield ""


def _by_size(analysis: Analysis) -> Iterator[str]:
    rows = [
        (
            *(row["axis"], row["collective"], format_bytes(size["bytes"]), _number(size["calls"])),
            *(format_time(size["transfer_s"]), _speed(size["bus_gb_s"])),
        )
        for row in analysis["collectives"]
        if len(row["sizes"]) > 1
        for size in sorted(row["sizes"], key=lambda size: -size["bytes"])[:4]
    ]
    if rows:
        yield "  by size of a call"
        yield from format_table(
            ("axis", "collective", "bytes", "calls", "transfer", "bus GB/s"), rows[:MAX_ROWS], left=2
        )
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
        shown = [
            (
                *(row["axis"], row["collective"], _number(row["calls"]), _number(row["predicted_calls"])),
                *(_number(row["bytes"]), _number(row["predicted_bytes"])),
            )
            for row in wrong
        ]
        header = ("axis", "collective", "calls", "estimated", "bytes", "estimated")
        yield from format_table(header, shown, left=2)
    yield ""


def _kernels(analysis: Analysis) -> Iterator[str]:
    kernels = analysis["kernels"]
    top = [{**entry, "name": shorten_name(entry["name"])} for entry in kernels["top"]]
    for title, entries in (("family", kernels["families"]), ("block", kernels["blocks"]), ("kernel", top)):
        if entries:
            rows = [
                (entry["name"], format_time(entry["seconds_a_step"]), f"{entry['share']:.1%}")
                + ((f"{entry['calls_a_step']:,.1f}",) if title == "kernel" else ())
                for entry in entries[:MAX_ROWS]
            ]
            yield from format_table((title, "per step", "share", *(("calls",) if title == "kernel" else ())), rows)
            yield ""


def _unknown(analysis: Analysis) -> Iterator[str]:
    for name, why in analysis["not_measurable"].items():
        yield f"  not measurable: {name}: {why}"
    for warning in analysis["warnings"]:
        yield f"  warning: {warning}"


def shorten_name(name: str, width: int = 70) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
