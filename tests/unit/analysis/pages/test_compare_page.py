"""The page of a comparison: the refusal or the answer first, then who carried the bytes, pictures, every figure."""

from __future__ import annotations

from page_reading import assert_page_rules
from page_samples import EVIL, comparison

from quadriga.analysis.compare.page import comparison_page, comparison_sentences
from quadriga.analysis.compare.report import format_answers


def test_the_answer_is_that_of_the_terminal():
    (sentence,) = comparison_sentences(comparison())
    assert sentence == "No winner" + f"{next(format_answers(comparison()))}."[len("no winner") :]
    assert "(nvshmem: no byte of axis shard went through it)" in sentence
    honest = comparison() | {"backend": []}
    honest["figures"][0]["ratios"][0]["verdict"] = "faster"
    assert comparison_sentences(honest)[0].startswith(
        "nvshmem is 6.3 % faster than nccl (95 % interval 4.5 to 8.1 %, 5 pairs"
    )
    other = comparison_sentences(comparison() | {"headline": "memory_peak_gib"})
    assert other[0].startswith("No difference shown between nccl and nvshmem (speed -0.2 %, ")


def test_a_refusal_is_the_answer():
    refused = comparison() | {"refused": "training.seq_len differs too: 512, 1024", "figures": [], "where": None}
    refused["losses"] = None
    read = assert_page_rules(comparison_page(refused))
    assert read.all("div", "answer")[0].text == "Not compared: training.seq_len differs too: 512, 1024"
    assert "not measurable: the runs have no logged step in common" in read.text


def test_every_figure_is_there():
    read = assert_page_rules(comparison_page(comparison()))
    for shown in ("nvshmem: repeat 2 ran beside another process", "61.20 GiB", "too few runs", "0.0120, at step 6"):
        assert shown in read.text, shown
    assert "shard: nccl (100.0 % of bytes)" in read.text
    assert len(read.all("svg", "picture")) == 3
    losses = next(table for table in read.all("table") if "Every 10 logged steps" in table.text)
    assert losses.all("tr")[1].text == "19.4078not logged"
    assert "Parts may overlap" in read.text
    assert "exposed on shard" in read.text
    assert "Repeats of one setting differ by 0.00300 at most. One more thing." in read.text
    assert "not measurable: nvshmem: it has no trace" in read.text


def test_names_stay_names():
    named = comparison()
    for run in named["runs"]:
        run["name"], run["folder"] = EVIL, EVIL
    assert EVIL in assert_page_rules(comparison_page(named)).text


def test_losses_that_are_equal():
    same = comparison()
    same["losses"]["largest_difference"]["value"] = 0.0
    assert "All runs have the same losses, to the last digit." in comparison_page(same)


def test_losses_that_are_no_numbers():
    lost = comparison()
    for run in lost["losses"]["by_run"]:
        run["loss"] = [float("nan")] * 200
    read = assert_page_rules(comparison_page(lost))
    assert "All losses are NaN or infinite." in read.text
    assert len(read.all("svg", "picture")) == 2
