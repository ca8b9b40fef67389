"""Plots: points on logarithmic axes, curves, and intervals around ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from quadriga.analysis.pages.charts import AXIS, RIGHT, WIDTH, horizontal_axis, picture, row_name
from quadriga.analysis.pages.markup import tag
from quadriga.analysis.pages.numbers import format_number, trim_zeros
from quadriga.analysis.pages.scales import LARGEST, Scale, linear, logarithmic

HEIGHT = 380.0  # of the space between the axes
TOP = 14.0
SIDE = 84.0  # for the labels of the vertical axis
DASHES = (None, "7 4", "2 4", "10 3 2 3", "14 4", "4 2", "1 2")
DOT = 4.6
ROW = 34.0
NAMES_WIDTH, MEANINGS_WIDTH = 330.0, 180.0  # margins of the interval plot
Formatter = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Points (x, y) with one colour, marker and dash, which differ without colours too. `index` selects them."""

    name: str
    index: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A value with its interval and its meaning, such as a verdict."""

    name: str
    value: float
    low: float
    high: float
    meaning: str
    colour: int


def marker(index: int, x: float, y: float, hint: str | None = None, size: float = DOT) -> Markup:
    """The marker of a series by index: circle, square, triangle, diamond, inverted triangle, cross."""
    shapes = (
        None, "M-1,-1 H1 V1 H-1 Z", "M0,-1.2 L1.15,0.9 H-1.15 Z", "M0,-1.35 L1.35,0 L0,1.35 L-1.35,0 Z",
        "M0,1.2 L1.15,-0.9 H-1.15 Z", "M-1,-0.35 H-0.35 V-1 H0.35 V-0.35 H1 V0.35 H0.35 V1 H-0.35 V0.35 H-1 Z",
    )  # fmt: skip
    shape, colour = shapes[index % len(shapes)], f"fill{index % len(DASHES)}"
    inner = tag("title", hint) if hint else None
    if shape is None:
        return tag("circle", inner, cx=x, cy=y, r=size, class_=colour)
    return tag("path", inner, d=shape, transform=f"translate({x:.2f} {y:.2f}) scale({size:.2f})", class_=colour)


def series_legend(series: Sequence[Series], *, lines: bool) -> Markup:
    """Markers and names; with `lines`, dashes too."""
    listed = []
    for each in series:
        dash = _line([(0.0, 7.0), (30.0, 7.0)], each.index) if lines else None
        swatch = tag("svg", dash, marker(each.index, 15, 7), width=30, height=14, aria_hidden="true")
        listed.append(tag("li", swatch, each.name))
    return tag("ul", *listed, class_="legend")


def log_log_plot(
    title: str, series: Sequence[Series], x_title: str, y_title: str, x_formatter: Formatter, y_formatter: Formatter
) -> Markup:
    """Points on two logarithmic axes. Values must be above 0."""
    points = [(each, *point) for each in series for point in each.points]
    x = logarithmic([a for _, a, _ in points], SIDE, WIDTH - RIGHT)
    y = logarithmic([b for _, _, b in points], TOP + HEIGHT, TOP)
    hints = [f"{each.name}: {x_formatter(a)}, {y_formatter(b)}" for each, a, b in points]
    marks = [marker(each.index, x(a), y(b), hint) for (each, a, b), hint in zip(points, hints, strict=True)]
    frame = (horizontal_axis(x, TOP, TOP + HEIGHT, x_title, x_formatter), _vertical_axis(y, y_title, y_formatter))
    return picture(title, TOP + HEIGHT + AXIS, *frame, *marks)


def line_plot(title: str, series: Sequence[Series], x_title: str, y_title: str) -> Markup:
    """One line per series, through its points in order. A NaN, infinite or huge value is a gap."""
    finite = [point for each in series for point in each.points if _is_drawn(point[1])]
    x = linear([point[0] for point in finite], SIDE, WIDTH - RIGHT)
    y = linear([point[1] for point in finite], TOP + HEIGHT, TOP)
    drawn: list[Markup] = []
    for each in series:
        drawn += [_line([(x(a), y(b)) for a, b in run], each.index) for run in _unbroken(each.points)]
        every = max(len(each.points) // 12, 1)
        for a, b in each.points[each.index % every :: every]:
            hint = f"{each.name}, {format_number(a)}: {format_number(b)}"
            drawn += [marker(each.index, x(a), y(b), hint)] if _is_drawn(b) else []
    frame = (horizontal_axis(x, TOP, TOP + HEIGHT, x_title, format_number), _vertical_axis(y, y_title, format_number))
    return picture(title, TOP + HEIGHT + AXIS, *frame, *drawn)


def _is_drawn(value: float) -> bool:
    return abs(value) <= LARGEST  # False for NaN


def _unbroken(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The runs of points whose values are drawn."""
    runs = groupby(points, key=lambda point: _is_drawn(point[1]))
    return [list(run) for is_drawn, run in runs if is_drawn]


def _line(points: Sequence[tuple[float, float]], index: int) -> Markup:
    way, style = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points), index % len(DASHES)
    return tag("path", d=way, class_=f"line{style}", stroke_dasharray=DASHES[style])


def _vertical_axis(scale: Scale, title: str, formatter: Formatter) -> Markup:
    drawn = []
    for value in scale.ticks():
        at = scale(value)
        drawn.append(tag("line", x1=SIDE, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        drawn.append(tag("text", trim_zeros(formatter(value)), x=SIDE - 8, y=at + 4, text_anchor="end", class_="small"))
    middle = TOP + HEIGHT / 2
    turned = f"translate(14 {middle:.0f}) rotate(-90)"
    return tag("g", *drawn, tag("text", title, transform=turned, text_anchor="middle", class_="small"))


def interval_plot(title: str, rows: Sequence[Interval], axis_title: str, reference: float = 1.0) -> Markup:
    """Values with their intervals, and a line at `reference`. An interval that contains it shows no difference."""
    ends = [end for row in rows for end in (row.low, row.high, row.value)]
    scale = linear([*ends, reference], NAMES_WIDTH, WIDTH - MEANINGS_WIDTH)
    foot = len(rows) * ROW
    drawn = [_interval(row, scale, index * ROW + ROW / 2) for index, row in enumerate(rows)]
    at = scale(reference)
    line = tag("line", x1=at, x2=at, y1=0, y2=foot, class_="axis")
    return picture(title, foot + AXIS, horizontal_axis(scale, 0.0, foot, axis_title, format_number), line, *drawn)


def _interval(row: Interval, scale: Scale, middle: float) -> Markup:
    low, high, hint = scale(row.low), scale(row.high), f"{row.name}: {format_number(row.value)}"
    ends = [tag("line", x1=x, x2=x, y1=middle - 6, y2=middle + 6, class_=f"line{row.colour}") for x in (low, high)]
    bar = tag("line", x1=low, x2=high, y1=middle, y2=middle, class_=f"line{row.colour}")
    dot = tag("circle", tag("title", hint), cx=scale(row.value), cy=middle, r=5, class_=f"fill{row.colour}")
    meaning = tag("text", row.meaning, x=WIDTH - MEANINGS_WIDTH + 14, y=middle + 4.5)
    return tag("g", row_name(row.name, middle, NAMES_WIDTH), bar, *ends, dot, meaning)
