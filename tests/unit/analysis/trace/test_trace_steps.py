"""Which marks of steps count, and which estimate a trace is compared with."""

from __future__ import annotations

import json

import pytest
from made_traces import HOST, MadeTrace, two_steps

from quadriga.analysis.trace.analysis import analyse
from quadriga.analysis.trace.page import trace_sentences
from quadriga.analysis.trace.report import format_verdict
from quadriga.cli.main import main

NAMES = {"all_gather": "ncclDevKernel_AllGather", "reduce_scatter": "ncclDevKernel_ReduceScatter"}
OLD = {
    "cpu_op": "Operator",
    "user_annotation": "Operator",
    "kernel": "Kernel",
    "cuda_runtime": "Runtime",
    "gpu_memcpy": "Memcpy",
    "gpu_memset": "Memset",
}


def of_a_host(steps: int = 5, length: float = 1000.0) -> MadeTrace:
    """Steps with ten products each on one CPU thread."""
    trace = MadeTrace(0, 1)
    for number in range(steps):
        t = length * number
        trace.mark(f"ProfilerStep#{number}", t, t + length)
        for place in range(10):
            trace.host("aten::mm", t + length * (0.05 + 0.09 * place), t + length * (0.13 + 0.09 * place))
    return trace


def analysed(trace: MadeTrace, place):
    trace.write(place / "rank0_trace.json")
    return analyse(place)


@pytest.mark.parametrize("stub", [1e-3, 69.0, 400.0, 3000.0])
def test_what_lies_between_the_last_step_and_the_end_of_profiling_is_no_step(tmp_path, stub):
    """Whatever its length: nothing of a step happens in it."""
    trace = of_a_host()
    trace.mark("ProfilerStep#5", 5000, 5000 + stub)
    found = analysed(trace, tmp_path)
    assert found["steps"] == [0, 1, 2, 3, 4]
    assert found["step_time_s"]["mean"] == pytest.approx(1e-3)
    assert len(found["by_rank"][0]["steps"]) == 5
    (message,) = [warning for warning in found["warnings"] if "excluded" in warning]
    assert message.startswith("rank0_trace.json: the last mark of a step (")


def test_a_stub_with_a_few_operations_is_one_too_and_a_short_step_with_its_work_is_none(tmp_path):
    trace = of_a_host()
    trace.mark("ProfilerStep#5", 5000, 5100)
    assert analysed(trace, tmp_path / "bare")["steps"] == [0, 1, 2, 3, 4]
    for place in range(10):
        trace.host("aten::mm", 5005 + 9 * place, 5012 + 9 * place)
    assert analysed(trace, tmp_path / "fast")["steps"] == [0, 1, 2, 3, 4, 5]


def test_kernels_that_lag_behind_into_a_stub_do_not_make_it_a_step(tmp_path):
    trace = two_steps(0, NAMES)
    trace.mark("ProfilerStep#9", 2000, 2600)
    trace.device("ampere_gemm", 2010, 2500, 99)
    found = analysed(trace, tmp_path)
    assert found["steps"] == [7, 8]
    assert found["step_time_s"]["mean"] == pytest.approx(1e-3)


def test_a_lone_step_counts_whatever_it_holds(tmp_path):
    trace = MadeTrace(0, 1)
    trace.mark("ProfilerStep#0", 0, 100)
    trace.host("aten::mm", 200, 300)
    assert analysed(trace, tmp_path)["steps"] == [0]


def test_a_step_that_two_threads_mark_is_one(tmp_path):
    """The mark of the thread that works counts, whichever comes first and however long the other one is."""
    plain, twice = of_a_host(), of_a_host()
    for number in range(5):
        event = {"ph": "X", "cat": "user_annotation", "name": f"ProfilerStep#{number}", "pid": 1, "tid": HOST + 1}
        twice.events.insert(0, {**event, "ts": 1000.0 * number - 50, "dur": 990})
    one, two = analysed(plain, tmp_path / "plain"), analysed(twice, tmp_path / "twice")
    assert two["steps"] == [0, 1, 2, 3, 4]
    assert two["step_time_s"] == pytest.approx(one["step_time_s"])
    assert two["by_rank"][0]["mean"] == pytest.approx(one["by_rank"][0]["mean"])


def test_a_step_that_one_thread_marks_twice_is_one(tmp_path):
    trace = of_a_host()
    trace.mark("ProfilerStep#2", 2000, 3000)
    assert analysed(trace, tmp_path)["steps"] == [0, 1, 2, 3, 4]


def test_categories_of_torch_before_1_12_say_the_same(tmp_path):
    new, old = two_steps(0, NAMES), two_steps(0, NAMES)
    for event in old.events:
        event["cat"] = OLD[event["cat"]]
        event["args"] = {name.replace("External id", "external id"): value for name, value in event["args"].items()}
    assert {event["cat"] for event in old.events} == {"Operator", "Kernel", "Runtime", "Memcpy"}
    one, other = analysed(new, tmp_path / "new"), analysed(old, tmp_path / "old")
    for key in ("steps", "step_time_s", "collectives", "kernels"):
        assert other[key] == one[key], key
    assert other["by_rank"] == one["by_rank"]


def test_ids_of_64_bits_link_like_others(tmp_path):
    plain, wide = two_steps(0, NAMES), two_steps(0, NAMES)
    for event in wide.events:
        if "correlation" in event["args"]:
            event["args"]["correlation"] = 2**64 - event["args"]["correlation"]
            event["args"]["External id"] = str(2**63 + event["args"]["correlation"] % 1000)
    one, other = analysed(plain, tmp_path / "plain"), analysed(wide, tmp_path / "wide")
    assert other["collectives"] == one["collectives"]
    assert other["by_rank"] == one["by_rank"]


@pytest.mark.parametrize("info", ["none", [], 7, {"rank": "0", "world_size": "2"}, {"rank": {}, "world_size": -1}])
def test_a_distributed_info_of_another_type_is_read_or_left_out_with_a_warning(tmp_path, info):
    trace = two_steps(0, NAMES)
    trace.about["distributedInfo"] = info
    found = analysed(trace, tmp_path)
    assert found["ranks"] == [0]
    sound = info == {"rank": "0", "world_size": "2"}
    assert found["world_size"] == (2 if sound else 1)
    assert any("ignored" in warning for warning in found["warnings"]) is not sound


def test_terminal_and_page_show_the_same_mean(tmp_path):
    trace = MadeTrace(0, 1)
    for number, (start, end) in enumerate([(0, 1000), (1000, 2000), (2000, 5543)]):
        trace.mark(f"ProfilerStep#{number}", start, end)
        trace.host("aten::mm", start, end)
    found = analysed(trace, tmp_path)
    assert found["step_time_s"]["mean"] == pytest.approx(5543e-6 / 3)
    assert format_verdict(found) == "a step takes 1.848 ms on average: 100.0% computing"
    assert trace_sentences(found)[0].startswith(
        "A step takes 1.848 ms on average (1.00 ms to 3.54 ms): 100.0 % compute"
    )


# --- whose estimate ---------------------------------------------------------------------------------------------------


def run_with(place, *, traced_by: int | None, estimates: dict[int, int], newest: int):
    """A run folder with a trace of one start, and the estimates of starts: bytes of the all-gather by start."""
    trace = two_steps(0, NAMES)
    if traced_by is not None:
        trace.about["quadriga"] = {"attempt": traced_by, "first_step": 0}
    trace.write(place / "profile_trace" / "iteration_2" / "rank0_trace.json")
    (place / "estimates").mkdir()

    def content(attempt: int) -> str:
        calls = [("all_gather", estimates.get(attempt, 1)), ("reduce_scatter", 4000)]
        listed = [{"axis": "shard", "collective": name, "calls": 1, "bytes": size} for name, size in calls]
        return json.dumps({"attempt": attempt, "communication": listed})

    for attempt in estimates:
        (place / "estimates" / f"attempt-{attempt}.json").write_text(content(attempt))
    (place / "estimate.json").write_text(content(newest))
    return analyse(place)


def verdicts(found):
    return [row["equal"] for row in found["estimate"]["rows"]]


def test_after_a_resume_on_another_layout_a_trace_is_compared_with_its_own_start(tmp_path):
    """Start 1 moves 2,000 bytes, as in the trace; start 2 would move 1,000."""
    both = {1: 2000, 2: 1000}
    assert verdicts(run_with(tmp_path / "first", traced_by=1, estimates=both, newest=2)) == [True, True]
    assert verdicts(run_with(tmp_path / "second", traced_by=2, estimates=both, newest=2)) == [False, True]


def test_what_is_predicted_of_a_step_is_calls_times_bytes(tmp_path):
    run_with(tmp_path, traced_by=None, estimates={}, newest=1)
    calls = {"axis": "shard", "collective": "all_gather", "calls": 4, "bytes": 500}
    (tmp_path / "estimate.json").write_text(json.dumps({"communication": [calls]}))
    row = next(row for row in analyse(tmp_path)["estimate"]["rows"] if row["collective"] == "all_gather")
    assert (row["calls"], row["predicted_calls"]) == (1, 4)
    assert (row["bytes"], row["predicted_bytes"], row["equal"]) == (2000, 2000, False)


def test_a_trace_that_names_no_start_is_compared_with_the_newest(tmp_path):
    assert verdicts(run_with(tmp_path, traced_by=None, estimates={2: 2000}, newest=2)) == [True, True]


def test_where_the_estimate_of_its_start_is_gone_no_difference_is_reported(tmp_path, capsys):
    found = run_with(tmp_path, traced_by=1, estimates={2: 1000}, newest=2)
    assert found["estimate"] is None
    assert "the traces are of start 1" in found["not_measurable"]["estimate"]
    assert main(["trace", str(tmp_path)]) == 0
    assert "NOT as estimated" not in capsys.readouterr().out


CALL = '{"communication": [{"axis": "tp", "collective": "all_gather", "calls": %s, "bytes": 1}]}'
NO_ESTIMATES = ["[]", "{", '{"communication": 5}', '{"communication": [{}]}', '{"communication": [7]}', "[" * 100_000]
NO_ESTIMATES += [CALL % number for number in ("-1", "9" * 5000, "NaN", "true", '"1"', "[1]")]


@pytest.mark.parametrize("content", NO_ESTIMATES)
def test_an_estimate_that_is_none_is_named(tmp_path, capsys, content):
    run_with(tmp_path, traced_by=None, estimates={}, newest=1)
    (tmp_path / "estimate.json").write_text(content)
    assert main(["trace", str(tmp_path)]) == 2
    assert str(tmp_path / "estimate.json") in capsys.readouterr().err


def test_a_step_within_a_step_does_not_count(tmp_path):
    """Other trainers nest annotations of the same form, with numbers of their own."""
    plain = analysed(of_a_host(), tmp_path)
    trace = of_a_host()
    trace.mark("ProfilerStep#77", 100, 900)
    trace.mark("ProfilerStep#78", 500, 1500)
    found = analysed(trace, tmp_path)
    assert found["steps"] == plain["steps"]
    assert found["step_time_s"] == plain["step_time_s"]
    assert any("2 marks of steps in rank0_trace.json within other steps: ignored" in line for line in found["warnings"])


def test_steps_that_overlap_by_rounding_all_count(tmp_path):
    trace = of_a_host()
    for each in trace.events:
        if each["name"].startswith("ProfilerStep"):
            each["dur"] += 1
    assert analysed(trace, tmp_path)["steps"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("more", "told"), [("", False), (" \n\0\0", False), ("}}", True), ('{"traceEvents": []}', True)]
)
@pytest.mark.parametrize("bare", [False, True])
def test_text_after_the_end_is_told(more, told, bare, tmp_path):
    of_a_host().write(tmp_path / "rank0_trace.json")
    file = tmp_path / "rank0_trace.json"
    text = json.dumps(json.loads(file.read_text())["traceEvents"]) if bare else file.read_text()
    file.write_text(text + more)
    warnings = analyse(tmp_path)["warnings"]
    assert any("text after the end of the trace" in line for line in warnings) == told


def test_two_files_of_a_rank_are_named(tmp_path, capsys):
    of_a_host().write(tmp_path / "rank0_trace.json")
    of_a_host().write(tmp_path / "a" / "x.json")
    (tmp_path / "a" / "x.json").rename(tmp_path / "rank0_trace.copy.json")
    assert main(["trace", str(tmp_path)]) == 2
    assert f"{tmp_path}/rank0_trace.copy.json, {tmp_path}/rank0_trace.json" in capsys.readouterr().err
