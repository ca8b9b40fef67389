"""The report of an analysed trace as one HTML page: what took the time first, then the pictures and their numbers.

`page` takes what `quadriga trace --json` prints (`quadriga-trace-1`). A figure that is None was not measurable; the
page says so and why, in the words of the analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quadriga.analysis.pages import page as html
from quadriga.analysis.pages.charts import Bar, Part, Strip, legend, stacked_bars, timeline
from quadriga.analysis.pages.markup import Markup, join
from quadriga.analysis.pages.numbers import decimal_bytes, duration, number, share, whole
from quadriga.analysis.pages.plots import Series, legend_of, log_log
from quadriga.analysis.pages.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from quadriga.analysis.trace.report import seconds
from quadriga.units import show_bytes

# What a step is cut into, in the order of a bar; with the rest these add up. What compute hides is no part of it.
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
LANES = {"compute": BLUE, "communication": VERMILION, "memcpy": GREEN, "host": GREY}
LANE_FIGURES = {
    "compute": ("compute_s",),
    "communication": ("communication_s",),
    "memcpy": ("memcpy_s",),
    "host": ("rest_s", "data_wait_s"),
}
FOUND_BY = {"linkage": "linkage", "annotation": "annotation", "name": "name only"}
# Under which word the analysis tells why a figure of one collective is missing: `transfer of tp all_gather`.
GROUPS = {
    **dict.fromkeys(("start_skew_s", "transfer_s", "bus_gb_s"), "transfer"),
    **dict.fromkeys(("seconds_a_step", "exposed_s_a_step", "overlap_share", "algorithm_gb_s"), "seconds"),
    "bytes_a_step": "bytes",
}
Show = Callable[[float], str]
Columns = dict[str, tuple[str, Show]]  # by the key of a row: its title, and how it is shown


def page(analysis: Mapping[str, Any]) -> str:
    """The whole page. `analysis`: a dict of the format `quadriga-trace-1`."""
    return html.document(
        "Where a step's time went",
        html.answer(*sentences(analysis)),
        html.warnings(analysis["warnings"]),
        _by_rank(analysis),
        _one_step(analysis),
        _communication(analysis),
        _kernels(analysis),
        _against_estimate(analysis),
        _not_measurable(analysis),
        source=f"{analysis['source']}: {_ranks(analysis)}, {_steps(analysis['steps'])}, {analysis['device_type']}",
    )


def sentences(analysis: Mapping[str, Any]) -> list[str]:
    """The answer: how long a step takes, what takes it, which rank is slow, which collective costs most."""
    said = [_what_took_the_time(analysis)]
    slowest = analysis["slowest"]
    if slowest:
        by = f"{duration(slowest['by_s'])} ({share(slowest['by_share'])})"
        said.append(
            f"The slowest rank is {slowest['rank']}: it spends {by} a step more than the median rank on its own."
        )
    costly = [row for row in analysis["collectives"] if row["exposed_s_a_step"]]
    if costly:
        row = max(costly, key=lambda each: each["exposed_s_a_step"])
        what = f"{row['collective']} on axis {row['axis']} over {row['backend'] or UNKNOWN}"
        said.append(f"Most of the exposed communication: {what}, {duration(row['exposed_s_a_step'])} a step.")
    elif not analysis["collectives"]:
        said.append("No collective was found.")
    return said


def _what_took_the_time(analysis: Mapping[str, Any]) -> str:
    timing = analysis["step_time_s"]
    step = f"A step takes {seconds(timing['mean'], 4)} on average"
    if timing["min"] != timing["max"]:
        step += f" ({duration(timing['min'])} to {duration(timing['max'])})"
    shares = _mean_shares(analysis)
    if not shares:
        return f"{step}; what took it is not measurable from this trace."
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]
    return f"{step}: " + ", ".join(f"{share(part)} {name}" for name, part in largest if part > 0) + "."


def _mean_shares(analysis: Mapping[str, Any]) -> dict[str, float]:
    """By name, of each part that was measured on all ranks and of the rest: its share of the step, over all ranks."""
    means = [rank["mean"] for rank in analysis["by_rank"]]
    whole_time = sum(mean["seconds"] for mean in means)
    if not whole_time:
        return {}
    known = [key for key in PARTS if all(mean.get(key) is not None for mean in means)]
    shares = {PARTS[key][0]: sum(mean[key] for mean in means) / whole_time for key in known}
    return {**shares, REST: 1 - sum(shares.values())} if shares else {}


def _by_rank(analysis: Mapping[str, Any]) -> Markup:
    ranks = analysis["by_rank"]
    parts = [Part(name, colour) for name, colour in PARTS.values()] + [Part(REST, GREY)]
    bars = [_bar_of(rank) for rank in ranks]
    drawn = [i for i, _ in enumerate(parts) if any(bar.values[i] for bar in bars)]
    shown = [Part(parts[i].name, parts[i].colour) for i in drawn]
    bars = [Bar(bar.name, [bar.values[i] for i in drawn], bar.whole) for bar in bars]
    known = {key: name for key, name in STEP_COLUMNS.items() if any(_has(rank, key) for rank in ranks)}
    rows = [[f"{rank['rank']}", *(_or_none(rank["mean"].get(key), duration) for key in known)] for rank in ranks]
    numbers = html.table(["rank", *known.values()], rows, caption="Mean over the steps, by rank.")
    caption = (
        "The mean step of each rank, cut into its parts; the tick is the step's own length. What compute hides is in "
        f"the table alone. “{REST}” is what is left of the step: the host's own work, and idling."
    )
    image = stacked_bars("Parts of a step by rank", shown, bars, "time in the mean step", duration)
    missing = html.reasons(_reasons_for(analysis, STEP_COLUMNS, [rank["mean"] for rank in ranks]))
    steps = html.folded("Every step of every rank", _all_steps(ranks, known))
    return html.section("By rank", html.figure(image, caption, numbers, legend(shown)), missing, steps)


def _bar_of(rank: Mapping[str, Any]) -> Bar:
    mean = rank["mean"]
    values = [mean.get(key) for key in PARTS]
    rest = max(mean["seconds"] - sum(value for value in values if value), 0.0)
    return Bar(f"rank {rank['rank']}", [*values, rest if rest > 0.001 * mean["seconds"] else None], mean["seconds"])


def _has(rank: Mapping[str, Any], key: str) -> bool:
    return any(step.get(key) is not None for step in (rank["mean"], *rank["steps"]))


def _all_steps(ranks: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Markup:
    rows = [
        [f"{rank['rank']}", f"{step['step']}", *(_or_none(step.get(key), duration) for key in columns)]
        for rank in ranks
        for step in rank["steps"]
    ]
    return html.table(["rank", "step", *columns.values()], rows)


def _one_step(analysis: Mapping[str, Any]) -> Markup | None:
    line = analysis["timeline"]
    if not line or not line["strips"]:
        return None
    strips = [
        Strip(
            f"rank {each['rank']}", each["lane"], LANES.get(each["lane"], SKY), [tuple(span) for span in each["spans"]]
        )
        for each in line["strips"]
    ]
    start = line["start_s"]
    rows = [_busy(analysis, each) for each in line["strips"]]
    numbers = html.table(["rank", "lane", "busy", "spans drawn"], rows, caption="This step by lane.", words=(0, 1))
    caption = (
        "Each strip is one lane of one rank; a span tells its name and its length under the pointer. Spans that lie "
        "too close for the eye are drawn as one. The lane `host` shows where nothing else ran, data wait included."
    )
    image = timeline(f"Step {line['step']} of all ranks", strips, start, f"time from the start of step {line['step']}")
    lanes = legend([Part(name, colour) for name, colour in LANES.items() if any(s.lane == name for s in strips)])
    return html.section(f"Step {line['step']} as it went", html.figure(image, caption, numbers, lanes))


def _busy(analysis: Mapping[str, Any], strip: Mapping[str, Any]) -> list[str | None]:
    """The lane's time by the figures of the step: strips are no finer than can be seen, and do not measure it."""
    steps = [step for rank in analysis["by_rank"] if rank["rank"] == strip["rank"] for step in rank["steps"]]
    step: Mapping[str, Any] = next((step for step in steps if step["step"] == analysis["timeline"]["step"]), {})
    seconds = [step.get(key) for key in LANE_FIGURES.get(strip["lane"], ())]
    known = [figure for figure in seconds if figure is not None]
    busy = duration(sum(known)) if known else None
    return [f"rank {strip['rank']}", strip["lane"], busy, f"{len(strip['spans']):,}"]


def _communication(analysis: Mapping[str, Any]) -> Markup:
    rows = analysis["collectives"]
    if not rows:
        why = analysis["not_measurable"].get("collectives")
        return html.section("Communication", html.missing(why) if why else html.note("No collective was found."))
    sent: Columns = {
        "calls_a_step": ("calls a step", whole),
        "bytes_a_step": ("bytes a step", show_bytes),
        "seconds_a_step": ("time a step", duration),
        "exposed_s_a_step": ("exposed", duration),
        "overlap_share": ("hidden", share),
    }
    speed: Columns = {
        "start_skew_s": ("start skew a call", duration),
        "transfer_s": ("transfer a call", duration),
        "algorithm_gb_s": ("algorithm GB/s", number),
        "bus_gb_s": ("bus GB/s", number),
    }
    what = "What each axis sent. Bytes: of the largest tensor that a call takes or gives."
    how_fast = (
        "How fast. Start skew: from the first rank's start to the last's; transfer: from the latest start to the "
        "earliest end, so that waiting for a late rank is not counted."
    )
    names = {key: name for key, (name, _) in (sent | speed).items()}
    return html.section(
        "Communication by axis",
        _by_axis(rows, sent, what),
        _by_axis(rows, speed, how_fast),
        html.reasons(_reasons_by_row(analysis["not_measurable"], names, rows)),
        _bandwidth(analysis),
    )


def _by_axis(rows: Sequence[Mapping[str, Any]], columns: Columns, caption: str) -> Markup:
    cells = [
        [row["axis"], row["collective"], row["backend"], FOUND_BY.get(row["found_by"], row["found_by"])]
        + [_or_none(row[key], show) for key, (_, show) in columns.items()]
        for row in rows
    ]
    header = ["axis", "collective", "backend", "found by", *(name for name, _ in columns.values())]
    return html.table(header, cells, caption=caption, words=range(4))


def _reasons_by_row(
    why: Mapping[str, str], columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str | None]:
    """By figure where one reason holds for all rows, else by figure and row: why it is None."""
    found: dict[str, str | None] = {}
    for key, name in columns.items():
        for row in rows:
            if row[key] is None:
                own = why.get(f"{GROUPS.get(key)} of {row['axis']} {row['collective']}")
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
        return join(html.note("Bandwidth by size: "), html.missing(why)) if measured or why else None
    rows = [
        [
            name,
            _or_none(s["bytes"], show_bytes),
            whole(s["calls"]),
            _or_none(s["transfer_s"], duration),
            _or_none(s["bus_gb_s"], number),
        ]
        for name, s in measured
    ]
    numbers = html.table(["collective", "bytes a call", "calls", "transfer a call", "bus GB/s"], rows)
    image = log_log(
        "Bus bandwidth by bytes of a call", series, "bytes of a call", "bus bandwidth in GB/s", decimal_bytes, number
    )
    caption = "Bus bandwidth of the calls of each size, both axes logarithmic; a GB is 1e9 bytes."
    return html.figure(image, caption, numbers, legend_of(series, lines=False))


def _drawable(size: Mapping[str, Any]) -> bool:
    return bool(size["bytes"] and size["bus_gb_s"])


def _kernels(analysis: Mapping[str, Any]) -> Markup | None:
    kernels = analysis["kernels"]
    tables = []
    for key, title in (("families", "By family"), ("blocks", "By block of the model"), ("top", "The longest")):
        rows = kernels.get(key) or []
        if not rows:
            why = analysis["not_measurable"].get(f"kernels.{key}") or analysis["not_measurable"].get(key)
            tables.append(join(html.note(f"{title}: "), html.missing(why)) if why else None)
            continue
        counts = "calls_a_step" in rows[0]
        header = ["name", *(["calls a step"] if counts else []), "time a step", "share"]
        cells = [
            [row["name"]]
            + ([_or_none(row["calls_a_step"], whole)] if counts else [])
            + [_or_none(row["seconds_a_step"], duration), _or_none(row["share"], share)]
            for row in rows
        ]
        tables.append(html.table(header, cells, caption=title))
    unit = "Kernels" if analysis["device_type"] == "cuda" else "Operations"
    return html.section(unit, *tables) if any(tables) else None


def _against_estimate(analysis: Mapping[str, Any]) -> Markup:
    estimate = analysis["estimate"]
    title = "Bytes against the estimate"
    if not estimate:
        return html.section(title, html.missing(analysis["not_measurable"].get("estimate")))
    rows = estimate["rows"]
    cells = [
        [row["axis"], row["collective"], *(_or_none(row[key], whole) for key in ("calls", "predicted_calls"))]
        + [_or_none(row[key], whole) for key in ("bytes", "predicted_bytes")]
        + ["equal" if row["equal"] else "different"]
        for row in rows
    ]
    header = ["axis", "collective", "calls", "predicted", "bytes", "predicted", "verdict"]
    different = sum(not row["equal"] for row in rows)
    verdict = f"{different} of {len(rows)} rows differ from the estimate." if different else "All rows agree exactly."
    return html.section(
        title, html.note(verdict), html.table(header, cells, words=(0, 1, 6), caption="Of one step, by axis.")
    )


def _not_measurable(analysis: Mapping[str, Any]) -> Markup | None:
    missing = html.reasons(analysis["not_measurable"])
    return html.section("What this trace cannot tell", missing) if missing else None


def _reasons_for(
    analysis: Mapping[str, Any], columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str | None]:
    """By a column's name, why some of its figures are None."""
    why = analysis["not_measurable"]
    absent = [key for key in columns if any(row.get(key) is None for row in rows)]
    return {columns[key]: why.get(key) or why.get(key.removeprefix("exposed_")) for key in absent}


def _or_none(value: float | None, show: Show) -> str | None:
    return None if value is None else show(value)


def _ranks(analysis: Mapping[str, Any]) -> str:
    return f"{len(analysis['ranks'])} of {analysis['world_size']} ranks"


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no steps"
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
