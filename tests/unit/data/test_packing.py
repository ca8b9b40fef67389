"""Properties of streams and packing on documents of any shape: nothing lost, nothing doubled, exact resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.data.sources import Document, Record
from quadriga.data.streams import Cursor, Streams, shuffled, tokenized, windows
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

SHARDS = st.lists(st.lists(st.text(max_size=40), max_size=9), min_size=1, max_size=6)


class ListSource:
    """Shards of texts in memory."""

    trusted = True
    disk_bytes = 0
    fingerprint = "list"

    def __init__(self, shards: list[list[str]]) -> None:
        self._texts = shards
        self.shards = len(shards)

    def read(self, shard: int) -> Iterator[Record]:
        return (Record(shard, number, text) for number, text in enumerate(self._texts[shard]))

    def parse(self, record: Record) -> Document:
        return Document(str(record.data))


@settings(max_examples=60)
@given(shards=SHARDS, count=st.integers(1, 12), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_streams_assign_every_document_once(shards, count, seed, epoch):
    streams = Streams(ListSource(shards), ByteTokenizer(), 8, count, seed, endless=False)
    assigned = [document for stream in range(count) for document, _ in streams.documents(stream, Cursor(epoch))]
    expected = {(epoch, s, n): text for s, shard in enumerate(shards) for n, text in enumerate(shard)}
    assert len(assigned) == len(expected)
    assert {document.id: document.text for document in assigned} == expected


@settings(max_examples=30)
@given(
    shards=SHARDS.filter(any),
    count=st.integers(1, 5),
    seq_len=st.integers(1, 30),
    overlap=st.integers(0, 1),
    data=st.data(),
)
def test_resume_at_any_window_goes_on_exactly(shards, count, seq_len, overlap, data):
    streams = Streams(ListSource(shards), ByteTokenizer(), seq_len, count, 3, overlap=overlap)
    stream, stop = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 20))
    run = list(islice(streams.windows(stream), stop + 6))
    again = list(islice(streams.windows(stream, run[stop].cursor), 5))
    assert [(window.cursor, window.documents) for window in again] == [
        (window.cursor, window.documents) for window in run[stop + 1 :]
    ]
    assert np.array_equal([window.ids for window in again], [window.ids for window in run[stop + 1 :]])


@settings(max_examples=60)
@given(documents=st.lists(st.text(max_size=40), min_size=1, max_size=30), seq_len=st.integers(1, 50))
def test_windows_joined_are_the_stream_of_tokens(documents, seq_len):
    stream = ((Document(text), Cursor(document=number)) for number, text in enumerate(documents))
    packed = [window.ids for window in windows(tokenized(stream, ByteTokenizer(), seq_len), seq_len)]
    assert all(len(window) == seq_len + 1 for window in packed[:-1])
    assert all(before[-1] == after[0] for before, after in pairwise(packed))
    joined = [int(packed[0][0])] + [int(token) for window in packed for token in window[1:]]
    assert joined == [token for text in documents for token in (256, *text.encode(), 257)]


@settings(max_examples=60)
@given(
    documents=st.lists(st.text(max_size=40), min_size=1, max_size=30),
    seq_len=st.integers(1, 50),
    overlap=st.integers(0, 1),
)
def test_a_window_knows_which_documents_its_tokens_are_from(documents, seq_len, overlap):
    streams = Streams(ListSource([documents]), ByteTokenizer(), seq_len, 1, None, endless=False, overlap=overlap)
    owners = [(0, 0, number) for number, text in enumerate(documents) for _ in range(len(text.encode()) + 2)]
    for number, window in enumerate(streams.windows(0)):
        start = number * (seq_len + 1 - overlap)
        assert list(window.documents) == list(dict.fromkeys(owners[start : start + len(window.ids)]))


def test_segments_of_one_document_get_one_bos_and_one_eos():
    segments = [Document("ab", True, False), Document("cd", False, False), Document("ef", False, True)]
    stream = tokenized(((segment, Cursor(document=i)) for i, segment in enumerate(segments)), ByteTokenizer(), 8)
    assert [ids.tolist() for ids, *_ in stream] == [[256, 97, 98], [99, 100], [101, 102, 257]]


def test_tokenizing_in_groups_changes_nothing():
    """A document's ids and place do not depend on what it is encoded with."""
    documents = [Document("word " * (i % 900)) for i in range(300)]
    placed = [(document, Cursor(document=i)) for i, document in enumerate(documents)]
    stream = list(tokenized(placed, ByteTokenizer(), 512))
    assert np.array_equal(stream[7][0], next(tokenized(placed[7:8], ByteTokenizer(), 1))[0])
    assert [place.document for _, place, *_ in stream] == list(range(300))
    for document, (ids, *_) in zip(documents, stream, strict=True):
        assert ids.tolist() == [256, *document.text.encode(), 257]


def splitmix64(state: int) -> int:
    """The published algorithm in plain integers."""
    mask = (1 << 64) - 1
    mixed = (state + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


def test_the_order_is_pinned():
    """A change here would make every saved cursor point at other documents."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the generator seeded with 0
    start = int.from_bytes(hashlib.blake2b(b"42 0 shards", digest_size=8).digest(), "little")
    keys = [splitmix64((start + i * 0x9E3779B97F4A7C15) % (1 << 64)) for i in range(8)]
    assert shuffled(8, "42 0 shards").tolist() == sorted(range(8), key=keys.__getitem__) == [3, 1, 6, 0, 7, 4, 2, 5]


@settings(max_examples=20)
@given(count=st.integers(0, 3000), key=st.text(max_size=9))
def test_shuffled_is_a_permutation(count, key):
    assert sorted(shuffled(count, key).tolist()) == list(range(count))


def test_shuffling_mixes_well():
    """Over 2,000 keys each of 6 elements comes to each of 6 places about equally often (chi-square, 25 degrees)."""
    counts = np.zeros((6, 6))
    for key in range(2000):
        counts[np.arange(6), shuffled(6, str(key))] += 1
    expected = 2000 / 6
    assert ((counts - expected) ** 2 / expected).sum() < 60  # p = 1e-4


def test_long_shards_are_shuffled_in_blocks_that_fit_in_memory():
    streams = Streams(ListSource([[str(i) for i in range(3000)]]), ByteTokenizer(), 8, 1, 3, endless=False)
    order = [int(document.text) for document, _ in streams.documents(0)]
    assert sorted(order[:1024]) == list(range(1024)) != order[:1024]
    assert sorted(order[1024:2048]) == list(range(1024, 2048))
    assert [i - 1024 for i in order[1024:2048]] != order[:1024], "each block has its own order"
    heavy = Streams(ListSource([["x" * (1 << 20)] * 7]), ByteTokenizer(), 8, 1, 3, endless=False)
    assert [place.document for _, place in heavy.documents(0)] == list(range(7))


def test_data_without_any_document_are_refused_instead_of_searched_for_ever():
    with pytest.raises(UserError, match="no document"):
        next(Streams(ListSource([[], []]), ByteTokenizer(), 8, 4, 3).windows(1))
