"""What reads run folders and traces: the commands themselves, so that exit codes count too."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any

import yaml
from fuzzing import Reader
from made_traces import BASE_NS, MadeTrace, two_steps
from run_folders import make_pair, make_run

from quadriga.analysis.compare.report import format_comparison
from quadriga.checkpoint import folder as folders
from quadriga.cli.main import main
from quadriga.config import JobConfig

TOKENS = [b'"attempt": 0', b'"step": -1', b'"time": 1e300', b'"time": NaN', b'"step": 1e9', b"repeat-", b"\x1b[2J"]

SHORT = JobConfig.model_validate({"training": {"steps": 10}, "metrics": {"log_freq": 1}})
RUN_CONFIG = """
[model]
flavor = "debugmodel"
[training]
steps = 10
seq_len = 64
local_batch_size = 2
"""
SMALL_CONFIG = """
[training]
steps = 10
seq_len = 64
[activation_checkpoint]
mode = "{mode}"
[profiling]
enable_profiling = true
profile_freq = 10
profiler_warmup = 1
profiler_active = 1
"""
RIGHT: dict[str, Any] = {
    "version": 1,
    "workload": {
        "model": {"phase": "training", "moe": False, "model_arch": {"num_params": 10**6, "num_params_embedding": 2048}},
        "data": {"batch_size": 32, "seq_len": 1024, "dataset": "c4"},
        "hardware": {
            "network_topo": {"topology": "slingshot", "bandwidth_gbps": [200, 2400]},
            "xpu_spec": {"type": "GPU", "model": "nvidia_a100", "total_count": 2, "count_per_node": 2},
        },
    },
    "Model-executor": {
        "model_plan_parallelization": {"dp_replicate": 1, "dp_shard": 2, "tp": 1, "pp": 1, "cp": 1},
        "communication_library": {"name": "NCCL", "version": "2.27.5", "env": {}},
    },
    "metric_source": {"traces": ["json"], "metrics_specific_trace": []},
}
KERNELS = {"all_gather": "ncclDevKernel_AllGather", "reduce_scatter": "ncclDevKernel_ReduceScatter"}


def _lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def build_goodput(folder: Path) -> None:
    """Two starts, the first killed after a save, the second finished."""

    def event(kind: str, time: float, attempt: int, step: int, **facts: Any) -> dict[str, Any]:
        return {"event": kind, "time": time, "attempt": attempt, "rank": 0, "step": step, **facts}

    def record(time: float, attempt: int, step: int) -> dict[str, Any]:
        figures = {"loss": 2.5, "data_wait": 0.5, "elapsed_seconds": time - 1000, "step_seconds": 10.0}
        return {"kind": "train", "time": time, "attempt": attempt, "step": step, **figures}

    events = [
        event("start", 1008, 1, 0, process_start=1000, world_size=2, layout={"dp": 2}, backend="gloo"),
        event("ready", 1020, 1, 0),
        event("save_begin", 1120, 1, 10, path="step-10"),
        event("save_end", 1130, 1, 10, path="step-10", seconds=10, blocked_seconds=10, bytes=1000),
        event("skip", 1150, 1, 12, reason="spike", loss=7.0, grad_norm=2.0),
        event("start", 1405, 2, 0, process_start=1400),
        event("resume", 1420, 2, 10, path="step-10", seconds=3.0),
        event("ready", 1430, 2, 10),
        event("fault", 1480, 2, 15, error="out of memory", lost_peer=False),
        event("end", 1541, 2, 20, code=0, reason="finished", carried={"all_gather": 5}),
    ]
    validation = {"kind": "validation", "time": 1240, "attempt": 1, "step": 20, "loss": 2.0, "seconds": 10.0}
    backends = {"kind": "backends", "time": 1019, "attempt": 1, "step": 1, "backends": {"shard": "gloo"}}
    _lines(folder / "events.jsonl", events)
    _lines(
        folder / "metrics.jsonl", [backends, record(1120, 1, 10), validation, record(1340, 1, 30), record(1530, 2, 20)]
    )


def read_goodput(folder: Path) -> int:
    assert main(["goodput", str(folder), "--json"]) in (0, 2)
    return main(["goodput", str(folder)])


def build_compare(folder: Path) -> None:
    """A bench of two settings with three repeats each; a trace in one run."""
    settings = [{"folder": "a", "name": "mode=selective"}, {"folder": "b", "name": "mode=none"}]
    varied = {"activation_checkpoint.mode": ["selective", "none"]}
    note = {"format": "quadriga-bench-1", "ranks": 2, "varied": varied, "settings": settings}
    (folder / "bench.json").write_text(json.dumps(note))
    make_pair(folder, [0.1, 0.11, 0.1], [0.2, 0.21, 0.2], config=SHORT)
    for run in sorted(folder.glob("*/repeat-*")):
        mode = "selective" if run.parent.name == "a" else "none"
        (run / "config.toml").write_text(SMALL_CONFIG.format(mode=mode))
    two_steps(0, KERNELS).write(folder / "a/repeat-1/profile_trace/iteration_20/rank0_trace.json")


def read_compare(folder: Path) -> int:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["compare", str(folder), "--json", "--html", str(folder / "page.html")])
    if code == 0:  # what is printed without --json is made of the same
        assert list(format_comparison(json.loads(printed.getvalue())))
    return code


COMPARED = ("bench.json", "a/repeat-1/*.*", "b/repeat-*/*.*")


def build_trace(folder: Path) -> None:
    """Two ranks on a GPU, plain."""
    for rank in range(2):
        two_steps(rank, KERNELS).write(folder / f"rank{rank}_trace.json")
    call = {"axis": "shard", "collective": "all_gather", "calls": 1, "bytes": 2000}
    (folder / "estimate.json").write_text(json.dumps({"communication": [call], "attempt": 1}))


def build_packed_trace(folder: Path) -> None:
    """One rank of a run over gloo, packed, with notes."""
    trace = MadeTrace(0)
    for number in range(2):
        t = 1000.0 * number
        trace.mark(f"ProfilerStep#{number}", t, t + 1000)
        trace.host("aten::mm", t + 10, t + 300, **{"Input Dims": [[2, 3], [3, 4]], "Input type": ["float", "float"]})
        fields = {"Input Dims": [[[1000]], []], "Input type": ["c10::BFloat16", ""]}
        trace.host("c10d::allreduce_", t + 400, t + 420, **fields)
        trace.host("gloo:all_reduce", t + 405, t + 600, **{"Input Dims": [[1000]], "Input type": ["c10::BFloat16"]})
        trace.host("aten::embedding", t + 700, t + 720, **{"Input Dims": [[256, 8], [2, 16]]})
    launches = [[BASE_NS + 410_000, "1", 0], [BASE_NS + 1_410_000, "1", 1]]
    notes = {"first_step": 3, "machine": "one", "axes": {"1": "shard"}, "same": {}, "launches": launches, "attempt": 1}
    trace.about |= {"quadriga": notes, "distributedInfo": {"backend": "gloo", "rank": 0, "world_size": 2}}
    config = {"pg_name": "1", "pg_desc": "mesh_dp_shard", "ranks": [0, 1]}
    trace.about["distributedInfo"]["pg_config"] = [config]
    trace.write(folder / "plain.json")
    (folder / "rank0_trace.json.gz").write_bytes(gzip.compress((folder / "plain.json").read_bytes()))


def read_trace(folder: Path) -> int:
    return main(["trace", str(folder), "--html", str(folder / "page.html")])


def read_repacked_trace(folder: Path) -> int:
    """What was damaged within is packed again, so that it is reached."""
    (folder / "rank0_trace.json.gz").write_bytes(gzip.compress((folder / "plain.json").read_bytes(), 1))
    return main(["trace", str(folder / "rank0_trace.json.gz"), "--json"])


def build_checkpoints(folder: Path) -> None:
    for step in (3, 7):
        place = folder / "checkpoint"
        folders.prepare(place, step)
        Path(folders.staging_path(place, step), "__0_0.distcp").write_bytes(b"tensors" * 99)
        Path(folders.staging_path(place, step), ".metadata").write_bytes(b"a plan.")
        extra = {"train_state": {"tokens_seen": 1000 * step}, "world_size": 4}
        folders.publish(place, step, ("model", "optimizer"), extra)


def read_checkpoints(folder: Path) -> int:
    """3: none of those that were published is whole."""
    code = main(["checkpoints", str(folder), "--verify"])
    return 0 if code == 3 else code


def build_card(folder: Path) -> None:
    (folder / "card.yaml").write_text(yaml.safe_dump(RIGHT, sort_keys=False))
    build_packed_trace(folder)
    (folder / "plain.json").rename(folder / "rank0_trace.json")
    (folder / "rank0_trace.json.gz").unlink()


def read_card(folder: Path) -> int:
    assert main(["ccl-bench", "read", str(folder), "--json"]) in (0, 2)
    return main(["ccl-bench", "read", str(folder)])


def build_calibration(folder: Path) -> None:
    make_run(folder, [0.2] * 10, config=SHORT)
    (folder / "config.toml").write_text(RUN_CONFIG)
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**environment, "world_size": 1}))
    trace = MadeTrace(0, 1)
    for number in range(2):
        t = 1000.0 * number
        trace.mark(f"ProfilerStep#{number}", t, t + 1000)
        trace.host("aten::mm", t + 10, t + 300)
        trace.host("aten::_scaled_dot_product_flash_attention_for_cpu", t + 300, t + 400)
        trace.host("autograd::engine::evaluate_function: MmBackward0", t + 400, t + 800)
        trace.host("aten::mm", t + 410, t + 700)
        trace.mark("Optimizer.step#AdamW.step", t + 800, t + 900)
    trace.write(folder / "profile_trace/iteration_10/rank0_trace.json")


def read_calibration(folder: Path) -> int:
    file = folder.parent / "estimated.toml"
    file.write_text(RUN_CONFIG)
    return main(["estimate", str(file), "--ngpu", "1", "--device", "cpu", "--calibrate", str(folder)])


YAML_TOKENS = [
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/object:os.system ",
    b"? ",
    b"- " * 500,
    b"2001-99-99",
    b".nan",
    b".inf",
]
YAML_TOKENS += [b"[" * 2000, b"{a: " * 500, b"!!timestamp x", b"!!int x", b"0x" + b"f" * 5000, b"1:" * 3000 + b"1"]
READERS = [
    Reader("goodput", build_goodput, read_goodput, TOKENS),
    Reader("compare", build_compare, read_compare, TOKENS, COMPARED),
    Reader("trace", build_trace, read_trace, TOKENS),
    Reader("trace, packed", build_packed_trace, read_trace, TOKENS, ("*.gz",)),
    Reader("trace, packed again", build_packed_trace, read_repacked_trace, TOKENS, ("plain.json",)),
    Reader("checkpoints", build_checkpoints, read_checkpoints, TOKENS),
    Reader("ccl-bench", build_card, read_card, YAML_TOKENS),
    Reader("calibration", build_calibration, read_calibration, TOKENS, ("*.json*", "profile_trace/*/*")),
]
