"""Cards of anybody's: what is known to go wrong in them is found, and a right one is left alone."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quadriga.analysis.ccl_bench.card import FIELDS, card_errors, field_value, layout_errors, model_flops_utilization
from quadriga.analysis.ccl_bench.folder import RankSummary, average_step_time, newest_traces, read_rank_summary
from quadriga.cli.main import main

EMBEDDINGS = {8_030_261_248: 525_336_576}
RIGHT: dict[str, Any] = {
    "version": 1,
    "description": "Llama 3.1 8B on 16 devices",
    "hf_url": "https://huggingface.co/meta-llama/Llama-3.1-8B",
    "trace_url": "a place",
    "contributor": "somebody",
    "contact": "somewhere",
    "workload": {
        "model": {
            "phase": "training", "moe": False, "granularity": "model_fwd_bwd_pass", "model_family": "llama-3.1-8b",
            "precision": "bf16", "epochs": 1, "iteration": 20,
            "model_arch": {
                "num_params": 8_030_261_248, "num_params_embedding": 525_336_576, "num_layers": 32, "num_heads": 32,
                "head_dim": 128,
            },
        },
        "data": {"batch_size": 32, "seq_len": 1024, "dataset": "c4"},
        "hardware": {
            "network_topo": {"topology": "slingshot", "bandwidth_gbps": [200, 2400]},
            "xpu_spec": {"type": "GPU", "model": "nvidia_a100", "total_count": 16, "count_per_node": 4},
            "driver_version": "cuda_12.4",
        },
    },
    "Model-executor": {
        "framework": {"name": "torchtitan", "compiler_tool_selection": "plain_pytorch"},
        "model_plan_parallelization": {
            "dp_replicate": 1, "dp_shard": 8, "tp": 2, "pp": 1, "cp": 1, "ep": 1, "pp_mb": 1,
        },
        "communication_library": {"name": "NCCL", "version": "2.27.5", "env": {}},
        "protocol_selection": ["rocev2", "p2p"],
    },
    "metric_source": {"traces": ["json"], "metrics_specific_trace": []},
}  # fmt: skip
TRACES = [RankSummary(rank, dict.fromkeys(range(3, 10), 2.0), 4096, 525_336_576) for rank in range(16)]


def changed(path: str, new: Any) -> dict[str, Any]:
    card = copy.deepcopy(RIGHT)
    *above, last = path.split(".")
    place = card
    for name in above:
        place = place[name]
    place[last] = new
    return card


def found(card: dict[str, Any], traces: list[RankSummary] = TRACES) -> str:
    return "\n".join(card_errors(card, traces, EMBEDDINGS))


def test_a_right_card_is_left_alone():
    assert found(RIGHT) == ""
    assert all(field_value(RIGHT, field) is not None for field in FIELDS)


@pytest.mark.parametrize(
    ("path", "new", "expected"),
    [
        ("workload.model.model_arch.num_params_embedding", 1_050_673_152, "the output layer, whose FLOP count"),
        ("workload.model.model_arch.num_params_embedding", 524_288_000, "this model's is 525,336,576"),
        ("workload.data.batch_size", 4, "which is 1/8 of them: the batch of one rank"),
        ("workload.data.batch_size", 64, "wrong by a factor of 0.5"),
        ("workload.hardware.network_topo.bandwidth_gbps", [2400, 200], "the two may be swapped"),
        ("workload.hardware.network_topo.bandwidth_gbps", [200], "has 1 figures, not two"),
        ("Model-executor.communication_library.name", "Gloo", "launches no kernels"),
        ("Model-executor.communication_library.name", "NVSHMEM", "no field shows which one carried the bytes"),
        ("Model-executor.model_plan_parallelization.tp", 4, "is 32, but total_count is 16"),
        ("contributor", None, "1 of 43 fields are missing or empty: contributor"),
        ("workload.hardware.network_topo.bandwidth_gbps", [None, 2400], "bandwidth_gbps"),
        ("workload.model.num_params", 8_030_261_248, "`mfu` reads them from workload.model.model_arch"),
    ],
)
def test_known_mistakes_are_named(path, new, expected):
    assert expected in found(changed(path, new))


def test_traces_that_are_too_short_or_of_different_steps():
    one = [RankSummary(rank, {5: 2.0}, 4096, None) for rank in range(16)]
    assert "1 profiled steps, of which `avg_step_time` counts 1" in found(RIGHT, one)
    four = [RankSummary(rank, dict.fromkeys(range(4), 2.0), 4096, None) for rank in range(16)]
    assert "4 profiled steps, of which `avg_step_time` counts 2" in found(RIGHT, four)
    assert "different steps" in found(
        RIGHT, [*TRACES[:15], RankSummary(15, dict.fromkeys(range(4, 11), 2.0), 4096, None)]
    )
    assert "no trace of a rank" in found(RIGHT, [])
    assert "no ProfilerStep marks" in found(RIGHT, [RankSummary(0, {}, None, None)])


def test_a_batch_that_no_trace_proves():
    blind = [RankSummary(rank, trace.steps, None, None) for rank, trace in enumerate(TRACES)]
    assert "batch_size_scope is missing" in found(RIGHT, blind)
    scoped = changed("workload.data.batch_size_scope", "global")
    assert found(scoped, blind) == ""
    assert "is not a multiple of 8 data-parallel ranks" in found(changed("workload.data.batch_size", 12), blind)
    serving = changed("workload.model.phase", "serving")
    assert "input_len, workload.data.output_len" in found(serving, blind)
    assert "batch_size" not in found(serving, blind).replace("batch_size_scope", "")


def test_a_utilization_above_the_peak_is_impossible():
    fast = [RankSummary(rank, dict.fromkeys(range(3, 10), 0.01), 4096, None) for rank in range(16)]
    assert "of their peak: batch, model, count or device is wrong" in found(RIGHT, fast)


def test_utilization_by_hand():
    """(6 x (8.030e9 - 0.525e9) + 12 x 32 x 32 x 128 x 1024) x 32 x 1024 / 2 s / (312e12 x 16)."""
    a_token = 6 * (8_030_261_248 - 525_336_576) + 12 * 32 * 32 * 128 * 1024
    assert model_flops_utilization(RIGHT, 2.0) == pytest.approx(a_token * 32 * 1024 / 2 / (312e12 * 16))
    assert model_flops_utilization(RIGHT, None) is None
    assert model_flops_utilization(changed("workload.hardware.xpu_spec.model", "abacus"), 2.0) is None


def test_average_step_time_drops_the_ends():
    steps = [{1: 9.0, 2: 1.0, 3: 2.0, 4: 9.0}, {1: 9.0, 2: 3.0, 3: 4.0, 4: 9.0}]
    assert average_step_time([RankSummary(i, each, None, None) for i, each in enumerate(steps)]) == 2.5
    assert average_step_time([RankSummary(0, {1: 1.0, 2: 2.0}, None, None)]) == 1.5
    assert average_step_time([RankSummary(0, {}, None, None)]) is None


def event(name: str, ts: float, dur: float, category: str = "cpu_op", **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": dur, **more}


def lookup(ts: float, table: list[int], ids: list[int]) -> dict[str, Any]:
    return event("aten::embedding", ts, 5.0, args={"Input Dims": [table, ids, [], []]})


def made_trace() -> dict[str, Any]:
    """Three steps of two micro-batches of 2 x 8 tokens; each look-up holds a second one, as that of a DTensor does."""
    events: list[dict[str, Any]] = []
    for step in range(3):
        start = 1000.0 * step
        events.append(event(f"ProfilerStep#{step + 4}", start, 1000.0, "user_annotation"))
        for half in (0, 400):
            events += [lookup(start + half, [64, 4], [2, 8]), lookup(start + half + 1, [32, 4], [2, 8])]
    events.append(event("ProfilerStep#9", 0.0, 1.0, "gpu_user_annotation"))
    return {"schemaVersion": 1, "traceEvents": events, "traceName": 'ends with ]} and " é'}


@pytest.mark.parametrize("form", ["plain", "packed", "list", "compact"])
def test_a_trace_is_read_in_every_form(tmp_path, form):
    path = tmp_path / ("rank1_trace.json.gz" if form == "packed" else "rank1_trace.json")
    trace = made_trace()
    if form == "packed":
        path.write_bytes(gzip.compress(json.dumps(trace, indent=1).encode()))
    else:
        shown = trace["traceEvents"] if form == "list" else trace
        path.write_text(json.dumps(shown, separators=(",", ":") if form == "compact" else None, ensure_ascii=False))
    assert read_rank_summary(1, path) == RankSummary(1, {4: 0.001, 5: 0.001, 6: 0.001}, tokens=32, table=256)


def test_the_newest_cycle_is_taken(tmp_path):
    for step in (9, 100, 20):
        for rank in (0, 1):
            path = tmp_path / "profile_trace" / f"iteration_{step}" / f"rank{rank}_trace.json.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    last, traces = newest_traces(tmp_path)
    assert last == 100
    assert {path.parent.name for path in traces.values()} == {"iteration_100"}
    assert sorted(traces) == [0, 1]


def test_a_layout_that_the_tools_would_misread(tmp_path):
    for name in ("a.yaml", "b.yaml", "rank0_trace.json", "groups.json", "rank1_trace.json.gz"):
        (tmp_path / name).touch()
    (tmp_path / "iteration_5").mkdir()
    (tmp_path / "iteration_5" / "rank1_trace.json").touch()
    mistakes = "\n".join(layout_errors(tmp_path, changed("metric_source.traces", ["nsys"])))
    for part in ("2 cards (a.yaml, b.yaml)", "also groups.json", "2 traces are compressed or in subfolders",
                 "traces of 1 ranks, but total_count is 16", "does not list `json`"):  # fmt: skip
        assert part in mistakes
    for rank in range(2, 18):
        (tmp_path / f"rank{rank}_trace.json").touch()
    assert "17 traces: of more than 16" in "\n".join(layout_errors(tmp_path, RIGHT))


def test_the_command_reads_anybodys_card(tmp_path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(changed("workload.data.batch_size", 1)))
    (tmp_path / "rank0_trace.json").write_text(json.dumps(made_trace()))
    assert main(["ccl-bench", "read", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "step         0.001 s (avg_step_time)" in output
    assert "from this card" in output
    assert "3 profiled steps" in output
    assert main(["ccl-bench", "read", str(tmp_path / "card.yaml"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["avg_step_time_s"] is None
    assert any("no trace of a rank" in line for line in shown["mistakes"])


def test_what_is_no_card_is_refused(tmp_path, capsys: pytest.CaptureFixture[str]):
    for content, expected in (
        ("- a\n- list\n", "not a card"),
        ("a: [1", "cannot be read"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("a: &a [1, 1]\nb: [*a, *a]\n", "references"),
        ("a: &a [*a]\n", "references"),
        ("a: " + "[" * 50_000, "nests too deep"),
        ("a: 2001-99-99\n", "cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("a: !!python/object/apply:os.system [id]\n", "tags"),
        ("!!timestamp a: b\n", "tags"),
        ("a: 0x" + "f" * 5000 + "\n", "more than 64 bits"),
        ("{0x" + "f" * 5000 + ": 1}\n", "cannot be read"),
        ("a: b\n" * 100_000, "longer than a card may be"),
    ):
        path: Path = tmp_path / "card.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert main(["ccl-bench", "read", str(path)]) == 2
        assert expected in capsys.readouterr().err
    for path in ("workload.data.batch_size", "workload.hardware.xpu_spec.total_count", "metric_source.traces"):
        for new in (0, -1, 10**19, float("nan"), True, {"a": 1}, "\x1b[2J", [{}]):
            (tmp_path / "card.yaml").write_text(yaml.safe_dump(changed(path, new)))
            assert main(["ccl-bench", "read", str(tmp_path)]) == 0
            assert "\x1b" not in capsys.readouterr().out
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(RIGHT))
    (tmp_path / "rank0_trace.json").write_text('{"no": "trace"}')
    assert main(["ccl-bench", "read", str(tmp_path)]) == 2
    assert "the file has no traceEvents" in capsys.readouterr().err
    for arguments, expected in (
        (["read", str(tmp_path / "nowhere")], "no such file or folder"),
        (["read", str(tmp_path), "out"], "`read` writes nothing"),
        (["write", str(tmp_path)], "name the folder to write"),
        (["write", str(tmp_path), str(tmp_path / "out")], "the record of a run cannot be read"),
    ):
        assert main(["ccl-bench", *arguments]) == 2
        assert expected in capsys.readouterr().err
