"""The loader: one global batch whatever the ranks and threads, exact state, no hang at the end."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from itertools import islice

import pytest
import torch
from launching import wait_until

from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.loader import IGNORE, Loader
from quadriga.data.prefetch import JOIN_SECONDS
from quadriga.data.stream_loader import build_loader
from quadriga.data.streams import Streams
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

ROWS = 8


def make(rows=range(ROWS), *, seed=7, seq_len=64, dataset="builtin", path=None, infinite=True, total=ROWS, **options):
    return build_loader(
        TextKeys(dataset, path),
        ByteTokenizer(),
        seed=seed,
        seq_len=seq_len,
        global_batch_size=total,
        rows=rows,
        dataloader=Dataloader(**options),
        infinite=infinite,
    )


def make_at(state, *args, **options) -> Loader:
    loader = make(*args, **options)
    loader.load_state_dict(state)
    return loader


def steps(loader: Loader, count: int) -> list[torch.Tensor]:
    """Token and label ids of `count` steps; closes the loader."""
    try:
        return [torch.stack((batch.tokens, batch.labels)) for batch in (loader.next() for _ in range(count))]
    finally:
        loader.close()


def steps_without_end(loader: Loader) -> None:
    while True:
        loader.next()


def digest(batches: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(batch.contiguous().numpy().tobytes() for batch in batches)).hexdigest()


@pytest.fixture
def lines(tmp_path):
    """A JSONL file of documents of very different lengths, each of which names itself."""
    path = tmp_path / "lines.jsonl"
    texts = [f"<{i}>" + "abc " * (i * 37 % 101) for i in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(ranks):
    share = ROWS // ranks
    parts = [steps(make(range(r * share, (r + 1) * share)), 12) for r in range(ranks)]
    together = [torch.cat(rank_parts, dim=1) for rank_parts in zip(*parts, strict=True)]
    assert digest(together) == digest(steps(make(), 12))


OPTIONS = [{"num_workers": 3}, {"prefetch_factor": 7}, {"num_workers": 8, "prefetch_factor": 1}]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_global_batch_does_not_depend_on_threads_and_prefetch(options):
    assert digest(steps(make(**options), 12)) == digest(steps(make(), 12))


def test_labels_are_the_next_tokens_and_every_token_is_a_label_once():
    loader = make(range(1))
    batches = steps(loader, 30)
    tokens, labels = (torch.cat([batch[i].flatten() for batch in batches]) for i in (0, 1))
    assert torch.equal(tokens[1:], labels[:-1])
    assert tokens[0] == ByteTokenizer.bos_id


def test_seed_decides_the_order():
    assert digest(steps(make(seed=7), 3)) == digest(steps(make(seed=7), 3)) != digest(steps(make(seed=8), 3))


def test_resume_is_exact_and_state_is_as_consumed(lines):
    """Stopped and resumed after each of 40 steps, over several epochs; the prefetched batches are not lost."""
    whole = steps(make(dataset="jsonl", path=str(lines)), 40)
    state, pieces = None, []
    for step in range(40):
        loader = make(dataset="jsonl", path=str(lines), prefetch_factor=1 + step % 4)
        if state is not None:
            loader.load_state_dict(json.loads(state))
        pieces += steps(loader, 1)
        state = json.dumps(loader.state_dict())
    assert digest(pieces) == digest(whole)
    assert max(place[0] for place in json.loads(state)["lanes"].values()) >= 2, "the test must cross epochs"


@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 8), (8, 1)])
def test_resume_on_another_number_of_ranks(before, after):
    whole = steps(make(), 9)
    streams, first = {}, []
    for rank in range(before):
        share = ROWS // before
        loader = make(range(rank * share, (rank + 1) * share))
        first.append(steps(loader, 4))
        streams |= loader.state_dict()["lanes"]
        fingerprint = loader.state_dict()["fingerprint"]
    state = json.loads(json.dumps({"fingerprint": fingerprint, "lanes": streams}))
    second = []
    for rank in range(after):
        share = ROWS // after
        loader = make(range(rank * share, (rank + 1) * share))
        loader.load_state_dict(state)
        second.append(steps(loader, 5))
    joined = [torch.cat(step, dim=1) for part in (first, second) for step in zip(*part, strict=True)]
    assert digest(joined) == digest(whole)


def test_resume_with_another_sequence_length_reads_on_at_the_same_token():
    first = make(range(1), total=1)
    steps(first, 3)
    second = make(range(1), total=1, seq_len=32)
    second.load_state_dict(first.state_dict())
    (longer,), halves = steps(make_at(first.state_dict(), range(1), total=1), 1), steps(second, 2)
    assert torch.equal(longer, torch.cat(halves, dim=2))


def test_loading_state_into_a_running_loader_goes_back():
    loader = make()
    loader.next()
    state = loader.state_dict()
    then = loader.next()
    for _ in range(3):
        loader.next()
    loader.load_state_dict(state)
    again = steps(loader, 1)
    assert torch.equal(again[0][0], then.tokens)


def test_back_to_a_mark_reads_on_there_and_neither_looks_at_files(lines, monkeypatch):
    loader = make(dataset="text", path=str(lines))
    loader.next()
    mark, state = loader.snapshot(), loader.state_dict()
    following = [loader.next().tokens for _ in range(2)]
    with monkeypatch.context() as patch:
        for name in ("layout", "anchor", "load_layout"):
            patch.setattr(type(loader.streams.source), name, lambda *given: pytest.fail("a file was read"))
        assert loader.snapshot() != mark
        loader.restore(mark)
    assert loader.state_dict() == state
    assert all(torch.equal(loader.next().tokens, tokens) for tokens in following)
    loader.close()


def test_other_data_are_refused_by_name(lines):
    state = make().state_dict()
    with pytest.raises(UserError) as caught:
        make(seed=8, dataset="jsonl", path=str(lines)).load_state_dict(state)
    assert [problem.where for problem in caught.value.problems] == [
        "data of the checkpoint: dataset",
        "data of the checkpoint: seed",
    ]
    assert "builtin:python" in caught.value.report


def test_missing_streams_are_named():
    state = make(range(4)).state_dict()
    with pytest.raises(ValueError, match=r"lacks streams \[4, 5\]"):
        make(range(4, 6)).load_state_dict(state)


def first_batch(loader, state):
    loader.load_state_dict(state)
    try:
        return next(loader)
    finally:
        loader.close()


@pytest.mark.parametrize("place", [1, 2], ids=["unit", "document"])
def test_a_position_beyond_the_data_is_refused(lines, place):
    """Not: read from the next unit on, as if nothing were wrong."""
    loader = make(dataset="jsonl", path=str(lines))
    steps(loader, 2)
    state = loader.state_dict()
    for cursor in state["lanes"].values():
        cursor[place] = 10**6
    with pytest.raises(UserError, match="beyond their end"):
        first_batch(make(dataset="jsonl", path=str(lines)), state)


def test_rows_outside_the_global_batch_are_refused():
    for rows in (range(4, 9), range(3, 3), range(0, 8, 2)):
        with pytest.raises(ValueError, match="are not rows"):
            make(rows)


def test_the_start_of_an_epoch_is_logged_by_the_owner_of_stream_0(lines, caplog):
    with caplog.at_level(logging.INFO, logger="quadriga"):
        loader = make(dataset="jsonl", path=str(lines))
        steps(loader, 60)
        epochs = loader.state_dict()["lanes"]["0"][0]
        assert [record.message for record in caplog.records] == [
            f"data: epoch {epoch + 2} begins (stream 0)" for epoch in range(epochs)
        ]
        assert epochs > 2
        caplog.clear()
        steps(make(range(1, 8), dataset="jsonl", path=str(lines)), 60)
        assert not caplog.records


def test_an_error_in_a_thread_reaches_the_reader_every_time(tmp_path, monkeypatch):
    """Beyond what is looked through first, a bad line is met when its turn comes."""
    monkeypatch.setattr("quadriga.data.survey.WHOLE_BYTES", 1000)
    path = tmp_path / "late.jsonl"
    path.write_text('{"text": "' + "good " * 40 + '"}\n' + '{"text": "short"}\n' * 400 + '{"txt": 1}\n')
    loader = make(dataset="jsonl", path=str(path), total=1, rows=range(1), seq_len=256)
    for _ in range(2):
        with pytest.raises(UserError, match=r"late\.jsonl, line 402"):
            steps_without_end(loader)
    loader.close()


def test_close_ends_the_threads_and_is_quick():
    before = threading.active_count()
    loader = make(num_workers=4)
    loader.next()
    assert threading.active_count() == before + 4
    started = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - started < JOIN_SECONDS  # after which a thread that does not end is left alone
    assert threading.active_count() == before


def test_waited_is_the_wait_of_the_last_batch():
    loader = make(prefetch_factor=4)
    loader.next()
    first = loader.waited
    waited = []
    for _ in range(5):  # of which a busy machine may hold up some
        assert wait_until(lambda: all(feed.ready.qsize() for feed in loader._prefetcher._feeds), 30)
        loader.next()
        waited.append(loader.waited)
    assert 0 <= min(waited) < 0.05
    assert first > 0
    loader.close()


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_finite_pass_gives_every_rank_as_many_batches(tmp_path, ranks):
    """20 windows and a short one into batches of 8 rows: 3 batches; every token is counted once over all ranks."""
    text = "".join(chr(97 + i % 26) for i in range(20 * 64 + 30))
    (tmp_path / "a.txt").write_text(text)
    total = 24 if ranks == 3 else ROWS
    share = total // ranks
    counted, counts = 0, set()
    for rank in range(ranks):
        rows = range(rank * share, (rank + 1) * share)
        loader = make(rows, dataset="text", path=str(tmp_path), infinite=False, total=total)
        batches = list(loader)
        counts.add(len(batches))
        assert all(batch.tokens.shape == batch.labels.shape == (share, 64) for batch in batches)
        counted += sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        assert sum(int((batch.labels != IGNORE).sum()) for batch in loader) == sum(
            int((batch.labels != IGNORE).sum()) for batch in batches
        ), "iterating again begins the pass again"
        loader.close()
    assert counts == {-(-21 // total)}
    assert counted == len(text) + 2 - 1  # BOS and EOS; the first token is no label


def test_a_finite_pass_may_be_left_in_the_middle():
    before = threading.active_count()
    loader = make(dataset="builtin_validation", infinite=False)
    first = [next(iter(loader)).tokens for _ in range(2)]
    assert torch.equal(*first)
    loader.close()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_page_locked_where_asked():
    loader = make(pin_memory=True)
    batch = loader.next()
    loader.close()
    assert batch.tokens.is_pinned()
    assert batch.labels.is_pinned()


@pytest.mark.skipif(torch.cuda.is_available(), reason="where CUDA is, it has an effect")
def test_page_locking_without_cuda_is_reported_to_have_no_effect(caplog):
    with caplog.at_level(logging.INFO, logger="quadriga"):
        make(pin_memory=True)
    assert "no effect" in caplog.text


class OtherBytes(ByteTokenizer):
    """As many ids, other ones."""

    fingerprint = "other-bytes"


@pytest.mark.parametrize(
    ("changed", "named"), [({"tokenizer": OtherBytes()}, "tokenizer"), ({"dataset": "builtin_validation"}, "dataset")]
)
def test_other_data_or_another_tokenizer_are_refused(changed, named):
    loader = make()
    state = loader.state_dict()
    given = {"dataset": "builtin", "tokenizer": ByteTokenizer(), **changed}
    other = build_loader(
        TextKeys(given["dataset"]),
        given["tokenizer"],
        seed=7,
        seq_len=64,
        global_batch_size=ROWS,
        rows=range(ROWS),
        dataloader=Dataloader(),
    )
    with pytest.raises(UserError) as refused:
        other.load_state_dict(state)
    assert [problem.where for problem in refused.value.problems] == [f"data of the checkpoint: {named}"]


class Without(ByteTokenizer):
    """As documents were made of before: no BOS."""

    bos_id = None
    fingerprint = "bytes-without"


class WithEarlier(ByteTokenizer):
    earlier = Without()


def test_a_run_that_began_with_an_earlier_meaning_of_the_tokenizer_keeps_it(lines, caplog):
    """And so do its own checkpoints."""

    def loader(tokenizer):
        return build_loader(
            TextKeys("jsonl", str(lines)),
            tokenizer,
            seed=7,
            seq_len=64,
            global_batch_size=ROWS,
            rows=range(ROWS),
            dataloader=Dataloader(),
        )

    whole = steps(loader(Without()), 7)
    first = loader(Without())
    head = steps(first, 3)
    second = loader(WithEarlier())
    with caplog.at_level(logging.INFO, logger="quadriga"):
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert "BOS None, EOS 257, as at the start of this run; a new run uses BOS 256, EOS 257" in caplog.text
    assert second.tokenizer.bos_id is None
    middle = steps(second, 2)
    third = loader(WithEarlier())
    third.load_state_dict(second.state_dict())
    assert digest(head + middle + steps(third, 2)) == digest(whole)
    assert digest(steps(loader(WithEarlier()), 7)) != digest(whole)


def test_each_epoch_has_an_order_of_its_own(lines):
    streams = Streams(open_source(TextKeys("jsonl", str(lines)), streams=1), ByteTokenizer(), 64, 1, seed=7)
    read = [document.id for document, _ in islice(streams.documents(0), 60)]
    first, second = ([number for epoch, _, number in read if epoch == which] for which in (0, 1))
    assert sorted(first) == sorted(second) == sorted(set(first)), "each document once an epoch"
    assert len(first) == 30
    assert first != second
