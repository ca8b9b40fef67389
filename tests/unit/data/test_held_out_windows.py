"""The windows of a validation: the first ones of the data, in full batches, the same on every data-parallel degree."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import write_jsonl

from quadriga.config.schema import Fetching, TextKeys, TokenKeys
from quadriga.data.loader import IGNORE, Batch, Loader
from quadriga.data.stream_loader import build_loader
from quadriga.data.token_loader import build_token_loader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.train.feed import Feed
from quadriga.train.validate import KEPT_BYTES, HeldOutSet, SetLoss, Validator

SEQ_LEN, SHARE = 16, 3  # rows of a batch of one rank
DEGREES = (1, 2, 3, 4, 7)
TEXTS = [f"held out {number} " * (number % 7 + 1) for number in range(60)]
Make = Callable[..., Loader]


@pytest.fixture(params=["jsonl", "tokens"])
def make(request, tmp_path: Path) -> tuple[Make, list[int]]:
    """A function that makes the loader of one rank, and all ids of the data."""
    ids = [token for text in TEXTS for token in (256, *text.encode(), 257)]
    write_jsonl(tmp_path / "held.jsonl", TEXTS)
    np.array(ids, "<u2").tofile(tmp_path / "held.bin")

    def make_loader(degree: int, rank: int, windows: int | None, share: int = SHARE) -> Loader:
        order = {"seed": 0, "seq_len": SEQ_LEN, "global_batch_size": share * degree, "infinite": False}
        order |= {"rows": range(rank * share, (rank + 1) * share), "dataloader": Fetching(), "windows": windows}
        if request.param == "jsonl":
            return build_loader(TextKeys("jsonl", str(tmp_path / "held.jsonl")), ByteTokenizer(), **order)
        keys = TokenKeys("validation", str(tmp_path / "held.bin"), "raw", "uint16", None, None)
        return build_token_loader(keys, 300, **order)

    return make_loader, ids


def rows_of(batches: Iterator[Batch]) -> list[bytes]:
    """The ids and labels of each row that counts, as a hash."""
    rows = []
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == (SHARE, SEQ_LEN)
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            if (labels != IGNORE).any():
                rows.append(hashlib.sha256(tokens.numpy().tobytes() + labels.numpy().tobytes()).digest())
    return rows


def expected(ids: list[int], windows: int | None) -> list[bytes]:
    """The hashes of the first windows, each of which begins with the last id of the one before."""
    count = -(-(len(ids) - 1) // SEQ_LEN)
    rows = []
    for start in range(0, (count if windows is None else min(windows, count)) * SEQ_LEN, SEQ_LEN):
        part = torch.tensor(ids[start : start + SEQ_LEN + 1])
        tokens, labels = torch.zeros(SEQ_LEN, dtype=torch.int64), torch.full((SEQ_LEN,), IGNORE)
        tokens[: len(part) - 1], labels[: len(part) - 1] = part[:-1], part[1:]
        rows.append(hashlib.sha256(tokens.numpy().tobytes() + labels.numpy().tobytes()).digest())
    return rows


@pytest.mark.parametrize("windows", [1, 20, 63, None, 10_000])
def test_all_degrees_read_the_same_windows(make, windows: int | None) -> None:
    """In as many batches on every rank; 10,000 windows are more than there are."""
    make_loader, ids = make
    oracle = Counter(expected(ids, windows))
    for degree in DEGREES:
        loaders = [make_loader(degree, rank, windows) for rank in range(degree)]
        for _ in range(2):  # each pass is the same
            of_ranks = [list(loader) for loader in loaders]
            assert {len(batches) for batches in of_ranks} == {-(-oracle.total() // (SHARE * degree))}
            assert Counter(row for batches in of_ranks for row in rows_of(iter(batches))) == oracle
        for loader in loaders:
            loader.close()


def test_a_small_set_is_read_once_and_a_large_one_each_time(make) -> None:
    make_loader, ids = make
    for kept_bytes, reads in ((KEPT_BYTES, 1), (2 * 2 * SHARE * SEQ_LEN * 8, 3)):  # all of it; two batches of seven
        loader = make_loader(1, 0, 20)
        calls, real = [], loader._feeds

        def feeds(calls=calls, real=real):
            calls.append(0)
            return real()

        loader._feeds = feeds
        held_out = HeldOutSet(None, "validation", loader, kept_bytes)
        for number in range(3):
            assert rows_of(held_out.batches(Feed())) == expected(ids, 20)
            assert held_out.passes == number + 1
        assert len(calls) == reads
        held_out.close()


def test_a_pass_that_was_not_finished_is_not_kept(make) -> None:
    make_loader, ids = make
    held_out = HeldOutSet(None, "validation", make_loader(1, 0, 20), KEPT_BYTES)
    cut = held_out.batches(Feed())
    next(cut)
    cut.close()
    assert held_out.passes == 0
    assert rows_of(held_out.batches(Feed())) == expected(ids, 20)
    held_out.close()


@pytest.mark.parametrize(("asked", "read", "noticed"), [(False, 20, True), (True, 20, False), (False, 19, False)])
def test_a_set_that_the_default_ends_is_noticed_once(make, asked: bool, read: int, noticed: bool) -> None:
    make_loader, _ = make
    held_out = HeldOutSet("web", "validation.sets[web]", make_loader(1, 0, 20), KEPT_BYTES)
    validator = Validator((held_out,), Feed(), None, torch.device("cpu"), 1, 20, asked)
    notices = []
    for _ in range(2):
        list(held_out.batches(validator.feed))
        notices.append(validator.rest_notice(held_out, SetLoss(1.0, read * SEQ_LEN, read)))
    assert notices[1] is None
    assert (notices[0] is not None) == noticed
    assert not noticed or "web: only the first 20 windows" in notices[0]
    validator.close()
