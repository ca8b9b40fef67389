"""Batches of the windows of streams of documents."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from quadriga.config.schema import Dataloader, Fetching, TextKeys
from quadriga.data.changes import data_changes, earlier_tokenizer
from quadriga.data.files import changed_files, format_files
from quadriga.data.loader import CONCATENATED, BatchPart, Loader, RowFormat
from quadriga.data.position import cursor_before, read_so_far
from quadriga.data.sources import Anchor
from quadriga.data.streams import START, Cursor, SkippedRecord, Streams, Window
from quadriga.data.survey import open_surveyed
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem, UserError, shortened
from quadriga.log import logger

SINGLE_STREAM = 0  # the one stream of data that are not shuffled


def build_loader(
    keys: TextKeys,
    tokenizer: Tokenizer,
    *,
    seed: int | str,
    seq_len: int,
    global_batch_size: int,
    rows: range,
    dataloader: Fetching,
    infinite: bool = True,
    windows: int | None = None,
    rows_have: RowFormat = CONCATENATED,
) -> StreamLoader:
    """The loader of `rows` of the global batch, of documents.

    infinite (training): endless epochs; a batch is a whole optimizer step. Shuffled by `seed`, row i is stream i. With
    `dataloader.shuffle` false there is one stream of documents in the source's order. Its windows fill the rows of one
    batch after another; every rank reads all of it and keeps its rows.
    Not infinite (validation): one pass in the data's order per iteration, of the first `windows` windows; None: of all.
    Every rank gets the same number of batches; the last one is filled up with rows whose labels are all IGNORE.

    Raises UserError: data that do not exist or cannot be read (small data are checked completely before the first
    step), or fewer tokens than one window.
    """
    shuffled = infinite and isinstance(dataloader, Dataloader) and dataloader.shuffle
    count = global_batch_size if shuffled else 1
    fills_rows = rows_have.packing == "concat"
    rows_have = rows_have._replace(prompts=rows_have.prompts or keys.prompt is not None)
    source = open_surveyed(keys, tokenizer, seq_len, dataloader, endless=infinite, streams=count, fills_rows=fills_rows)
    skip_bad = dataloader.on_bad_record == "skip"
    order = seed if shuffled else None
    overlap = dataloader.window_overlap
    how = (infinite, skip_bad, overlap, windows, rows_have.packing)
    streams = Streams(source, tokenizer, seq_len, count, order, *how)
    return StreamLoader(streams, global_batch_size, rows, dataloader, rows_have=rows_have)


class StreamLoader(Loader):
    """Batches of the windows of streams of documents."""

    def __init__(
        self,
        streams: Streams,
        global_batch_size: int,
        rows: range,
        dataloader: Fetching,
        *,
        rows_have: RowFormat = CONCATENATED,
    ) -> None:
        order = (streams.seq_len, global_batch_size, rows, dataloader)
        super().__init__(*order, endless=streams.endless, rows_have=rows_have)
        self.streams = streams  # loading a state can replace them
        self._in_order = streams.endless and streams.seed is None
        self._streams_read: Sequence[int] = (SINGLE_STREAM,) if self._in_order else rows
        self._cursors = dict.fromkeys(self._streams_read, START)

    @property
    def fingerprint(self) -> str:
        streams = self.streams
        parts = {
            "dataset": streams.source.fingerprint,
            "tokenizer": streams.tokenizer.fingerprint,
            "seed": streams.seed,
            "global_batch_size": self._global_batch_size,
            "shuffle": "false" if self._in_order else "true",
            "window_overlap": streams.overlap,
        }
        if streams.packing != "concat":
            parts |= {"packing": streams.packing, "seq_len": streams.seq_len}
        return "; ".join(f"{key}={value}" for key, value in parts.items())

    @property
    def epoch(self) -> int:
        """The number of complete epochs of the first stream of this rank."""
        return self._cursors[self._streams_read[0]].epoch

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in use. After the state of an older run was loaded, this can be its `earlier`."""
        return self.streams.tokenizer

    def state_dict(self) -> dict[str, Any]:
        """The consumed position, as JSON values: the fingerprint, the cursor and anchor of each stream, and how the
        files are cut into shards."""
        streams = {str(stream): [*self._cursors[stream], *self._anchor(stream)] for stream in self._streams_read}
        return {"fingerprint": self.fingerprint, "lanes": streams, "layout": self.streams.source.layout()}

    def snapshot(self) -> dict[int, Cursor]:
        return dict(self._cursors)

    def advance(self, cursors: Mapping[int, Cursor]) -> None:
        """Moves some streams to these cursors."""
        self._cursors.update(cursors)

    def restore(self, snapshot: Mapping[int, Cursor]) -> None:
        self.close()
        self._cursors = dict(snapshot)

    def start_at(self, documents: int, tokens_left: int) -> None:
        """See `Loader`. Only for unshuffled data. Raises UserError if the data have fewer documents or ids."""
        if not self._in_order:
            raise ValueError("shuffled data have no position by the number of documents read")
        self.restore({SINGLE_STREAM: cursor_before(self.streams, documents, tokens_left)})

    def read_so_far(self) -> tuple[int, list[int]]:
        """The reverse of `start_at`: the number of documents of the epoch read, and their ids not used yet."""
        if not self._in_order:
            raise ValueError("shuffled data have no position by the number of documents read")
        return read_so_far(self.streams, self._cursors[SINGLE_STREAM])

    def _anchor(self, stream: int) -> tuple[int, ...]:
        if not self.streams.endless or self._cursors[stream] == START:
            return ()
        return self.streams.source.anchor(self.streams.shard(stream, self._cursors[stream])[0]) or ()

    def differences(self, state: Mapping[str, Any]) -> list[Problem]:
        """Why the data differ from those that `state` was saved with. Files that were repaired since are allowed."""
        return data_changes(state, self.fingerprint, self.streams.source.files, self.tokenizer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, which has the streams of all ranks; this rank takes its own.

        Raises UserError if the data differ from those that the state was saved with, or if a repaired file has fewer
        documents than were read from it.
        """
        if found := self.differences(state):
            raise UserError(*found)
        missing = [stream for stream in self._streams_read if str(stream) not in state["lanes"]]
        if missing:
            raise ValueError(f"the saved data state lacks streams {missing}; it has {sorted(map(int, state['lanes']))}")
        self.close()
        if (earlier := earlier_tokenizer(state, self.tokenizer)) is not None:
            then, now = (f"BOS {one.bos_id}, EOS {one.eos_id}" for one in (earlier, self.tokenizer))
            logger.info("data: documents get the ids %s, as at the start of this run; a new run uses %s", then, now)
            self.streams = replace(self.streams, tokenizer=earlier)
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
        """Cuts the files as the run that saved. If they changed since, logs this and checks that reading can continue.

        `cursors` and `anchors`: of the streams of all ranks, so that all ranks make the same cuts.
        """
        source = self.streams.source
        source.load_layout(layout, {})  # for the numbers of the shards
        source.load_layout(
            layout, {self.streams.shard(stream, cursors[stream])[0]: known for stream, known in anchors.items()}
        )
        changed = changed_files(source.files, layout)
        if not changed:
            return
        logger.info(
            "data: %s changed since the checkpoint was saved; reading continues at the same document numbers",
            format_files(changed),
        )
        needed: dict[int, int] = {}
        for stream in self._streams_read:
            if cursors[stream] != START:
                shard, count = self.streams.shard(stream, cursors[stream])
                needed[shard] = max(needed.get(shard, 0), count)
        for shard, count in needed.items():
            file = source.file_of(shard)
            if file in changed and (there := sum(1 for _ in islice(source.read(shard), count))) < count:
                what = f"was read up to document {count:,} of shard {shard}, which now has {there:,}"
                fix = "restore the documents before it, or start another run (--job.dump_folder)"
                raise UserError(Problem(shortened(file.path, 400), what, fix=fix))

    def _feeds(self) -> list[Generator[BatchPart, None, None]]:
        if self._in_order or not self.streams.endless:
            cursor = self._cursors[SINGLE_STREAM] if self._in_order else START
            return [_assign_rows(self.streams, cursor, self._rows, self._global_batch_size)]
        threads = min(max(self._dataloader.num_workers, 1), len(self._rows))
        return [
            _feed(self.streams, {row: self._cursors[row] for row in self._rows[i::threads]}) for i in range(threads)
        ]

    def bad_records(self) -> int | None:
        """The single stream of unshuffled data is counted by the rank of row 0."""
        if not self.streams.skip_bad:
            return None
        counts = not self._in_order or 0 in self._rows
        return sum(cursor.skipped for cursor in self._cursors.values()) if counts else 0

    def format_location(self, record: SkippedRecord) -> str:
        return self.streams.source.format_location(record.shard, record.number)

    def _advance(self, parts: Sequence[BatchPart]) -> None:
        before = self._cursors.get(0, START).epoch
        for part in parts:
            self.advance(part.cursors)
        if 0 in self._rows and self.streams.endless and self._cursors[0].epoch > before:
            stream = "" if self._in_order else " (stream 0)"
            logger.info("data: epoch %d begins%s", self._cursors[0].epoch + 1, stream)


def _feed(streams: Streams, cursors: Mapping[int, Cursor]) -> Generator[BatchPart, None, None]:
    """Yields one window of each row, endlessly. Not a method, so that no thread keeps a loader alive."""
    running = {row: streams.windows(row, cursor) for row, cursor in cursors.items()}
    while True:
        made = {row: next(windows) for row, windows in running.items()}
        yield BatchPart(made, {row: window.cursor for row, window in made.items()})


def _assign_rows(
    streams: Streams, cursor: Cursor, rows: range, global_batch_size: int
) -> Generator[BatchPart, None, None]:
    """Assigns the windows of one stream to the rows of one batch after another, and keeps those of `rows`.

    Every rank reads the whole stream, so that all ranks have the same cursors and the same number of batches.
    """
    kept: dict[int, Window] = {}
    row = 0  # of the current global batch
    for window in streams.windows(SINGLE_STREAM, cursor):
        if row in rows:
            kept[row] = window
        row += 1
        if row == global_batch_size:
            yield BatchPart(kept, {SINGLE_STREAM: window.cursor})
            kept, row = {}, 0
    if row:
        yield BatchPart(kept, {})
