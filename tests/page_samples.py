"""Analyses and comparisons made by hand, as `quadriga trace --json` and `quadriga compare --json` would print them."""

from __future__ import annotations

import random
from typing import Any

EVIL = "void <script>alert('1')</script> & \"co\"<T, 4>"


def step(seconds: float, number: int | None = None) -> dict[str, Any]:
    """A step on a GPU: what is waited for data was not measured."""
    parts = {
        "seconds": seconds,
        "compute_s": 0.6 * seconds,
        "communication_s": 0.35 * seconds,
        "exposed_communication_s": 0.22 * seconds,
        "memcpy_s": 0.05 * seconds,
        "exposed_memcpy_s": 0.03 * seconds,
        "host_idle_s": 0.1 * seconds,
        "data_wait_s": None,
    }
    return parts if number is None else {"step": number, **parts}


def collective(axis: str, kind: str, by_size: dict[int, float], **changed: Any) -> dict[str, Any]:
    """`by_size`: bus bandwidth in GB/s by bytes of a call."""
    row = {
        "axis": axis,
        "collective": kind,
        "backend": "nccl",
        "found_by": "linkage",
        "ranks": 4,
        "calls_a_step": 64,
        "bytes_a_step": 64 * sum(by_size),
        "bytes_a_call": [min(by_size), min(by_size), max(by_size)],
        "seconds_a_step": 0.031,
        "exposed_s_a_step": 0.012,
        "start_skew_s": 0.0007,
        "transfer_s": 0.0021,
        "algorithm_gb_s": 120.0,
        "bus_gb_s": 90.0,
        "overlap_share": 0.61,
        "sizes": [
            {"bytes": size, "calls": 32, "transfer_s": size / gb_s / 1e9, "bus_gb_s": gb_s}
            for size, gb_s in by_size.items()
        ],
    }
    return {**row, **changed}


def strips(ranks: int, seconds: float) -> list[dict[str, Any]]:
    dice = random.Random(3)
    found = []
    for rank in range(ranks):
        for lane, busy in (("compute", 0.7), ("communication", 0.35), ("memcpy", 0.05), ("host", 0.9)):
            spans, at = [], 0.0
            while at < 0.97 * seconds:
                length = dice.uniform(0.2, 1.0) * busy * seconds / 30
                spans.append([at, at + length, EVIL if lane == "compute" else f"{lane} {len(spans)}"])
                at += length / busy
            found.append({"rank": rank, "lane": lane, "spans": spans})
    return found


def analysis(ranks: int = 4) -> dict[str, Any]:
    """Of a run on GPUs; rank 3 is slow, an op on axis `tp` was found by its name alone."""
    times = [0.41, 0.42, 0.415, 0.44, 0.412]
    gather = {2_000_000: 35.0, 33_000_000: 120.0, 436_000_000: 185.0}
    return {
        "format": "quadriga-trace-1",
        "source": "outputs/llama3_8b",
        "device_type": "cuda",
        "ranks": list(range(ranks)),
        "world_size": ranks,
        "steps": [6, 7, 8, 9, 10],
        "step_time_s": {"mean": 0.4194, "median": 0.415, "min": 0.41, "max": 0.44},
        "by_rank": [
            {
                "rank": rank,
                "mean": step(0.4194 + 0.01 * (rank == 3)),
                "steps": [step(t, 6 + i) for i, t in enumerate(times)],
            }
            for rank in range(ranks)
        ],
        "slowest": {"rank": 3, "by_s": 0.01, "by_share": 0.0238},
        "collectives": [
            collective("shard", "all_gather", gather),
            collective("shard", "reduce_scatter", {4_000_000: 51.0, 872_000_000: 191.0}, exposed_s_a_step=0.044),
            collective(
                "tp",
                EVIL,
                {8_388_608: 1.0},
                found_by="name",
                backend="symm_mem",
                bus_gb_s=None,
                algorithm_gb_s=None,
                transfer_s=None,
                start_skew_s=None,
                sizes=[{"bytes": 8_388_608, "calls": 3, "transfer_s": None, "bus_gb_s": None}],
            ),
        ],
        "kernels": {
            "families": [
                {"name": "matrix products", "seconds_a_step": 0.2, "share": 0.6},
                {"name": "attention", "seconds_a_step": 0.05, "share": 0.15},
            ],
            "blocks": [],
            "top": [{"name": EVIL, "calls_a_step": 32, "seconds_a_step": 0.08, "share": 0.24}],
        },
        "estimate": {
            "rows": [
                {
                    "axis": "shard", "collective": "all_gather", "calls": 64, "predicted_calls": 64,
                    "bytes": 30144000000, "predicted_bytes": 30144000000, "equal": True,
                },
                {
                    "axis": "tp", "collective": "all_reduce", "calls": 3, "predicted_calls": 4,
                    "bytes": 3000, "predicted_bytes": 4000, "equal": False,
                },
            ]
        },
        "timeline": {"step": 8, "start_s": 0.0, "strips": strips(ranks, 0.415)},
        "not_measurable": {
            "data_wait_s": "the trace has no range around the loader",
            f"transfer of tp {EVIL}": "ranks without `Seq` cannot be matched",
            "kernels.blocks": "the model's blocks are not annotated",
        },
        "warnings": ["rank 2's clock is 3 ms ahead"],
    }  # fmt: skip


def bare_analysis() -> dict[str, Any]:
    """Of a foreign trace of one rank that tells next to nothing."""
    nothing = dict.fromkeys(step(1.0)) | {"seconds": 1.5}
    return {
        "format": "quadriga-trace-1",
        "source": "somewhere/trace.json",
        "device_type": "cpu",
        "ranks": [0],
        "world_size": 1,
        "steps": [1],
        "step_time_s": {"mean": 1.5, "median": 1.5, "min": 1.5, "max": 1.5},
        "by_rank": [{"rank": 0, "mean": nothing, "steps": [{"step": 1, **nothing}]}],
        "slowest": None,
        "collectives": [],
        "kernels": {"families": [], "blocks": [], "top": []},
        "estimate": None,
        "timeline": {"step": 1, "start_s": 0.0, "strips": []},
        "not_measurable": {
            "collectives": "the trace has no CPU operations",
            "estimate": "the folder holds no estimate.json",
            "compute_s": "no device rows",
        },
        "warnings": [],
    }


def comparison() -> dict[str, Any]:
    """Two backends: one faster, memory the same, and what was asked of a third not credited."""
    steps = list(range(1, 201))
    dice = random.Random(5)
    losses = [8.0 / (1 + 0.02 * s) + 1.6 + dice.gauss(0, 0.03) for s in steps]
    others = [loss + 0.002 * (s % 7) for s, loss in zip(steps, losses, strict=True)]
    return {
        "format": "quadriga-compare-1",
        "varied": {"comm.backend": ["nccl", "nvshmem"]},
        "runs": [
            {"name": "nccl", "folder": "bench/nccl", "values": {"comm.backend": "nccl"}, "repeats": 5, "warnings": []},
            {
                "name": "nvshmem", "folder": "bench/nvshmem", "values": {"comm.backend": "nvshmem"}, "repeats": 5,
                "warnings": ["repeat 2 ran beside another process"],
            },
        ],
        "refused": None,
        "headline": "step_time_s",
        "not_measurable": {"where": "nvshmem: it has no trace"},
        "warnings": [],
        "figures": [
            {
                "name": "step_time_s", "unit": "s", "lower_is_better": True,
                "by_run": [
                    {"run": "nccl", "median": 0.415, "spread": [0.41, 0.43], "samples": [0.41, 0.415, 0.43]},
                    {"run": "nvshmem", "median": 0.39, "spread": [0.385, 0.4], "samples": [0.39, 0.385, 0.4]},
                ],
                "ratios": [
                    {"run": "nvshmem", "against": "nccl", "ratio": 0.941, "interval": [0.925, 0.957],
                     "confidence": 0.95, "pairs": 5, "verdict": "not credited"},
                ],
            },
            {
                "name": "memory_peak_gib", "unit": "GiB", "lower_is_better": True,
                "by_run": [
                    {"run": "nccl", "median": 61.2, "spread": [61.2, 61.2], "samples": [61.2] * 5},
                    {"run": "nvshmem", "median": 61.3, "spread": [61.2, 61.4], "samples": [61.3] * 5},
                ],
                "ratios": [
                    {"run": "nvshmem", "against": "nccl", "ratio": 1.0016, "interval": [0.998, 1.004],
                     "confidence": 0.95, "pairs": 5, "verdict": "no difference shown"},
                ],
            },
            {
                "name": "exposed_communication_s.shard", "unit": "s", "lower_is_better": True,
                "by_run": [
                    {"run": "nccl", "median": 0.05, "spread": [0.04, 0.06], "samples": [0.05]},
                    {"run": "nvshmem", "median": None, "spread": None, "samples": []},
                ],
                "ratios": [
                    {"run": "nvshmem", "against": "nccl", "ratio": None, "interval": None,
                     "confidence": 0.95, "pairs": 1, "verdict": "too few runs"},
                ],
            },
        ],
        "losses": {
            "steps": steps,
            "by_run": [{"run": "nccl", "loss": losses}, {"run": "nvshmem", "loss": [None, *others[1:]]}],
            "largest_difference": {"step": 6, "value": 0.012, "between": ["nccl", "nvshmem"]},
            "largest_within_a_setting": 0.003,
            "note": "One more thing.",
        },
        "where": [
            {
                "part": "exposed_communication_on_shard_s", "axis": "shard",
                "by_run": [{"run": "nccl", "seconds": 0.08}, {"run": "nvshmem", "seconds": None}],
            },
            {"part": "compute_s", "by_run": [{"run": "nccl", "seconds": 0.25}, {"run": "nvshmem", "seconds": 0.24}]},
            {
                "part": "exposed_communication_s",
                "by_run": [{"run": "nccl", "seconds": 0.09}, {"run": "nvshmem", "seconds": None}],
            },
        ],
        "backend": [
            {
                "run": "nccl", "asked": "nccl", "credited": True, "why": "it carried 100 % of the bytes",
                "carried": [{"axis": "shard", "backend": "nccl", "share_of_bytes": 1.0}],
            },
            {
                "run": "nvshmem", "asked": "nvshmem", "credited": False, "why": "no byte of axis shard went through it",
                "carried": None,
            },
        ],
    }  # fmt: skip
