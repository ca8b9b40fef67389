"""The report of a comparison as one HTML page: first the answer, then charts and tables.

`comparison_page` reads the object that `quadriga compare --json` prints (`quadriga-compare-1`), and fills `page.jinja`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from quadriga.analysis.compare.report import format_answers, format_value
from quadriga.analysis.pages.charts import Bar, BarPart, legend, stacked_bars
from quadriga.analysis.pages.markup import render_page
from quadriga.analysis.pages.numbers import Column, format_duration, format_number, format_share
from quadriga.analysis.pages.plots import Interval, Series, interval_plot, line_plot, series_legend
from quadriga.analysis.pages.style import BLUE, GREY, VERMILION

VERDICTS = {"faster": BLUE, "better": BLUE, "slower": VERMILION, "worse": VERMILION}
UNITS_IN_CELLS = ("s", "GiB", "share")  # units that are shown in each cell
Comparison = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]
MAX_LOSS_ROWS = 20

# The columns of the tables.
RUN, FIGURE = Column("run", "run"), Column("figure", "figure")
BACKEND_COLUMNS = (
    *(RUN, Column("asked for", "asked"), Column("what carried the bytes", "carried")),
    *(Column("credited", "credited"), Column("why", "why")),
)
RATIO_COLUMNS = (
    *(FIGURE, RUN, Column("against", "against"), Column("ratio", "ratio", format_number)),
    *(Column("interval", "interval", str), Column("confidence", "confidence", lambda share: f"{100 * share:.3g} %")),
    *(Column("pairs", "pairs", str), Column("verdict", "verdict")),
)
FIGURE_COLUMNS = (
    *(FIGURE, RUN, Column("median", "median", str), Column("middle half", "spread", str)),
    Column("each repeat", "samples"),
)


def comparison_page(comparison: Comparison) -> str:
    """The HTML of the page. `comparison`: a dict of the format `quadriga-compare-1`."""
    names, figures = _names(comparison), comparison["figures"]
    rated = [{**ratio, "figure": figure["name"]} for figure in figures for ratio in figure["ratios"]]
    keys = list(dict.fromkeys(key for run in comparison["runs"] for key in run["values"]))
    warned = [f"{run['name']}: {line}" for run in comparison["runs"] for line in run["warnings"]]
    return render_page(
        "compare/page.jinja",
        title=f"{' and '.join(names)} compared" if len(names) == 2 else f"{len(names)} runs compared",
        source=_varied(comparison["varied"]),
        sentences=comparison_sentences(comparison),
        warnings=[*warned, *comparison.get("warnings", ())],
        backends=[_backend_row(row) for row in comparison["backend"]],
        backend_columns=BACKEND_COLUMNS,
        ratios=[{**ratio, "interval": _range(ratio["interval"], format_number)} for ratio in rated],
        ratio_columns=RATIO_COLUMNS,
        intervals=_intervals(rated),
        figures=[row for figure in figures for row in _figure_rows(figure)],
        figure_columns=FIGURE_COLUMNS,
        where=_where(comparison["where"]) if comparison["where"] else None,
        why=comparison.get("not_measurable", {}).get("where"),
        losses=_losses(comparison["losses"]) if (comparison["losses"] or {}).get("steps") else None,
        runs=[{**run, **{("value", key): run["values"].get(key, "") for key in keys}} for run in comparison["runs"]],
        run_columns=[
            *(Column("run", "name"), Column("folder", "folder"), Column("repeats", "repeats", str)),
            *(Column(key, ("value", key), str) for key in keys),
        ],
    )


def comparison_sentences(comparison: Comparison) -> list[str]:
    """The answer as in the terminal, or the refusal."""
    if comparison["refused"]:
        return [f"Not compared: {comparison['refused']}"]
    return [
        f"{answer[0].upper()}{answer[1:]}." if not answer.startswith(_names(comparison)) else f"{answer}."
        for answer in format_answers(comparison)
    ]


def _names(comparison: Comparison) -> tuple[str, ...]:
    return tuple(run["name"] for run in comparison["runs"])


def _backend_row(row: Mapping[str, Any]) -> dict[str, Any]:
    carried = None
    if row["carried"] is not None:
        carried = "; ".join(f"{each['axis']}: {each['backend']} ({_share(each)})" for each in row["carried"])
    return {**row, "asked": row["asked"] or "none", "carried": carried, "credited": "yes" if row["credited"] else "no"}


def _share(carried: Mapping[str, Any]) -> str:
    part = carried["share_of_bytes"]
    return "share not measurable" if part is None else f"{format_share(part)} of bytes"


def _intervals(rated: Rows) -> str | None:
    """The plot of the ratios that have an interval; None if none has."""
    pairs = list(dict.fromkeys((ratio["run"], ratio["against"]) for ratio in rated))
    drawn = []
    for ratio in rated:
        name = ratio["figure"] if len(pairs) == 1 else f"{ratio['figure']}: {ratio['run']}"
        colour = VERDICTS.get(ratio["verdict"], GREY)
        if ratio["ratio"] is not None and ratio["interval"]:
            low, high = ratio["interval"]
            drawn.append(Interval(name, ratio["ratio"], low, high, ratio["verdict"], colour))
    if not drawn:
        return None
    of = pairs[0][0] if len(pairs) == 1 else "each run"
    return interval_plot("Ratios of runs with their intervals", drawn, f"{of} / {pairs[0][1]}; 1 is no difference")


def _figure_rows(figure: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = figure["name"] if figure["unit"] in UNITS_IN_CELLS else f"{figure['name']}, {figure['unit']}"
    formatter = partial(format_value, unit=figure["unit"])
    rows = []
    for run in figure["by_run"]:
        middle = None if run["median"] is None else formatter(run["median"])
        samples = ", ".join(formatter(value) for value in run["samples"] if value is not None)
        spread = _range(run["spread"], formatter)
        rows.append({"figure": name, "run": run["run"], "median": middle, "spread": spread, "samples": samples})
    return rows


def _where(parts: Rows) -> dict[str, Any]:
    runs = list(dict.fromkeys(each["run"] for part in parts for each in part["by_run"]))
    shown = [BarPart(run, index % GREY) for index, run in enumerate(runs)]
    bars: list[Bar] = []
    rows: list[dict[Any, Any]] = []
    for part in parts:
        seconds = {each["run"]: each["seconds"] for each in part["by_run"]}
        # `exposed communication`, or `exposed on shard` for one axis
        axis = part.get("axis")
        name = f"exposed on {axis}" if axis else part["part"].removesuffix("_s").replace("_", " ")
        rows.append(dict[Any, Any](part=name) | {("run", run): value for run, value in seconds.items()})
        for index, run in enumerate(runs):
            values = [seconds.get(run) if i == index else None for i in range(len(runs))]
            bars.append(Bar(name if index == 0 else "", values))
    return {
        "picture": stacked_bars("Parts of a step by run", shown, bars, "time per step"),
        "legend": legend(shown),
        "rows": rows,
        "columns": [Column("part of a step", "part"), *(Column(run, ("run", run), format_duration) for run in runs)],
    }


def _losses(losses: Mapping[str, Any]) -> dict[str, Any]:
    steps = losses["steps"]
    series = []
    for index, run in enumerate(losses["by_run"]):
        values = [math.nan if loss is None else float(loss) for loss in run["loss"]]  # NaN is a gap in the curve
        series.append(Series(run["run"], index, list(zip(steps, values, strict=True))))
    drawable = any(math.isfinite(loss) for each in series for _, loss in each.points)
    every = max(math.ceil(len(steps) / MAX_LOSS_ROWS), 1)
    rows: list[dict[Any, str]] = []
    for at in sorted({*range(0, len(steps), every), len(steps) - 1}):
        shown = {number: _loss(run["loss"][at]) for number, run in enumerate(losses["by_run"])}
        rows.append({"step": f"{steps[at]:,}", **shown})
    return {
        "picture": line_plot("Loss by step", series, "step", "loss") if drawable else None,
        "legend": series_legend(series, lines=True),
        "summary": _loss_summary(losses),
        "every": every,
        "rows": rows,
        "columns": [Column("step", "step"), *(Column(run["run"], n, str) for n, run in enumerate(losses["by_run"]))],
    }


def _loss_summary(losses: Mapping[str, Any]) -> str:
    largest, within = losses["largest_difference"], losses.get("largest_within_a_setting")
    summary = "Only one run has losses."
    if largest and largest["value"] == 0:
        summary = "All runs have the same losses, to the last digit."
    elif largest:
        where = f"at step {largest['step']}, between {' and '.join(largest['between'])}"
        summary = f"The largest difference is {format_number(largest['value'])}, {where}."
    if within is not None:
        summary += f" Repeats of one setting differ by {format_number(within)} at most."
    return f"{summary} {losses['note']}" if losses.get("note") else summary


def _loss(loss: float | None) -> str:
    return "not logged" if loss is None else f"{loss:.4f}"


def _varied(varied: Mapping[str, Sequence[Any]]) -> str:
    if not varied:
        return "No key was varied."
    return "Varied: " + "; ".join(f"{key} = {', '.join(map(str, values))}" for key, values in varied.items())


def _range(ends: Sequence[float | None] | None, formatter: Callable[[float], str]) -> str | None:
    if not ends or ends[0] is None or ends[1] is None:
        return None
    return f"{formatter(ends[0])} to {formatter(ends[1])}"
