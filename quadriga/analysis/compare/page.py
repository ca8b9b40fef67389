"""The report of a comparison as one HTML page: first the answer, then charts and tables.

`comparison_page` reads the object that `quadriga compare --json` prints (`quadriga-compare-1`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from quadriga.analysis.compare.report import format_answers, format_value
from quadriga.analysis.pages import elements
from quadriga.analysis.pages.charts import Bar, BarPart, legend, stacked_bars
from quadriga.analysis.pages.markup import Markup
from quadriga.analysis.pages.numbers import format_duration, format_number, format_share
from quadriga.analysis.pages.plots import Interval, Series, interval_plot, line_plot, series_legend
from quadriga.analysis.pages.style import BLUE, GREY, VERMILION

VERDICTS = {"faster": BLUE, "better": BLUE, "slower": VERMILION, "worse": VERMILION}
UNITS_IN_CELLS = ("s", "GiB", "share")  # units that are shown in each cell
Comparison = dict[str, Any]
MAX_LOSS_ROWS = 20


def comparison_page(comparison: Comparison) -> str:
    """The HTML of the page. `comparison`: a dict of the format `quadriga-compare-1`."""
    names = _names(comparison)
    warned = [f"{run['name']}: {line}" for run in comparison["runs"] for line in run["warnings"]]
    warned += comparison.get("warnings", ())
    return elements.document(
        f"{' and '.join(names)} compared" if len(names) == 2 else f"{len(names)} runs compared",
        elements.answer(*comparison_sentences(comparison)),
        elements.warnings(warned),
        _backends(comparison["backend"]),
        _ratios(comparison["figures"]),
        _figures(comparison["figures"]),
        _where(comparison["where"], comparison.get("not_measurable", {}).get("where")),
        _losses(comparison["losses"]),
        _runs(comparison),
        source=_varied(comparison["varied"]),
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


def _backends(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not rows:
        return None
    cells = [
        [
            row["run"],
            row["asked"] or "none",
            _format_backend_shares(row["carried"]),
            "yes" if row["credited"] else "no",
            row["why"],
        ]
        for row in rows
    ]
    header = ["run", "asked for", "what carried the bytes", "credited", "why"]
    return elements.section("Which backend carried the bytes", elements.table(header, cells, text_columns=range(5)))


def _format_backend_shares(shares: Sequence[Mapping[str, Any]] | None) -> str | None:
    if shares is None:
        return None
    return "; ".join(f"{each['axis']}: {each['backend']} ({_share(each['share_of_bytes'])})" for each in shares)


def _share(part: float | None) -> str:
    return "share not measurable" if part is None else f"{format_share(part)} of bytes"


def _ratios(figures: Sequence[Mapping[str, Any]]) -> Markup | None:
    rated = [(figure, ratio) for figure in figures for ratio in figure["ratios"]]
    if not rated:
        return None
    cells = [
        [
            figure["name"],
            ratio["run"],
            ratio["against"],
            _or_none(ratio["ratio"], format_number),
            _range(ratio["interval"], format_number),
            f"{100 * ratio['confidence']:.3g} %",
            f"{ratio['pairs']}",
            ratio["verdict"],
        ]
        for figure, ratio in rated
    ]
    header = ["figure", "run", "against", "ratio", "interval", "confidence", "pairs", "verdict"]
    numbers = elements.table(header, cells, text_columns=(0, 1, 2, 7))
    pairs = list(dict.fromkeys((ratio["run"], ratio["against"]) for _, ratio in rated))
    drawn = [
        Interval(
            figure["name"] if len(pairs) == 1 else f"{figure['name']}: {ratio['run']}",
            ratio["ratio"],
            ratio["interval"][0],
            ratio["interval"][1],
            ratio["verdict"],
            VERDICTS.get(ratio["verdict"], GREY),
        )
        for figure, ratio in rated
        if ratio["ratio"] is not None and ratio["interval"]
    ]
    if not drawn:
        return elements.section("Ratios", numbers)
    against = pairs[0][1]
    of = pairs[0][0] if len(pairs) == 1 else "each run"
    image = interval_plot("Ratios of runs with their intervals", drawn, f"{of} / {against}; 1 is no difference")
    caption = (
        "Each dot is the ratio of two runs by pairs of repeats, the bar its interval. A bar that touches 1 "
        "shows no difference."
    )
    return elements.section("Ratios", elements.figure(image, caption, numbers))


def _figures(figures: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not figures:
        return None
    cells = []
    for figure in figures:
        name = figure["name"] if figure["unit"] in UNITS_IN_CELLS else f"{figure['name']}, {figure['unit']}"
        formatter = partial(format_value, unit=figure["unit"])
        for run in figure["by_run"]:
            samples = ", ".join(formatter(value) for value in run["samples"] if value is not None)
            cells.append(
                [name, run["run"], _or_none(run["median"], formatter), _range(run["spread"], formatter), samples]
            )
    header = ["figure", "run", "median", "middle half", "each repeat"]
    return elements.section("Figures", elements.table(header, cells, text_columns=(0, 1, 4)))


def _where(parts: Sequence[Mapping[str, Any]] | None, why: str | None) -> Markup:
    title = "Where the time went"
    if not parts:
        return elements.section(title, elements.not_measurable(why or "no traces of these runs were read"))
    runs = list(dict.fromkeys(each["run"] for part in parts for each in part["by_run"]))
    legend_parts = [BarPart(run, index % GREY) for index, run in enumerate(runs)]
    bars = []
    for part in parts:
        seconds = {each["run"]: each["seconds"] for each in part["by_run"]}
        for index, run in enumerate(runs):
            values = [seconds.get(run) if i == index else None for i in range(len(runs))]
            bars.append(Bar(_part(part) if index == 0 else "", values))
    cells = [[_part(part), *(_seconds_of(part, run) for run in runs)] for part in parts]
    image = stacked_bars("Parts of a step by run", legend_parts, bars, "time per step")
    numbers = elements.table(["part of a step", *runs], cells)
    caption = "Each part of a step, with one bar per run. Parts may overlap, so their sum can exceed the step."
    reasons = elements.not_measurable(why) if why else None
    return elements.section(title, elements.figure(image, caption, numbers, legend(legend_parts)), reasons)


def _seconds_of(part: Mapping[str, Any], run: str) -> str | None:
    found = next((each["seconds"] for each in part["by_run"] if each["run"] == run), None)
    return _or_none(found, format_duration)


def _part(part: Mapping[str, Any]) -> str:
    """The name of a part: `exposed communication`, or `exposed on shard` for one axis."""
    axis = part.get("axis")
    return f"exposed on {axis}" if axis else part["part"].removesuffix("_s").replace("_", " ")


def _losses(losses: Mapping[str, Any] | None) -> Markup:
    title = "Losses"
    if not losses or not losses["steps"]:
        return elements.section(title, elements.not_measurable("the runs have no logged step in common"))
    steps = losses["steps"]
    series = [
        Series(run["run"], index, [(step, _figure(loss)) for step, loss in zip(steps, run["loss"], strict=True)])
        for index, run in enumerate(losses["by_run"])
    ]
    largest = losses["largest_difference"]
    summary = "Only one run has losses."
    if largest and largest["value"] == 0:
        summary = "All runs have the same losses, to the last digit."
    elif largest:
        summary = (
            f"The largest difference is {format_number(largest['value'])}, at step {largest['step']}, "
            f"between {' and '.join(largest['between'])}."
        )
    within = losses.get("largest_within_a_setting")
    if within is not None:
        summary += f" Repeats of one setting differ by {format_number(within)} at most."
    if losses.get("note"):
        summary += f" {losses['note']}"
    every = max(math.ceil(len(steps) / MAX_LOSS_ROWS), 1)
    chosen = sorted({*range(0, len(steps), every), len(steps) - 1})
    cells = [[f"{steps[i]:,}", *(_loss(run["loss"][i]) for run in losses["by_run"])] for i in chosen]
    caption = f"Every {every} logged steps, and the last." if every > 1 else "Every logged step."
    numbers = elements.table(["step", *(run["run"] for run in losses["by_run"])], cells, caption=caption)
    if not any(math.isfinite(loss) for each in series for _, loss in each.points):
        return elements.section(title, elements.note("All losses are NaN or infinite."), numbers)
    image = line_plot("Loss by step", series, "step", "loss")
    return elements.section(
        title,
        elements.note(summary),
        elements.figure(image, "Loss of each run.", numbers, series_legend(series, lines=True)),
    )


def _figure(loss: float | None) -> float:
    """NaN for a loss that was not logged, which is a gap in the curve."""
    return math.nan if loss is None else float(loss)


def _loss(loss: float | None) -> str:
    return "not logged" if loss is None else f"{loss:.4f}"


def _runs(comparison: Comparison) -> Markup:
    keys = list(dict.fromkeys(key for run in comparison["runs"] for key in run["values"]))
    cells = [
        [run["name"], run["folder"], f"{run['repeats']}", *(str(run["values"].get(key, "")) for key in keys)]
        for run in comparison["runs"]
    ]
    return elements.section("Runs", elements.table(["run", "folder", "repeats", *keys], cells, text_columns=(0, 1)))


def _varied(varied: Mapping[str, Sequence[Any]]) -> str:
    if not varied:
        return "No key was varied."
    return "Varied: " + "; ".join(f"{key} = {', '.join(map(str, values))}" for key, values in varied.items())


def _range(ends: Sequence[float | None] | None, formatter: Callable[[float], str]) -> str | None:
    if not ends or ends[0] is None or ends[1] is None:
        return None
    return f"{formatter(ends[0])} to {formatter(ends[1])}"


def _or_none(value: float | None, formatter: Callable[[float], str]) -> str | None:
    return None if value is None else formatter(value)
