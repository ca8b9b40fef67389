"""`Batch`: what the data pipeline passes to training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quadriga.data.packing import SkippedRecord
from quadriga.data.sources import DocumentId

IGNORE = -100  # a label that the loss ignores


@dataclass(frozen=True)
class Batch:
    """Rows of token ids and of the ids that follow them (labels), on the host. Both int64, shape (rows, seq_len).

    `documents`: for each row, the documents that its ids are from. `skipped`: the unreadable records that were passed
    while these rows were read. `bad_records`: the number of unreadable records of these rows since the first epoch;
    None if such a record ends the run. Micro-batches have none of the three.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: tuple[tuple[DocumentId, ...], ...] = ()
    skipped: tuple[SkippedRecord, ...] = ()
    bad_records: int | None = None

    def micro_batches(self, rows: int) -> Iterator[Batch]:
        """Splits the batch into micro-batches of `rows` rows, in order."""
        for tokens, labels in zip(self.tokens.split(rows), self.labels.split(rows), strict=True):
            yield Batch(tokens, labels)
