"""Every figure that `quadriga trace` prints, on a trace whose right answers are worked out here.

Device rows of each step of rank 0, in microseconds from the step's begin (rank 1: all-gather from 230, reduce-scatter
10 later):

    copy to the device   110 -- 160
    all-gather           200 -- 300         2,000 bytes put together (1,000 bfloat16)
    product              250 -- 450         so 50 of the all-gather's 100 are exposed (rank 1: 20 of 70)
    reduce-scatter       650 -- 750         4,000 bytes taken apart (1,000 float32), on the copy engine
    update               800 -- 900

Data wait is 0 to 100, in which nothing runs.
"""

from __future__ import annotations

import json

import pytest
from launching import ROOT
from made_traces import two_steps

from quadriga.analysis.trace.analysis import analyse
from quadriga.cli.main import main

US = 1e-6
NAMED = {"all_gather": "ncclDevKernel_AllGather_RING_LL", "reduce_scatter": "Memcpy DtoD (Device -> Device)"}
RENAMED = {"all_gather": "zk_17_fused", "reduce_scatter": "Memcpy DtoD (Device -> Device)"}
STEPS = {
    0: {
        "seconds": 1000,
        "compute_s": 300,
        "communication_s": 200,
        "exposed_communication_s": 150,
        "memcpy_s": 50,
        "exposed_memcpy_s": 50,
        "data_wait_s": 100,
        "host_idle_s": 400,
        "rest_s": 400,
    },
    1: {
        "seconds": 1000,
        "compute_s": 300,
        "communication_s": 170,
        "exposed_communication_s": 120,
        "memcpy_s": 50,
        "exposed_memcpy_s": 50,
        "data_wait_s": 100,
        "host_idle_s": 430,
        "rest_s": 430,
    },
}


def near(value):
    return pytest.approx(value, rel=1e-6, abs=1e-12)


def written(folder, kernels=NAMED, **how):
    for rank in range(2):
        two_steps(rank, kernels, **how).write(folder / "profile_trace" / "iteration_9" / f"rank{rank}_trace.json")
    return folder


@pytest.fixture
def found(tmp_path):
    calls = [
        {"axis": "shard", "collective": "all_gather", "calls": 1, "bytes": 2000},
        {"axis": "shard", "collective": "reduce_scatter", "calls": 1, "bytes": 8000},
    ]
    (tmp_path / "estimate.json").write_text(json.dumps({"communication": calls}))
    return analyse(written(tmp_path))


def test_what_it_is_of(found):
    assert (found["format"], found["device_type"], found["iteration"]) == ("quadriga-trace-1", "cuda", 9)
    assert (found["ranks"], found["world_size"], found["steps"]) == ([0, 1], 2, [7, 8])
    assert found["step_time_s"] == {name: near(1000 * US) for name in ("mean", "median", "min", "max")}


@pytest.mark.parametrize("rank", [0, 1])
def test_where_each_step_of_each_rank_went(found, rank):
    entry = found["by_rank"][rank]
    expected = {name: near(value * US) for name, value in STEPS[rank].items()}
    assert entry["rank"] == rank
    assert entry["mean"] == expected
    assert [{**expected, "step": step["step"]} for step in entry["steps"]] == entry["steps"]
    assert [step["step"] for step in entry["steps"]] == [7, 8]


def test_parts_add_up_to_the_step(found):
    for entry in found["by_rank"]:
        mean = entry["mean"]
        parts = ("compute_s", "exposed_communication_s", "exposed_memcpy_s", "data_wait_s", "rest_s")
        assert sum(mean[part] for part in parts) == near(mean["seconds"])


def test_the_slowest_rank_is_the_one_with_most_time_of_its_own(found):
    # 1000 - 150 = 850 and 1000 - 120 = 880: their median is 865.
    assert found["slowest"] == {"rank": 1, "by_s": near(15 * US), "by_share": near(0.015)}


def test_the_all_gather(found):
    row = next(row for row in found["collectives"] if row["collective"] == "all_gather")
    speed = 2000 / (70 * US) / 1e9  # of its output, from the latest start (230) to the earliest end (300)
    assert row == {
        "axis": "shard",
        "collective": "all_gather",
        "backend": "nccl",
        "found_by": "linkage",
        "ranks": 2,
        "calls_a_step": 1,
        "bytes_a_step": 2000,
        "bytes_a_call": [2000, 2000, 2000],
        "matched_calls": 2,
        "seconds_a_step": near(85 * US),
        "exposed_s_a_step": near(35 * US),
        "overlap_share": near(1 - 35 / 85),
        "start_skew_s": near(30 * US),
        "transfer_s": near(70 * US),
        "algorithm_gb_s": near(speed),
        "bus_gb_s": near(speed / 2),
        "sizes": [{"bytes": 2000, "calls": 1, "transfer_s": near(70 * US), "bus_gb_s": near(speed / 2)}],
    }


def test_the_reduce_scatter_that_is_a_copy(found):
    row = next(row for row in found["collectives"] if row["collective"] == "reduce_scatter")
    speed = 4000 / (90 * US) / 1e9  # of its input, from 660 to 750
    assert (row["calls_a_step"], row["bytes_a_step"], row["found_by"]) == (1, 4000, "linkage")
    assert (row["seconds_a_step"], row["exposed_s_a_step"]) == (near(100 * US), near(100 * US))
    assert (row["start_skew_s"], row["transfer_s"], row["overlap_share"]) == (near(10 * US), near(90 * US), near(0))
    assert (row["algorithm_gb_s"], row["bus_gb_s"]) == (near(speed), near(speed / 2))


def test_families_blocks_and_kernels(found):
    kernels = found["kernels"]
    whole = 200 + 100 + 50 + 185  # communication: the mean of 200 and 170
    assert {entry["name"]: entry["seconds_a_step"] for entry in kernels["families"]} == {
        "matrix products": near(200 * US),
        "communication": near(185 * US),
        "optimizer": near(100 * US),
        "copies and casts": near(50 * US),
    }
    assert {entry["name"]: entry["share"] for entry in kernels["families"]}["optimizer"] == near(100 / whole)
    assert {entry["name"]: (entry["seconds_a_step"], entry["share"]) for entry in kernels["blocks"]} == {
        "layers.0": (near(250 * US), near(250 / 350)),  # the copy and the product are launched in its forward pass
        "optimizer": (near(100 * US), near(100 / 350)),
    }
    assert [
        (entry["name"], entry["seconds_a_step"], entry["share"], entry["calls_a_step"]) for entry in kernels["top"]
    ] == [
        ("ampere_bf16_s16816gemm_bf16_128x128", near(200 * US), near(200 / whole), near(1)),
        ("multi_tensor_apply_kernel<adam>", near(100 * US), near(100 / whole), near(1)),
        ("Memcpy HtoD (Pinned -> Device)", near(50 * US), near(50 / whole), near(1)),
    ]


def test_a_difference_from_the_estimate_is_shown(found, tmp_path, capsys):
    gather, scatter = found["estimate"]["rows"]
    assert gather == {
        "axis": "shard",
        "collective": "all_gather",
        "calls": 1,
        "predicted_calls": 1,
        "bytes": 2000,
        "predicted_bytes": 2000,
        "equal": True,
    }
    assert (scatter["bytes"], scatter["predicted_bytes"], scatter["equal"]) == (4000, 8000, False)
    assert main(["trace", str(tmp_path)]) == 0
    assert "NOT as estimated" in capsys.readouterr().out


def test_the_timeline_is_of_the_middle_step_and_of_one_clock(found):
    strips = {(each["rank"], each["lane"]): each["spans"] for each in found["timeline"]["strips"]}
    assert found["timeline"]["step"] == 8
    assert strips[0, "communication"] == [
        [near(200 * US), near(300 * US), "shard all_gather"],
        [near(650 * US), near(750 * US), "shard reduce_scatter"],
    ]
    assert strips[1, "communication"][0][:2] == [near(230 * US), near(300 * US)]
    assert strips[0, "compute"] == [
        [near(250 * US), near(450 * US), "compute"],
        [near(800 * US), near(900 * US), "compute"],
    ]
    assert strips[0, "memcpy"] == [[near(110 * US), near(160 * US), "copies"]]
    assert strips[0, "host"][0] == [0.0, near(100 * US), "data wait"]


def test_renamed_kernels_are_found_by_linkage(found, tmp_path):
    renamed = analyse(written(tmp_path / "renamed", RENAMED))
    assert renamed["by_rank"] == found["by_rank"]
    assert renamed["collectives"] == found["collectives"]
    assert "communication_s" not in renamed["not_measurable"]


def test_renamed_and_unlinked_communication_is_not_identified_instead_of_none(tmp_path, capsys):
    kernels = {"all_gather": "zk_17_fused", "reduce_scatter": "zk_18_fused"}
    found = analyse(written(tmp_path, kernels, linked=False))
    for entry in found["by_rank"]:
        assert entry["mean"]["communication_s"] is None
        assert entry["mean"]["exposed_communication_s"] is None
    assert found["collectives"] == []
    assert found["slowest"] is None
    assert "was identified as a collective" in found["not_measurable"]["communication_s"]
    assert main(["trace", str(tmp_path)]) == 0
    assert "not measurable: communication_s" in capsys.readouterr().out


def test_unlinked_communication_is_found_by_name_and_marked_so(tmp_path, capsys):
    kernels = {"all_gather": "ncclDevKernel_AllGather_RING_LL", "reduce_scatter": "ncclDevKernel_ReduceScatter_Sum"}
    found = analyse(written(tmp_path, kernels, linked=False))
    assert found["by_rank"][0]["mean"]["exposed_communication_s"] == near(150 * US)
    assert {(row["axis"], row["collective"], row["found_by"]) for row in found["collectives"]} == {
        ("?", "all_gather", "name"),
        ("?", "reduce_scatter", "name"),
    }
    assert all(row["bytes_a_step"] is None and row["bus_gb_s"] is None for row in found["collectives"])
    assert found["not_measurable"]["bytes of ? all_gather"]
    assert main(["trace", str(tmp_path)]) == 0
    assert "(by name)" in capsys.readouterr().out


def test_kernels_that_carry_their_own_arguments_need_no_launch(tmp_path):
    """Kineto copies what record_param_comms said to the rows that belong to it."""
    from made_traces import record

    for rank in range(2):
        trace = two_steps(rank, RENAMED, linked=False)
        for event in trace.events:
            if event["name"] == "zk_17_fused":
                event["args"] |= record("_allgather_base", 500, 1000, "BFloat16")
        trace.write(tmp_path / f"rank{rank}_trace.json")
    (row,) = analyse(tmp_path)["collectives"]
    assert (row["axis"], row["collective"], row["found_by"]) == ("shard", "all_gather", "linkage")
    assert (row["bytes_a_step"], row["transfer_s"]) == (2000, near(70 * US))


def test_own_annotations_describe_what_torch_does_not(tmp_path):
    """Symmetric memory's operations have no words of their own: all that is launched within the annotation counts."""
    words = "axis=shard kind=all_gather bytes=2000 dtype=bfloat16 ranks=2 backend=nvshmem"
    for rank in range(2):
        trace = two_steps(rank, RENAMED, linked=False)
        for start in (0, 1000):
            trace.mark(f"quadriga:collective {words}", start + 110, start + 140)
            trace.host("symm_mem::nvshmem_put_with_signal", start + 112, start + 130)
        trace.write(tmp_path / f"rank{rank}_trace.json")
    found = analyse(tmp_path)
    (row,) = found["collectives"]
    assert (row["axis"], row["collective"], row["backend"]) == ("shard", "all_gather", "nvshmem")
    assert (row["found_by"], row["bytes_a_step"], row["calls_a_step"]) == ("annotation", 2000, 1)
    assert (row["transfer_s"], row["seconds_a_step"]) == (near(70 * US), near(85 * US))


@pytest.mark.parametrize(
    ("machines", "why"), [((None, None), "host_name"), (("one", "two"), "2 machines")], ids=["unknown", "two"]
)
def test_clocks_that_cannot_be_compared_make_transfers_not_measurable(tmp_path, machines, why):
    for rank, machine in enumerate(machines):
        two_steps(rank, NAMED, machine=machine).write(tmp_path / f"rank{rank}_trace.json")
    found = analyse(tmp_path)
    assert why in found["not_measurable"]["transfer_s"]
    for row in found["collectives"]:
        assert row["transfer_s"] is None
        assert row["start_skew_s"] is None
        assert row["bus_gb_s"] is None
        assert row["seconds_a_step"] > 0


def test_the_terminal_begins_with_where_the_time_went(tmp_path, capsys):
    assert main(["trace", str(written(tmp_path))]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == (
        "a step takes 1 ms on average: 41.5% idle (the host launched nothing in time), 30.0% computing, "
        "13.5% waiting for communication, 10.0% waiting for data, 5.0% copying without overlap"
    )


def test_json_is_the_whole_analysis(tmp_path, capsys):
    written(tmp_path)
    assert main(["trace", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == analyse(tmp_path)
    page = (ROOT / "docs/traces.md").read_text(encoding="utf-8")
    keys = {*found, *found["collectives"][0], *found["by_rank"][0]["mean"]}
    assert not [key for key in keys if f"`{key}`" not in page and f'"{key}"' not in page]
