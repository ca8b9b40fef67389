"""Real files of each format, through the loader: one sequence of ids on any number of ranks, and across resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from token_writers import lists, write_arrow, write_llmc, write_megatron, write_parquet, write_raw

from quadriga.config.schema import Dataloader, TokenKeys
from quadriga.data.loader import Batch
from quadriga.data.token_loader import TokenLoader, build_token_loader
from quadriga.data.windows import Windows

BATCH, SEQ_LEN, VOCAB, SEED, STEPS = 84, 8, 60_000, 11, 24
IDS = np.random.default_rng(2).integers(1, VOCAB, 6_000)
DOCUMENTS = np.split(IDS, np.sort(np.random.default_rng(3).choice(np.arange(1, 6_000), 200, replace=False)))
PARTS = [DOCUMENTS[:50], DOCUMENTS[50:51], DOCUMENTS[51:]]  # of the files


def nested(documents: list[np.ndarray]) -> list[list[int]]:
    return [document.tolist() for document in documents]


def write_each(suffix: str, write: Callable[[Path, list[np.ndarray]], object]) -> Callable[[Path], None]:
    def write_all(folder: Path) -> None:
        for number, documents in enumerate(PARTS):
            write(folder / f"part-{number}{suffix}", documents)

    return write_all


def whole(documents: list[np.ndarray]) -> list[int]:
    return np.concatenate(documents).tolist()


FORMATS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "megatron": (
        write_each("", lambda path, docs: write_megatron(path, [[document] for document in nested(docs)], "uint16")),
        None,
    ),
    "llmc": (write_each(".bin", lambda path, docs: write_llmc(path, whole(docs))), None),
    "raw": (write_each(".bin", lambda path, docs: write_raw(path, whole(docs), "uint32")), "uint32"),
    "npy": (write_each(".npy", lambda path, docs: np.save(path, np.array(whole(docs), ">i4"))), None),
    "parquet": (write_each(".parquet", lambda path, docs: write_parquet(path, lists(nested(docs)), rows=16)), None),
    "arrow": (write_each(".arrow", lambda path, docs: write_arrow(path, lists(nested(docs)), rows=16)), None),
}


def make(folder: Path, name: str, rows: range, **options) -> TokenLoader:
    keys = TokenKeys("training", str(folder), name, FORMATS[name][1], None, None)
    return build_token_loader(
        keys,
        VOCAB,
        seed=SEED,
        seq_len=SEQ_LEN,
        global_batch_size=BATCH,
        rows=rows,
        dataloader=Dataloader(**options),
    )


def ranks_of(count: int) -> list[range]:
    return [range(BATCH * rank // count, BATCH * (rank + 1) // count) for rank in range(count)]


def digest(tokens: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest()


def of_ranks(parts: list[Batch]) -> str:
    tokens, labels = torch.cat([part.tokens for part in parts]), torch.cat([part.labels for part in parts])
    return digest(tokens.numpy(), labels.numpy())


def expected() -> list[str]:
    """The batches, by indexing the ids in memory."""
    windows = Windows(len(IDS), SEQ_LEN, seed=SEED)
    order = windows.at(np.arange(STEPS * BATCH)).reshape(STEPS, BATCH)
    assert 2 * windows.count < STEPS * BATCH
    rows = [np.stack([IDS[window * SEQ_LEN :][: SEQ_LEN + 1] for window in step]) for step in order]
    return [digest(row[:, :-1], row[:, 1:]) for row in rows]


@pytest.mark.parametrize("name", FORMATS)
def test_ids_of_every_step_are_the_same_on_4_3_7_and_1_ranks(tmp_path, name):
    FORMATS[name][0](tmp_path)
    found, state = [], None
    for ranks, steps in ((4, 7), (3, 2), (7, 9), (1, 6)):
        loaders = [make(tmp_path, name, rows, num_workers=ranks % 3) for rows in ranks_of(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        found += [of_ranks([loader.next() for loader in loaders]) for _ in range(steps)]
        (state,) = {json.dumps(loader.state_dict()) for loader in loaders}
        for loader in loaders:
            loader.close()
    assert found == expected()


@pytest.mark.parametrize("name", ["megatron", "parquet"])
def test_documents_are_those_that_the_ids_are_from(tmp_path, name):
    FORMATS[name][0](tmp_path)
    loader = make(tmp_path, name, range(BATCH))
    for _ in range(10):
        batch = loader.next()
        for ids, documents in zip(batch.tokens.tolist(), batch.documents, strict=True):
            joined = np.concatenate([PARTS[file][number] for _, file, number in documents]).tolist()
            assert any(joined[at : at + SEQ_LEN] == ids for at in range(len(joined)))
    loader.close()


def test_a_step_far_ahead_is_read_at_once(tmp_path):
    FORMATS["llmc"][0](tmp_path)
    loader = make(tmp_path, "llmc", range(BATCH))
    loader.restore(10**12 * BATCH)
    batch = loader.next()
    loader.close()
    windows = Windows(len(IDS), SEQ_LEN, seed=SEED)
    first = int(windows.at(10**12 * BATCH)) * SEQ_LEN
    assert batch.tokens[0].tolist() == IDS[first : first + SEQ_LEN].tolist()
