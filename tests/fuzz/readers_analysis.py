"""What reads run folders and traces: the commands themselves, so that exit codes count too."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from fuzzing import Reader
from made_traces import two_steps
from run_folders import make_pair

from quadriga.cli.main import main
from quadriga.compare.report import lines
from quadriga.config import JobConfig

TOKENS = [b'"attempt": 0', b'"step": -1', b'"time": 1e300', b'"time": NaN', b'"step": 1e9', b"repeat-", b"\x1b[2J"]

SHORT = JobConfig.model_validate({"training": {"steps": 10}, "metrics": {"log_freq": 1}})
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
        assert list(lines(json.loads(printed.getvalue())))
    return code


COMPARED = ("bench.json", "a/repeat-1/*.*", "b/repeat-*/*.*")
READERS = [
    Reader("goodput", build_goodput, read_goodput, TOKENS),
    Reader("compare", build_compare, read_compare, TOKENS, COMPARED),
]
