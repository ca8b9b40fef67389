"""A comparison as text for a terminal: first the answer, in one sentence per setting, then the table and the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quadriga.analysis.compare.comparison import NO_DIFFERENCE, NOT_VERIFIED, TOO_FEW
from quadriga.analysis.compare.statistics import FEWEST_PAIRS
from quadriga.analysis.pages.numbers import aligned_lines
from quadriga.units import plural

Comparison = dict[str, Any]


def format_comparison(comparison: Comparison) -> Iterator[str]:
    yield from format_answers(comparison)
    yield ""
    yield from _setup(comparison)
    yield ""
    yield from _table(comparison)
    yield ""
    yield from _where(comparison)
    yield from _losses(comparison["losses"])
    yield from _backends(comparison)
    yield from _warnings(comparison)


def format_answers(comparison: Comparison) -> Iterator[str]:
    """One sentence for each setting except the first. Percentages are of speed: steps or tokens per second."""
    name = comparison["headline"]
    figure = next((each for each in comparison["figures"] if each["name"] == name), None)
    if figure is None or not figure["ratios"]:
        why = "a run has no finite value of it" if figure is None else "its median is not above 0 in every run"
        yield f"no answer: {name} cannot be compared: {why}"
        return
    for ratio in figure["ratios"]:
        yield _answer(ratio, figure, comparison)


def _answer(ratio: dict[str, Any], figure: dict[str, Any], comparison: Comparison) -> str:
    run, other = ratio["run"], ratio["against"]
    medians = {each["run"]: format_value(each["median"], figure["unit"]) for each in figure["by_run"]}
    measured = f"{other} {medians[other]}, {run} {medians[run]}"
    pairs = plural(ratio["pairs"], "pair")
    if ratio["verdict"] == TOO_FEW:
        return f"too few runs: {pairs}, at least {FEWEST_PAIRS} are needed ({measured})"
    low, high = speed_interval(ratio, figure["lower_is_better"])
    interval = f"{_level(ratio)} interval {_range(low, high)}, {pairs}"
    if ratio["verdict"] == NO_DIFFERENCE:
        change = round(100 * (speed_ratio(ratio["ratio"], figure["lower_is_better"]) - 1), 1) + 0.0  # no -0.0
        return f"no difference shown between {other} and {run} (speed {change:+.1f} %, {interval}; {measured})"
    if ratio["verdict"] == NOT_VERIFIED:
        reasons = {each["run"]: each["why"] for each in comparison["backend"] if not each["credited"]}
        why = "; ".join(f"{name}: {reasons[name]}" for name in (other, run) if name in reasons)
        return f"no winner is named between {other} and {run} ({why}); measured: {measured}, {interval}"
    speed = speed_ratio(ratio["ratio"], figure["lower_is_better"])
    if speed > 1:
        return f"{run} is {100 * (speed - 1):.1f} % faster than {other} ({interval}; {measured})"
    interval = f"{_level(ratio)} interval {_range(2 - high, 2 - low)}, {pairs}"
    return f"{run} is {100 * (1 - speed):.1f} % slower than {other} ({interval}; {measured})"


def speed_ratio(ratio: float, lower_is_better: bool) -> float:
    """The ratio of speeds for a ratio of a figure."""
    return 1 / ratio if lower_is_better else ratio


def speed_interval(ratio: dict[str, Any], lower_is_better: bool) -> tuple[float, float]:
    low, high = sorted(speed_ratio(end, lower_is_better) for end in ratio["interval"])
    return low, high


def _range(low: float, high: float) -> str:
    """Two ratios as changes in percent: 1.02 and 1.063 -> `2.0 to 6.3 %`."""
    return f"{100 * (low - 1):.1f} to {100 * (high - 1):.1f} %"


def _level(ratio: dict[str, Any]) -> str:
    return f"{100 * ratio['confidence']:.3g} %"


def format_value(value: float | None, unit: str) -> str:
    """A figure with its unit and four digits; `not measurable` for None."""
    if value is None:
        return "not measurable"
    shown = {"s": f"{value:.4g} s", "GiB": f"{value:.2f} GiB", "share": f"{100 * value:.2f} %"}
    return shown.get(unit, f"{value:,.0f}" if 1000 <= value < 1e15 else f"{value:,.4g}")


def _setup(comparison: Comparison) -> Iterator[str]:
    varied = comparison["varied"]
    for key, values in varied.items():
        yield f"varied: {key} = {', '.join(map(str, values))}"
    if not varied:
        yield "nothing was varied: the runs have the same configuration"
    for run in comparison["runs"]:
        yield f"  {run['name']}: {plural(run['repeats'], 'run')} in {run['folder']}"
    yield f"the first {comparison['warmup_steps']} steps of each run are excluded"


def _table(comparison: Comparison) -> Iterator[str]:
    """Rows by figure and setting: median, middle half, and ratio to the first setting."""
    rows = [("", "", "median", "middle half", "against the first", "interval", "")]
    for figure in comparison["figures"]:
        ratios = {ratio["run"]: ratio for ratio in figure["ratios"]}
        name, unit = figure["name"], figure["unit"]
        label = f"{name}, {unit}" if unit.startswith("T") else str(name)
        for each in figure["by_run"]:
            middle, low, high = (format_value(value, unit) for value in (each["median"], *each["spread"]))
            ratio_cells = _ratio_cells(ratios[each["run"]]) if each["run"] in ratios else ("", "", "")
            rows.append((label, each["run"], middle, f"{low} - {high}", *ratio_cells))
            label = ""
    return _aligned(rows)


def _ratio_cells(ratio: dict[str, Any]) -> tuple[str, str, str]:
    interval = _range(*ratio["interval"]) if ratio["interval"] else ""
    return f"{100 * (ratio['ratio'] - 1):+.1f} %", interval, ratio["verdict"]


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Aligned columns: the first two and the last to the left, the others to the right."""
    return aligned_lines(rows, [False, False, *[True] * (len(rows[0]) - 3), False])


def _where(comparison: Comparison) -> Iterator[str]:
    rows = comparison["where"]
    if rows is None:
        yield f"where the time went: not measurable: {comparison['not_measurable']['where']}"
        yield ""
        return
    yield "where the time of a traced step went (mean over ranks; the profiler slows these steps)"
    names = [run["name"] for run in comparison["runs"]]
    table = [("", "", *names, "")]
    for row in rows:
        part = row["part"].removesuffix("_s").replace("_", " ")
        shown = [format_value(each["seconds"], "s") for each in row["by_run"]]
        table.append((part, "", *shown, ""))
    yield from _aligned(table)
    yield ""


def _losses(losses: dict[str, Any]) -> Iterator[str]:
    largest, within = losses["largest_difference"], losses["largest_within_a_setting"]
    noise = "" if within is None else f"; repeats of one setting differ by at most {within:.3g}"
    if largest is None:
        what = "has a finite loss in all runs" if losses["steps"] else "was logged by all runs"
        yield f"losses: no step {what}"
    elif largest["value"]:
        between = " and ".join(largest["between"])
        yield f"losses: at most {largest['value']:.3g} apart, at step {largest['step']}, between {between}{noise}"
    else:
        yield f"losses: equal to the last digit at all {len(losses['steps'])} logged steps{noise}"
    if losses["note"]:
        yield f"losses: {losses['note']}"


def _backends(comparison: Comparison) -> Iterator[str]:
    for each in comparison["backend"]:
        yield f"backend of {each['run']}: asked for {each['asked']}; {each['why']}"


def _warnings(comparison: Comparison) -> Iterator[str]:
    own = [f"{run['name']}: {warning}" for run in comparison["runs"] for warning in run["warnings"]]
    for warning in [*comparison["warnings"], *own]:
        yield f"warning: {warning}"
