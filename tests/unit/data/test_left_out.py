"""`on_bad_record = "skip"`: what is left out depends on the data alone, is counted in the place, and is shown."""

from __future__ import annotations

import json

import pytest
import torch

from quadriga import limits
from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data.stream_loader import build_loader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

ROWS, DOCUMENTS = 4, 400
BAD = {7: b'{"text": 5}', 8: b"no", 150: b'{"text": "caf\xe9"}', 399: b"[" * 200_000}


def lines(bad=BAD) -> list[bytes]:
    sound = [json.dumps({"text": f"<{i}>" + "abc " * (i * 37 % 51)}).encode() for i in range(DOCUMENTS)]
    return [bad.get(i, line) for i, line in enumerate(sound)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines()) + b"\n")
    return path


def make(path, rows=range(ROWS), mode="skip", infinite=True, **options):
    return build_loader(
        TextKeys("jsonl", str(path)),
        ByteTokenizer(),
        seed=3,
        seq_len=64,
        global_batch_size=ROWS,
        rows=rows,
        dataloader=Dataloader(on_bad_record=mode, **options),
        infinite=infinite,
    )


def take(loader, steps):
    batches = [loader.next() for _ in range(steps)]
    loader.close()
    return batches


def epochs(loader) -> int:
    return min(place[0] for place in loader.state_dict()["lanes"].values())


def test_to_stop_is_the_default_and_names_all(path):
    with pytest.raises(UserError) as caught:
        make(path, mode="stop")
    assert [problem.where for problem in caught.value.problems] == [f"{path}, line {i + 1}" for i in BAD]
    assert Dataloader().on_bad_record == "stop"


def test_one_epoch_leaves_out_each_bad_record_once_and_keeps_the_others(path):
    loader = make(path)
    met, batches = [], []
    while epochs(loader) < 1:
        batches.append(loader.next())
        met += batches[-1].skipped
    counted = batches[-1].bad_records
    loader.close()
    first_epoch = sorted({loader.format_location(record) for record in met})
    assert first_epoch == sorted(f"{path}, line {i + 1}" for i in BAD)
    assert counted == len(met) >= len(BAD)
    text = b"".join(bytes(i for i in row.tolist() if i < 256) for batch in batches for row in batch.tokens)
    assert all(b"<%d>" % i in text for i in range(DOCUMENTS) if i not in BAD)
    assert not any(b"<%d>" % i in text for i in BAD)
    reasons = {loader.format_location(record).rpartition(" ")[2]: record.what for record in met}
    assert "number" in reasons["8"]
    assert "not JSON" in reasons["9"]
    assert "0xe9" in reasons["151"]
    assert "too deep" in reasons["400"]


def contents(batches):
    return [(batch.tokens, batch.skipped, batch.bad_records) for batch in batches]


def same(some, others) -> bool:
    return len(some) == len(others) and all(
        torch.equal(one[0], other[0]) and one[1:] == other[1:] for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("stop", range(0, 60, 7))
def test_a_resume_leaves_out_and_counts_the_same(path, stop):
    whole = contents(take(make(path, prefetch_factor=3), 80))
    first = make(path)
    head = contents(take(first, stop)) if stop else []
    second = make(path, num_workers=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert same(head + contents(take(second, 80 - stop)), whole)
    assert 2 <= sum(len(one[1]) for one in whole) == whole[-1][2]


def test_ranks_leave_out_their_own_and_together_the_same(path):
    whole = contents(take(make(path), 60))
    parts = [contents(take(make(path, range(row, row + 1)), 60)) for row in range(ROWS)]
    for step, (tokens, left_out, count) in enumerate(whole):
        own = [part[step] for part in parts]
        assert torch.equal(torch.cat([one[0] for one in own]), tokens)
        assert tuple(record for one in own for record in one[1]) == left_out
        assert sum(one[2] for one in own) == count


def test_a_finite_pass_leaves_out_too(path):
    loader = make(path, infinite=False)
    first, again = ([record for batch in loader for record in batch.skipped] for _ in range(2))
    loader.close()
    assert [loader.format_location(record) for record in first] == [f"{path}, line {i + 1}" for i in BAD if i < 399]
    assert first == again


def test_data_that_cannot_be_read_at_all_end_a_run(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" * 50)
    with pytest.raises(UserError, match=r"none of the 50 records.*\n(.*\n)*.*no `text`"):
        make(path)
    monkeypatch.setattr("quadriga.data.survey.WHOLE_BYTES", 10)
    monkeypatch.setattr(limits, "BAD_RECORDS_IN_A_ROW", 100)
    path.write_bytes(b'{"text": "one good line"}\n' + b"{}\n" * 900)
    loader = make(path)
    with pytest.raises(UserError, match="101 records in a row cannot be read; the last of them: the object has no"):
        take(loader, 1000)
    loader.close()


def test_nothing_is_skipped_of_the_document_that_comes_instead_of_one_that_is_gone(tmp_path):
    """The run stood within a document that cannot be read any more: the next one is read from its beginning."""
    path = tmp_path / "a.jsonl"
    sound = [json.dumps({"text": f"<{i}>" + "abc " * 40}).encode() for i in range(DOCUMENTS)]
    path.write_bytes(b"\n".join(sound) + b"\n")
    loader = make(path, range(1))
    batches = take(loader, 7)
    state = loader.state_dict()
    assert state["lanes"]["0"][3] > 4, "stands within a document"
    (_, _, at) = batches[-1].documents[0][-1]
    line = next(i for i in range(DOCUMENTS) if sum(len(text) + 1 for text in sound[:i]) == at)
    following = take(make_at(path, state), 9)
    path.write_bytes(b"\n".join([*sound[:line], b"#" * len(sound[line]), *sound[line + 1 :]]) + b"\n")
    now = take(make_at(path, state), 6)
    (_, _, first) = now[0].documents[0][0]
    assert first == next(number for batch in following for _, _, number in batch.documents[0] if number != at)
    ids = now[0].tokens[0].tolist()
    assert bytes(i for i in ids if i < 256).startswith(b"<")
    assert [record.number for record in now[0].skipped] == [at]


def make_at(path, state):
    loader = make(path, range(1))
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader
