"""What `quadriga trace` says of a real run over gloo: bytes and calls of every axis are those of the estimate."""

from __future__ import annotations

import gzip
import json

import pytest
from training import TINY, train

from quadriga.analysis.trace.analysis import analyse

PROFILED = (
    *(argument for argument in TINY if argument != "--profiling.no_enable_profiling"),
    *("--training.local_batch_size=2", "--training.steps=6"),
    *("--training.mixed_precision_reduce=float32", "--checkpoint.no_enable"),
    *("--profiling.enable_profiling", "--profiling.profiler_active=5", "--profiling.profiler_warmup=1"),
    "--profiling.profile_freq=6",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """FSDP 2 x TP 2, two micro-batches a step, five profiled steps."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, 4, *PROFILED, "--parallelism.tensor_parallel_degree=2")
    return folder


@pytest.fixture(scope="module")
def found(run):
    return analyse(run)


def test_bytes_and_calls_of_every_axis_equal_the_estimate(run, found):
    predicted: dict[tuple[str, str], list[float]] = {}
    for call in json.loads((run / "estimate.json").read_text())["communication"]:
        entry = predicted.setdefault((call["axis"], call["collective"]), [0, 0])
        entry[0] += call["calls"]
        entry[1] += call["calls"] * call["bytes"]
    measured = {
        (row["axis"], row["collective"]): [row["calls_a_step"], row["bytes_a_step"]]
        for row in found["collectives"]
        if row["axis"] != "host"  # the exchange of stop requests, which no step waits for
    }
    assert measured == predicted
    assert {axis for axis, _ in measured} == {"shard", "tp", "world"}
    assert all(row["equal"] for row in found["estimate"]["rows"])
    assert len(found["estimate"]["rows"]) == len(predicted)


def test_what_a_group_gathers_is_what_it_scatters(found):
    """In float32 the bytes of one all-gather's output are those of one reduce-scatter's input, group by group."""
    sizes = {row["collective"]: row["sizes"] for row in found["collectives"] if row["axis"] == "shard"}
    gathered = {size["bytes"] for size in sizes["all_gather"]}
    scattered = {size["bytes"]: size["calls"] for size in sizes["reduce_scatter"]}
    assert gathered == set(scattered)
    assert sum(scattered.values()) == 4  # embedding, two blocks, output; gradients go once a step


def test_exposed_communication_is_measured_on_every_step_of_every_rank(found):
    assert (found["device_type"], found["ranks"], found["steps"]) == ("cpu", [0, 1, 2, 3], [2, 3, 4, 5, 6])
    assert "exposed_communication_s" not in found["not_measurable"]
    for entry in found["by_rank"]:
        for step in entry["steps"]:
            assert 0 < step["exposed_communication_s"] <= step["communication_s"] < step["seconds"]
            assert 0 < step["compute_s"] < step["seconds"]
            parts = ("compute_s", "exposed_communication_s", "data_wait_s", "rest_s")
            assert sum(step[part] for part in parts) == pytest.approx(step["seconds"])


def test_every_call_is_found_by_linkage_and_has_its_time(found):
    for row in found["collectives"]:
        assert (row["found_by"], row["backend"]) == ("linkage", "gloo")
        assert row["seconds_a_step"] > 0
        assert row["transfer_s"] > 0
        assert row["bus_gb_s"] > 0
    ranks = {(row["axis"], row["ranks"]) for row in found["collectives"]}
    assert ranks == {("shard", 2), ("tp", 2), ("world", 4), ("host", 4)}
    assert not [warning for warning in found["warnings"] if "no row on the device" in warning]


def test_blocks_of_the_model_are_named(found):
    names = {entry["name"] for entry in found["kernels"]["blocks"]}
    assert {"tok_embeddings", "layers.0", "layers.1", "norm, output", "optimizer"} <= names
    assert found["kernels"]["top"][0]["calls_a_step"] > 0
    assert {"matrix products", "communication"} <= {entry["name"] for entry in found["kernels"]["families"]}


def test_without_the_recorder_groups_are_reported_as_unknown(run, tmp_path):
    """As after `comm.trace_buf_size = 0`, and over gloo in traces of others: calls and bytes stay what they are."""
    with gzip.open(run / "profile_trace" / "iteration_6" / "rank1_trace.json.gz", "rt") as file:
        trace = json.load(file)
    assert trace["quadriga"].pop("launches")
    (tmp_path / "rank1_trace.json").write_text(json.dumps(trace))
    found = analyse(tmp_path)
    assert {row["axis"] for row in found["collectives"]} == {"?"}
    assert "group" in found["not_measurable"]["axis of ? all_gather"]
    assert all(row["bytes_a_step"] and row["seconds_a_step"] for row in found["collectives"])
    assert found["by_rank"][0]["mean"]["exposed_communication_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis",
    [
        "pipeline_parallel_degree=2",
        "context_parallel_degree=2",
        "data_parallel_replicate_degree=2",
        "data_parallel_shard_degree=4",
    ],
)
def test_other_layouts_equal_the_estimate_too(tmp_path, axis):
    train(tmp_path, 4, *PROFILED, f"--parallelism.{axis}")
    found = analyse(tmp_path)
    assert [row for row in found["estimate"]["rows"] if not row["equal"]] == []
    assert {row["found_by"] for row in found["collectives"]} == {"linkage"}
    assert all(row["seconds_a_step"] > 0 for row in found["collectives"])
