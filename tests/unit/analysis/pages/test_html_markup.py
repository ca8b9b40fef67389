"""Elements, figures and scales that pages are made of."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from page_reading import read_page

from quadriga.analysis.pages.markup import TEMPLATES, UNSAFE, tag
from quadriga.analysis.pages.numbers import (
    Column,
    format_decimal_bytes,
    format_duration,
    format_number,
    format_share,
    format_whole,
    trim_zeros,
)
from quadriga.analysis.pages.scales import linear, logarithmic


@given(st.text(), st.text())
@example("\x1b[2J\ud800\x00\u202e", "\ud800\r\x07")
def test_whatever_a_name_holds_stays_text(name, hint):
    """But for control characters, halves of pairs and marks of direction: these are replaced, one for one."""
    text = tag("p", name, tag("b", "bold"), title=hint)
    text.encode()
    page = read_page(text)
    assert [element.name for element in page.inner] == ["p"]
    assert page.inner[0].text == UNSAFE.sub("\ufffd", name) + "bold"
    assert page.inner[0].attributes["title"] == UNSAFE.sub("\ufffd", hint)


def test_attributes_and_children():
    assert tag("rect", None, x=1.0, stroke_width=0.126, class_="a", dash=None) == (
        '<rect x="1" stroke-width="0.13" class="a"></rect>'
    )
    assert tag("p", "a<b", None, tag("i", "&")) == "<p>a&lt;b<i>&amp;</i></p>"
    assert tag("p", "".join([*tag("i")])) == "<p>&lt;i&gt;&lt;/i&gt;</p>", "a plain copy of markup is text again"


@given(st.text())
@example("\x1b[2J\ud800\x00\u202e<script>")
def test_templates_write_text_as_elements_do(name):
    rows = [{"name": name, "figure": None}, {"name": "plain", "figure": 0.5}]
    columns = [Column(name, "name"), Column("figure", "figure", str), Column("none", "missing")]
    source = '{% from "pages/elements.jinja" import table, reasons %}{{ table(columns, rows, name) }}{{ reasons(why) }}'
    text = TEMPLATES.from_string(source).render(columns=columns, rows=rows, name=name, why={name: None})
    page, shown = read_page(text), UNSAFE.sub("\ufffd", name)
    assert [each.text for each in page.all("th")] == [shown, "figure", "none", shown, "plain"]
    assert [each.text for each in page.all("td")] == ["not measurable", "not measurable", "0.5", "not measurable"]
    assert page.all("li")[0].text == f"{shown}: not measurable: no reason was recorded"
    assert not page.all("caption") if not name else page.all("caption")[0].text == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.01234, "0.0123"), (12.345, "12.3"), (1234.5, "1,230"), (-5.5, "−5.50"), (1e-5, "1.00e-5"),
     (2.5e9, "2.50e9"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_have_three_digits(value, shown):
    assert format_number(value) == shown


def test_units():
    assert [format_duration(s) for s in (1.234, 0.0456, 7.89e-6, 0, 0.9999)] == [
        "1.23 s",
        "45.6 ms",
        "7.89 µs",
        "0 s",
        "1.00 s",
    ]
    assert [format_share(0.2539), format_share(-0.01)] == ["25.4 %", "−1.0 %"]
    assert [format_whole(1234), format_whole(1234.0), format_whole(2.5)] == ["1,234", "1,234", "2.5"]
    assert [format_decimal_bytes(b) for b in (10.0, 1000, 2_500_000, 1e9)] == ["10 B", "1 kB", "2.5 MB", "1 GB"]
    assert [trim_zeros(t) for t in ("0.920", "50.0 ms", "1,000", "10.05", "100")] == [
        "0.92",
        "50 ms",
        "1,000",
        "10.05",
        "100",
    ]


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
@example([0.0, 5e-324])
@example([1e9, 1e9 + 1e-6])
def test_a_linear_scale_holds_its_values(values):
    scale = linear(values, 10, 110)
    assert all(10 - 1e-6 <= scale(value) <= 110 + 1e-6 for value in values)
    assert 2 <= len(scale.ticks()) <= 9
    assert all(10 - 1e-6 <= scale(tick) <= 110 + 1e-6 for tick in scale.ticks())


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=20))
def test_a_logarithmic_scale_holds_its_values(values):
    scale = logarithmic(values, 100, 0)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)
    assert len(scale.ticks()) >= 2


def test_scales_by_hand():
    scale = linear([0.3, 4.1], 0, 100, from_zero=True)
    assert (scale.low, scale.high) == (0, 5)
    assert scale(2.5) == 50
    assert scale.ticks() == [0, 1, 2, 3, 4, 5]
    log = logarithmic([20, 900], 0, 100)
    assert (log.low, log.high) == (10, 1000)
    assert log(100) == pytest.approx(50)
    assert log.ticks() == pytest.approx([10, 20, 50, 100, 200, 500, 1000])
    assert logarithmic([1, 1e9], 0, 1).ticks() == pytest.approx([1, 1e2, 1e4, 1e6, 1e8])
