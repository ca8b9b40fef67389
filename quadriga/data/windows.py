"""Windows of a sequence of token ids, by index arithmetic: which window a row of a step gets, and which ids it covers.

The rows of all steps are numbered: slot = step x global batch size + row. Slot g is position g % count of epoch
g // count, where count is the number of windows, and a bijection of the positions gives the window. It is keyed by seed
and epoch, so each epoch shows each window once, in another order. Nothing is stored, so any step is found at once, and
memory does not depend on the size of the data.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quadriga.data.streams import mix_bits

ROUNDS = 8  # of the Feistel network; the hash that gives their keys gives at most 8


@dataclass(frozen=True)
class Windows:
    """The windows of `ids` ids, in the order of an endless run or of one pass.

    Window j has the ids [j x stride, j x stride + seq_len + 1), with stride = seq_len + 1 - overlap. With an overlap of
    1, each id is a label once. `seed`: of the shuffling; None keeps the order. `short_last`: with overlap, rest ids at
    the end are a shorter window; otherwise no window has them.
    """

    ids: int
    seq_len: int
    overlap: int = 1
    seed: int | str | None = None
    short_last: bool = False

    @property
    def count(self) -> int:
        """The number of windows in one epoch; 0 if the data are shorter than one window."""
        labels = self.ids - self.overlap
        if self.short_last and self.overlap:
            return max(-(-labels // self.seq_len), 0)
        return max(labels // self._stride, 0)

    @property
    def least_ids(self) -> int:
        """The smallest number of ids that has a window."""
        return 2 if self.short_last and self.overlap else self.seq_len + 1

    @property
    def _stride(self) -> int:
        return self.seq_len + 1 - self.overlap

    def bounds(self, window: int) -> tuple[int, int]:
        """The first id of a window, and the one after its last."""
        start = window * self._stride
        return start, min(start + self.seq_len + 1, self.ids)

    def at(self, slots: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The windows of some slots, which may be of several epochs. int64, of the same shape. Needs a window."""
        epochs, positions = np.divmod(np.asarray(slots, np.int64), self.count)
        if self.seed is None:
            return positions
        found = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = permuted(positions[here], self.count, f"{self.seed} {epoch} windows")
        return found


def permuted(positions: npt.NDArray[np.int64], count: int, key: str) -> npt.NDArray[np.int64]:
    """The images of some positions under a bijection of range(count) that depends only on `key`. int64, shape (n,).

    A balanced Feistel network permutes the smallest range of an even number of bits that contains range(count), at
    most four times as large. A value outside of range(count) goes through the network again, until it is inside
    (cycle walking). Values outside are on the path of exactly one position, so this is a bijection too.
    """
    half = max(-(-(count - 1).bit_length() // 2), 1)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest(), "<u8")
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(values >= np.uint64(count))).size:
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of the numbers of 2 x `half` bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (mix_bits(right + key) & mask)
    return (left << bits) | right
