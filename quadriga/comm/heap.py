"""How much memory that peers may write into a rank needs, and whether it gets it. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.errors import Problem, UserError
from quadriga.units import MIB, format_bytes

# `fully_shard` frees the output of an all-gather when it has copied it out, and in a forward pass not before the next
# one is on its way: two are alive at once.
GATHER_BUFFERS = 2
ALIGNMENT = 256  # of the parts, in bytes
# What NVSHMEM's own bookkeeping and the pieces that it rounds up to may take beside them: assumed, not measured yet.
RESERVE = 64 * MIB
VARIABLE = "NVSHMEM_SYMMETRIC_SIZE"  # of NVSHMEM itself: bytes of its heap, a rank
SCALES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


@dataclass(frozen=True)
class Heap:
    """Bytes of the largest calls of a run, equal on all of its ranks: a peer finds a place by its distance from the
    beginning.

    `gather`: of what one all-gather puts together; `scatter`: of what one reduce-scatter takes apart, which lands in a
    scratch as large before it is summed.
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
        """Of all buffers together."""
        return self.scatter_start + _aligned(self.scatter)

    @property
    def nvshmem_bytes(self) -> int:
        """What NVSHMEM's heap should have, in whole MiB."""
        return -(-(self.bytes + RESERVE) // MIB) * MIB

    def __str__(self) -> str:
        parts = f"{GATHER_BUFFERS} x {format_bytes(self.gather)} for all-gathers, {format_bytes(self.scatter)} for sums"
        return f"{format_bytes(self.nvshmem_bytes)} a rank ({parts}, {format_bytes(RESERVE)} in reserve)"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def symmetric_size(heap: Heap, environ: Mapping[str, str]) -> str:
    """The value of NVSHMEM_SYMMETRIC_SIZE for a run: the user's, where it is enough, or what the run needs.

    Raises:
        UserError: it is set, and too small or no size.
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
    """As NVSHMEM reads it: `1073741824`, `1.5G`."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([kmgt]?)b?", text.lower())
    return int(float(found.group(1)) * SCALES[found.group(2)]) if found else None
