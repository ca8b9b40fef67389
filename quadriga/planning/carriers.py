"""Which backend would carry how much of what a step sends."""

from __future__ import annotations

from collections import Counter

from quadriga.comm.backend import in_words, serving
from quadriga.config import Run
from quadriga.planning.communication import calls_of
from quadriga.planning.setup import Setup

NORMS = "norms"


def shares_of_bytes(run: Run, backend: str) -> dict[str, float]:
    """Of the bytes on the wire of a step, over all ranks, by backend; {} where nothing is sent."""
    setup, served = Setup(run), serving(backend, run.spec.degrees)
    sent: Counter[str] = Counter()
    for rank in range(setup.degrees.pp):
        for call in calls_of(setup, rank):
            axis = NORMS if call.when == "norm" else call.axis
            sent[served[axis]] += round(call.wire_bytes)
    whole = sum(sent.values())
    return {name: size / whole for name, size in sent.items()} if whole else {}


def carriers_in_words(run: Run, backend: str) -> str:
    """`nvshmem: shard (89.4 %); nccl: tp, norms (10.6 %); gloo: host`: with shares of a step's bytes on the wire."""
    return in_words(serving(backend, run.spec.degrees), shares_of_bytes(run, backend))
