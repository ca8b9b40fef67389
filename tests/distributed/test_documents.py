"""Which documents each step read: the same on every layout, number of ranks and resume point, and really those."""

from __future__ import annotations

from training import TINY, train

from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.stream_loader import build_loader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.metrics.documents import read_documents

ROWS = 4
KEYS = (*TINY, "--metrics.log_documents", "--checkpoint.enable", "--lr_scheduler.total_steps=6")


def test_a_run_that_changes_its_layout_reads_the_documents_of_the_straight_one(tmp_path):
    validation = ("--validation.enable", "--validation.dataset=builtin_validation", "--validation.steps=1")
    train(tmp_path / "straight", 2, *KEYS, *validation, "--validation.seq_len=32", "--training.steps=6")
    expected = read_documents(tmp_path / "straight")
    assert [list(rows) for rows in expected.values()] == [list(range(8))] * 6
    assert all(names for rows in expected.values() for names in rows.values())

    train(tmp_path / "moved", 1, *KEYS, "--training.steps=3")
    train(tmp_path / "moved", 2, *KEYS, "--training.steps=6", "--parallelism.tensor_parallel_degree=2")
    assert read_documents(tmp_path / "moved") == expected
    assert [path.name for path in (tmp_path / "moved/documents").iterdir()] == ["rank0.jsonl"], (
        "one of two that read them"
    )


def test_data_in_order_are_one_stream_on_every_layout(tmp_path):
    """Of a real run: 4 steps on 2 ranks, and 2 steps on one and 2 more on two of tensor parallelism."""
    in_order = ("--training.dataloader.no_shuffle", "--training.dataloader.window_overlap=0")
    train(tmp_path / "straight", 2, *KEYS, *in_order, "--training.steps=4")
    expected = read_documents(tmp_path / "straight")
    names = [name for rows in expected.values() for row in rows.values() for name in row]
    numbers = [tuple(map(int, name.split(":"))) for name in names]
    assert numbers == sorted(numbers), "in the order of the data, row after row"
    assert len(set(names)) > 1
    train(tmp_path / "moved", 1, *KEYS, *in_order, "--training.steps=2")
    train(tmp_path / "moved", 2, *KEYS, *in_order, "--training.steps=4", "--parallelism.tensor_parallel_degree=2")
    assert read_documents(tmp_path / "moved") == expected


def test_without_the_key_nothing_is_written(tmp_path):
    train(tmp_path, 1, *TINY, "--training.steps=1", "--checkpoint.no_enable")
    assert not (tmp_path / "documents").exists()


def rows_of(rows: range, steps: int, state=None, **options):
    loader = build_loader(
        TextKeys("builtin"),
        ByteTokenizer(),
        seed=3,
        seq_len=2000,
        global_batch_size=ROWS,
        rows=rows,
        dataloader=Dataloader(**options),
    )
    if state is not None:
        loader.load_state_dict(state)
    try:
        return [loader.next() for _ in range(steps)], loader.state_dict()
    finally:
        loader.close()


def test_the_tokens_of_a_row_are_those_of_its_documents():
    source = open_source(TextKeys("builtin"))
    batches, _ = rows_of(range(ROWS), 6)
    several = 0
    for batch in batches:
        for tokens, documents in zip(batch.tokens.tolist(), batch.documents, strict=True):
            joined: list[int] = []
            for epoch, shard, number in documents:
                (record,) = [one for one in source.read(shard) if one.number == number]
                assert epoch == 0
                joined += [256, *source.parse(record).text.encode(), 257]
            text, row = (b"".join(id.to_bytes(2, "big") for id in ids) for ids in (joined, tokens))
            assert row in text
            several += len(documents) > 1
    assert several > 3


def test_ranks_threads_and_resumes_do_not_change_what_is_recorded():
    whole = [batch.documents for batch in rows_of(range(ROWS), 6)[0]]
    halves = [rows_of(range(at, at + 2), 6, num_workers=2, prefetch_factor=3)[0] for at in (0, 2)]
    assert [one.documents + other.documents for one, other in zip(*halves, strict=True)] == whole
    first, state = rows_of(range(ROWS), 2, prefetch_factor=4)
    then, _ = rows_of(range(ROWS), 4, state)
    assert [batch.documents for batch in (*first, *then)] == whole
