"""Pictures: what is drawn is where the figures say, and as long."""

from __future__ import annotations

import math
import re

import pytest
from page_reading import Element, read_page

from quadriga.analysis.pages.charts import LEFT, RIGHT, WIDTH, Bar, BarPart, Strip, stacked_bars, timeline_chart
from quadriga.analysis.pages.plots import (
    MEANINGS_WIDTH,
    NAMES_WIDTH,
    Interval,
    Series,
    interval_plot,
    line_plot,
    log_log_plot,
    series_legend,
)
from quadriga.analysis.pages.scales import linear, logarithmic
from quadriga.analysis.pages.style import DARK, LIGHT, ON_DARK, ON_LIGHT

ROOM = WIDTH - LEFT - RIGHT


def numbers(elements: list[Element], *names: str) -> list[tuple[float, ...]]:
    return [tuple(float(each.attributes[name]) for name in names) for each in elements]


def test_bars_are_as_long_as_their_figures():
    parts = [BarPart("compute", 0), BarPart("waiting", 1)]
    drawn = read_page(stacked_bars("t", parts, [Bar("rank 0", [6.0, 2.0], 10.0), Bar("rank 1", [3.0, None])], "s"))
    compute, waiting = (numbers(drawn.all("rect", f"fill{i}"), "x", "width") for i in (0, 1))
    assert compute == [(LEFT, pytest.approx(0.6 * ROOM - 1, abs=0.02)), (LEFT, pytest.approx(0.3 * ROOM - 1, abs=0.02))]
    assert waiting == [(pytest.approx(LEFT + 0.6 * ROOM, abs=0.02), pytest.approx(0.2 * ROOM - 1, abs=0.02))]
    tick = drawn.all("line", "axis")[0]
    assert float(tick.attributes["x1"]) == pytest.approx(LEFT + ROOM)
    assert "rank 0, waiting: 2.00 s" in drawn.text


def test_a_bar_without_any_figure_says_so():
    drawn = read_page(stacked_bars("t", [BarPart("a", 0)], [Bar("x", [None]), Bar("y", [1.0])], "s"))
    assert len(drawn.all("rect")) == 1
    assert "not measurable" in drawn.text


def test_strips_begin_where_their_spans_begin():
    spans = [(10.0, 12.0, "<a>"), (14.0, 20.0, "b")]
    drawn = read_page(
        timeline_chart("t", [Strip("rank 0", "compute", 0, spans), Strip("rank 1", "host", 6, [])], 10.0, "s")
    )
    found = numbers(drawn.all("rect", "fill0"), "x", "width")
    assert found == [
        (LEFT, pytest.approx(0.2 * ROOM, abs=0.02)),
        (pytest.approx(LEFT + 0.4 * ROOM), pytest.approx(0.6 * ROOM)),
    ]
    assert "<a>: 2.00 s, from 0 s" in drawn.text
    assert len(drawn.all("rect", "stream")) == 2


def test_a_timeline_of_idle_lanes_is_drawn():
    assert len(read_page(timeline_chart("t", [Strip("rank 0", "host", 6, [])], 0.0, "s")).all("rect")) == 1


def test_points_lie_on_logarithmic_axes():
    series = [Series("a", 0, [(1e3, 1.0), (1e6, 10.0), (1e9, 100.0)])]
    drawn = read_page(log_log_plot("t", series, "bytes", "GB/s", str, str))
    (x0, y0), (x1, y1), (x2, y2) = numbers(drawn.all("circle"), "cx", "cy")
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.02)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.02)
    assert y0 > y2, "more is higher"


def test_a_hole_in_a_curve_is_a_hole():
    points = [(1.0, 5.0), (2.0, math.nan), (3.0, 4.0), (4.0, 3.0)]
    drawn = read_page(line_plot("t", [Series("a", 1, points)], "step", "loss"))
    lines = drawn.all("path", "line1")
    assert [len(re.findall(r"[\d.]+,[\d.]+", line.attributes["d"])) for line in lines] == [1, 2]


def test_series_differ_by_more_than_colour():
    legend = read_page(series_legend([Series(f"s{i}", i, []) for i in range(6)], lines=True))
    dashes = [
        path.attributes.get("stroke-dasharray") for path in legend.all("path") if "stroke" in str(path.attributes)
    ]
    marks = [item.all("circle") or item.all("path")[-1].attributes["d"] for item in legend.all("li")]
    assert len(set(dashes)) == 5  # five dashes, and the one line that has none
    assert len({str(mark) for mark in marks}) == 6


def test_intervals_stand_around_the_line_of_no_difference():
    rows = [Interval("a / b", 0.9, 0.8, 1.0, "faster", 0), Interval("c / b", 1.1, 0.9, 1.3, "no difference shown", 6)]
    drawn = read_page(interval_plot("t", rows, "ratio"))
    one = float(drawn.all("line", "axis")[0].attributes["x1"])
    (a, _), (c, _) = numbers(drawn.all("circle"), "cx", "cy")
    assert one - a == pytest.approx(c - one, abs=0.02)
    bars = numbers(drawn.all("line", "line6")[:1], "x1", "x2")
    assert bars[0][0] < one < bars[0][1]
    assert all(NAMES_WIDTH <= x <= WIDTH - MEANINGS_WIDTH for x in (a, c, one))


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("words", "data"), [(LIGHT, ON_LIGHT), (DARK, ON_DARK)])
def test_text_can_be_read_and_marks_be_seen(words, data):
    assert all(contrast(words[name], words["ground"]) >= 4.5 for name in ("text", "muted"))
    assert contrast(words["warn"], words["warn-ground"]) >= 4.5
    assert contrast(words["muted"], words["raised"]) >= 4.5
    assert all(contrast(colour, words["ground"]) >= 1.8 for colour in data)


@pytest.mark.parametrize("values", [[0.0, 1.7e308], [1.7e308] * 2, [1e308, 1.7e308], [-1e308, 1e308], [5e-324, 1.0]])
def test_a_scale_of_huge_or_tiny_numbers_has_ticks(values):
    scales = [linear(values, 0.0, 100.0)] + ([logarithmic(values, 0.0, 100.0)] if min(values) > 0 else [])
    assert all(math.isfinite(scale(tick)) for scale in scales for tick in scale.ticks())


def test_a_huge_loss_is_a_gap():
    drawn = read_page(line_plot("t", [Series("a", 0, [(1, 2.0), (2, 1e308), (3, 3.0), (4, 3.5)])], "step", "loss"))
    assert len(drawn.all("circle", "fill0")) == 3
