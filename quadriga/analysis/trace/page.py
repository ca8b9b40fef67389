"""The report of an analysed trace as one HTML page: first what took the time, then charts and tables.

`trace_page` reads the object that `quadriga trace --json` prints (`quadriga-trace-1`). A figure that is None was not
measurable; the page shows the reason that the analysis gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quadriga.analysis.pages import elements
from quadriga.analysis.pages.charts import Bar, BarPart, Strip, legend, stacked_bars, timeline_chart
from quadriga.analysis.pages.markup import Markup, join_markup
from quadriga.analysis.pages.numbers import (
    format_decimal_bytes,
    format_duration,
    format_number,
    format_share,
    format_whole,
)
from quadriga.analysis.pages.plots import Series, log_log_plot, series_legend
from quadriga.analysis.pages.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from quadriga.analysis.trace.report import format_time
from quadriga.units import format_bytes

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
STEP_COLUMNS = {
    "seconds": "step",
    "compute_s": "compute",
    "communication_s": "communication",
    "exposed_communication_s": "exposed communication",
    "memcpy_s": "copies",
    "exposed_memcpy_s": "exposed copies",
    "host_idle_s": "waiting for the host",
    "data_wait_s": "waiting for data",
}
STRIPS = {"compute": BLUE, "communication": VERMILION, "memcpy": GREEN, "host": GREY}
STRIP_FIGURES = {
    "compute": ("compute_s",),
    "communication": ("communication_s",),
    "memcpy": ("memcpy_s",),
    "host": ("rest_s", "data_wait_s"),
}
FOUND_BY = {"linkage": "linkage", "annotation": "annotation", "name": "name only"}
# The prefix of the analysis' reason for a missing figure of a collective: `transfer of tp all_gather`.
REASON_GROUPS = {
    **dict.fromkeys(("start_skew_s", "transfer_s", "bus_gb_s"), "transfer"),
    **dict.fromkeys(("seconds_a_step", "exposed_s_a_step", "overlap_share", "algorithm_gb_s"), "seconds"),
    "bytes_a_step": "bytes",
}
Formatter = Callable[[float], str]
Columns = dict[str, tuple[str, Formatter]]  # by key of a row: title and format


def trace_page(analysis: Mapping[str, Any]) -> str:
    """The HTML of the page. `analysis`: a dict of the format `quadriga-trace-1`."""
    return elements.document(
        "Where a step's time went",
        elements.answer(*trace_sentences(analysis)),
        elements.warnings(analysis["warnings"]),
        _by_rank(analysis),
        _one_step(analysis),
        _communication(analysis),
        _kernels(analysis),
        _against_estimate(analysis),
        _not_measurable(analysis),
        source=f"{analysis['source']}: {_ranks(analysis)}, {_steps(analysis['steps'])}, {analysis['device_type']}",
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
    shares = _mean_shares(analysis)
    if not shares:
        return f"{step}; what took it is not measurable from this trace."
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]
    return f"{step}: " + ", ".join(f"{format_share(part)} {name}" for name, part in largest if part > 0) + "."


def _mean_shares(analysis: Mapping[str, Any]) -> dict[str, float]:
    """By name: the share of the step of each part that was measured on all ranks, and of the rest. Over all ranks."""
    means = [rank["mean"] for rank in analysis["by_rank"]]
    whole_time = sum(mean["seconds"] for mean in means)
    if not whole_time:
        return {}
    known = [key for key in PARTS if all(mean.get(key) is not None for mean in means)]
    shares = {PARTS[key][0]: sum(mean[key] for mean in means) / whole_time for key in known}
    return {**shares, REST: 1 - sum(shares.values())} if shares else {}


def _by_rank(analysis: Mapping[str, Any]) -> Markup:
    ranks = analysis["by_rank"]
    parts = [BarPart(name, colour) for name, colour in PARTS.values()] + [BarPart(REST, GREY)]
    bars = [_bar_of(rank) for rank in ranks]
    drawn = [i for i, _ in enumerate(parts) if any(bar.values[i] for bar in bars)]
    shown = [BarPart(parts[i].name, parts[i].colour) for i in drawn]
    bars = [Bar(bar.name, [bar.values[i] for i in drawn], bar.whole) for bar in bars]
    known = {key: name for key, name in STEP_COLUMNS.items() if any(_has(rank, key) for rank in ranks)}
    rows = [[f"{rank['rank']}", *(_or_none(rank["mean"].get(key), format_duration) for key in known)] for rank in ranks]
    numbers = elements.table(["rank", *known.values()], rows, caption="Mean over the steps, by rank.")
    caption = (
        "The mean step of each rank by part; the tick is the length of the step. Time that overlaps with compute is "
        f"only in the table. “{REST}” is the rest of the step: work of the host, and idle time."
    )
    image = stacked_bars("Parts of a step by rank", shown, bars, "time in the mean step", format_duration)
    missing = elements.reasons(_reasons_for(analysis, STEP_COLUMNS, [rank["mean"] for rank in ranks]))
    steps = elements.collapsible("Every step of every rank", _all_steps(ranks, known))
    return elements.section("By rank", elements.figure(image, caption, numbers, legend(shown)), missing, steps)


def _bar_of(rank: Mapping[str, Any]) -> Bar:
    mean = rank["mean"]
    values = [mean.get(key) for key in PARTS]
    rest = max(mean["seconds"] - sum(value for value in values if value), 0.0)
    return Bar(f"rank {rank['rank']}", [*values, rest if rest > 0.001 * mean["seconds"] else None], mean["seconds"])


def _has(rank: Mapping[str, Any], key: str) -> bool:
    return any(step.get(key) is not None for step in (rank["mean"], *rank["steps"]))


def _all_steps(ranks: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Markup:
    rows = [
        [f"{rank['rank']}", f"{step['step']}", *(_or_none(step.get(key), format_duration) for key in columns)]
        for rank in ranks
        for step in rank["steps"]
    ]
    return elements.table(["rank", "step", *columns.values()], rows)


def _one_step(analysis: Mapping[str, Any]) -> Markup | None:
    line = analysis["timeline"]
    if not line or not line["strips"]:
        return None
    strips = [
        Strip(
            f"rank {each['rank']}", each["lane"], STRIPS.get(each["lane"], SKY), [tuple(span) for span in each["spans"]]
        )
        for each in line["strips"]
    ]
    start = line["start_s"]
    rows = [_busy(analysis, each) for each in line["strips"]]
    numbers = elements.table(
        ["rank", "stream", "busy", "spans drawn"], rows, caption="This step by stream.", text_columns=(0, 1)
    )
    caption = (
        "Each strip is one stream of one rank; a span shows its name and its length under the pointer. Spans that are "
        "too close to see are drawn as one. The stream `host` is the time in which nothing else ran, with data wait."
    )
    image = timeline_chart(
        f"Step {line['step']} of all ranks", strips, start, f"time from the start of step {line['step']}"
    )
    drawn = legend([BarPart(name, colour) for name, colour in STRIPS.items() if any(s.stream == name for s in strips)])
    return elements.section(f"Step {line['step']} as it went", elements.figure(image, caption, numbers, drawn))


def _busy(analysis: Mapping[str, Any], strip: Mapping[str, Any]) -> list[str | None]:
    """The time of a stream, from the figures of the step. Spans in strips are merged, so they do not measure it."""
    steps = [step for rank in analysis["by_rank"] if rank["rank"] == strip["rank"] for step in rank["steps"]]
    step: Mapping[str, Any] = next((step for step in steps if step["step"] == analysis["timeline"]["step"]), {})
    seconds = [step.get(key) for key in STRIP_FIGURES.get(strip["lane"], ())]
    known = [figure for figure in seconds if figure is not None]
    busy = format_duration(sum(known)) if known else None
    return [f"rank {strip['rank']}", strip["lane"], busy, f"{len(strip['spans']):,}"]


def _communication(analysis: Mapping[str, Any]) -> Markup:
    rows = analysis["collectives"]
    if not rows:
        why = analysis["not_measurable"].get("collectives")
        return elements.section(
            "Communication", elements.not_measurable(why) if why else elements.note("No collective was found.")
        )
    sent: Columns = {
        "calls_a_step": ("calls per step", format_whole),
        "bytes_a_step": ("bytes per step", format_bytes),
        "seconds_a_step": ("time per step", format_duration),
        "exposed_s_a_step": ("exposed", format_duration),
        "overlap_share": ("hidden", format_share),
    }
    speed: Columns = {
        "start_skew_s": ("start skew per call", format_duration),
        "transfer_s": ("transfer per call", format_duration),
        "algorithm_gb_s": ("algorithm GB/s", format_number),
        "bus_gb_s": ("bus GB/s", format_number),
    }
    what = "Bytes and calls by axis. Bytes are those of the largest input or output tensor of a call."
    how_fast = (
        "Speed. Start skew: from the first rank's start to the last's; transfer: from the latest start to the "
        "earliest end, so that the wait for a late rank does not count."
    )
    names = {key: name for key, (name, _) in (sent | speed).items()}
    return elements.section(
        "Communication by axis",
        _by_axis(rows, sent, what),
        _by_axis(rows, speed, how_fast),
        elements.reasons(_reasons_by_row(analysis["not_measurable"], names, rows)),
        _bandwidth(analysis),
    )


def _by_axis(rows: Sequence[Mapping[str, Any]], columns: Columns, caption: str) -> Markup:
    cells = [
        [row["axis"], row["collective"], row["backend"], FOUND_BY.get(row["found_by"], row["found_by"])]
        + [_or_none(row[key], formatter) for key, (_, formatter) in columns.items()]
        for row in rows
    ]
    header = ["axis", "collective", "backend", "found by", *(name for name, _ in columns.values())]
    return elements.table(header, cells, caption=caption, text_columns=range(4))


def _reasons_by_row(
    why: Mapping[str, str], columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str | None]:
    """The reasons for None: by figure if one reason holds for all rows, else by figure and row."""
    found: dict[str, str | None] = {}
    for key, name in columns.items():
        for row in rows:
            if row[key] is None:
                own = why.get(f"{REASON_GROUPS.get(key)} of {row['axis']} {row['collective']}")
                found[f"{name}, {row['axis']} {row['collective']}" if own else name] = own or why.get(key)
    return found


def _bandwidth(analysis: Mapping[str, Any]) -> Markup | None:
    measured = [
        (f"{row['axis']}: {row['collective']} ({row['backend'] or UNKNOWN})", size)
        for row in analysis["collectives"]
        for size in row["sizes"]
    ]
    names = list(dict.fromkeys(name for name, _ in measured))
    points = {name: [(s["bytes"], s["bus_gb_s"]) for n, s in measured if n == name and _drawable(s)] for name in names}
    series = [Series(name, index, points[name]) for index, name in enumerate(names) if points[name]]
    if not series:
        why = analysis["not_measurable"].get("bus_gb_s")
        return (
            join_markup(elements.note("Bandwidth by size: "), elements.not_measurable(why)) if measured or why else None
        )
    rows = [
        [
            name,
            _or_none(s["bytes"], format_bytes),
            format_whole(s["calls"]),
            _or_none(s["transfer_s"], format_duration),
            _or_none(s["bus_gb_s"], format_number),
        ]
        for name, s in measured
    ]
    numbers = elements.table(["collective", "bytes per call", "calls", "transfer per call", "bus GB/s"], rows)
    image = log_log_plot(
        "Bus bandwidth by bytes of a call",
        series,
        "bytes of a call",
        "bus bandwidth in GB/s",
        format_decimal_bytes,
        format_number,
    )
    caption = "Bus bandwidth of the calls of each size, both axes logarithmic; a GB is 1e9 bytes."
    return elements.figure(image, caption, numbers, series_legend(series, lines=False))


def _drawable(size: Mapping[str, Any]) -> bool:
    return bool(size["bytes"] and size["bus_gb_s"])


def _kernels(analysis: Mapping[str, Any]) -> Markup | None:
    kernels = analysis["kernels"]
    tables = []
    for key, title in (("families", "By family"), ("blocks", "By block of the model"), ("top", "The longest")):
        rows = kernels.get(key) or []
        if not rows:
            why = analysis["not_measurable"].get(f"kernels.{key}") or analysis["not_measurable"].get(key)
            tables.append(join_markup(elements.note(f"{title}: "), elements.not_measurable(why)) if why else None)
            continue
        counts = "calls_a_step" in rows[0]
        header = ["name", *(["calls per step"] if counts else []), "time per step", "share"]
        cells = [
            [row["name"]]
            + ([_or_none(row["calls_a_step"], format_whole)] if counts else [])
            + [_or_none(row["seconds_a_step"], format_duration), _or_none(row["share"], format_share)]
            for row in rows
        ]
        tables.append(elements.table(header, cells, caption=title))
    unit = "Kernels" if analysis["device_type"] == "cuda" else "Operations"
    return elements.section(unit, *tables) if any(tables) else None


def _against_estimate(analysis: Mapping[str, Any]) -> Markup:
    estimate = analysis["estimate"]
    title = "Bytes against the estimate"
    if not estimate:
        return elements.section(title, elements.not_measurable(analysis["not_measurable"].get("estimate")))
    rows = estimate["rows"]
    cells = [
        [row["axis"], row["collective"], *(_or_none(row[key], format_whole) for key in ("calls", "predicted_calls"))]
        + [_or_none(row[key], format_whole) for key in ("bytes", "predicted_bytes")]
        + ["equal" if row["equal"] else "different"]
        for row in rows
    ]
    header = ["axis", "collective", "calls", "predicted", "bytes", "predicted", "verdict"]
    different = sum(not row["equal"] for row in rows)
    verdict = f"{different} of {len(rows)} rows differ from the estimate." if different else "All rows are equal."
    return elements.section(
        title,
        elements.note(verdict),
        elements.table(header, cells, text_columns=(0, 1, 6), caption="Of one step, by axis."),
    )


def _not_measurable(analysis: Mapping[str, Any]) -> Markup | None:
    missing = elements.reasons(analysis["not_measurable"])
    return elements.section("Not measurable from this trace", missing) if missing else None


def _reasons_for(
    analysis: Mapping[str, Any], columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str | None]:
    """The reason for None in a column, by the name of the column."""
    why = analysis["not_measurable"]
    absent = [key for key in columns if any(row.get(key) is None for row in rows)]
    return {columns[key]: why.get(key) or why.get(key.removeprefix("exposed_")) for key in absent}


def _or_none(value: float | None, formatter: Formatter) -> str | None:
    return None if value is None else formatter(value)


def _ranks(analysis: Mapping[str, Any]) -> str:
    return f"{len(analysis['ranks'])} of {analysis['world_size']} ranks"


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no steps"
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
