"""A step over gloo whose right answers are worked out by hand. In microseconds:

main thread    data wait 0 -- 50
               aten::linear 100 -- 300 on a DTensor; within: aten::linear 120 -- 220, aten::mm 130 -- 210
               the call of the all-gather 300 -- 320
               aten::add 400 -- 450
               wait 460 -- 520, with a copy in it
gloo's thread  the all-gather 310 -- 500
"""

from __future__ import annotations

import pytest
from made_traces import BASE_NS, MadeTrace

from quadriga.analysis.trace.analysis import analyse

US = 1e-6
GLOO = 200


@pytest.fixture
def found(tmp_path):
    trace = MadeTrace(0, world_size=2)
    trace.about["distributedInfo"]["backend"] = "gloo"
    trace.about["quadriga"] = {"first_step": 11, "axes": {"9": "shard"}, "launches": [[BASE_NS + 305_000, "9", 4]]}
    trace.mark("ProfilerStep#3", 0, 1000)
    trace.mark("quadriga:data_wait", 0, 50)
    for name, start, end in (
        ("aten::linear", 100, 300),
        ("PythonSubclass", 110, 290),
        ("aten::linear", 120, 220),
        ("aten::mm", 130, 210),
        ("aten::add", 400, 450),
        ("_c10d_functional::wait_tensor", 460, 520),
        ("aten::copy_", 500, 515),
    ):
        trace.host(name, start, end)
    args = {"Input Dims": [[8], [4], [], [], []], "Input type": ["float", "float", "", "Scalar", "Scalar"]}
    trace.host("c10d::_allgather_base_", 300, 320, **args)
    trace.mark("gloo:all_gather", 310, 500)
    trace.events[-1] |= {"tid": GLOO, "args": {"Input Dims": [[4]], "Input type": ["float"]}}
    trace.host("aten::copy_", 480, 490)
    trace.events[-1]["tid"] = GLOO
    trace.write(tmp_path / "rank0_trace.json")
    return analyse(tmp_path)


def near(value):
    return pytest.approx(value * US)


def test_the_step(found):
    assert (found["device_type"], found["steps"]) == ("cpu", [14])
    assert found["by_rank"][0]["mean"] == {
        "seconds": near(1000),
        "compute_s": near(100 + 50),  # not the Python around a DTensor's operation, nor the copy that is waited for
        "communication_s": near(520 - 310),
        "exposed_communication_s": near(210 - 50),
        "memcpy_s": None,
        "exposed_memcpy_s": None,
        "data_wait_s": near(50),
        "host_idle_s": None,
        "rest_s": near(1000 - 150 - 160 - 50),
    }
    assert {"memcpy_s", "host_idle_s", "transfer_s"} <= set(found["not_measurable"])


def test_the_call_gets_its_group_from_the_notes_and_its_time_from_gloos_thread(found):
    (row,) = found["collectives"]
    assert (row["axis"], row["collective"], row["backend"], row["found_by"]) == (
        "shard",
        "all_gather",
        "gloo",
        "linkage",
    )
    assert (row["calls_a_step"], row["bytes_a_step"]) == (1, 32)
    assert (row["seconds_a_step"], row["exposed_s_a_step"]) == (near(190), near(140))
    assert row["overlap_share"] == pytest.approx(50 / 190)


def test_operations_are_counted_without_those_in_them(found):
    top = {entry["name"]: entry["seconds_a_step"] for entry in found["kernels"]["top"]}
    assert top["aten::mm"] == near(80)
    assert top["aten::linear"] == near(20)
    assert top["aten::add"] == near(50)
