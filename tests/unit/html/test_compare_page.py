"""The page of a comparison: a refusal first, then what is not credited, then what was shown."""

from __future__ import annotations

from page_reading import keeps_the_house_rules
from page_samples import EVIL, comparison

from quadriga.compare.page import page, sentences, shower


def test_no_winner_is_named_where_a_backend_is_not_credited():
    assert sentences(comparison()) == [
        "No winner is named between nvshmem and nccl (nvshmem: no byte of axis shard went through it). Measured: step "
        "time of nvshmem is 0.941 times that of nccl (95 % interval 0.925 to 0.957), 5 pairs."
    ]


def test_the_verdict_of_an_honest_pair():
    honest = comparison() | {"backend": []}
    assert sentences(honest) == [
        "nvshmem is faster than nccl: step time of nvshmem is 0.941 times that of nccl (95 % interval 0.925 to 0.957), "
        "5 pairs."
    ]
    assert sentences(honest | {"headline": "memory_peak_gib"}) == [
        "No difference shown between nvshmem and nccl: memory peak gib of nvshmem is 1.00 times that of nccl "
        "(95 % interval 0.998 to 1.00), 5 pairs."
    ]
    assert sentences(honest | {"headline": "exposed_communication_s.shard"}) == [
        "Too few runs to compare nvshmem with nccl: 1 pair."
    ]


def test_a_refusal_is_the_answer():
    refused = comparison() | {"refused": "training.seq_len differs too: 512, 1024", "figures": [], "where": None}
    refused["losses"] = None
    read = keeps_the_house_rules(page(refused))
    assert read.all("div", "answer")[0].text == "Not compared: training.seq_len differs too: 512, 1024"
    assert "not measurable: the runs have no logged step in common" in read.text


def test_every_figure_is_there():
    read = keeps_the_house_rules(page(comparison()))
    for shown in ("nvshmem: repeat 2 ran beside another process", "61.20 GiB", "too few runs", "0.0120, at step 6"):
        assert shown in read.text, shown
    assert "shard: nccl (100.0 % of bytes)" in read.text
    assert len(read.all("svg", "picture")) == 3
    losses = next(table for table in read.all("table") if "Every 10 logged steps" in table.text)
    assert losses.all("tr")[1].text == "19.4078not logged"
    assert "Parts may overlap" in read.text
    assert "Repeats of one setting differ by 0.00300 at most. One more thing." in read.text
    assert "not measurable: nvshmem: it has no trace" in read.text


def test_names_stay_names():
    named = comparison()
    for run in named["runs"]:
        run["name"], run["folder"] = EVIL, EVIL
    assert EVIL in keeps_the_house_rules(page(named)).text


def test_losses_that_are_no_numbers():
    lost = comparison()
    for run in lost["losses"]["by_run"]:
        run["loss"] = [float("nan")] * 200
    read = keeps_the_house_rules(page(lost))
    assert "No loss is a finite number." in read.text
    assert len(read.all("svg", "picture")) == 2


def test_units():
    shown = [shower(unit)(0.25) for unit in ("s", "GiB", "tokens/s", "share")]
    assert shown == ["250 ms", "0.25 GiB", "0.250 tokens/s", "25.0 %"]
    assert shower("bytes")(2**30) == "1.00 GiB"
    assert shower("tokens/s")(12345.6) == "12,346 tokens/s"
