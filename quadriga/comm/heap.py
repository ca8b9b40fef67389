"""The size of the symmetric memory that a rank needs, and a check of NVSHMEM_SYMMETRIC_SIZE. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.errors import Problem, UserError
from quadriga.units import MIB, format_bytes

# `fully_shard` frees the output of an all-gather after it has copied it out. In a forward pass the next all-gather has
# been launched by then, so two outputs are alive at once.
GATHER_BUFFERS = 2
ALIGNMENT = 256  # of the buffers, in bytes
# For NVSHMEM's own data and for its rounding of sizes: assumed, not measured yet.
RESERVE = 64 * MIB
VARIABLE = "NVSHMEM_SYMMETRIC_SIZE"  # NVSHMEM's own variable: bytes of its heap per rank
SCALES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


@dataclass(frozen=True)
class Heap:
    """Bytes of the largest calls of a run. They are equal on all ranks, so that a buffer has the same offset on each.

    `gather`: output of the largest all-gather; `scatter`: input of the largest reduce-scatter, which has a scratch
    buffer of the same size.
    """

    gather: int
    scatter: int

    @property
    def gather_starts(self) -> tuple[int, ...]:
        return tuple(number * _aligned(self.gather) for number in range(GATHER_BUFFERS))

    @property
    def scatter_start(self) -> int:
        return GATHER_BUFFERS * _aligned(self.gather)

    @property
    def bytes(self) -> int:
        """Total size of all buffers."""
        return self.scatter_start + _aligned(self.scatter)

    @property
    def nvshmem_bytes(self) -> int:
        """Required size of NVSHMEM's heap in bytes, rounded up to MiB."""
        return -(-(self.bytes + RESERVE) // MIB) * MIB

    def __str__(self) -> str:
        parts = f"{GATHER_BUFFERS} x {format_bytes(self.gather)} for all-gathers, {format_bytes(self.scatter)} for sums"
        return f"{format_bytes(self.nvshmem_bytes)} per rank ({parts}, {format_bytes(RESERVE)} in reserve)"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def symmetric_size(heap: Heap, environ: Mapping[str, str]) -> str:
    """The value of NVSHMEM_SYMMETRIC_SIZE for a run: the user's if it is large enough; if unset, what the run needs.

    Raises:
        UserError: the variable is set, but too small or not a size.
    """
    text = environ.get(VARIABLE, "").strip()
    if not text:
        return str(heap.nvshmem_bytes)
    size = _size(text)
    if size is None:
        raise UserError(Problem(VARIABLE, "not a size", text, "environment", "bytes, or a number with K, M, G or T"))
    if size < heap.nvshmem_bytes:
        what = f"the symmetric heap is too small: this run needs {heap}"
        fix = f"set {VARIABLE}={heap.nvshmem_bytes}, or leave it unset"
        raise UserError(Problem(VARIABLE, what, text, "environment", fix=fix))
    return text


def _size(text: str) -> int | None:
    """Bytes, in the formats that NVSHMEM reads: `1073741824`, `1.5G`; None for anything else."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([kmgt]?)b?", text.lower())
    return int(float(found.group(1)) * SCALES[found.group(2)]) if found else None
