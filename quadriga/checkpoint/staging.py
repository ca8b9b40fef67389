"""Host memory for saves in the background: a copy of what the rank holds, which training cannot change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quadriga.tensors import from_local_like, to_local

ALIGNMENT = 512  # bytes between the starts of two tensors: every dtype, and whole sectors for the copy engine
BLOCK_BYTES = 1 << 30  # of a block, if no tensor is larger


class Staging:
    """Copies tensors to host memory, so that training cannot change them during a save. The memory is reused.

    With `pinned` memory (on CUDA), the device copies directly, without the buffers of the driver. torch rounds each
    pinned allocation up to a power of two, so tensors share blocks of these sizes.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned, self._copies = pinned, dict[str, torch.Tensor]()

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The copies, with the same dtypes and placements. They are valid until the next call."""
        held = {name: to_local(value.detach()) for name, value in tensors.items()}
        if not all(name in self._copies and _alike(self._copies[name], value) for name, value in held.items()):
            self._copies.clear()  # frees the blocks before new ones are allocated
            self._copies = self._allocate(held)
        copies = dict[str, torch.Tensor]()
        for name, value in held.items():
            copy = self._copies[name].copy_(value, non_blocking=self._pinned)
            copies[name] = from_local_like(copy, tensors[name])
        if self._pinned:
            torch.cuda.synchronize()
        return copies

    def _allocate(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Memory for each tensor, each with a storage of its own: torch.save would write the storage of a view."""
        sizes, places = pack([value.nbytes for value in held.values()])
        blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned).untyped_storage() for size in sizes]
        copies = dict[str, torch.Tensor]()
        for (name, value), (block, start) in zip(held.items(), places, strict=True):
            storage = blocks[block][start : start + value.nbytes]  # keeps its block alive
            copies[name] = torch.empty(0, dtype=value.dtype).set_(storage).view(value.shape)
        return copies


def pack(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Blocks for tensors of these sizes in bytes: the bytes of each block, and for each tensor its block and start.

    Each block is a power of two. The largest tensors come first, each into the first block where it fits.
    """
    blocks, used = list[int](), list[int]()
    places = [(0, 0)] * len(sizes)
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    rest = sum(aligned)
    for index in sorted(range(len(sizes)), key=aligned.__getitem__, reverse=True):
        size = aligned[index]
        block = next((number for number, total in enumerate(blocks) if used[number] + size <= total), len(blocks))
        if block == len(blocks):  # no larger than what is left, if possible
            blocks.append(max(_ceil(size), min(BLOCK_BYTES, _floor(rest))))
            used.append(0)
        places[index] = block, used[block]
        used[block] += size
        rest -= size
    return blocks, places


def _ceil(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _floor(size: int) -> int:
    """The largest power of two that is not above `size`; 1 for 0."""
    return 1 << max(size.bit_length() - 1, 0)


def _alike(copy: torch.Tensor, value: torch.Tensor) -> bool:
    return copy.shape == value.shape and copy.dtype == value.dtype
