"""Names Quadriga's own collectives in a profiler trace, because torch does not record them by itself.

    quadriga:collective axis=shard kind=all_gather bytes=1234 dtype=bfloat16 ranks=4 backend=nvshmem

The pairs are in this order, separated by one space, and no value has a space. Further pairs may be added at the end.
`bytes` is the size of the call's largest tensor: the output of an all-gather, the input of a reduce-scatter.
"""

from __future__ import annotations

import torch
from torch.profiler import record_function

PREFIX = "quadriga:collective"


def annotated(axis: str, kind: str, tensor: torch.Tensor, ranks: int, backend: str) -> record_function:
    """A context for one call; `tensor` is its largest input or output."""
    size, dtype = tensor.numel() * tensor.itemsize, str(tensor.dtype).removeprefix("torch.")
    return record_function(
        f"{PREFIX} axis={axis} kind={kind} bytes={size} dtype={dtype} ranks={ranks} backend={backend}"
    )
