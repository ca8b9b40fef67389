"""A file whose reads stall: nothing is lost, nothing waits while the buffer lasts, and the file is named."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from quadriga.config.schema import Dataloader, TextKeys, TokenKeys
from quadriga.data import stalls
from quadriga.data.jsonl import JsonlSource
from quadriga.data.loader import Loader
from quadriga.data.stored_arrays import OpenFiles
from quadriga.data.stream_loader import build_loader
from quadriga.data.token_loader import build_token_loader
from quadriga.data.tokenizer import ByteTokenizer

STALL = 0.6
ORDER = {"seed": 1, "seq_len": 16, "global_batch_size": 4, "rows": range(4)}


@pytest.fixture(params=["text", "tokens"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def loader_of(kind: str, folder: Path, ahead: int) -> Loader:
    folder.mkdir(exist_ok=True)
    if kind == "tokens":
        for number in range(3):
            (np.arange(400) % 250 + number).astype("<u2").tofile(folder / f"{number}.bin")
        keys = TokenKeys("training", str(folder), "auto", "uint16", None, None)
        return build_token_loader(keys, 260, dataloader=Dataloader(prefetch_factor=ahead), **ORDER)
    for number in range(3):
        lines = [json.dumps({"text": f"{number}.{line} words of a line"}) for line in range(20)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return build_loader(
        TextKeys("jsonl", str(folder)), ByteTokenizer(), dataloader=Dataloader(prefetch_factor=ahead), **ORDER
    )


def stall_once(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The read number `after` of the file 1 waits for STALL seconds."""
    calls = [0]

    def wait(name: str) -> None:
        if name.startswith("1."):
            calls[0] += 1
            if calls[0] == after:
                time.sleep(STALL)

    read_ids, read_lines = OpenFiles._read, JsonlSource.read

    def slow_ids(self, file, offset, size):
        wait(file.name)
        return read_ids(self, file, offset, size)

    def slow_lines(self, shard):
        wait(self.file_of(shard).name)
        yield from read_lines(self, shard)

    monkeypatch.setattr(OpenFiles, "_read", slow_ids)
    monkeypatch.setattr(JsonlSource, "read", slow_lines)


def test_a_stalled_file_is_named_and_the_batches_are_the_same(kind, tmp_path, monkeypatch, caplog):
    expected = loader_of(kind, tmp_path / "data", 2)
    batches = [expected.next() for _ in range(40)]
    expected.close()
    loader = loader_of(kind, tmp_path / "data", 1)
    stall_once(monkeypatch, after=3)
    monkeypatch.setattr(stalls, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        waited = []
        for batch in batches:
            found = loader.next()
            waited.append(loader.waited)
            assert torch.equal(found.tokens, batch.tokens)
            assert torch.equal(found.labels, batch.labels)
            assert found.documents == batch.documents
    loader.close()
    assert max(waited) > STALL / 2, "the record of the wait has the stall"
    lines = [record.getMessage() for record in caplog.records if "training wait" in record.getMessage()]
    named = [line for line in lines if f"{tmp_path}/data/1." in line]
    assert len(named) >= 2
    assert "training waits for" in named[0]
    assert "goes on; training waited for" in named[-1]


def test_a_stall_costs_nothing_while_the_buffer_lasts(kind, tmp_path, monkeypatch, caplog):
    """Twelve batches ahead at a tenth of a second per step outlast a stall of 0.6 s."""
    loader = loader_of(kind, tmp_path / "data", 12)
    stall_once(monkeypatch, after=3)
    loader.next()
    time.sleep(2 * STALL)  # the buffer is full again
    monkeypatch.undo()
    stall_once(monkeypatch, after=1)
    waited = []
    for _ in range(14):
        loader.next()
        waited.append(loader.waited)
        time.sleep(0.1)
    loader.close()
    assert sum(waited) < STALL / 2
    assert "training waits" not in caplog.text
