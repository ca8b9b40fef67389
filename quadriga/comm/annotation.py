"""What our own collectives are called in a trace: torch writes down nothing of them by itself.

    quadriga:collective axis=shard kind=all_gather bytes=1234 dtype=bfloat16 ranks=4 backend=nvshmem

Pairs follow each other in this order, one space apart, and no value has a space; further pairs may be added at the end.
`bytes` are those of the largest tensor of the call: of an all-gather's whole output, of a reduce-scatter's whole input.
"""

from __future__ import annotations

import torch
from torch.profiler import record_function

PREFIX = "quadriga:collective"


def annotated(axis: str, kind: str, tensor: torch.Tensor, ranks: int, backend: str) -> record_function:
    """A context in which one call is made; `tensor` is the largest that it takes or gives."""
    size, dtype = tensor.numel() * tensor.itemsize, str(tensor.dtype).removeprefix("torch.")
    return record_function(
        f"{PREFIX} axis={axis} kind={kind} bytes={size} dtype={dtype} ranks={ranks} backend={backend}"
    )
