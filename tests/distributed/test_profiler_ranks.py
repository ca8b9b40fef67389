"""A trace of each rank, which says of what group it was a part."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_ranks

from quadriga.config.run_spec import Folders
from quadriga.config.schema import Profiling
from quadriga.metrics.profiler import Profiler


def reduce_under_the_profiler(folder: str) -> None:
    section = Profiling(enable_profiling=True, profile_freq=4, profiler_active=2, profiler_warmup=1)
    folders = Folders(folder, folder, folder, folder, folder, folder)
    rank = dist.get_rank()
    with Profiler(section, folders, rank=rank, device=torch.device("cpu"), first_step=1, steps=4) as profiler:
        for step in range(1, 5):
            dist.all_reduce(torch.ones(8))
            profiler.step(step)


def test_each_rank_leaves_a_trace_that_knows_the_group(tmp_path):
    run_ranks(reduce_under_the_profiler, 2, str(tmp_path))
    for rank in range(2):
        with gzip.open(Path(tmp_path, "iteration_4", f"rank{rank}_trace.json.gz"), "rt") as file:
            trace = json.load(file)
        assert trace["distributedInfo"]["rank"] == rank
        assert trace["distributedInfo"]["world_size"] == 2
        assert trace["distributedInfo"]["backend"] == "gloo"
        assert trace["quadriga"]["first_step"] == 1
        assert trace["quadriga"]["machine"]
        assert len([event for event in trace["traceEvents"] if event.get("name") == "gloo:all_reduce"]) == 2
