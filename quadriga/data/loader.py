"""Batches for one rank: threads read its rows ahead; the state is that of consumed batches.

`Loader` is what the trainer uses. `stream_loader` reads documents in streams, `token_loader` windows of token ids, and
`mixture_loader` both.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from quadriga.config.schema import Fetching, Training
from quadriga.data.document_borders import document_tensors
from quadriga.data.prefetch import Prefetcher
from quadriga.data.sources import DocumentName
from quadriga.data.streams import Cursor, SkippedRecord, Window
from quadriga.errors import Problem
from quadriga.log import logger

IGNORE = -100  # a label that the loss ignores
PREFETCH = 2  # batches ahead, if the configuration gives no number


@dataclass(frozen=True)
class Batch:
    """Rows of token ids and of the ids that follow them (labels), on the host. Both int64, shape (rows, seq_len).

    `documents`: for each row, the documents that its ids are from. `skipped`: the unreadable records that were passed
    while these rows were read. `bad_records`: the number of unreadable records of these rows since the first epoch;
    None if such a record ends the run. `sources`: of a mixture, tokens and epochs of each source up to this batch.
    Micro-batches have none of the four. `tokens_read`: the number of tokens that do not fill up rows; None if all rows
    are full and all labels count.

    `positions`: int64, shape (rows, seq_len), of each token in its document, or in the piece of it that is in the row.
    `borders`: int32, shape (rows, n), the first position in the row of each document or piece, then seq_len, repeated.
    Both are None if a row is one document for the model.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: tuple[tuple[DocumentName, ...], ...] = ()
    skipped: tuple[SkippedRecord, ...] = ()
    bad_records: int | None = None
    sources: Mapping[str, Mapping[str, float]] | None = None
    positions: torch.Tensor | None = None
    borders: torch.Tensor | None = None
    tokens_read: int | None = None

    @property
    def counted_labels(self) -> int:
        """The number of labels that the loss counts."""
        return int((self.labels != IGNORE).sum())

    def micro_batches(self, rows: int) -> Iterator[Batch]:
        """Splits the batch into micro-batches of `rows` rows, in order."""
        if self.positions is None or self.borders is None:
            for tokens, labels in zip(self.tokens.split(rows), self.labels.split(rows), strict=True):
                yield Batch(tokens, labels)
            return
        split = [tensor.split(rows) for tensor in (self.tokens, self.labels, self.positions, self.borders)]
        for tokens, labels, positions, borders in zip(*split, strict=True):
            yield Batch(tokens, labels, positions=positions, borders=borders)


class RowFormat(NamedTuple):
    """How documents become rows: `training.document_mask`, `training.packing`, and whether documents have prompts."""

    document_mask: bool = False
    packing: str = "concat"
    prompts: bool = False

    @property
    def counts_labels(self) -> bool:
        """Whether the number of labels that the loss counts differs from step to step."""
        return self.document_mask or self.packing == "pad" or self.prompts


CONCATENATED = RowFormat()


def row_format(training: Training) -> RowFormat:
    """The rows of a run."""
    prompts = any(source.dataset_prompt is not None for source in training.sources or (training,))
    return RowFormat(training.document_mask, training.packing, prompts)


class BatchPart(NamedTuple):
    """One thread's part of a batch. `windows`: by row, of the rows that the thread reads. `cursors`: by stream, in a
    mixture by source and stream, the beginning of the next batch."""

    windows: dict[int, Window]
    cursors: dict[Any, Cursor]


class Loader(ABC):
    """`next()` returns a Batch of len(rows) rows. `waited`: seconds that the last call waited for its batch.

    endless: training, without end. Otherwise each iteration is one pass, and all ranks get equally many batches.
    """

    def __init__(
        self,
        seq_len: int,
        global_batch_size: int,
        rows: range,
        dataloader: Fetching,
        *,
        endless: bool,
        rows_have: RowFormat = CONCATENATED,
    ) -> None:
        if not 0 <= rows.start < rows.stop <= global_batch_size or rows.step != 1:
            raise ValueError(f"rows {rows} are not rows of a global batch of {global_batch_size}")
        self.waited = 0.0
        self._seq_len, self._endless = seq_len, endless
        self._global_batch_size, self._rows = global_batch_size, rows
        self._dataloader, self._format = dataloader, rows_have
        self._pin = dataloader.pin_memory and torch.cuda.is_available()
        if dataloader.pin_memory and not self._pin:
            logger.info("data: dataloader.pin_memory has no effect without CUDA")
        self._prefetcher: Prefetcher | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Returns itself; a finite loader begins its pass again."""
        if not self._endless:
            self.close()
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self) -> Batch:
        """The next batch of this rank. Raises StopIteration at the end of a pass, and errors of its threads."""
        started = time.perf_counter()
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._feeds(), self._dataloader.prefetch_factor or PREFETCH)
        parts: list[BatchPart] = self._prefetcher.next()
        self.waited = time.perf_counter() - started
        self._advance(parts)
        return self._assemble({row: window for part in parts for row, window in part.windows.items()})

    def empty(self) -> Batch:
        """A batch of the same shape whose labels are all IGNORE."""
        return self._assemble({})

    def close(self) -> None:
        """Ends the threads. The next `next()` reads again what they had prefetched."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Everything that determines the order of ids, as text; a resume compares it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The consumed position, as JSON values: `fingerprint`, and `lanes`, by stream a list of counts. The state of
        the run has the `lanes` of all ranks."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, which has the streams of all ranks.

        Raises UserError if the data differ from those that the state was saved with."""

    @abstractmethod
    def differences(self, state: Mapping[str, Any]) -> list[Problem]:
        """Why the data differ from those that `state` was saved with."""

    @abstractmethod
    def snapshot(self) -> Any:
        """The consumed position, for `restore` of this loader. Unlike `state_dict`, it reads no file."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Continues at the position of `snapshot`."""

    @abstractmethod
    def start_at(self, documents: int, tokens_left: int) -> None:
        """Continues `tokens_left` ids before the end of the `documents`-th document of an epoch. This is the position
        of torchtitan's loader, which counts documents read and keeps the ids not used yet.

        Raises UserError if the data have no such position."""

    @abstractmethod
    def _feeds(self) -> list[Generator[BatchPart, None, None]]:
        """One generator per thread. Together they yield the rows of one batch after another."""

    @abstractmethod
    def _advance(self, parts: Sequence[BatchPart]) -> None:
        """Moves the position behind a batch."""

    def bad_records(self) -> int | None:
        """The number of records skipped so far in the rows of this rank; None if none is ever skipped."""
        return None

    def format_location(self, record: SkippedRecord) -> str:
        """The location of a skipped record: file and line. May read the file up to there."""
        raise LookupError("these data have no records that are skipped")

    def _assemble(self, windows: Mapping[int, Window]) -> Batch:
        """The batch of these windows, by row. Rows without a window, and the rest of a short one, have the label
        IGNORE, and so have prompts. With `document_mask` the first token of a document is no label: the one before it
        does not predict it."""
        shape = (len(self._rows), self._seq_len)
        tokens, labels = (torch.empty(shape, dtype=torch.int64, pin_memory=self._pin) for _ in range(2))
        for row, of_tokens, of_labels in zip(self._rows, tokens.numpy(), labels.numpy(), strict=True):
            window = windows.get(row)
            length = 0 if window is None else len(window.ids) - 1
            of_tokens[length:], of_labels[length:] = 0, IGNORE
            if window is not None:
                of_tokens[:length], of_labels[:length] = window.ids[:-1], window.ids[1:]
                if self._format.document_mask and len(window.starts):
                    of_labels[np.asarray(window.starts) - 1] = IGNORE
                for first, after in window.uncounted:
                    of_labels[max(first - 1, 0) : after - 1] = IGNORE
        positions, borders = self._documents_of(windows) if self._format.document_mask else (None, None)
        read = sum(len(window.ids) - 1 for window in windows.values()) if self._format.counts_labels else None
        return Batch(
            tokens,
            labels,
            documents=tuple(windows[row].documents if row in windows else () for row in self._rows),
            skipped=tuple(record for row in sorted(windows) for record in windows[row].skipped),
            bad_records=self.bad_records(),
            positions=positions,
            borders=borders,
            tokens_read=read,
        )

    def _documents_of(self, windows: Mapping[int, Window]) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions and borders of a batch. What fills up a short window is a document of its own."""
        starts = []
        for row in self._rows:
            window = windows.get(row)
            length = self._seq_len if window is None else len(window.ids) - 1
            rest = [] if length == self._seq_len else [length]
            starts.append([*(at for at in (window.starts if window else ()) if at < length), *rest])
        positions, borders = document_tensors(starts, self._seq_len)
        return (positions.pin_memory(), borders.pin_memory()) if self._pin else (positions, borders)
