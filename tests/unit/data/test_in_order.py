"""Data that are not shuffled: one stream of documents whose windows fill row after row, as torchtitan's loader does."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import torch
from corpora import KINDS, texts, write_jsonl

from quadriga.config.schema import Dataloader, Fetching, TextKeys
from quadriga.data.hub import HubSource
from quadriga.data.loader import IGNORE, Batch, Loader
from quadriga.data.stream_loader import build_loader
from quadriga.data.streams import Streams
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

ROWS, SEQ_LEN = 4, 48
DOCUMENTS = texts(23)


def expected_rows(documents: list[str], *, overlap: int = 0, seq_len: int = SEQ_LEN) -> Iterator[list[int]]:
    """Written from the description of torchtitan's loader alone: BOS and EOS at each document, one buffer, which is
    kept over the end of the data, windows of seq_len + 1."""
    buffer: list[int] = []
    while True:
        for text in documents:
            buffer += [ByteTokenizer.bos_id, *text.encode(), ByteTokenizer.eos_id]
            while len(buffer) >= seq_len + 1:
                yield buffer[: seq_len + 1]
                buffer = buffer[seq_len + 1 - overlap :]


def expected_batches(count: int, rows: int = ROWS, **options) -> list[torch.Tensor]:
    windows = expected_rows(DOCUMENTS, **options)
    batches = [torch.tensor([next(windows) for _ in range(rows)]) for _ in range(count)]
    return [torch.stack((batch[:, :-1], batch[:, 1:])) for batch in batches]


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "data.json", DOCUMENTS)


def make(path, rows=range(ROWS), *, total=ROWS, kind="jsonl", tokenizer=None, seq_len=SEQ_LEN, **options) -> Loader:
    return build_loader(
        TextKeys(kind, str(path)),
        tokenizer or ByteTokenizer(),
        seed=7,
        seq_len=seq_len,
        global_batch_size=total,
        rows=rows,
        dataloader=Dataloader(**{"shuffle": False, "window_overlap": 0, **options}),
    )


def made_of(batch: Batch) -> torch.Tensor:
    return torch.stack((batch.tokens, batch.labels))


def read(loader: Loader, count: int) -> list[torch.Tensor]:
    try:
        return [made_of(loader.next()) for _ in range(count)]
    finally:
        loader.close()


def steps_of_epochs(epochs: int) -> int:
    """More batches than so many epochs hold."""
    return epochs * sum(len(text.encode()) + 2 for text in DOCUMENTS) // (ROWS * SEQ_LEN) + 1


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_batches_are_those_of_the_description_for_three_epochs(data, ranks, overlap):
    count = steps_of_epochs(3)
    share = ROWS // ranks
    loaders = [make(data, range(r * share, (r + 1) * share), window_overlap=overlap) for r in range(ranks)]
    parts = [read(loader, count) for loader in loaders]
    together = [torch.cat(rank_parts, dim=1) for rank_parts in zip(*parts, strict=True)]
    assert all(torch.equal(*pair) for pair in zip(together, expected_batches(count, overlap=overlap), strict=True))
    assert {loader.state_dict()["lanes"]["0"][0] for loader in loaders} == {3}


def test_a_resume_at_every_step_on_other_ranks_goes_on_exactly(data):
    """1, 2 and 4 ranks in turn, each of which writes the place of the whole stream."""
    expected = expected_batches(steps_of_epochs(2))
    state = None
    for step, batch in enumerate(expected):
        ranks = (1, 2, 4)[step % 3]
        share = ROWS // ranks
        loaders = [make(data, range(r * share, (r + 1) * share), prefetch_factor=1 + step % 3) for r in range(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        assert torch.equal(torch.cat([read(loader, 1)[0] for loader in loaders], dim=1), batch)
        states = {json.dumps(loader.state_dict()) for loader in loaders}
        assert len(states) == 1, "every rank knows the same place"
        (state,) = states


@pytest.mark.parametrize("options", [{"num_workers": 3}, {"prefetch_factor": 7}, {"prefetch_factor": 1}])
def test_read_ahead_changes_nothing(data, options):
    assert all(torch.equal(*pair) for pair in zip(read(make(data, **options), 9), expected_batches(9), strict=True))


def test_neither_the_seed_nor_the_batch_size_moves_the_stream(data):
    loader = make(data)
    read(loader, 3)
    other = make(data, range(6), total=6)
    other.load_state_dict(loader.state_dict())
    then = read(other, 2)
    rows = expected_batches(6, rows=ROWS * 6)[0][:, 3 * ROWS : 3 * ROWS + 12]
    assert torch.equal(torch.cat(then, dim=1), rows)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"text", "text_gz", "text_zst"}))
def test_every_source_is_read_in_the_order_of_its_files(tmp_path, kind):
    source = KINDS[kind](tmp_path, DOCUMENTS, 1)
    of_kind = {"c4": 5, "hub": 5, "hub_folder": 5, "hub_local": 5, "arrow": 4, "parquet": 2, "parquet_template": 1}
    parts = (of_kind | {"saved": 1, "jsonl_template": 1}).get(kind, 3)
    in_order = [text for part in range(parts) for text in DOCUMENTS[part::parts]]
    streams = Streams(source, ByteTokenizer(), SEQ_LEN, 1, None, overlap=0)
    rows = expected_rows(in_order)
    for window in (window for _, window in zip(range(60), streams.windows(0), strict=False)):
        assert window.ids.tolist() == next(rows)


def test_the_hub_is_read_in_the_order_of_its_files(tmp_path):
    """Ten shards, so that the order by name is not that by number of a stream."""
    files = [write_jsonl(tmp_path / f"part-{n:02d}.jsonl", DOCUMENTS[2 * n : 2 * n + 2]) for n in range(10)]
    source = HubSource("json", None, "train", data_files=[str(file) for file in files], keys=TextKeys("hub"))
    read_texts = [document.text for document, _ in Streams(source, ByteTokenizer(), 8, 1, None, False).documents(0)]
    assert read_texts == DOCUMENTS[:20]


def test_records_that_cannot_be_read_are_left_out_and_counted_once(tmp_path):
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    lines[4:4] = ["broken"]
    lines[15:15] = ["[]", '{"txt": 1}']
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    count = steps_of_epochs(2)
    for ranks in (1, 2):
        share = ROWS // ranks
        loaders = [make(tmp_path, range(r * share, (r + 1) * share), on_bad_record="skip") for r in range(ranks)]
        batches = [[loader.next() for loader in loaders] for _ in range(count)]
        for loader in loaders:
            loader.close()
        together = [torch.cat([made_of(batch) for batch in step], dim=1) for step in batches]
        assert all(torch.equal(*pair) for pair in zip(together, expected_batches(count), strict=True))
        assert sum(batch.bad_records for batch in batches[-1]) == 6
        named = [record.nth for step in batches for batch in step for record in batch.skipped]
        assert sorted(named) == [1, 2, 3, 4, 5, 6], "by one rank each"


def test_the_end_of_an_epoch_is_logged_once_and_the_buffer_is_kept(data, caplog):
    with caplog.at_level(logging.INFO, logger="quadriga"):
        batches = read(make(data), steps_of_epochs(1) + 1)
        read(make(data, range(2, 4)), steps_of_epochs(1) + 1)
    assert [record.message for record in caplog.records] == ["data: epoch 2 begins"]
    assert all(torch.equal(*pair) for pair in zip(batches, expected_batches(len(batches)), strict=True))


def test_documents_are_named_by_row(data):
    """Those that a row's tokens are from, and no other: a window that ends with a document names not the next."""
    owners = [number for number, text in enumerate(DOCUMENTS) for _ in range(len(text.encode()) + 2)]
    loader = make(data)
    named = [documents for _ in range(steps_of_epochs(1) - 2) for documents in loader.next().documents]
    loader.close()
    numbers: list[int] = []
    offsets = {0: 0}
    for text in DOCUMENTS:
        offsets[len(json.dumps({"text": text, "url": "http://x"})) + 1 + max(offsets)] = len(offsets)
    for row, documents in enumerate(named):
        numbers = [offsets[number] for _, _, number in documents]
        owned = owners[row * (SEQ_LEN + 1) : (row + 1) * (SEQ_LEN + 1)]
        assert numbers == list(dict.fromkeys(owned))


def test_files_that_were_mended_go_on_at_the_same_document(tmp_path, caplog):
    path = write_jsonl(tmp_path / "data.jsonl", DOCUMENTS)
    loader = make(tmp_path)
    head = read(loader, 5)
    state = json.loads(json.dumps(loader.state_dict()))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, json.dumps({"text": "one more"}) + "\n"]))
    resumed = make(tmp_path)
    with caplog.at_level(logging.INFO, logger="quadriga"):
        resumed.load_state_dict(state)
    assert "data.jsonl changed since the checkpoint was saved" in caplog.text
    rows = expected_rows([*DOCUMENTS, "one more"])
    count = steps_of_epochs(1)
    windows = torch.tensor([next(rows) for _ in range(ROWS * count)]).view(count, ROWS, SEQ_LEN + 1)
    got = head + read(resumed, count - 5)
    assert torch.equal(torch.stack([batch[0] for batch in got]), windows[:, :, :-1])


@pytest.mark.parametrize(
    ("changed", "named"), [({"shuffle": True}, "shuffle"), ({"window_overlap": 1}, "window_overlap")]
)
def test_another_order_or_overlap_is_refused_by_name(data, changed, named):
    loader = make(data)
    read(loader, 1)
    with pytest.raises(UserError) as refused:
        make(data, **changed).load_state_dict(loader.state_dict())
    assert f"data of the checkpoint: {named}" in [problem.where for problem in refused.value.problems]


def test_an_older_state_means_shuffled_and_overlapping(data):
    loader = make(data, shuffle=True, window_overlap=1)
    read(loader, 2)
    state = loader.state_dict()
    state["fingerprint"] = state["fingerprint"].partition("; shuffle")[0]
    assert "shuffle" not in state["fingerprint"]
    again = make(data, shuffle=True, window_overlap=1)
    again.load_state_dict(state)
    assert torch.equal(read(again, 1)[0], read(loader, 1)[0])
    with pytest.raises(UserError, match="shuffle"):
        make(data).load_state_dict(state)


def test_start_at_goes_on_where_a_count_of_documents_says(data):
    """For every document, with every number of ids left that a buffer of torchtitan can hold then."""
    stream = [[256, *text.encode(), 257] for text in DOCUMENTS]
    flat = [token for _ in range(3) for ids in stream for token in ids]
    whole = len(flat) // 3
    for documents in range(len(DOCUMENTS) + 1):
        end = whole + sum(map(len, stream[:documents]))
        for left in (0, 1, 2, SEQ_LEN):
            loader = make(data)
            loader.start_at(documents, left)
            (batch,) = read(loader, 1)
            at = end - left
            windows = torch.tensor(flat[at : at + ROWS * (SEQ_LEN + 1)]).view(ROWS, SEQ_LEN + 1)
            assert torch.equal(batch, torch.stack((windows[:, :-1], windows[:, 1:]))), (documents, left)


def test_start_at_reaches_over_short_documents_and_the_border_of_an_epoch(tmp_path):
    short = ["", "a", "", "bc"]  # with BOS and EOS 11 ids
    write_jsonl(tmp_path / "data.jsonl", [*short, "x" * 60])
    flat = [token for _ in range(3) for text in [*short, "x" * 60] for token in (256, *text.encode(), 257)]
    for documents, left in ((4, 11), (2, 3), (0, 30), (1, 40), (0, 62)):
        loader = make(tmp_path)
        loader.start_at(documents, left)
        at = len(flat) // 3 + sum(len(text) + 2 for text in short[:documents]) - left
        assert read(loader, 1)[0][0][0].tolist() == flat[at : at + SEQ_LEN]


def test_start_at_beyond_the_data_is_refused(data):
    loader = make(data)
    with pytest.raises(UserError, match="have 23 documents, fewer than the 24"):
        loader.start_at(24, 0)
    with pytest.raises(UserError, match="fewer than 1,000,000 ids"):
        loader.start_at(3, 10**6)
    with pytest.raises(ValueError, match="no position"):
        loader.start_at(-1, 0)
    with pytest.raises(ValueError, match="shuffled"):
        make(data, shuffle=True).start_at(1, 0)


@pytest.mark.parametrize("overlap", [0, 1])
def test_what_is_read_so_far_is_where_start_at_goes_on(data, overlap):
    """Over more than one epoch, batch by batch; the ids are those that the next windows begin with."""
    loader = make(data, window_overlap=overlap)
    assert loader.read_so_far() == (0, [])
    for _ in range(40):
        read(loader, 1)
        documents, ids = loader.read_so_far()
        again = make(data, window_overlap=overlap)
        again.start_at(documents, len(ids))
        (following,) = read(again, 1)
        first = following[0].flatten()[: min(len(ids), SEQ_LEN)].tolist()
        assert first == ids[:SEQ_LEN]
        mark = loader.snapshot()
        assert torch.equal(following, read(loader, 1)[0])
        loader.restore(mark)
    assert documents < 23 * 2
    with pytest.raises(ValueError, match="shuffled"):
        make(data, shuffle=True).read_so_far()


@pytest.mark.parametrize("total", [1, 3])
def test_validation_without_overlap_leaves_a_remainder_out(data, total):
    """As torchtitan does: whole windows alone, in order, the last batch filled up with rows that do not count."""
    loader = build_loader(
        TextKeys("jsonl", str(data)),
        ByteTokenizer(),
        seed=0,
        seq_len=SEQ_LEN,
        global_batch_size=total,
        rows=range(total),
        dataloader=Fetching(window_overlap=0),
        infinite=False,
    )
    ids = [token for text in DOCUMENTS for token in (256, *text.encode(), 257)]
    windows = [ids[at : at + SEQ_LEN + 1] for at in range(0, len(ids) - SEQ_LEN, SEQ_LEN + 1)]
    for _ in range(2):
        rows = [
            row for batch in loader for row in zip(*made_of(batch).tolist(), strict=True) if set(row[1]) != {IGNORE}
        ]
        assert [[*tokens, labels[-1]] for tokens, labels in rows] == windows
    loader.close()


@pytest.mark.parametrize("overlap", [0, 1])
def test_validation_text_without_a_whole_window_is_refused_where_only_whole_ones_count(tmp_path, overlap):
    file = write_jsonl(tmp_path / "short.jsonl", ["hello"])
    fetching = Fetching(window_overlap=overlap)

    def batches():
        given = {"seq_len": SEQ_LEN + 40, "global_batch_size": 1, "rows": range(1), "dataloader": fetching}
        return len(list(build_loader(TextKeys("jsonl", str(file)), ByteTokenizer(), seed=0, infinite=False, **given)))

    if overlap:
        assert batches() == 1
    else:
        with pytest.raises(UserError, match="fewer than the"):
            batches()
