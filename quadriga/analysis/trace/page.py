"""The report of an analysed trace as one HTML page: first what took the time, then charts and tables.

`trace_page` reads the object that `quadriga trace --json` prints (`quadriga-trace-1`), and fills `page.jinja`. A figure
that is None was not measurable; the page shows the reason that the analysis gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.analysis.pages.charts import Bar, BarPart, Strip, legend, stacked_bars, timeline_chart
from quadriga.analysis.pages.markup import render_page
from quadriga.analysis.pages.numbers import (
    Column,
    format_decimal_bytes,
    format_duration,
    format_number,
    format_share,
    format_whole,
)
from quadriga.analysis.pages.plots import Series, log_log_plot, series_legend
from quadriga.analysis.pages.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from quadriga.analysis.trace.report import AXIS, COLLECTIVE, format_time, mean_shares
from quadriga.units import format_bytes

Rows = Sequence[Mapping[str, Any]]
# The parts of a step, in the order of a bar. With the rest they add up to the step. Overlapped time is not included.
PARTS = {
    "compute_s": ("compute", BLUE),
    "exposed_communication_s": ("exposed communication", VERMILION),
    "exposed_memcpy_s": ("exposed copies", GREEN),
    "data_wait_s": ("waiting for data", ORANGE),
    "host_idle_s": ("waiting for the host", PURPLE),
}
REST = "rest"
UNKNOWN = "an unknown backend"
# The streams of the timeline: colour, and the figures of a step that measure how long each was busy.
STREAMS = {
    "compute": (BLUE, ("compute_s",)),
    "communication": (VERMILION, ("communication_s",)),
    "memcpy": (GREEN, ("memcpy_s",)),
    "host": (GREY, ("rest_s", "data_wait_s")),
}
FOUND_BY = {"name": "name only"}
# The prefix of the analysis' reason for a missing figure of a collective: `transfer of tp all_gather`.
REASON_GROUPS = {
    **dict.fromkeys(("start_skew_s", "transfer_s", "bus_gb_s"), "transfer"),
    **dict.fromkeys(("seconds_a_step", "exposed_s_a_step", "overlap_share", "algorithm_gb_s"), "seconds"),
    "bytes_a_step": "bytes",
}

# The columns of the tables.
RANK, STEP = Column("rank", "rank"), Column("step", "step", str)
STEP_COLUMNS = (
    Column("step", "seconds", format_duration),
    Column("compute", "compute_s", format_duration),
    Column("communication", "communication_s", format_duration),
    Column("exposed communication", "exposed_communication_s", format_duration),
    Column("copies", "memcpy_s", format_duration),
    Column("exposed copies", "exposed_memcpy_s", format_duration),
    Column("waiting for the host", "host_idle_s", format_duration),
    Column("waiting for data", "data_wait_s", format_duration),
)
STREAM_COLUMNS = (
    *(RANK, Column("stream", "stream"), Column("busy", "busy", format_duration)),
    Column("spans drawn", "spans", format_whole),
)

WHICH = (AXIS, COLLECTIVE, Column("backend", "backend"), Column("found by", "found_by"))
SENT = (
    Column("calls per step", "calls_a_step", format_whole),
    Column("bytes per step", "bytes_a_step", format_bytes),
    Column("time per step", "seconds_a_step", format_duration),
    Column("exposed", "exposed_s_a_step", format_duration),
    Column("hidden", "overlap_share", format_share),
)
SPEED = (
    Column("start skew per call", "start_skew_s", format_duration),
    Column("transfer per call", "transfer_s", format_duration),
    Column("algorithm GB/s", "algorithm_gb_s", format_number),
    Column("bus GB/s", "bus_gb_s", format_number),
)
SIZE_COLUMNS = (
    *(Column("collective", "name"), Column("bytes per call", "bytes", format_bytes)),
    *(Column("calls", "calls", format_whole), Column("transfer per call", "transfer_s", format_duration)),
    Column("bus GB/s", "bus_gb_s", format_number),
)
KERNEL_COLUMNS = (
    *(Column("name", "name"), Column("calls per step", "calls_a_step", format_whole)),
    *(Column("time per step", "seconds_a_step", format_duration), Column("share", "share", format_share)),
)
ESTIMATE_COLUMNS = (
    *(AXIS, COLLECTIVE, Column("calls", "calls", format_whole), Column("predicted", "predicted_calls", format_whole)),
    *(Column("bytes", "bytes", format_whole), Column("predicted", "predicted_bytes", format_whole)),
    Column("verdict", "verdict"),
)


def trace_page(analysis: Mapping[str, Any]) -> str:
    """The HTML of the page. `analysis`: a dict of the format `quadriga-trace-1`."""
    ranks, rows, estimate = analysis["by_rank"], analysis["collectives"], analysis["estimate"]
    means = [{**rank["mean"], "rank": rank["rank"]} for rank in ranks]
    steps = [{**step, "rank": rank["rank"]} for rank in ranks for step in rank["steps"]]
    known = [column for column in STEP_COLUMNS if any(row.get(column.key) is not None for row in (*means, *steps))]
    named = [(f"{row['axis']}: {row['collective']} ({row['backend'] or UNKNOWN})", row["sizes"]) for row in rows]
    sizes = [{"name": name, **size} for name, sizes in named for size in sizes]
    verdicts = {True: "equal", False: "different"}
    shown = f"{len(analysis['ranks'])} of {analysis['world_size']} ranks, {_steps(analysis['steps'])}"
    return render_page(
        "trace/page.jinja",
        title="Where a step's time went",
        source=f"{analysis['source']}: {shown}, {analysis['device_type']}",
        sentences=trace_sentences(analysis),
        warnings=analysis["warnings"],
        analysis=analysis,
        why=analysis["not_measurable"],
        means=means,
        steps=steps,
        bars=_bars(ranks),
        mean_columns=[RANK, *known],
        step_columns=[RANK, STEP, *known],
        mean_reasons=_reasons_for(analysis, means),
        strips=_strips(analysis),
        stream_rows=[_stream_row(analysis, each) for each in analysis["timeline"]["strips"]],
        stream_columns=STREAM_COLUMNS,
        collectives=[{**row, "found_by": FOUND_BY.get(row["found_by"], row["found_by"])} for row in rows],
        sent_columns=WHICH + SENT,
        speed_columns=WHICH + SPEED,
        collective_reasons=_reasons_by_row(analysis["not_measurable"], rows),
        sizes=sizes,
        size_columns=SIZE_COLUMNS,
        bandwidths=_bandwidths(sizes),
        kernels=_kernels(analysis),
        estimate=[{**row, "verdict": verdicts[row["equal"]]} for row in (estimate or {}).get("rows", ())],
        estimate_columns=ESTIMATE_COLUMNS,
    )


def trace_sentences(analysis: Mapping[str, Any]) -> list[str]:
    """The answer: the time of a step and its parts, the slowest rank, the collective with most exposed time."""
    sentences = [_what_took_the_time(analysis)]
    slowest = analysis["slowest"]
    if slowest:
        by = f"{format_duration(slowest['by_s'])} ({format_share(slowest['by_share'])})"
        sentences.append(
            f"The slowest rank is {slowest['rank']}: its own time is {by} per step longer than that of the median rank."
        )
    costly = [row for row in analysis["collectives"] if row["exposed_s_a_step"]]
    if costly:
        row = max(costly, key=lambda each: each["exposed_s_a_step"])
        what = f"{row['collective']} on axis {row['axis']} over {row['backend'] or UNKNOWN}"
        sentences.append(
            f"Most of the exposed communication: {what}, {format_duration(row['exposed_s_a_step'])} per step."
        )
    elif not analysis["collectives"]:
        sentences.append("No collective was found.")
    return sentences


def _what_took_the_time(analysis: Mapping[str, Any]) -> str:
    timing = analysis["step_time_s"]
    step = f"A step takes {format_time(timing['mean'], 4)} on average"
    if timing["min"] != timing["max"]:
        step += f" ({format_duration(timing['min'])} to {format_duration(timing['max'])})"
    shares = {PARTS[key][0]: share for key, share in mean_shares(analysis, PARTS).items()}
    if not shares:
        return f"{step}; what took it is not measurable from this trace."
    largest = sorted({**shares, REST: 1 - sum(shares.values())}.items(), key=lambda item: -item[1])[:3]
    return f"{step}: " + ", ".join(f"{format_share(part)} {name}" for name, part in largest if part > 0) + "."


def _bars(ranks: Rows) -> dict[str, Any]:
    values = [_part_seconds(rank["mean"]) for rank in ranks]
    parts = [BarPart(name, colour) for name, colour in (*PARTS.values(), (REST, GREY))]
    drawn = [place for place, column in enumerate(zip(*values, strict=True)) if any(column)]
    shown = [parts[place] for place in drawn]
    bars = [
        Bar(f"rank {rank['rank']}", [own[place] for place in drawn], rank["mean"]["seconds"])
        for rank, own in zip(ranks, values, strict=True)
    ]
    return {
        "picture": stacked_bars("Parts of a step by rank", shown, bars, "time in the mean step"),
        "legend": legend(shown),
    }


def _part_seconds(mean: Mapping[str, Any]) -> list[float | None]:
    """Seconds of the parts of a step, and of the rest."""
    values = [mean.get(key) for key in PARTS]
    rest = max(mean["seconds"] - sum(value for value in values if value), 0.0)
    return [*values, rest if rest > 0.001 * mean["seconds"] else None]


def _strips(analysis: Mapping[str, Any]) -> dict[str, Any]:
    line = analysis["timeline"]
    strips = []
    for each in line["strips"]:
        colour, _ = STREAMS.get(each["lane"], (SKY, ()))
        strips.append(Strip(f"rank {each['rank']}", each["lane"], colour, [tuple(span) for span in each["spans"]]))
    what = f"Step {line['step']} of all ranks"
    there = {strip.stream for strip in strips}
    return {
        "picture": timeline_chart(what, strips, line["start_s"], f"time from the start of step {line['step']}"),
        "legend": legend([BarPart(name, colour) for name, (colour, _) in STREAMS.items() if name in there]),
    }


def _stream_row(analysis: Mapping[str, Any], strip: Mapping[str, Any]) -> dict[str, Any]:
    """How long a stream was busy, by the figures of the step. Spans in strips are merged, so they do not measure it."""
    steps = [step for rank in analysis["by_rank"] if rank["rank"] == strip["rank"] for step in rank["steps"]]
    step: Mapping[str, Any] = next((step for step in steps if step["step"] == analysis["timeline"]["step"]), {})
    _, figures = STREAMS.get(strip["lane"], (SKY, ()))
    known = [step[key] for key in figures if step.get(key) is not None]
    busy, spans = sum(known) if known else None, len(strip["spans"])
    return {"rank": f"rank {strip['rank']}", "stream": strip["lane"], "busy": busy, "spans": spans}


def _bandwidths(sizes: Rows) -> dict[str, Any] | None:
    """The plot of the bus bandwidths by size; None if no size has one."""
    points: dict[str, list[tuple[float, float]]] = {size["name"]: [] for size in sizes}
    for size in sizes:
        if size["bytes"] and size["bus_gb_s"]:
            points[size["name"]].append((size["bytes"], size["bus_gb_s"]))
    series = [Series(name, index, own) for index, (name, own) in enumerate(points.items()) if own]
    if not series:
        return None
    axes = ("bytes of a call", "bus bandwidth in GB/s")
    return {
        "picture": log_log_plot("Bus bandwidth by bytes of a call", series, *axes, format_decimal_bytes, format_number),
        "legend": series_legend(series, lines=False),
    }


def _kernels(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of kernels. A table without rows has the reason instead, or is left out if there is none."""
    found, why = [], analysis["not_measurable"]
    for key, title in (("families", "By family"), ("blocks", "By block of the model"), ("top", "The longest")):
        rows, reason = analysis["kernels"].get(key), why.get(f"kernels.{key}") or why.get(key)
        if rows or reason:
            columns = [each for each in KERNEL_COLUMNS if rows and each.key in rows[0]]
            found.append({"title": title, "rows": rows, "columns": columns, "why": reason})
    return found


def _reasons_by_row(why: Mapping[str, str], rows: Rows) -> dict[str, str | None]:
    """The reasons for None: by figure if one reason holds for all rows, else by figure and row."""
    found: dict[str, str | None] = {}
    for column in (*SENT, *SPEED):
        for row in rows:
            if row[column.key] is None:
                name = f"{row['axis']} {row['collective']}"
                own = why.get(f"{REASON_GROUPS.get(column.key)} of {name}")
                found[f"{column.title}, {name}" if own else column.title] = own or why.get(column.key)
    return found


def _reasons_for(analysis: Mapping[str, Any], rows: Rows) -> dict[str, str | None]:
    """The reason for None in a column of the steps, by the title of the column."""
    why = analysis["not_measurable"]
    absent = [column for column in STEP_COLUMNS if any(row.get(column.key) is None for row in rows)]
    return {each.title: why.get(each.key) or why.get(each.key.removeprefix("exposed_")) for each in absent}


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no steps"
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
