"""Real files of each kind of text, through the loader: one sequence of ids on any number of ranks, across resumes."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from corpora import KINDS, texts

from quadriga.config.schema import Dataloader
from quadriga.data.loader import Batch
from quadriga.data.sources import Source
from quadriga.data.stream_loader import StreamLoader
from quadriga.data.streams import Streams
from quadriga.data.tokenizer import ByteTokenizer

BATCH, SEQ_LEN, SEED = 84, 32, 11
DOCUMENTS = texts(150)
PARTS = ((4, 7), (3, 2), (7, 5), (1, 4))  # ranks and steps
STEPS = sum(steps for _, steps in PARTS)


def make(source: Source, rows: range, workers: int) -> StreamLoader:
    streams = Streams(source, ByteTokenizer(), SEQ_LEN, BATCH, SEED)
    return StreamLoader(streams, BATCH, rows, Dataloader(num_workers=workers))


def ranks_of(count: int) -> list[range]:
    return [range(BATCH * rank // count, BATCH * (rank + 1) // count) for rank in range(count)]


def digest(parts: list[Batch]) -> str:
    tokens, labels = torch.cat([part.tokens for part in parts]), torch.cat([part.labels for part in parts])
    return hashlib.sha256(tokens.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_step_are_the_same_on_4_3_7_and_1_ranks(tmp_path, kind):
    source = KINDS[kind](tmp_path, DOCUMENTS, BATCH)
    undisturbed = make(source, range(BATCH), 0)
    expected = [digest([undisturbed.next()]) for _ in range(STEPS)]
    undisturbed.close()
    assert len(set(expected)) == STEPS
    found: list[str] = []
    state: dict | None = None
    for ranks, steps in PARTS:
        again = KINDS[kind](tmp_path, DOCUMENTS, BATCH)  # the same files, opened by another process
        loaders = [make(again, rows, ranks % 3) for rows in ranks_of(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        found += [digest([loader.next() for loader in loaders]) for _ in range(steps)]
        states = [loader.state_dict() for loader in loaders]
        state = states[0] | {"lanes": {lane: at for each in states for lane, at in each["lanes"].items()}}
        for loader in loaders:
            loader.close()
    assert found == expected
