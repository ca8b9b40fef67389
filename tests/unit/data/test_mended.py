"""After a file was mended, a run goes on at the same document; a file that lost what was read is refused."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
import pytest
import torch

from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data import jsonl, streams, text
from quadriga.data.loader import Loader
from quadriga.data.stream_loader import build_loader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

ROWS, COUNT = 4, 240
TEXTS = [f"<{i}>" + "abcdefgh"[i % 8] * (i * 37 % 91) for i in range(COUNT)]


@pytest.fixture(autouse=True, params=[(1 << 21, 1 << 16), (400, 900)], ids=["few shards", "many shards"])
def cuts(request):
    """Blocks and shards that are small beside the files, or one of each a file."""
    block, size = request.param
    with (
        patch.object(streams, "BLOCK_CHARACTERS", block),
        patch.multiple(jsonl, LEAST_RANGE=size, MOST_RANGE=size),
        patch.multiple(text, LEAST_SEGMENT=size, MOST_SEGMENT=size),
    ):
        yield


def write_jsonl(folder: Path, edit: Callable[[int, dict], dict | None] = lambda i, row: row) -> None:
    for part in range(2):
        rows = (edit(i, {"text": TEXTS[i], "id": i}) for i in range(part, COUNT, 2))
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def make(kind: str, path: Path, **options) -> Loader:
    return build_loader(
        TextKeys(kind, str(path)),
        ByteTokenizer(),
        seed=5,
        seq_len=48,
        global_batch_size=ROWS,
        rows=options.pop("rows", range(ROWS)),
        dataloader=Dataloader(**options),
    )


def take(loader: Loader, steps: int) -> list[torch.Tensor]:
    batches = [loader.next().tokens for _ in range(steps)]
    loader.close()
    return batches


def go_on(kind: str, path: Path, state: dict, steps: int, **options) -> tuple[list[torch.Tensor], dict]:
    loader = make(kind, path, **options)
    loader.load_state_dict(json.loads(json.dumps(state)))
    return take(loader, steps), loader.state_dict()


def state_after(kind: str, path: Path, steps: int) -> dict:
    loader = make(kind, path)
    take(loader, steps)
    return loader.state_dict()


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


LONGER = {"a little longer": "x" * 3, "much longer": "x" * 5000}


@pytest.mark.parametrize("added", LONGER.values(), ids=LONGER)
@pytest.mark.parametrize("line", [0, 31, 100, 201, 239])
def test_lines_that_are_longer_elsewhere_change_no_batch(tmp_path, line, added):
    """What is mended is another key, so that every token stays what it was: only the bytes are others."""
    write_jsonl(tmp_path)
    whole = take(make("jsonl", tmp_path), 40)
    states = {stop: state_after("jsonl", tmp_path, stop) for stop in (1, 9, 23)}
    read_now = {stop: reads_now(tmp_path, state, line) for stop, state in states.items()}
    write_jsonl(tmp_path, lambda i, row: row | {"id": added} if i == line else row)
    for stop, state in states.items():
        again, _ = go_on("jsonl", tmp_path, state, 40 - stop)
        if read_now[stop]:
            assert same(again, whole[stop:])
        else:  # of shards that nobody stood in, those beside the line may give or take some at their ends
            assert torch.equal(again[0][:, :20], whole[stop][:, :20])


def reads_now(path: Path, state: dict, line: int) -> bool:
    """Whether a stream stands in the shard of this line."""
    loader = make("jsonl", path)
    loader.load_state_dict(state)
    shards = {loader.streams.shard(row, loader._cursors[row])[0] for row in range(ROWS)}
    return any(b"<%d>" % line in record.data for shard in shards for record in loader.streams.source.read(shard))


def test_lines_that_are_shorter_or_as_long_change_no_batch_either(tmp_path):
    write_jsonl(tmp_path, lambda i, row: row | {"id": "x" * 40})
    whole = take(make("jsonl", tmp_path), 30)
    state = state_after("jsonl", tmp_path, 7)
    for much in (40, 39, 1):
        write_jsonl(tmp_path, lambda i, row, much=much: row | {"id": "y" * (much if i == 100 else 40)})
        again, _ = go_on("jsonl", tmp_path, state, 2)
        assert torch.equal(again[0][:, :20], whole[7][:, :20])
        assert much < 40 or same(again, whole[7:9])


def test_ranks_agree_and_a_second_resume_goes_on_in_the_mended_file(tmp_path):
    write_jsonl(tmp_path)
    state = state_after("jsonl", tmp_path, 8)
    write_jsonl(tmp_path, lambda i, row: row | {"id": "x" * 700} if i in (50, 51) else row)
    whole, _ = go_on("jsonl", tmp_path, state, 24)
    parts = [go_on("jsonl", tmp_path, state, 24, rows=range(row, row + 1))[0] for row in range(ROWS)]
    assert same([torch.cat(rows) for rows in zip(*parts, strict=True)], whole)
    first, then = go_on("jsonl", tmp_path, state, 10)
    second, _ = go_on("jsonl", tmp_path, then, 14)
    assert same(first + second, whole)
    write_jsonl(tmp_path)  # and back again
    assert same(go_on("jsonl", tmp_path, then, 1)[0], second[:1])


def test_a_record_that_was_bad_is_read_where_it_stands(tmp_path):
    write_jsonl(tmp_path, lambda i, row: {"txt": TEXTS[i]} if i == 60 else row)
    loader = make("jsonl", tmp_path, on_bad_record="skip")
    take(loader, 2)
    state = loader.state_dict()
    write_jsonl(tmp_path)
    batches, after = go_on("jsonl", tmp_path, state, 200, on_bad_record="skip")
    read = b"".join(bytes(i for i in row.tolist() if i < 256) for batch in batches for row in batch)
    assert b"<60>" in read
    assert all(stream[4] <= 1 for stream in after["lanes"].values())


def test_it_is_reported_in_one_line(tmp_path, caplog):
    write_jsonl(tmp_path)
    state = state_after("jsonl", tmp_path, 5)
    with caplog.at_level(logging.INFO, logger="quadriga"):
        go_on("jsonl", tmp_path, state, 1)
        assert not caplog.records
        content = (tmp_path / "1.jsonl").read_text()
        (tmp_path / "1.jsonl").write_text(content.replace("<101>", "<1-1>"))  # as long as before
        go_on("jsonl", tmp_path, state, 1)
    (record,) = caplog.records
    assert record.getMessage() == (
        "data: 1.jsonl changed since the checkpoint was saved; reading continues at the same document numbers"
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "text", "parquet"])
def test_fewer_documents_than_were_read_are_refused_with_their_file(tmp_path, kind):
    path = tmp_path / {"text": "a.txt"}.get(kind, f"a.{kind}")
    dataset = kind.removesuffix(".gz")

    def write(texts: list[str]) -> None:
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
            return
        lines = texts if kind == "text" else [json.dumps({"text": text}) for text in texts]
        content = "\n".join(lines).encode() + b"\n"
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)

    write(TEXTS)
    state = state_after(dataset, path, 20)
    write(TEXTS[:3])
    loader = make(dataset, path)
    if kind == "text" and len(state["layout"]["sizes"]) == 1 and state["layout"]["step"] > 10_000:
        loader.load_state_dict(state)  # one document, of which there still is a part
        return
    with pytest.raises(UserError, match=r"was read up to document \d+ of shard \d+, which now has \d") as caught:
        loader.load_state_dict(state)
    assert caught.value.problems[0].where == str(path)


def test_a_parquet_file_goes_on_at_its_row_whatever_its_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=30)
    whole = take(make("parquet", path), 60)
    state = state_after("parquet", path, 11)
    table = pyarrow.table({"id": ["x"] * COUNT, "text": pyarrow.array(TEXTS, pyarrow.large_string())})
    for size in (7, 30, 1000):
        pyarrow.parquet.write_table(table, path, row_group_size=size)
        again, then = go_on("parquet", path, state, 20)
        assert same(again, whole[11:31])
        assert same(go_on("parquet", path, then, 29)[0], whole[31:])


def test_other_files_are_other_data(tmp_path):
    write_jsonl(tmp_path)
    state = state_after("jsonl", tmp_path, 5)
    (tmp_path / "2.jsonl").write_text('{"text": "one more file"}\n')
    with pytest.raises(UserError, match="data of the checkpoint: dataset"):
        go_on("jsonl", tmp_path, state, 1)
    (tmp_path / "2.jsonl").unlink()
    (tmp_path / "1.jsonl").rename(tmp_path / "3.jsonl")
    with pytest.raises(UserError, match="data of the checkpoint: dataset"):
        go_on("jsonl", tmp_path, state, 1)


def test_places_of_older_checkpoints_are_understood(tmp_path):
    write_jsonl(tmp_path)
    whole = take(make("jsonl", tmp_path), 40)
    for stop in range(0, 40, 3):
        state = state_after("jsonl", tmp_path, stop)
        older = {
            "fingerprint": state["fingerprint"],
            "lanes": {row: stream[:4] for row, stream in state["lanes"].items()},
        }
        assert same(go_on("jsonl", tmp_path, older, 40 - stop)[0], whole[stop:])
    write_jsonl(tmp_path, lambda i, row: row | {"id": "longer"})
    with pytest.raises(UserError, match="data of the checkpoint: dataset"):
        go_on("jsonl", tmp_path, older, 1)
