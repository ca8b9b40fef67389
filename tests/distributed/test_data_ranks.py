"""Ranks as processes of their own: their rows together are the global batch, and a run goes on with other ranks."""

from __future__ import annotations

import hashlib
import json

import torch.distributed as dist
from ranks import run_ranks

from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data.loader import Batch, Loader
from quadriga.data.stream_loader import build_loader
from quadriga.data.tokenizer import ByteTokenizer

ROWS, SEQ_LEN, FIRST, SECOND = 8, 128, 5, 4


def make(rank: int, ranks: int) -> Loader:
    share = ROWS // ranks
    return build_loader(
        TextKeys("builtin"),
        ByteTokenizer(),
        seed=11,
        seq_len=SEQ_LEN,
        global_batch_size=ROWS,
        rows=range(rank * share, (rank + 1) * share),
        dataloader=Dataloader(num_workers=1 + rank % 2),
    )


def row_hashes(batch: Batch) -> list[str]:
    rows = zip(batch.tokens, batch.labels, strict=True)
    return [hashlib.sha256(t.numpy().tobytes() + l.numpy().tobytes()).hexdigest() for t, l in rows]  # noqa: E741


def read(steps: int, state: str | None) -> tuple[list[list[str]], str]:
    """The hashes of all rows of every step, and the data state that a checkpoint of all ranks would hold."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    loader = make(rank, ranks)
    if state is not None:
        loader.load_state_dict(json.loads(state))
    mine = [row_hashes(loader.next()) for _ in range(steps)]
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, (mine, loader.state_dict()))
    loader.close()
    batches = [[row for rows, _ in everyone for row in rows[step]] for step in range(steps)]
    streams = {stream: place for _, part in everyone for stream, place in part["lanes"].items()}
    return batches, json.dumps({"fingerprint": everyone[0][1]["fingerprint"], "lanes": streams})


def test_batches_are_the_same_on_1_2_and_4_ranks_and_over_a_change():
    whole, _ = run_ranks(read, 1, FIRST + SECOND, None)[0]
    head, state = run_ranks(read, 2, FIRST, None)[0]
    tail, _ = run_ranks(read, 4, SECOND, state)[0]
    assert head + tail == whole
