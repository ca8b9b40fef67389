"""Which files are read, in whose spelling, and what is said of files that cannot be."""

from __future__ import annotations

import gzip
import json

import pytest
from made_traces import MadeTrace, two_steps

from quadriga.analysis.trace.analysis import analyse
from quadriga.analysis.trace.document import TraceDocument
from quadriga.analysis.trace.find import find_traces
from quadriga.cli.main import main
from quadriga.errors import UserError

NAMES = {"all_gather": "ncclDevKernel_AllGather", "reduce_scatter": "ncclDevKernel_ReduceScatter"}


def content(rank=0):
    trace = two_steps(rank, NAMES)
    return {**trace.about, "traceEvents": trace.events}


def problem(place, *arguments, **how):
    with pytest.raises(UserError) as raised:
        analyse(place, *arguments, **how)
    return str(raised.value)


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1 << 22])
@pytest.mark.parametrize(
    "layout", [{}, {"indent": 1}, {"separators": (",", ":")}, {"indent": "\t", "ensure_ascii": False}], ids=str
)
def test_any_layout_and_any_cut_is_read_the_same(tmp_path, layout, chunk):
    whole = {"before": {"a": [1, {"b": "}]"}]}, **content(), "after": 12.5, "zoë": 'ünï\\"x"', "last": None}
    path = tmp_path / "rank0_trace.json"
    path.write_text(json.dumps(whole, **layout))
    document = TraceDocument(path, chunk)
    assert list(document) == whole["traceEvents"]
    assert document.metadata == {name: value for name, value in whole.items() if name != "traceEvents"}


@pytest.mark.parametrize("chunk", [7, 100, 1 << 22])
def test_objects_in_the_metadata_after_the_events_are_no_events(tmp_path, chunk):
    groups = [{"pg_name": str(i), "ranks": [0, 1]} for i in range(3)]
    events = [
        {"ph": "X", "name": f"event {i}", "ts": i, "dur": 1, "args": {"of": [{"a": 1}, {"b": 2}]}} for i in range(5)
    ]
    metadata = {"distributedInfo": {"pg_config": groups, "rank": 3}, "z": 1}
    path = tmp_path / "rank3_trace.json"
    path.write_text(json.dumps({"traceEvents": events, **metadata}))
    document = TraceDocument(path, chunk)
    assert list(document) == events
    assert (document.metadata, document.non_objects) == (metadata, 0)


def test_a_bare_array_and_a_packed_file_with_a_plain_name_are_read(tmp_path):
    events = content()["traceEvents"]
    path = tmp_path / "kineto_trace_3.json"
    text = json.dumps(events).encode()
    path.write_bytes(gzip.compress(text[:999]) + gzip.compress(text[999:]) + bytes(512))  # as some tools pack: in parts
    assert list(TraceDocument(path)) == events
    found = analyse(tmp_path)
    assert found["ranks"] == [3], "from the name: a bare array has no distributedInfo"


@pytest.mark.parametrize(
    "names",
    [
        ["profile_trace/iteration_5/rank{}_trace.json"],
        ["profiling/traces/iteration_5/rank{}_trace.json.gz"],
        ["kineto_trace_{}.json"],
        ["deep/er/rank_{}.trace.json"],
        ["rank{}/worker.123.pt.trace.json"],
    ],
    ids=lambda names: names[0],
)
def test_folders_of_others_are_found(tmp_path, names):
    for rank in range(2):
        for name in names:
            path = tmp_path / name.format(rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            document = json.dumps({**content(rank), "distributedInfo": {}}).encode()
            path.write_bytes(gzip.compress(document) if path.suffix == ".gz" else document)
    found = analyse(tmp_path)
    assert found["ranks"] == [0, 1]
    assert found["collectives"][0]["axis"] == "shard"
    assert found["by_rank"][0]["mean"]["exposed_communication_s"] == pytest.approx(150e-6)


def test_the_newest_iteration_counts_unless_another_is_asked_for(tmp_path):
    for iteration in (20, 100, 9):
        two_steps(0, NAMES).write(tmp_path / f"iteration_{iteration}" / "rank0_trace.json")
    assert find_traces(tmp_path).iteration == 100
    assert analyse(tmp_path)["iteration"] == 100
    assert analyse(tmp_path, 9)["iteration"] == 9
    assert "9, 20, 100" in problem(tmp_path, 10)
    assert any("[9, 20]" in warning for warning in analyse(tmp_path)["warnings"])


def test_what_is_being_written_is_left_alone(tmp_path):
    two_steps(0, NAMES).write(tmp_path / "iteration_5" / "rank0_trace.json")
    (tmp_path / "iteration_5" / ".rank1_trace.json").write_text("{")
    (tmp_path / "environment.json").write_text("{")
    assert [path.name for path in find_traces(tmp_path).files] == ["rank0_trace.json"]


def test_two_folders_without_a_number_are_refused(tmp_path):
    for name in ("a", "b"):
        two_steps(0, NAMES).write(tmp_path / name / "rank0_trace.json")
    assert "name one of them" in problem(tmp_path)


def test_two_files_of_one_rank_are_refused(tmp_path):
    for name in ("rank0_trace.json", "rank1_trace.json"):
        two_steps(0, NAMES).write(tmp_path / name)
    assert "of rank 0" in problem(tmp_path)


def test_a_rank_that_nothing_states_is_asked_for(tmp_path):
    for name in ("first.trace.json", "second.trace.json"):
        (tmp_path / name).write_text(json.dumps({**content(), "distributedInfo": {}}))
    assert "rankK_trace.json" in problem(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(content())[:3000], "truncated"),
        (json.dumps(content())[:-1], "truncated"),
        ("", "truncated"),
        ('{"traceEvents": [{"ph": "X", nonsense}]}', "nonsense"),
        ('{"schemaVersion": 1}', "not a trace of torch.profiler"),
        ('{"traceEvents": []}', "no operations"),
        ('{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a"}]}', "event 1: ts is None"),
        ("what is this", "not a JSON object"),
    ],
    ids=["truncated", "unclosed", "empty", "broken", "another", "no events", "no time", "text"],
)
def test_a_wrong_file_is_named_with_what_to_do(tmp_path, capsys, text, expected):
    path = tmp_path / "rank0_trace.json"
    path.write_text(text)
    assert main(["trace", str(tmp_path)]) == 2
    output = capsys.readouterr().err
    assert str(path) in output
    assert expected in output
    assert "to do:" in output


def test_a_packed_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "rank0_trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content()).encode())[:-200])
    report = problem(tmp_path)
    assert str(path) in report
    assert "cannot be read to its end" in report


def test_a_place_without_traces_is_refused(tmp_path):
    assert "there is no trace of torch.profiler" in problem(tmp_path)
    assert "no such file or folder" in problem(tmp_path / "nowhere")


def test_without_marks_of_steps_the_whole_trace_is_one(tmp_path):
    trace = two_steps(0, NAMES)
    trace.events = [event for event in trace.events if "ProfilerStep" not in event["name"]]
    trace.write(tmp_path / "rank0_trace.json")
    found = analyse(tmp_path)
    assert found["steps"] == [0]
    assert any("no marks of steps" in warning for warning in found["warnings"])
    assert found["by_rank"][0]["mean"]["compute_s"] == pytest.approx(600e-6)


def test_a_run_of_one_rank_has_no_communication_and_an_unknown_one_may_have(tmp_path):
    for name, about in (("alone", {"rank": 0, "world_size": 1}), ("unknown", {})):
        trace = MadeTrace(0)
        trace.about["distributedInfo"] = about
        trace.mark("ProfilerStep#0", 0, 100)
        trace.host("aten::mm", 10, 20)
        trace.launch(11, 1)
        trace.device("gemm", 30, 60, 1)
        trace.write(tmp_path / name / "rank0_trace.json")
    alone, unknown = (analyse(tmp_path / name) for name in ("alone", "unknown"))
    assert alone["by_rank"][0]["mean"]["communication_s"] == 0
    assert "communication_s" not in alone["not_measurable"]
    assert unknown["by_rank"][0]["mean"]["communication_s"] is None
    assert "communication_s" in unknown["not_measurable"]


def test_missing_ranks_and_few_steps_are_warned_of(tmp_path):
    two_steps(0, NAMES, world_size=8).write(tmp_path / "rank0_trace.json")
    warnings = " ".join(analyse(tmp_path)["warnings"])
    assert "traces of 1 of 8 ranks" in warnings
    assert "2 profiled steps are few" in warnings


def test_many_processes_find_what_one_does(tmp_path, monkeypatch):
    for rank in range(2):
        two_steps(rank, NAMES).write(tmp_path / f"rank{rank}_trace.json")
    alone = analyse(tmp_path, processes=1)
    monkeypatch.setattr("quadriga.analysis.trace.analysis.PARALLEL_READ_BYTES", 0)
    assert analyse(tmp_path, processes=2) == alone
