"""Batches of token files: a function of data, seed, batch and step alone; read errors are never bad records."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from quadriga.config.schema import Dataloader, Fetching
from quadriga.data.loader import IGNORE, Batch
from quadriga.data.stored_arrays import OpenFiles
from quadriga.data.token_files import open_token_files
from quadriga.data.token_loader import TokenLoader, TokenReader
from quadriga.data.windows import Windows
from quadriga.errors import Problem, UserError

BATCH, SEQ_LEN, VOCAB = 84, 8, 50_000


@dataclass
class InMemory:
    """Token files as the loader sees them: id i is at position i; documents of 10 ids, files of 1,000."""

    length: int = 5_000
    bad: int | None = None  # position of an id outside of the vocabulary
    value: int = VOCAB
    failures: list[int] = field(default_factory=list)  # reads that fail, by their number
    reads: int = 0
    read_positions: list[int] = field(default_factory=list)
    fingerprint: str = "memory:1"
    files: tuple[str, ...] = ("a", "b", "c", "d", "e")

    def read(self, start: int, stop: int) -> np.ndarray:
        self.reads += 1
        if self.reads in self.failures:
            raise UserError(Problem("a", "the file cannot be read: Input/output error"))
        self.read_positions.append(start)
        ids = np.arange(start, stop)
        if self.bad is not None and start <= self.bad < stop:
            ids[self.bad - start] = self.value
        return ids

    def read_documents(self, start: int, stop: int) -> tuple[np.ndarray, tuple[tuple[int, int], ...], np.ndarray]:
        names = tuple((number // 100, number % 100) for number in range(start // 10, (stop - 1) // 10 + 1))
        return self.read(start, stop), names, np.arange(start // 10 + 1, stop // 10 + 1) * 10 - start

    def format_location(self, position: int) -> str:
        return f"{self.files[position // 1000]}, id {position % 1000}"


def make(
    rows=range(BATCH), *, source=None, batch=BATCH, seed=3, endless=True, shuffle=True, overlap=1, **options
) -> TokenLoader:
    source = source or InMemory()
    windows = Windows(source.length, SEQ_LEN, overlap, seed if shuffle and endless else None, short_last=not endless)
    section = Dataloader(shuffle=shuffle, window_overlap=overlap, **options) if endless else Fetching(**options)
    return TokenLoader(source, windows, VOCAB, batch, rows, section, endless=endless)


def digest(batch: Batch) -> str:
    return hashlib.sha256(batch.tokens.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest()


def hashes(loader: TokenLoader, steps: int) -> list[str]:
    try:
        return [digest(loader.next()) for _ in range(steps)]
    finally:
        loader.close()


def ranks_of(count: int) -> list[range]:
    return [range(BATCH * rank // count, BATCH * (rank + 1) // count) for rank in range(count)]


def together(loaders: list[TokenLoader], steps: int) -> Iterator[str]:
    """The hashes of the global batches that some ranks read."""
    for _ in range(steps):
        parts = [loader.next() for loader in loaders]
        yield digest(Batch(torch.cat([p.tokens for p in parts]), torch.cat([p.labels for p in parts])))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("overlap", [1, 0])
def test_resume_on_4_3_7_and_1_ranks_reads_what_one_rank_reads(shuffle, overlap):
    options = {"shuffle": shuffle, "overlap": overlap}
    whole = hashes(make(**options), 40)
    found, state = [], None
    for ranks, steps in ((4, 9), (3, 5), (7, 13), (1, 13)):
        loaders = [make(rows, num_workers=1 + ranks % 3, **options) for rows in ranks_of(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        found += together(loaders, steps)
        states = {json.dumps(loader.state_dict()) for loader in loaders}
        assert len(states) == 1, "the state is the same on all ranks"
        (state,) = states
        for loader in loaders:
            loader.close()
    assert found == whole


def test_a_stop_after_any_step_loses_nothing_that_was_read_ahead():
    whole, found, state = hashes(make(), 30), [], None
    for step in range(30):
        loader = make(prefetch_factor=1 + step % 4)
        if state is not None:
            loader.load_state_dict(state)
        found += hashes(loader, 1)
        state = loader.state_dict()
    assert found == whole


def test_every_epoch_shows_each_window_once_and_each_id_is_a_label_once():
    loader = make(batch=7, rows=range(7))
    windows = (5_000 - 1) // SEQ_LEN
    labels: list[int] = []
    while len(labels) < 3 * windows * SEQ_LEN:
        labels += loader.next().labels.flatten().tolist()
    loader.close()
    for epoch in range(3):
        seen = labels[epoch * windows * SEQ_LEN : (epoch + 1) * windows * SEQ_LEN]
        assert sorted(seen) == list(range(1, windows * SEQ_LEN + 1))


def test_without_shuffling_rows_are_the_windows_in_order():
    batch = make(shuffle=False).next()
    assert torch.equal(batch.tokens.flatten(), torch.arange(BATCH * SEQ_LEN))
    assert torch.equal(batch.labels, batch.tokens + 1)


def test_a_rank_reads_its_rows_only():
    source = InMemory()
    loader = make(range(40, 42), source=source, shuffle=False, prefetch_factor=1)
    for _ in range(5):
        loader.next()
    loader.close()
    starts = [step * BATCH + row for step in range(8) for row in (40, 41)]
    assert source.read_positions == [slot * SEQ_LEN for slot in starts][: len(source.read_positions)]


@pytest.mark.parametrize(("length", "overlap"), [(5_000, 1), (85 * SEQ_LEN + 4, 1), (5_000, 0)])
def test_a_pass_has_equally_many_batches_on_all_ranks_and_each_label_once(length, overlap):
    loaders = [
        make(rows, source=InMemory(length), endless=False, overlap=overlap, window_overlap=overlap)
        for rows in ranks_of(4)
    ]
    for _ in range(2):
        passes = [[batch.labels for batch in iter(loader)] for loader in loaders]
        assert len({len(batches) for batches in passes}) == 1
        labels = torch.cat([torch.cat(parts).flatten() for parts in zip(*passes, strict=True)])
        seen = sorted(labels[labels != IGNORE].tolist())
        stride = SEQ_LEN + 1 - overlap
        expected = [i for i in range(1, length) if overlap or (i % stride and i // stride < length // stride)]
        assert seen == expected
    for loader in loaders:
        loader.close()


def test_documents_have_epoch_file_and_number():
    loader = make(shuffle=False, batch=1, rows=range(1), source=InMemory(20))
    found = [loader.next().documents for _ in range(3)]
    loader.close()
    assert found == [(((0, 0, 0),),), (((0, 0, 0), (0, 0, 1)),), (((1, 0, 0),),)]


@pytest.mark.parametrize("value", [VOCAB, -1, -(2**40), 2**62])
def test_an_id_outside_the_vocabulary_is_located(value):
    loader = make(shuffle=False, source=InMemory(bad=2_345, value=value))
    with pytest.raises(UserError) as found:
        hashes(loader, 5)
    (problem,) = found.value.problems
    assert problem.where == "c, id 345"
    assert str(value) in problem.what
    assert "50,000 ids" in problem.what


def test_a_read_that_fails_ends_the_run_and_consumes_nothing():
    loader = make(shuffle=False, source=InMemory(failures=[5]))
    for _ in range(2):
        with pytest.raises(UserError, match="Input/output error"):
            loader.next()
    loader.close()
    assert hashes(loader, 1) == hashes(make(shuffle=False), 1)


CHANGES = [
    ({"seed": 4}, "seed"),
    ({"batch": 85}, "global_batch_size"),
    ({"overlap": 0}, "window_overlap"),
    ({"shuffle": False}, "shuffle"),
    ({"source": InMemory(fingerprint="memory:2")}, "dataset"),
]


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_a_state_of_other_data_or_another_order_is_refused(change, name):
    state = make().state_dict()
    with pytest.raises(UserError, match=f"data of the checkpoint: {name}"):
        make(**change).load_state_dict(state)


def test_a_text_state_is_refused():
    fingerprint = "dataset=jsonl:1:ab; tokenizer=bytes; seed=3; global_batch_size=84; shuffle=true; window_overlap=1"
    state = {"fingerprint": fingerprint, "lanes": {"0": [0, 0, 0, 0]}, "layout": None}
    with pytest.raises(UserError, match="dataset"):
        make().load_state_dict(state)


def test_an_epoch_is_logged_by_the_rank_of_row_0(caplog):
    with caplog.at_level(logging.INFO):
        hashes(make(range(42)), 8)
        hashes(make(range(42, 84)), 8)
    assert [record.getMessage() for record in caplog.records] == ["data: epoch 2 begins"]


def test_a_row_is_read_once(tmp_path, monkeypatch):
    """Also where the ids separate documents, and over the border of two files."""
    ids = np.random.default_rng(0).integers(0, 6, 200).astype("<u2")
    for number in range(2):
        ids[number * 100 :][:100].tofile(tmp_path / f"{number}.bin")
    files = open_token_files(str(tmp_path), token_dtype="uint16", eos_id=0)
    reader = TokenReader(files, Windows(200, 15, 1, 3), 6)
    expected = [(reader.read(slot, slot).ids, files.documents(*reader.windows.bounds(slot))) for slot in range(13)]
    sizes: list[int] = []
    real = OpenFiles.read
    monkeypatch.setattr(OpenFiles, "read", lambda self, *args: sizes.append(args[2]) or real(self, *args))
    for slot, (row, documents) in enumerate(expected):
        window = reader.read(slot, slot)
        assert window.ids.tolist() == row.tolist()
        assert window.documents == tuple((0, *document) for document in documents)
    assert sum(sizes) == 13 * 16 * 2
