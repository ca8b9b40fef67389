"""The page of a trace says what the analysis says: the answer first, every figure, and why one is missing."""

from __future__ import annotations

import copy

import pytest
from page_reading import assert_page_rules
from page_samples import EVIL, analysis, bare_analysis

from quadriga.analysis.trace.page import trace_page, trace_sentences


def test_the_answer_stands_before_any_picture():
    text = trace_page(analysis())
    assert text.index("60.0 % compute, 22.0 % exposed communication") < text.index("<svg")
    assert trace_sentences(analysis()) == [
        "A step takes 419.4 ms on average (410 ms to 440 ms): 60.0 % compute, 22.0 % exposed communication, "
        "10.0 % waiting for the host.",
        "The slowest rank is 3: its own time is 10.0 ms (2.4 %) per step longer than that of the median rank.",
        "Most of the exposed communication: reduce_scatter on axis shard over nccl, 44.0 ms per step.",
    ]


def test_every_figure_is_there_and_names_stay_names():
    read = assert_page_rules(trace_page(analysis()))
    assert EVIL in read.text
    for shown in (
        "rank 2's clock is 3 ms ahead",
        "252 ms",
        "28.07 GiB",
        "matrix products",
        "30,144,000,000",
        "different",
    ):
        assert shown in read.text, shown
    assert "1 of 2 rows differ from the estimate." in read.text
    assert len(read.all("svg", "picture")) == 3
    assert "name only" in read.text


def test_missing_figures_say_why_and_are_no_zeros():
    read = assert_page_rules(trace_page(analysis()))
    assert "waiting for data: not measurable: the trace has no range around the loader" in read.text
    assert f"transfer per call, tp {EVIL}: not measurable: ranks without `Seq` cannot be matched" in read.text
    assert "algorithm GB/s: not measurable: no reason was recorded" in read.text
    assert "waiting for data" not in read.all("table")[0].text, "a column in which nothing could be had is left out"
    speed = next(table for table in read.all("table") if "Speed." in table.text)
    assert [cell.text for cell in speed.all("tr")[-1].inner[4:]] == ["not measurable"] * 4


def test_an_empty_trace_has_a_page():
    read = assert_page_rules(trace_page(bare_analysis()))
    assert "A step takes 1.5 s on average; what took it is not measurable from this trace." in read.text
    assert "not measurable: the trace has no CPU operations" in read.text
    assert "not measurable: the folder holds no estimate.json" in read.text
    assert len(read.all("svg", "picture")) == 1


def test_what_is_left_of_a_step_is_named():
    text = assert_page_rules(trace_page(analysis())).text
    assert "rank 0, rest: 21.0 ms" in text  # 5 % of 419 ms
    whole = copy.deepcopy(analysis())
    for rank in whole["by_rank"]:
        rank["mean"]["host_idle_s"] = 0.15 * rank["mean"]["seconds"]
    assert "rank 0, rest" not in assert_page_rules(trace_page(whole)).text


def test_how_long_a_lane_was_busy_is_not_read_off_its_strip():
    """Strips are coarse; step 8 of rank 0 took 0.415 s and computed 0.6 of it."""
    read = assert_page_rules(trace_page(analysis()))
    lanes = next(table for table in read.all("table") if "This step by stream." in table.text)
    first = [[cell.text for cell in row.inner[:3]] for row in lanes.all("tr")[1:5]]
    assert first == [
        ["rank 0", "compute", "249 ms"],
        ["rank 0", "communication", "145 ms"],
        ["rank 0", "memcpy", "20.8 ms"],
        ["rank 0", "host", "not measurable"],
    ]


NULLABLE = [key for key, value in analysis()["collectives"][0].items() if key not in ("axis", "collective", "sizes")]


@pytest.mark.parametrize("key", NULLABLE)
def test_any_figure_of_a_collective_may_be_missing(key):
    holed = analysis()
    for row in holed["collectives"]:
        row[key] = None
    assert "None" not in assert_page_rules(trace_page(holed)).text


@pytest.mark.parametrize("ranks", [1, 64])
def test_pages_of_any_number_of_ranks(ranks):
    text = trace_page(analysis(ranks))
    assert len(assert_page_rules(text).all("rect", "stream")) == 4 * ranks
    assert len(text) < 60_000 + 60_000 * ranks
