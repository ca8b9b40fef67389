"""Traces are valid, stand where they should, and hold the steps that were asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerAction

from quadriga.config.run_spec import Folders
from quadriga.config.schema import Profiling
from quadriga.metrics.cycles import Cycle
from quadriga.metrics.profiler import Profiler, profiler_schedule

CPU = torch.device("cpu")


def folders(dump: Path) -> Folders:
    names = ("checkpoint", "tb", "profile_trace", "memory_snapshot", "comm_traces")
    return Folders(str(dump), *(str(dump / name) for name in names))


def run(section: Profiling, dump: Path, first_step: int, steps: int, stop_after: int | None = None) -> None:
    with Profiler(section, folders(dump), rank=3, device=CPU, first_step=first_step, steps=steps) as profiler:
        for step in range(first_step, (stop_after or steps) + 1):
            torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step(step)


def traced(dump: Path) -> dict[str, int]:
    """Recorded steps of each trace."""
    found = {}
    for path in sorted((dump / "profile_trace").rglob("*")):
        if path.is_dir():
            continue
        assert path.name == "rank3_trace.json.gz", "nothing else is left behind"
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        assert any(event.get("name") == "aten::matmul" for event in events)
        steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}
        found[path.parent.name] = len(steps)
    return found


def test_every_cycle_leaves_its_last_steps(tmp_path):
    section = Profiling(enable_profiling=True, profile_freq=6, profiler_active=2, profiler_warmup=1)
    run(section, tmp_path, first_step=1, steps=12)
    assert traced(tmp_path) == {"iteration_6": 2, "iteration_12": 2}


def test_a_run_shorter_than_a_cycle_leaves_a_trace_too(tmp_path):
    section = Profiling(enable_profiling=True, profile_freq=100)
    run(section, tmp_path, first_step=8, steps=10)
    assert traced(tmp_path) == {"iteration_10": 3}


def test_a_run_that_ends_while_recording_keeps_what_it_has(tmp_path):
    section = Profiling(enable_profiling=True, profile_freq=10, profiler_active=4)
    run(section, tmp_path, first_step=1, steps=20, stop_after=8)
    assert list(traced(tmp_path)) == ["iteration_8"]


def test_off_means_nothing(tmp_path):
    run(Profiling(), tmp_path, first_step=1, steps=3)
    assert list(tmp_path.iterdir()) == []


def test_a_memory_snapshot_on_a_cpu_is_reported_as_none(tmp_path, lines):
    run(Profiling(enable_memory_snapshot=True), tmp_path, first_step=1, steps=3)
    assert len([line for line in lines if "nothing is recorded" in line]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("length", "warmup", "active"), [(10, 3, 5), (5, 0, 5), (1, 0, 1), (7, 6, 1)])
def test_a_cycle_waits_warms_up_and_records(length, warmup, active):
    names = [profiler_schedule(Cycle(length, warmup, active), 2 * length)(step) for step in range(2 * length + 3)]
    once = [ProfilerAction.NONE] * (length - warmup - active) + [ProfilerAction.WARMUP] * warmup
    once += [ProfilerAction.RECORD] * (active - 1) + [ProfilerAction.RECORD_AND_SAVE]
    assert names == once * 2 + [ProfilerAction.NONE] * 3
