"""Batches of a mixture: each row is a window of one source, and `Mixture` says of which.

A source of token files is read by the numbers of its windows. A source of text keeps a stream and a cursor for each
row: row r takes the next window of stream r of the source each time that it meets the source. Without shuffling, a
source of text is one stream, whose windows are taken in order. So the state is the number of finished steps and the
cursors.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from quadriga import limits
from quadriga.config.schema import TOKENS, Training, TrainingSource
from quadriga.data.loader import Batch, BatchPart, Loader, row_format
from quadriga.data.mixture_data import STEP, MixtureData, collected, open_mixture
from quadriga.data.stream_loader import SINGLE_STREAM, StreamLoader, build_loader
from quadriga.data.streams import Cursor, SkippedRecord, Streams, Window
from quadriga.data.token_loader import TokenReader
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError
from quadriga.log import logger

BLOCK = 1024  # rows whose windows are computed at once


def build_mixture_loader(
    training: Training,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    seed: int,
    seq_len: int,
    global_batch_size: int,
    rows: range,
    assets: str | None,
) -> MixtureLoader:
    """The endless loader of `rows` of the global batch. `tokenizer`: of the texts, None if there are none. `assets`: as
    in `open_mixture`.

    Raises UserError as `open_mixture` and `build_loader`, with the problems of all sources.
    """
    order: dict[str, Any] = {"seq_len": seq_len, "global_batch_size": global_batch_size}
    quiet = training.dataloader.model_copy(update={"pin_memory": False})  # the mixture makes the batches

    def open_text(source: TrainingSource) -> StreamLoader:
        assert tokenizer is not None
        own: dict[str, Any] = {"seed": f"{seed} {source.title}", "rows": rows, "rows_have": row_format(training)}
        return build_loader(source.text_keys, tokenizer, dataloader=quiet, **order, **own)

    problems: list[Problem] = []
    try:
        data = open_mixture(training, seed=seed, vocab_size=vocab_size, assets=assets, **order)
    except UserError as error:
        problems += error.problems
    try:
        texts = [source for source in training.sources if source.dataset != TOKENS]
        loaders = dict(zip([source.title for source in texts], collected(open_text, texts), strict=True))
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    return MixtureLoader(data, loaders, vocab_size, rows)


class MixtureLoader(Loader):
    """Batches of the windows of several sources. `texts`: by index of the source, the streams and cursors of texts."""

    def __init__(self, data: MixtureData, texts: Mapping[str, StreamLoader], vocab_size: int, rows: range) -> None:
        """texts: by name, the streams and cursors of the sources of text, whose own batches are not used.
        vocab_size: of the model."""
        order = (data.seq_len, data.global_batch_size, rows, data.training.dataloader)
        super().__init__(*order, endless=True, rows_have=row_format(data.training))
        self.data = data
        self.texts = {data.names.index(name): loader for name, loader in texts.items()}
        self._readers = {
            data.names.index(name): TokenReader(files, windows, vocab_size)
            for name, (files, windows) in data.tokens.items()
        }
        self._step = 0
        self._windows = data.mixture.windows_before(0)  # of each source that were consumed

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the texts; None if there are none."""
        return next((loader.tokenizer for loader in self.texts.values()), None)

    @property
    def fingerprint(self) -> str:
        texts = {self.data.names[index]: loader.streams.source.fingerprint for index, loader in self.texts.items()}
        return self.data.fingerprint(texts)

    def next(self) -> Batch:
        return replace(super().next(), sources=self._consumed())

    def state_dict(self) -> dict[str, Any]:
        """`lanes` has the number of finished steps, and by `NAME:STREAM` the cursors of the texts of this rank's rows.
        `sources` has the rest of the states of the texts, by name."""
        state: dict[str, Any] = {"fingerprint": self.fingerprint, "lanes": {STEP: [self._step]}, "sources": {}}
        for index, loader in self.texts.items():
            name, own = self.data.names[index], loader.state_dict()
            state["lanes"] |= {f"{name}:{stream}": cursor for stream, cursor in own.pop("lanes").items()}
            state["sources"][name] = own
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if found := self.differences(state):
            raise UserError(*found)
        if not 0 <= (step := state["lanes"][STEP][0]) <= limits.COUNT:
            raise ValueError(f"the data state is of step {step}")
        self.close()
        for index, loader in self.texts.items():
            name = self.data.names[index]
            lanes = {lane.removeprefix(f"{name}:"): at for lane, at in state["lanes"].items() if _is_of(lane, name)}
            loader.load_state_dict({**state["sources"][name], "lanes": lanes})
        self._move_to(step)

    def differences(self, state: Mapping[str, Any]) -> list[Problem]:
        by_name = {self.data.names[index]: loader for index, loader in self.texts.items()}
        return self.data.differences(
            state, self.fingerprint, lambda source, saved: by_name[source.title].differences(saved)
        )

    def snapshot(self) -> tuple[int, dict[int, dict[int, Cursor]]]:
        return self._step, {index: loader.snapshot() for index, loader in self.texts.items()}

    def restore(self, snapshot: tuple[int, Mapping[int, Mapping[int, Cursor]]]) -> None:
        self.close()
        step, cursors = snapshot
        for index, loader in self.texts.items():
            loader.restore(cursors[index])
        self._move_to(step)

    def describe(self, steps: int) -> list[str]:
        """As `MixtureData.describe`."""
        return self.data.describe(steps)

    def start_at(self, documents: int, tokens_left: int) -> NoReturn:
        what = "are a mixture, in which torchtitan has no position"
        raise UserError(Problem("the training data", what, fix="use the data that the state was saved with"))

    def bad_records(self) -> int | None:
        counts = [loader.bad_records() for loader in self.texts.values()]
        return sum(count or 0 for count in counts) if any(count is not None for count in counts) else None

    def format_location(self, record: SkippedRecord) -> str:
        return self.texts[self.data.names.index(record.source)].format_location(record)

    def _move_to(self, step: int) -> None:
        self._step, self._windows = step, self.data.mixture.windows_before(step)

    def _consumed(self) -> dict[str, dict[str, float]]:
        """By name, the tokens and epochs of each source that the run has consumed. The epochs of a text are the
        complete ones of the first row of this rank."""
        counts = dict(zip(self.data.names, self._windows.tolist(), strict=True))
        return {
            name: {"tokens": windows * self._seq_len, "epochs": self._epochs(index, windows)}
            for index, (name, windows) in enumerate(counts.items())
        }

    def _epochs(self, index: int, windows: int) -> float:
        if index in self.texts:
            return self.texts[index].epoch
        return windows / self._readers[index].windows.count

    def _feeds(self) -> list[Generator[BatchPart, None, None]]:
        streams = {index: loader.streams for index, loader in self.texts.items()}
        cursors = {index: loader.snapshot() for index, loader in self.texts.items()}
        single = bool(streams) and not self.data.training.dataloader.shuffle
        threads = 1 if single else min(max(self._dataloader.num_workers, 1), len(self._rows))
        return [
            _feed(self.data, self._readers, streams, cursors, self._rows[i::threads], self._step)
            for i in range(threads)
        ]

    def _advance(self, parts: Sequence[BatchPart]) -> None:
        before = [int(self._epochs(index, windows)) for index, windows in enumerate(self._windows.tolist())]
        for part in parts:
            for (index, stream), cursor in part.cursors.items():
                self.texts[index].advance({stream: cursor})
        self._windows = self._windows + self.data.mixture.windows_in(self._step)
        self._step += 1
        if 0 not in self._rows:
            return
        for index, windows in enumerate(self._windows.tolist()):
            if (epoch := int(self._epochs(index, windows))) > before[index]:
                logger.info("data: epoch %d of %s begins", epoch + 1, self.data.names[index])


def _is_of(lane: str, name: str) -> bool:
    return lane.rpartition(":")[0] == name


def _feed(
    data: MixtureData,
    readers: Mapping[int, TokenReader],
    streams: Mapping[int, Streams],
    cursors: Mapping[int, Mapping[int, Cursor]],
    rows: range,
    step: int,
) -> Generator[BatchPart, None, None]:
    """Yields the windows of `rows` of one step after another, endlessly. Not a method, so that no thread keeps a loader
    alive.

    Without shuffling, every rank reads the one stream of each text, so that all ranks have the same cursors.
    """
    in_order = bool(streams) and not data.training.dataloader.shuffle
    running: dict[tuple[int, int], Iterator[Window]] = {}  # the windows of each source and stream, from its first use
    while True:
        for planned in _plan(data, readers, range(data.global_batch_size) if in_order else rows, step):
            made: dict[int, Window] = {}
            moved: dict[tuple[int, int], Cursor] = {}
            for row, index, number, window in sorted(planned, key=_number):
                if index in readers:
                    if row in rows:
                        made[row] = _named(readers[index].read(number, window), data, index)
                    continue
                stream = SINGLE_STREAM if in_order else row
                if (index, stream) not in running:
                    running[index, stream] = streams[index].windows(stream, cursors[index][stream])
                read = next(running[index, stream])
                moved[index, stream] = read.cursor
                if row in rows:
                    made[row] = _named(read, data, index)
            yield BatchPart(made, moved)
            step += 1


def _number(planned: tuple[int, int, int, int]) -> int:
    return planned[2]


def _plan(
    data: MixtureData, readers: Mapping[int, TokenReader], rows: range, step: int
) -> list[list[tuple[int, int, int, int]]]:
    """For some steps from `step` on: row, source, number of the window in the source, and for token files its place."""
    mixed = [data.mixture.rows(step + ahead) for ahead in range(-(-BLOCK // len(rows)))]
    sources, numbers = (np.stack(arrays)[:, np.asarray(rows)] for arrays in zip(*mixed, strict=True))
    windows = np.zeros_like(numbers)
    for index, reader in readers.items():
        here = sources == index
        windows[here] = reader.windows.at(numbers[here])
    steps = zip(sources.tolist(), numbers.tolist(), windows.tolist(), strict=True)
    return [list(zip(rows, *of_step, strict=True)) for of_step in steps]


def _named(window: Window, data: MixtureData, index: int) -> Window:
    """A window whose documents and skipped records have the name of the source. Without documents, as in ids that no
    `token_eos_id` separates, the source stands alone."""
    name = data.names[index]
    documents = tuple((name, *document) for document in window.documents) or ((name,),)
    return window._replace(documents=documents, skipped=tuple(each._replace(source=name) for each in window.skipped))
