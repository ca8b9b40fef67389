"""Where documents begin in the rows of a batch, as tensors for the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TOKENS_PER_DOCUMENT = 64  # more documents than one for so many tokens are a rare row
LEAST_BORDERS = 32


def document_tensors(starts: Sequence[Sequence[int]], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions in documents, int64 (rows, seq_len), and the borders, int32 (rows, n), as `Batch` has them.

    `starts`: for each row, the places after 0 at which a document begins, ascending, below `seq_len`.

    n is the same for all rows that have a usual number of documents, else seq_len + 1, so that compiled code meets two
    sizes at most. It is not always seq_len + 1, because a kernel on CUDA starts blocks for each entry.
    """
    most = max((len(row) for row in starts), default=0) + 2
    usual = max(seq_len // TOKENS_PER_DOCUMENT, LEAST_BORDERS)
    borders = torch.full((len(starts), usual if most <= usual else seq_len + 1), seq_len, dtype=torch.int32)
    borders[:, 0] = 0
    positions = torch.arange(seq_len).repeat(len(starts), 1)
    for index, row in enumerate(starts):
        if len(row):
            places = torch.as_tensor(row, dtype=torch.int64)
            borders[index, 1 : len(row) + 1] = places
            steps = torch.zeros(seq_len, dtype=torch.int64)
            steps[places] = torch.diff(places, prepend=torch.zeros(1, dtype=torch.int64))
            positions[index] -= steps.cumsum(0)
    return positions, borders
