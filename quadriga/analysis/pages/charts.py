"""Charts of time: stacked bars by rank, and a timeline of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quadriga.analysis.pages.markup import tag
from quadriga.analysis.pages.numbers import format_duration, trim_zeros
from quadriga.analysis.pages.scales import Scale, linear

WIDTH = 960.0
LEFT, RIGHT = 185.0, 36.0  # margins of the picture: names on the left, the end of the axis on the right
BAR, GAP = 24.0, 10.0
STRIP, STRIP_GAP, RANK_GAP = 15.0, 2.0, 10.0
AXIS = 46.0
THINNEST = 0.7  # least width of a span, so that short ones are visible
LETTER = 8.2  # mean width of a letter


@dataclass(frozen=True)
class BarPart:
    """One part of all bars: its name and the index of its colour."""

    name: str
    colour: int


@dataclass(frozen=True)
class Bar:
    """One bar: a value or None for each part, and the value of the whole bar, if it is known."""

    name: str
    values: Sequence[float | None]
    whole: float | None = None


@dataclass(frozen=True)
class Strip:
    """One stream of one rank: spans (start, end, name) in seconds."""

    rank: str
    stream: str
    colour: int
    spans: Sequence[tuple[float, float, str]]


def picture(title: str, height: float, *parts: str | None) -> Markup:
    """An SVG as wide as its container. `title`: for screen readers."""
    box = f"0 0 {WIDTH:.0f} {height:.0f}"
    return tag("svg", tag("title", title), *parts, class_="picture", viewBox=box, role="img", aria_label=title)


def legend(parts: Sequence[BarPart]) -> Markup:
    """Colours and their names, in the order of the parts."""
    return tag("ul", *(tag("li", _swatch(part.colour), part.name) for part in parts), class_="legend")


def _swatch(colour: int) -> Markup:
    square = tag("rect", width=16, height=12, rx=2, class_=f"fill{colour}")
    return tag("svg", square, width=16, height=12, aria_hidden="true")


def stacked_bars(title: str, parts: Sequence[BarPart], bars: Sequence[Bar], axis_title: str) -> Markup:
    """One bar per row, with its parts, in seconds, side by side in order. A tick marks the whole bar, if known."""
    longest = [max(sum(v for v in bar.values if v is not None), bar.whole or 0.0) for bar in bars]
    scale = linear([*longest, 0.0], LEFT, WIDTH - RIGHT, from_zero=True)
    foot = len(bars) * (BAR + GAP)
    drawn = [_bar(bar, parts, scale, index * (BAR + GAP) + GAP / 2) for index, bar in enumerate(bars)]
    return picture(title, foot + AXIS, horizontal_axis(scale, 0.0, foot, axis_title, format_duration), *drawn)


def _bar(bar: Bar, parts: Sequence[BarPart], scale: Scale, top: float) -> Markup:
    marks, reached = [], 0.0
    for part, value in zip(parts, bar.values, strict=True):
        if not value:
            continue
        start, end, shown = scale(reached), scale(reached + value), format_duration(value)
        hint = tag("title", f"{bar.name}, {part.name}: {shown}")
        marks.append(_box(start, top, max(end - start - 1, THINNEST), BAR, f"fill{part.colour}", hint))
        if end - start > (len(shown) + 1.5) * LETTER:
            marks.append(_inside(shown, (start + end) / 2, top + BAR / 2 + 4.5))
        reached += value
    if all(value is None for value in bar.values):
        marks.append(tag("text", "not measurable", x=scale.start + 8, y=top + BAR / 2 + 4.5, class_="small"))
    if bar.whole is not None:
        at = scale(bar.whole)
        marks.append(tag("line", x1=at, x2=at, y1=top - 3, y2=top + BAR + 3, class_="axis"))
    return tag("g", row_name(bar.name, top + BAR / 2), *marks)


def _inside(text: str, x: float, y: float) -> Markup:
    """A label in a bar: dark letters with a light outline are readable on every colour."""
    look = "fill:#111;stroke:#fff;stroke-width:3px;paint-order:stroke;stroke-linejoin:round"
    return tag("text", text, x=x, y=y, text_anchor="middle", style=look)


def _box(x: float, y: float, width: float, height: float, class_: str, hint: str | None = None) -> Markup:
    return tag("rect", hint, x=x, y=y, width=width, height=height, class_=class_)


def row_name(name: str, middle: float, width: float = LEFT) -> Markup:
    """The name to the left of a row. A long name is truncated, and its tooltip has the whole."""
    most = int((width - 10) / LETTER)
    shown = name if len(name) <= most else name[: most - 1] + "…"
    return tag("text", tag("title", name), shown, x=width - 10, y=middle + 4.5, text_anchor="end")


def horizontal_axis(scale: Scale, top: float, foot: float, title: str, formatter: Callable[[float], str]) -> Markup:
    """Grid lines from `top` to `foot` at the ticks, with their labels and the title of the axis."""
    drawn = []
    for value in scale.ticks():
        at = scale(value)
        drawn.append(tag("line", x1=at, x2=at, y1=top, y2=foot, class_="grid"))
        drawn.append(tag("text", trim_zeros(formatter(value)), x=at, y=foot + 17, text_anchor="middle", class_="small"))
    middle = (scale.start + scale.end) / 2
    drawn.append(tag("text", title, x=middle, y=foot + 36, text_anchor="middle", class_="small"))
    return tag("g", *drawn)


def timeline_chart(title: str, strips: Sequence[Strip], start: float, axis_title: str) -> Markup:
    """The strips of all ranks below each other, on one time axis that begins at `start` seconds."""
    longest = max((end - start for strip in strips for _, end, _ in strip.spans), default=0.0) or 1.0
    scale = Scale(0.0, longest, LEFT, WIDTH - RIGHT)
    drawn, top, rank = [], 0.0, None
    for strip in strips:
        if strip.rank != rank:
            top += RANK_GAP
            drawn.append(tag("text", strip.rank, x=0, y=top + STRIP - 3))
        rank = strip.rank
        drawn.append(_strip(strip, scale, start, top))
        top += STRIP + STRIP_GAP
    return picture(title, top + AXIS + 4, horizontal_axis(scale, 0.0, top + 4, axis_title, format_duration), *drawn)


def _strip(strip: Strip, scale: Scale, start: float, top: float) -> Markup:
    ground = _box(scale.start, top, scale.end - scale.start, STRIP, "stream")
    name = tag("text", strip.stream, x=LEFT - 10, y=top + STRIP - 3.5, text_anchor="end", class_="small")
    spans = []
    for begins, ends, what in strip.spans:
        left, right = scale(begins - start), scale(ends - start)
        hint = tag("title", f"{what}: {format_duration(ends - begins)}, from {format_duration(begins - start)}")
        spans.append(_box(left, top, max(right - left, THINNEST), STRIP, f"fill{strip.colour}", hint))
    return tag("g", ground, name, *spans)
