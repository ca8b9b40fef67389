"""Batches of windows of token ids. The state is one number: the rows that the whole run has consumed.

Token files have no bad records. `TokenFiles` repeats a read that fails, and then the run stops.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from quadriga.config.schema import Fetching, TokenKeys
from quadriga.data.changes import differences
from quadriga.data.loader import BatchPart, Loader
from quadriga.data.streams import START, Window
from quadriga.data.token_data import format_tokens, open_tokens
from quadriga.data.token_files import TokenFiles
from quadriga.data.windows import Windows
from quadriga.errors import Problem, UserError
from quadriga.log import logger

BLOCK = 1024  # windows whose order is computed at once
STREAM = "0"  # the key of the position in a checkpoint


def build_token_loader(
    keys: TokenKeys,
    vocab_size: int,
    *,
    seed: int,
    seq_len: int,
    global_batch_size: int,
    rows: range,
    dataloader: Fetching,
    infinite: bool = True,
    assets: str | None = None,
) -> TokenLoader:
    """The loader of `rows` of the global batch, of token files; `loader.build_loader` describes the arguments, and
    `open_tokens` `assets`.

    Not infinite (validation): with an overlap, the last row of a pass can be short.
    Raises UserError as `open_tokens`.
    """
    files, windows = open_tokens(keys, dataloader, seq_len, vocab_size, endless=infinite, seed=seed, assets=assets)
    return TokenLoader(files, windows, vocab_size, global_batch_size, rows, dataloader, endless=infinite)


class TokenLoader(Loader):
    """Batches of the windows of token files. A rank reads its own rows only."""

    def __init__(
        self,
        files: TokenFiles,
        windows: Windows,
        vocab_size: int,
        global_batch_size: int,
        rows: range,
        dataloader: Fetching,
        *,
        endless: bool,
    ) -> None:
        """`vocab_size`: of the model; larger ids and negative ones end the run."""
        super().__init__(windows.seq_len, global_batch_size, rows, dataloader, endless=endless)
        self._reader = TokenReader(files, windows, vocab_size)
        self._slots = 0  # rows of the global batch that were consumed since the start of the run

    @property
    def fingerprint(self) -> str:
        windows = self._reader.windows
        parts = {
            "dataset": self._reader.files.fingerprint,
            "seed": windows.seed,
            "global_batch_size": self._global_batch_size,
            "seq_len": windows.seq_len,
            "shuffle": "false" if windows.seed is None else "true",
            "window_overlap": windows.overlap,
        }
        return "; ".join(f"{key}={value}" for key, value in parts.items())

    def state_dict(self) -> dict[str, Any]:
        """`lanes` has one entry, the same on all ranks: the number of consumed rows of the global batch."""
        return {"fingerprint": self.fingerprint, "lanes": {STREAM: [self._slots]}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if found := self.differences(state):
            raise UserError(*found)
        self.restore(state["lanes"][STREAM][0])

    def differences(self, state: Mapping[str, Any]) -> list[Problem]:
        return differences(state["fingerprint"], self.fingerprint)

    def snapshot(self) -> int:
        return self._slots

    def restore(self, snapshot: int) -> None:
        self.close()
        self._slots = snapshot

    def describe(self, rows: int) -> str:
        """How much data there is, and how much of it a run of so many rows reads."""
        return format_tokens(self._reader.files, self._reader.windows, rows)

    def start_at(self, documents: int, tokens_left: int) -> NoReturn:
        what = "are token files, in which torchtitan has no position"
        raise UserError(Problem("the training data", what, fix="use the data that the state was saved with"))

    def _feeds(self) -> list[Generator[BatchPart, None, None]]:
        threads = min(max(self._dataloader.num_workers, 1), len(self._rows))
        first, end = (self._slots, None) if self._endless else (0, self._reader.windows.count)
        return [
            _feed(self._reader, self._rows[i::threads], first, self._global_batch_size, end) for i in range(threads)
        ]

    def _advance(self, parts: Sequence[BatchPart]) -> None:
        before, count = self._slots, self._reader.windows.count
        self._slots += self._global_batch_size
        if 0 in self._rows and self._endless and self._slots // count > before // count:
            logger.info("data: epoch %d begins", self._slots // count + 1)


def _feed(
    reader: TokenReader, rows: range, first: int, global_batch_size: int, end: int | None
) -> Generator[BatchPart, None, None]:
    """Yields the windows of `rows` of one batch after another, from slot `first` to slot `end`; None: endlessly.

    Every rank yields for each batch that has a row of any rank. Not a method, so that no thread keeps a loader alive.
    """
    while end is None or first < end:
        batches = first + global_batch_size * np.arange(-(-BLOCK // len(rows)))
        batches = batches if end is None else batches[batches < end]
        slots = batches[:, None] + np.asarray(rows)
        for of_rows, windows in zip(slots.tolist(), reader.windows.at(slots).tolist(), strict=True):
            named = zip(rows, of_rows, windows, strict=True)
            read = {row: reader.read(slot, window) for row, slot, window in named if end is None or slot < end}
            yield BatchPart(read, {})
        first = int(batches[-1]) + global_batch_size


@dataclass(frozen=True)
class TokenReader:
    """Reads windows, and checks their ids. `vocab_size`: of the model."""

    files: TokenFiles
    windows: Windows
    vocab_size: int

    def read(self, slot: int, window: int) -> Window:
        """The ids of a window, which is shown in `slot`.

        Raises UserError: the ids cannot be read, or one is not in the vocabulary.
        """
        start, stop = self.windows.bounds(window)
        ids = self.files.read(start, stop)
        if ids.view(np.uint64).max() >= self.vocab_size:  # as unsigned numbers, negative ones are large
            self._refuse(start, ids.view(np.uint64))
        epoch = slot // self.windows.count
        return Window(ids, START, tuple((epoch, *document) for document in self.files.documents(start, stop, ids)))

    def _refuse(self, start: int, ids: Any) -> NoReturn:
        first = int(np.argmax(ids >= self.vocab_size))
        what = f"the id {int(ids.view(np.int64)[first])} is not in the vocabulary of the model, which has"
        fix = (
            "set model.vocab_size to that of the tokenizer that made the files, or the right token_format, token_dtype"
        )
        where = self.files.format_location(start + first)
        raise UserError(Problem(where, f"{what} {self.vocab_size:,} ids", fix=fix))
