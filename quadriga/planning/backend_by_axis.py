"""The share of the bytes of a step that each backend would carry."""

from __future__ import annotations

from collections import Counter

from quadriga.comm.backend import backend_by_axis, format_backends
from quadriga.config import Run
from quadriga.planning.communication import collective_calls
from quadriga.planning.setup import Setup

NORMS = "norms"


def byte_share_by_backend(run: Run, backend: str) -> dict[str, float]:
    """Share of the bytes that all ranks send in a step, by backend; {} if they send none."""
    setup, served = Setup(run), backend_by_axis(backend, run.spec.degrees)
    sent: Counter[str] = Counter()
    for rank in range(setup.degrees.pp):
        for call in collective_calls(setup, rank):
            axis = NORMS if call.when == "norm" else call.axis
            sent[served[axis]] += round(call.wire_bytes)
    whole = sum(sent.values())
    return {name: size / whole for name, size in sent.items()} if whole else {}


def format_backend_by_axis(run: Run, backend: str) -> str:
    """`nvshmem: shard (89.4 %); nccl: tp, norms (10.6 %); gloo: host`, with shares of the bytes sent in a step."""
    return format_backends(backend_by_axis(backend, run.spec.degrees), byte_share_by_backend(run, backend))
