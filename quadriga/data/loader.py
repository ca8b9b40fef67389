"""Batches for one rank: the streams of its rows, run ahead by threads; state as consumed, not as prefetched."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch

from quadriga.config.schema import Dataloader, Fetching
from quadriga.data.batch import IGNORE, Batch
from quadriga.data.catalogue import open_source
from quadriga.data.fields import TEXT, Field
from quadriga.data.layout import Anchor, changed_files, format_files, names_digest
from quadriga.data.packing import START, Cursor, SkippedRecord, Window
from quadriga.data.position import cursor_before, read_so_far
from quadriga.data.prefetch import Prefetcher
from quadriga.data.streams import Streams
from quadriga.data.survey import survey
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError, shortened
from quadriga.log import logger

PREFETCH = 2  # batches ready, where the configuration leaves the choice

SINGLE_STREAM = 0  # the one stream of data that are not shuffled
# What checkpoints mean that were saved before these could be chosen.
OLDER_DEFAULTS = {"shuffle": "true", "window_overlap": "1"}


class BatchPart(NamedTuple):
    """What one thread makes of one batch: `windows` by row, of the rows that it feeds; `cursors`: by stream, where the
    next batch begins."""

    windows: dict[int, Window]
    cursors: dict[int, Cursor]


def build_loader(
    dataset: str,
    dataset_path: str | None,
    tokenizer: Tokenizer,
    *,
    seed: int,
    seq_len: int,
    global_batch_size: int,
    rows: range,
    dataloader: Fetching,
    infinite: bool = True,
    field: Field = TEXT,
) -> Loader:
    """The loader of `rows` of the global batch.

    infinite: for training: epochs without end, one whole optimizer step a batch. Shuffled by `seed`, row i is stream i.
    With `dataloader.shuffle` false there is one stream of documents in the source's own order, whose windows fill the
    rows of one batch after another; every rank reads all of it and keeps its rows.
    Not infinite: for validation: one pass in the data's own order each time it is iterated; every rank gets the same
    number of batches, the last of them filled up with rows whose labels are all IGNORE.

    Raises UserError: no such data, data that cannot be read (all of it is looked through first, where that takes
    moments), or fewer tokens than one window.
    """
    if not 0 <= rows.start < rows.stop <= global_batch_size or rows.step != 1:
        raise ValueError(f"rows {rows} are not rows of a global batch of {global_batch_size}")
    shuffled = infinite and isinstance(dataloader, Dataloader) and dataloader.shuffle
    count = global_batch_size if shuffled else 1
    source = open_source(dataset, dataset_path, streams=count, field=field)
    skip_bad = dataloader.on_bad_record == "skip"
    # A pass with overlap ends with a window that is not full; without overlap only whole windows come out of it.
    least = seq_len + 1 if infinite or dataloader.window_overlap == 0 else 2
    survey(source, tokenizer, least, skip_bad=skip_bad)
    order = seed if shuffled else None
    streams = Streams(source, tokenizer, seq_len, count, order, infinite, skip_bad, dataloader.window_overlap)
    return Loader(streams, global_batch_size, rows, dataloader)


class Loader:
    """`next()` gives a Batch of len(rows) rows. `waited` is how many seconds the last one kept the trainer waiting."""

    def __init__(self, streams: Streams, global_batch_size: int, rows: range, dataloader: Fetching) -> None:
        self.waited = 0.0
        self._streams = streams
        self._global_batch_size = global_batch_size
        self._rows = rows
        self._dataloader = dataloader
        self._pin = dataloader.pin_memory and torch.cuda.is_available()
        if dataloader.pin_memory and not self._pin:
            logger.info("data: dataloader.pin_memory has no effect, since there is no CUDA here")
        self._in_order = streams.endless and streams.seed is None
        self._streams_read: Sequence[int] = (SINGLE_STREAM,) if self._in_order else rows
        self._cursors = dict.fromkeys(self._streams_read, START)
        self._prefetcher: Prefetcher | None = None

    @property
    def fingerprint(self) -> str:
        """Names what decides which ids come next; checked by a resume."""
        streams = self._streams
        parts = {
            "dataset": streams.source.fingerprint,
            "tokenizer": streams.tokenizer.fingerprint,
            "seed": streams.seed,
            "global_batch_size": self._global_batch_size,
            "shuffle": "false" if self._in_order else "true",
            "window_overlap": streams.overlap,
        }
        return "; ".join(f"{key}={value}" for key, value in parts.items())

    @property
    def tokenizer(self) -> Tokenizer:
        """The one in use; after the state of an older run was loaded, perhaps its `earlier`."""
        return self._streams.tokenizer

    def __iter__(self) -> Iterator[Batch]:
        """Itself; a finite loader begins its pass again."""
        if not self._streams.endless:
            self.close()
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self) -> Batch:
        """The next batch of this rank. Raises StopIteration at the end of a pass, and whatever its threads raised."""
        started = time.perf_counter()
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._feeds(), self._dataloader.prefetch_factor or PREFETCH)
        parts: list[BatchPart] = self._prefetcher.next()
        self.waited = time.perf_counter() - started
        for part in parts:
            self._advance(part.cursors)
        return self._assemble({row: window for part in parts for row, window in part.windows.items()})

    def empty(self) -> Batch:
        """A batch of the same shape in which no token counts."""
        return self._assemble({})

    def state_dict(self) -> dict[str, Any]:
        """What was consumed, JSON-able: the fingerprint, of each stream its cursor and how to find the beginning of its
        shard, and how the files are cut into shards."""
        streams = {str(stream): [*self._cursors[stream], *self._anchor(stream)] for stream in self._streams_read}
        return {"fingerprint": self.fingerprint, "lanes": streams, "layout": self._streams.source.layout()}

    def snapshot(self) -> dict[int, Cursor]:
        """What was consumed, for `restore` of this loader; unlike `state_dict` it reads no file."""
        return dict(self._cursors)

    def restore(self, snapshot: Mapping[int, Cursor]) -> None:
        """Go on from where this loader stood at `snapshot`."""
        self.close()
        self._cursors = dict(snapshot)

    def start_at(self, documents: int, tokens_left: int) -> None:
        """Go on `tokens_left` ids before the end of the `documents`-th document of an epoch: where torchtitan's loader
        stands, which has read so many documents and not used so many ids. For data that are not shuffled.

        Raises UserError where the data hold fewer documents or ids.
        """
        if not self._in_order:
            raise ValueError("data that are shuffled have no place by the number of documents read")
        self.restore({SINGLE_STREAM: cursor_before(self._streams, documents, tokens_left)})

    def read_so_far(self) -> tuple[int, list[int]]:
        """The reverse of `start_at`: how many documents of the epoch are read, and their ids that are still to come."""
        if not self._in_order:
            raise ValueError("data that are shuffled have no place by the number of documents read")
        return read_so_far(self._streams, self._cursors[SINGLE_STREAM])

    def _anchor(self, stream: int) -> tuple[int, ...]:
        if not self._streams.endless or self._cursors[stream] == START:
            return ()
        return self._streams.source.anchor(self._streams.shard(stream, self._cursors[stream])[0]) or ()

    def differences(self, state: Mapping[str, Any]) -> list[Problem]:
        """Why the data are not those that `state` was saved with; files that were mended since are no reason."""
        found = differences(state["fingerprint"], self.fingerprint)
        still = {"dataset": self._same_files(state), "tokenizer": self._earlier(state) is not None}
        return [problem for problem in found if not still.get(problem.where.rpartition(" ")[2])]

    def _earlier(self, state: Mapping[str, Any]) -> Tokenizer | None:
        """The tokenizer as an older version of this program used it, where `state` was saved with that."""
        earlier = self.tokenizer.earlier
        return earlier if earlier and f"; tokenizer={earlier.fingerprint};" in state["fingerprint"] else None

    def _same_files(self, state: Mapping[str, Any]) -> bool:
        """Whether the files have the names that they had, and are read in the same way."""
        layout, here = state.get("layout"), self._streams.source.fingerprint
        saved = state["fingerprint"].partition(";")[0].removeprefix("dataset=")
        same_kind = [part for at, part in enumerate(saved.split(":")) if at != 2] == [
            part for at, part in enumerate(here.split(":")) if at != 2
        ]
        return same_kind and layout is not None and layout["names"] == names_digest(self._streams.source.files)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, whose streams are those of all ranks that ran; this rank takes its own.

        Raises UserError where the data are not those that the state was saved with, or a file that was mended since has
        fewer documents than were read of it.
        """
        if found := self.differences(state):
            raise UserError(*found)
        missing = [stream for stream in self._streams_read if str(stream) not in state["lanes"]]
        if missing:
            raise ValueError(f"the saved data state lacks lanes {missing}; it holds {sorted(map(int, state['lanes']))}")
        self.close()
        if (earlier := self._earlier(state)) is not None:
            then, now = (f"BOS {one.bos_id}, EOS {one.eos_id}" for one in (earlier, self.tokenizer))
            logger.info("data: documents get the ids %s, as when this run began; a new one gives %s", then, now)
            self._streams = replace(self._streams, tokenizer=earlier)
        fields = len(Cursor._fields)
        saved = {int(stream): cursor for stream, cursor in state["lanes"].items()}
        cursors = {stream: Cursor(*cursor[:fields]) for stream, cursor in saved.items()}
        if layout := state.get("layout"):
            anchors = {stream: Anchor(*cursor[fields:]) for stream, cursor in saved.items() if cursor[fields:]}
            self._load_layout(layout, cursors, anchors)
        self._cursors = {stream: cursors[stream] for stream in self._streams_read}

    def _load_layout(
        self, layout: Mapping[str, Any], cursors: Mapping[int, Cursor], anchors: Mapping[int, Anchor]
    ) -> None:
        """Cut the files as the run did that saved; where they were mended since, say so, and check that it can go on.

        `cursors` and `anchors`: of the streams of all ranks, so that all cut alike.
        """
        source = self._streams.source
        source.load_layout(layout, {})  # for the numbers of the shards
        source.load_layout(
            layout, {self._streams.shard(stream, cursors[stream])[0]: known for stream, known in anchors.items()}
        )
        changed = changed_files(source.files, layout)
        if not changed:
            return
        logger.info(
            "data: %s changed since the checkpoint was saved; reading goes on at the same document numbers",
            format_files(changed),
        )
        needed: dict[int, int] = {}
        for stream in self._streams_read:
            if cursors[stream] != START:
                shard, count = self._streams.shard(stream, cursors[stream])
                needed[shard] = max(needed.get(shard, 0), count)
        for shard, count in needed.items():
            file = source.file_of(shard)
            if file in changed and (there := sum(1 for _ in islice(source.read(shard), count))) < count:
                what = f"was read up to document {count:,} of shard {shard}, which now has {there:,}"
                fix = "restore the documents that came before, or begin another run (--job.dump_folder)"
                raise UserError(Problem(shortened(file.path, 400), what, fix=fix))

    def close(self) -> None:
        """End the threads; what they had read ahead is read again by the next `next()`."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _feeds(self) -> list[Generator[BatchPart, None, None]]:
        if self._in_order or not self._streams.endless:
            cursor = self._cursors[SINGLE_STREAM] if self._in_order else START
            return [_assign_rows(self._streams, cursor, self._rows, self._global_batch_size)]
        threads = min(max(self._dataloader.num_workers, 1), len(self._rows))
        return [
            _feed(self._streams, {row: self._cursors[row] for row in self._rows[i::threads]}) for i in range(threads)
        ]

    def _assemble(self, windows: Mapping[int, Window]) -> Batch:
        """Rows without a window, and the rest of a short one, are filled up with labels that no loss counts."""
        shape = (len(self._rows), self._streams.seq_len)
        tokens = torch.zeros(shape, dtype=torch.int64, pin_memory=self._pin)
        labels = torch.full(shape, IGNORE, dtype=torch.int64, pin_memory=self._pin)
        for index, row in enumerate(self._rows):
            if (window := windows.get(row)) is not None:
                ids = torch.from_numpy(window.ids)
                tokens[index, : len(ids) - 1] = ids[:-1]
                labels[index, : len(ids) - 1] = ids[1:]
        return Batch(
            tokens,
            labels,
            documents=tuple(windows[row].documents if row in windows else () for row in self._rows),
            skipped=tuple(record for row in sorted(windows) for record in windows[row].skipped),
            bad_records=self._bad_records() if self._streams.skip_bad else None,
        )

    def _bad_records(self) -> int:
        """How many records were left out so far of what this rank counts: its streams, or the stream if it has row
        0."""
        counts = not self._in_order or 0 in self._rows
        return sum(cursor.skipped for cursor in self._cursors.values()) if counts else 0

    def format_location(self, record: SkippedRecord) -> str:
        """Where a record lies: file and line. May read the file up to there."""
        return self._streams.source.format_location(record.shard, record.number)

    def _advance(self, cursors: Mapping[int, Cursor]) -> None:
        before = self._cursors.get(0, START).epoch
        self._cursors.update(cursors)
        if 0 in self._rows and self._streams.endless and self._cursors[0].epoch > before:
            stream = "" if self._in_order else " (lane 0)"
            logger.info("data: epoch %d begins%s", self._cursors[0].epoch + 1, stream)


def _feed(streams: Streams, cursors: Mapping[int, Cursor]) -> Generator[BatchPart, None, None]:
    """Endlessly one window of each row. A function of its own, so that no thread keeps a loader alive."""
    running = {row: streams.windows(row, cursor) for row, cursor in cursors.items()}
    while True:
        made = {row: next(windows) for row, windows in running.items()}
        yield BatchPart(made, {row: window.cursor for row, window in made.items()})


def _assign_rows(
    streams: Streams, cursor: Cursor, rows: range, global_batch_size: int
) -> Generator[BatchPart, None, None]:
    """The windows of one stream assigned to the rows of batch after batch; those of `rows` are kept.

    Every rank reads the whole stream, so that all agree on every cursor, and on the number of batches where it ends.
    """
    kept: dict[int, Window] = {}
    row = 0  # of the global batch under way
    for window in streams.windows(SINGLE_STREAM, cursor):
        if row in rows:
            kept[row] = window
        row += 1
        if row == global_batch_size:
            yield BatchPart(kept, {SINGLE_STREAM: window.cursor})
            kept, row = {}, 0
    if row:
        yield BatchPart(kept, {})


def differences(saved: str, here: str) -> list[Problem]:
    """What differs between two fingerprints of data, each as a problem; [] where they are the same."""
    then, now = (OLDER_DEFAULTS | dict(part.split("=", 1) for part in text.split("; ")) for text in (saved, here))
    if then["shuffle"] == now["shuffle"] == "false":  # then neither changes which document is next
        then, now = (
            {key: parts[key] for key in parts if key not in ("seed", "global_batch_size")} for parts in (then, now)
        )
    fix = "restore what it was, or read the data given now from their start: --checkpoint.allow_change"
    return [
        Problem(f"data of the checkpoint: {key}", f"was {then.get(key)} when it was saved", value=now.get(key), fix=fix)
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
