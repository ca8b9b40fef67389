"""The one thing that data hands to training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quadriga.data.packing import SkippedRecord
from quadriga.data.sources import DocumentId

IGNORE = -100  # a label that no loss counts


@dataclass(frozen=True)
class Batch:
    """Rows of token ids and the ids that follow them, on the host. Both int64 of shape (rows, seq_len).

    `documents` says of each row which documents it is from; `skipped` names the records that could not be read on the
    way, and `bad_records` counts them since the first epoch, of these rows; None where such a record ends the run. A
    micro-batch does not know.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: tuple[tuple[DocumentId, ...], ...] = ()
    skipped: tuple[SkippedRecord, ...] = ()
    bad_records: int | None = None

    def micro_batches(self, rows: int) -> Iterator[Batch]:
        """Cut into micro-batches of `rows` rows, in order."""
        for tokens, labels in zip(self.tokens.split(rows), self.labels.split(rows), strict=True):
            yield Batch(tokens, labels)
