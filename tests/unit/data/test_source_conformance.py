"""The conformance test of every source: each document once an epoch, order by (seed, epoch), exact resume."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise, takewhile

import numpy as np
import pytest
from corpora import KINDS, texts

from quadriga.data.builtin import BuiltinSource
from quadriga.data.streams import Cursor, Streams
from quadriga.data.tokenizer import ByteTokenizer

DOCUMENTS = texts(60)
SEQ_LEN = 48
STREAM_COUNTS = (1, 3, 8, 70)  # 70: more than there are documents


def make(kind: str, folder, count: int, *, seed: int | None = 5, endless: bool = True) -> Streams:
    source = KINDS[kind](folder, DOCUMENTS, count)
    return Streams(source, ByteTokenizer(), SEQ_LEN, count, seed, endless)


def epoch_of(streams: Streams, stream: int, epoch: int) -> list[str]:
    """The texts of one epoch of a stream, in order. A stream without any stops where the next epoch of another
    begins."""
    one_epoch = Streams(streams.source, streams.tokenizer, streams.seq_len, streams.count, streams.seed, endless=False)
    return [document.text for document, _ in one_epoch.documents(stream, Cursor(epoch))]


def lines_of(documents) -> Counter[str]:
    return Counter(line for document in documents for line in document.splitlines())


@pytest.mark.parametrize("count", STREAM_COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_sees_everything_once(tmp_path, kind, count):
    streams = make(kind, tmp_path, count)
    for epoch in range(2):
        seen = lines_of(text for stream in range(count) for text in epoch_of(streams, stream, epoch))
        assert seen == lines_of(DOCUMENTS)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_documents_begin_and_end_once(tmp_path, kind):
    streams = make(kind, tmp_path, 8, endless=False)
    documents = [document for stream in range(8) for document, _ in streams.documents(stream)]
    whole = {"text": 4, "text_gz": 2, "text_zst": 2}.get(kind, len(DOCUMENTS))
    assert sum(document.begins for document in documents) == whole
    assert sum(document.ends for document in documents) == whole


@pytest.mark.parametrize(
    "kind", sorted(set(KINDS) - {"text_gz", "text_zst"})
)  # 60 documents of compressed text are one segment
def test_order_differs_by_epoch_and_seed(tmp_path, kind):
    def order(seed: int | None, epoch: int) -> list[str]:
        streams = make(kind, tmp_path, 1, seed=seed)
        return epoch_of(streams, 0, epoch)

    orders = [order(5, 0), order(5, 1), order(6, 0), order(None, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order(5, 0) == orders[0]
    assert order(None, 1) == order(None, 0)


@pytest.mark.parametrize("count", [1, 5, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_from_every_cursor(tmp_path, kind, count):
    streams = make(kind, tmp_path, count)
    run = list(islice(streams.windows(2 % count), 40))
    step = 7 if kind.startswith("hub") else 3
    for stop in range(0, 39, step):
        cursor = json.loads(json.dumps(run[stop].cursor))
        again = list(islice(streams.windows(2 % count, Cursor(*cursor)), 3))
        for window, expected in zip(again, run[stop + 1 :], strict=False):
            assert np.array_equal(window.ids, expected.ids)
            assert window.cursor == expected.cursor
            assert window.documents == expected.documents


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_an_epoch_are_the_texts_between_bos_and_eos(tmp_path, kind):
    """One stream in the source's own order: the windows, joined without their overlap, are the data."""
    streams = make(kind, tmp_path, 1, seed=None, endless=False)
    windows = [window.ids for window in streams.windows(0)]
    assert all(len(window) == SEQ_LEN + 1 for window in windows[:-1])
    assert all(a[-1] == b[0] for a, b in pairwise(windows))
    ids = np.concatenate([windows[0], *(window[1:] for window in windows[1:])])
    expected: list[int] = []
    for record in (record for shard in range(streams.source.shards) for record in streams.source.read(shard)):
        document = streams.source.parse(record)
        expected += [256] * document.begins + list(document.text.encode()) + [257] * document.ends
    assert ids.tolist() == expected
    assert lines_of([bytes(i for i in expected if i < 256).decode()]) == lines_of(DOCUMENTS)


def test_equal_data_in_another_folder_have_the_same_fingerprint(tmp_path):
    for kind in sorted(set(KINDS) - {"hub", "hub_folder", "hub_local"}):  # their fingerprints are those of repositories
        sources = []
        for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS), ("c", DOCUMENTS[:-1])):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            sources.append(KINDS[kind](folder, documents, 4))
        assert sources[0].fingerprint == sources[1].fingerprint != sources[2].fingerprint
        assert ";" not in sources[0].fingerprint


def test_builtin_sees_everything_once_and_apart_from_its_validation_part():
    names = {}
    for held_out in (False, True):
        source = BuiltinSource(held_out=held_out)
        streams = Streams(source, ByteTokenizer(), 256, 16, 3, endless=False)
        places = [place for stream in range(16) for _, place in streams.documents(stream)]
        assert len(places) == source.shards
        units = [unit for stream in range(16) for unit in streams._units(stream, 0)]
        assert sorted(units) == list(range(source.shards))
        names[held_out] = set(source.names)
    assert not names[False] & names[True]
    assert 0.02 < len(names[True]) / len(names[False]) < 0.15


def test_builtin_is_real_text_and_leaves_out_what_is_not():
    source = BuiltinSource(held_out=False)
    assert source.fingerprint == BuiltinSource(held_out=False).fingerprint
    assert any(name.startswith("topic:") for name in source.names)
    assert any(name.startswith("builtin:") for name in source.names)
    assert "file:argparse.py" in source.names
    assert not [name for name in source.names if "/test" in name or "_sysconfigdata" in name or "site-packages" in name]
    total = sum(len(source.parse(record).text) for shard in range(source.shards) for record in source.read(shard))
    assert total > 4_000_000


def test_streams_rotate_so_that_none_stays_without_data(tmp_path):
    """One document and 20 streams: each stream comes to it."""
    source = KINDS["jsonl"](tmp_path, ["only this"] * 3, 20)
    streams = Streams(source, ByteTokenizer(), 8, 20, 5)
    for stream in range(20):
        epochs = takewhile(lambda cursor: cursor.epoch < 500, (place for _, place in streams.documents(stream)))
        assert next(epochs, None) is not None
