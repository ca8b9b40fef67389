"""Batches for one rank: the lanes of its rows, run ahead by threads; state as consumed, not as prefetched."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from quadriga.config.schema import Dataloader
from quadriga.data.batch import IGNORE, Batch
from quadriga.data.catalogue import open_source
from quadriga.data.fields import TEXT, Field
from quadriga.data.lanes import Lanes
from quadriga.data.layout import Anchor, changed, in_words, names_digest
from quadriga.data.packing import START, LeftOut, Place, Window
from quadriga.data.prefetch import Prefetcher
from quadriga.data.survey import survey
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError, shortened
from quadriga.log import logger

PREFETCH = 2  # batches ready, where the configuration leaves the choice

Piece = list[tuple[int, Window]]  # (row, window) of the rows that one thread feeds


def build_loader(
    dataset: str,
    dataset_path: str | None,
    tokenizer: Tokenizer,
    *,
    seed: int,
    seq_len: int,
    global_batch_size: int,
    rows: range,
    dataloader: Dataloader,
    infinite: bool = True,
    field: Field = TEXT,
) -> Loader:
    """The loader of `rows` of the global batch.

    infinite: for training: epochs without end, shuffled by `seed`, one whole optimizer step a batch.
    Not infinite: for validation: one pass in the data's own order each time it is iterated; every rank gets the same
    number of batches, the last of them filled up with rows whose labels are all IGNORE.

    Raises UserError: no such data, data that cannot be read (all of it is looked through first, where that takes
    moments), or fewer tokens than one window.
    """
    if not 0 <= rows.start < rows.stop <= global_batch_size or rows.step != 1:
        raise ValueError(f"rows {rows} are not rows of a global batch of {global_batch_size}")
    source = open_source(dataset, dataset_path, lanes=global_batch_size if infinite else 1, field=field)
    skip_bad = dataloader.on_bad_record == "skip"
    survey(source, tokenizer, seq_len + 1 if infinite else 2, skip_bad=skip_bad)
    count = global_batch_size if infinite else 1
    lanes = Lanes(source, tokenizer, seq_len, count, seed if infinite else None, infinite, skip_bad)
    return Loader(lanes, global_batch_size, rows, dataloader)


class Loader:
    """`next()` gives a Batch of len(rows) rows. `waited` is how many seconds the last one kept the trainer waiting."""

    def __init__(self, lanes: Lanes, global_batch_size: int, rows: range, dataloader: Dataloader) -> None:
        self.waited = 0.0
        self._lanes = lanes
        self._global_batch_size = global_batch_size
        self._rows = rows
        self._dataloader = dataloader
        self._pin = dataloader.pin_memory and torch.cuda.is_available()
        if dataloader.pin_memory and not self._pin:
            logger.info("data: dataloader.pin_memory has no effect, since there is no CUDA here")
        self._places = dict.fromkeys(rows, START)
        self._prefetcher: Prefetcher | None = None
        self.fingerprint = "; ".join(
            (
                f"dataset={lanes.source.fingerprint}",
                f"tokenizer={lanes.tokenizer.fingerprint}",
                f"seed={lanes.seed}",
                f"global_batch_size={global_batch_size}",
            )
        )

    def __iter__(self) -> Iterator[Batch]:
        """Itself; a finite loader begins its pass again."""
        if not self._lanes.endless:
            self.close()
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self) -> Batch:
        """The next batch of this rank. Raises StopIteration at the end of a pass, and whatever its threads raised."""
        started = time.perf_counter()
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._feeds(), self._dataloader.prefetch_factor or PREFETCH)
        pieces: list[Piece] = self._prefetcher.next()
        self.waited = time.perf_counter() - started
        windows = {row: window for piece in pieces for row, window in piece}
        self._move_on({row: window.place for row, window in windows.items()})
        return self._assemble(windows)

    def empty(self) -> Batch:
        """A batch of the same shape in which no token counts."""
        return self._assemble({})

    def state_dict(self) -> dict[str, Any]:
        """What was consumed, JSON-able: the fingerprint, of each lane its place and how to find the beginning of its
        shard, and how the files are cut into shards."""
        lanes = {str(row): [*self._places[row], *self._anchor(row)] for row in self._rows}
        return {"fingerprint": self.fingerprint, "lanes": lanes, "layout": self._lanes.source.layout()}

    def mark(self) -> dict[int, Place]:
        """What was consumed, for `back_to` of this loader; unlike `state_dict` it reads no file."""
        return dict(self._places)

    def back_to(self, mark: Mapping[int, Place]) -> None:
        """Go on from where this loader stood at `mark`."""
        self.close()
        self._places = dict(mark)

    def _anchor(self, row: int) -> tuple[int, ...]:
        if not self._lanes.endless or self._places[row] == START:
            return ()
        return self._lanes.source.anchor(self._lanes.shard(row, self._places[row])[0]) or ()

    def differences(self, state: Mapping[str, Any]) -> list[Problem]:
        """Why the data are not those that `state` was saved with; files that were mended since are no reason."""
        found = differences(state["fingerprint"], self.fingerprint)
        return [problem for problem in found if not (problem.where.endswith("dataset") and self._mended(state))]

    def _mended(self, state: Mapping[str, Any]) -> bool:
        """Whether the files have the names that they had, and are read in the same way."""
        layout, here = state.get("layout"), self._lanes.source.fingerprint
        saved = state["fingerprint"].partition(";")[0].removeprefix("dataset=")
        same_kind = [part for at, part in enumerate(saved.split(":")) if at != 2] == [
            part for at, part in enumerate(here.split(":")) if at != 2
        ]
        return same_kind and layout is not None and layout["names"] == names_digest(self._lanes.source.files)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, whose lanes are those of all ranks that ran; this rank takes its own.

        Raises UserError where the data are not those that the state was saved with, or a file that was mended since has
        fewer documents than were read of it.
        """
        if found := self.differences(state):
            raise UserError(*found)
        missing = [row for row in self._rows if str(row) not in state["lanes"]]
        if missing:
            raise ValueError(f"the saved data state lacks lanes {missing}; it holds {sorted(map(int, state['lanes']))}")
        self.close()
        fields = len(Place._fields)
        saved = {int(row): lane for row, lane in state["lanes"].items()}
        places = {row: Place(*lane[:fields]) for row, lane in saved.items()}
        if layout := state.get("layout"):
            self._adopt(layout, places, {row: Anchor(*lane[fields:]) for row, lane in saved.items() if lane[fields:]})
        self._places = {row: places[row] for row in self._rows}

    def _adopt(self, layout: Mapping[str, Any], places: Mapping[int, Place], anchors: Mapping[int, Anchor]) -> None:
        """Cut the files as the run did that saved; where they were mended since, say so, and check that it can go on.

        `places` and `anchors`: of the lanes of all ranks, so that all cut alike.
        """
        source = self._lanes.source
        source.adopt(layout, {})  # for the numbers of the shards
        source.adopt(layout, {self._lanes.shard(row, places[row])[0]: known for row, known in anchors.items()})
        mended = changed(source.files, layout)
        if not mended:
            return
        logger.info(
            "data: %s changed since the checkpoint was saved; reading goes on at the same document numbers",
            in_words(mended),
        )
        needed: dict[int, int] = {}
        for row in self._rows:
            if places[row] != START:
                shard, count = self._lanes.shard(row, places[row])
                needed[shard] = max(needed.get(shard, 0), count)
        for shard, count in needed.items():
            file = source.file_of(shard)
            if file in mended and (there := sum(1 for _ in islice(source.read(shard), count))) < count:
                what = f"was read up to document {count:,} of shard {shard}, which now has {there:,}"
                fix = "restore the documents that came before, or begin another run (--job.dump_folder)"
                raise UserError(Problem(shortened(file.path, 400), what, fix=fix))

    def close(self) -> None:
        """End the threads; what they had read ahead is read again by the next `next()`."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _feeds(self) -> list[Generator[Piece, None, None]]:
        if not self._lanes.endless:
            return [self._one_pass()]
        threads = min(max(self._dataloader.num_workers, 1), len(self._rows))
        return [_feed(self._lanes, {row: self._places[row] for row in self._rows[i::threads]}) for i in range(threads)]

    def _one_pass(self) -> Generator[Piece, None, None]:
        """Every rank reads the whole pass and keeps its rows, so that all agree on the number of batches."""
        piece: Piece = []
        filled = 0  # rows of the global batch under way
        for window in self._lanes.windows(0):
            if filled in self._rows:
                piece.append((filled, window))
            filled += 1
            if filled == self._global_batch_size:
                yield piece
                piece, filled = [], 0
        if filled:
            yield piece

    def _assemble(self, windows: Mapping[int, Window]) -> Batch:
        """Rows without a window, and the rest of a short one, are filled up with labels that no loss counts."""
        shape = (len(self._rows), self._lanes.seq_len)
        tokens = torch.zeros(shape, dtype=torch.int64, pin_memory=self._pin)
        labels = torch.full(shape, IGNORE, dtype=torch.int64, pin_memory=self._pin)
        for place, row in enumerate(self._rows):
            if (window := windows.get(row)) is not None:
                ids = torch.from_numpy(window.ids)
                tokens[place, : len(ids) - 1] = ids[:-1]
                labels[place, : len(ids) - 1] = ids[1:]
        return Batch(
            tokens,
            labels,
            documents=tuple(windows[row].documents if row in windows else () for row in self._rows),
            left_out=tuple(record for row in sorted(windows) for record in windows[row].left_out),
            bad_records=sum(place.left_out for place in self._places.values()) if self._lanes.skip_bad else None,
        )

    def place(self, record: LeftOut) -> str:
        """Where a record lies: file and line. May read the file up to there."""
        return self._lanes.source.place(record.shard, record.number)

    def _move_on(self, places: Mapping[int, Place]) -> None:
        before = self._places.get(0, START).epoch
        self._places.update(places)
        if self._lanes.endless and self._places.get(0, START).epoch > before:
            logger.info("data: epoch %d begins (lane 0)", self._places[0].epoch + 1)


def _feed(lanes: Lanes, places: Mapping[int, Place]) -> Generator[Piece, None, None]:
    """Endlessly one window of each row. A function of its own, so that no thread keeps a loader alive."""
    running = {row: lanes.windows(row, place) for row, place in places.items()}
    while True:
        yield [(row, next(windows)) for row, windows in running.items()]


def differences(saved: str, here: str) -> list[Problem]:
    """What differs between two fingerprints of data, each as a problem; [] where they are the same."""
    then, now = (dict(part.split("=", 1) for part in text.split("; ")) for text in (saved, here))
    fix = "restore what it was, or read the data given now from their start: --checkpoint.allow_change"
    return [
        Problem(f"data of the checkpoint: {key}", f"was {then.get(key)} when it was saved", value=now.get(key), fix=fix)
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
