"""How much symmetric memory a run needs, and what is said when it is not there."""

from __future__ import annotations

import pytest

from quadriga.comm.heap import RESERVE, Heap, symmetric_size
from quadriga.errors import UserError
from quadriga.units import MIB

HEAP = Heap(gather=1000, scatter=2000)
NEEDED = 65 * MIB  # 4096 bytes and the reserve, in whole MiB


def test_parts_lie_one_behind_the_other_and_do_not_touch() -> None:
    assert HEAP.gather_starts == (0, 1024)
    assert HEAP.scatter_start == 2048
    assert HEAP.bytes == 4096
    assert HEAP.nvshmem_bytes == NEEDED == RESERVE + MIB


@pytest.mark.parametrize("text", ["65M", "65m", "1G", "1.5g", ".2G", str(NEEDED), "1T", "65MB"])
def test_a_heap_that_is_large_enough_is_kept(text: str) -> None:
    assert symmetric_size(HEAP, {"NVSHMEM_SYMMETRIC_SIZE": text}) == text


@pytest.mark.parametrize("environ", [{}, {"NVSHMEM_SYMMETRIC_SIZE": ""}])
def test_one_that_is_not_set_becomes_what_the_run_needs(environ: dict[str, str]) -> None:
    assert symmetric_size(HEAP, environ) == str(NEEDED)


@pytest.mark.parametrize("text", ["64M", "68157439", "1k", "0"])
def test_one_that_is_too_small_is_refused_with_the_size_that_is_needed(text: str) -> None:
    with pytest.raises(UserError, match=f"too small: this run needs 65.00 MiB(.|\n)*=({NEEDED})"):
        symmetric_size(HEAP, {"NVSHMEM_SYMMETRIC_SIZE": text})


@pytest.mark.parametrize("text", ["much", "-1", "1X", "1,5G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        symmetric_size(HEAP, {"NVSHMEM_SYMMETRIC_SIZE": text})
