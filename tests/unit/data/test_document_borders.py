"""Where documents begin in the rows of a batch, for text of every kind, on any number of ranks and after a resume."""

from __future__ import annotations

import itertools
import json
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_writers import write_megatron

from quadriga.config.schema import Dataloader, TextKeys, TokenKeys
from quadriga.data.document_borders import document_tensors
from quadriga.data.loader import IGNORE, Batch, RowFormat
from quadriga.data.stream_loader import StreamLoader, build_loader
from quadriga.data.token_data import open_tokens
from quadriga.data.token_loader import build_token_loader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError
from quadriga.train.feed import Feed
from quadriga.train.validate import KEPT_BYTES, HeldOutSet

BOS = ByteTokenizer.bos_id
SEQ, BATCH = 64, 6


def make(keys: TextKeys, rows: range = range(BATCH), *, infinite: bool = True, mask: bool = True, **options: object):
    return build_loader(
        keys,
        ByteTokenizer(),
        seed=5,
        seq_len=SEQ,
        global_batch_size=BATCH,
        rows=rows,
        dataloader=Dataloader(**options),
        infinite=infinite,
        rows_have=RowFormat(document_mask=mask),
    )


@given(st.lists(st.sets(st.integers(1, 39), max_size=39), min_size=1, max_size=4))
def test_positions_and_borders_of_rows(rows: list[set[int]]) -> None:
    starts = [sorted(row) for row in rows]
    positions, borders = document_tensors(starts, 40)
    for row, marks in enumerate(starts):
        edges = [0, *marks]
        assert positions[row].tolist() == [at - max(edge for edge in edges if edge <= at) for at in range(40)]
        assert borders[row, : len(edges)].tolist() == edges
        assert set(borders[row, len(edges) :].tolist()) == {40}
    assert (positions.dtype, borders.dtype) == (torch.int64, torch.int32)


def test_borders_have_two_sizes_at_most() -> None:
    """So compiled code meets no third one."""
    sizes = {document_tensors([range(1, most)], 256)[1].shape[1] for most in (1, 2, 30, 31, 32, 33, 100, 256)}
    assert sizes == {32, 257}


def jsonl(folder: Path) -> TextKeys:
    lengths = [1, 0, 200, 5, 63, 64, 65, 12, 0, 300, 33]
    lines = [json.dumps({"text": chr(97 + i % 26) * length}) for i, length in enumerate(lengths * 12)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return TextKeys("jsonl", str(folder))


def assert_documents(batch: Batch, plain: Batch) -> int:
    """That the batch has the ids of `plain`, and documents that begin at their BOS. Returns how many begin in it."""
    assert torch.equal(batch.tokens, plain.tokens)
    assert batch.positions is not None
    assert batch.borders is not None
    begins = batch.tokens == BOS
    places = torch.arange(SEQ).expand_as(batch.tokens)
    last = torch.where(begins, places, 0).cummax(1).values
    assert torch.equal(batch.positions, places - last)
    first_of_next = plain.labels == BOS
    assert torch.equal(batch.labels, plain.labels.masked_fill(first_of_next, IGNORE))
    for row, marks in enumerate(batch.borders.tolist()):
        expected = [0, *(at for at in range(1, SEQ) if begins[row, at])]
        assert marks == expected + [SEQ] * (len(marks) - len(expected))
    return int(begins.sum())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("overlap", [1, 0])
def test_a_document_begins_at_its_bos(tmp_path: Path, shuffle: bool, overlap: int) -> None:
    keys, options = jsonl(tmp_path), {"shuffle": shuffle, "window_overlap": overlap}
    masked, plain = make(keys, **options), make(keys, mask=False, **options)
    seen = sum(assert_documents(*pair) for pair in islice(zip(masked, plain, strict=True), 30))
    assert seen > 100
    masked.close()
    plain.close()


def test_ranks_and_a_resume_do_not_change_documents(tmp_path: Path) -> None:
    keys = jsonl(tmp_path)
    whole = list(islice(make(keys), 6))
    first = make(keys, range(3))
    for batch in whole[:3]:
        mine = first.next()
        assert torch.equal(mine.positions, batch.positions[:3])
    state = first.state_dict()
    others = make(keys, range(3, BATCH))
    for _ in range(3):
        others.next()
    state["lanes"] |= others.state_dict()["lanes"]
    for rows in (range(2), range(2, 5), range(5, 6)):
        again = make(keys, rows)
        again.load_state_dict(state)
        for batch in whole[3:]:
            mine, own = again.next(), slice(rows.start, rows.stop)
            assert torch.equal(mine.tokens, batch.tokens[own])
            assert torch.equal(mine.labels, batch.labels[own])
            assert torch.equal(mine.positions, batch.positions[own])
            count = min(mine.borders.shape[1], batch.borders.shape[1])
            assert torch.equal(mine.borders[:, :count], batch.borders[own, :count])
        again.close()


@pytest.mark.parametrize("marked", [False, True])
def test_pieces_of_a_long_text_are_one_document_where_they_follow_each_other(tmp_path: Path, marked: bool) -> None:
    """In order, the pieces into which a file is cut for reading are one document. Shuffled, most stand alone."""
    text = "".join(f"{number:08d}\n" for number in range(1000))
    (tmp_path / "a.txt").write_text(("\ufeff" if marked else "") + text, encoding="utf-8")
    keys = TextKeys("text", str(tmp_path))
    in_order = make(keys, shuffle=False)
    for batch in islice(in_order, 20):
        assert_documents(batch, Batch(batch.tokens, torch.where(batch.labels == IGNORE, BOS, batch.labels)))
    in_order.close()
    shuffled = make(keys)
    assert isinstance(shuffled, StreamLoader)
    cuts = 0
    for batch in islice(shuffled, 120):
        for row, marks in zip(batch.tokens.tolist(), batch.borders.tolist(), strict=True):
            places = sorted({*marks})
            for start, end in pairwise(places):
                piece = bytes(each for each in row[start:end] if each < BOS).decode()
                assert piece in text
                if len(piece) >= 9 and start >= 9 and max(row[start - 9 : start + 1]) < BOS:
                    before = bytes(row[start - 9 : start]).decode()
                    assert before + piece not in text
                    cuts += 1
    assert cuts > 5
    shuffled.close()


def test_what_fills_up_a_short_row_is_a_document_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 70}) + "\n", encoding="utf-8")
    keys = TextKeys("jsonl", str(tmp_path))
    (batch,) = list(make(keys, infinite=False))
    assert batch.borders[1, :3].tolist() == [0, 72 - 1 - SEQ, SEQ]
    assert batch.borders[2].unique().tolist() == [0, SEQ]
    assert batch.counted_labels == 72 - 1
    assert int((batch.labels[2:] != IGNORE).sum()) == 0


@pytest.mark.parametrize("kind", ["megatron", "raw"])
def test_documents_of_token_files(tmp_path: Path, kind: str) -> None:
    """By the index of Megatron, whose documents have no id that ends them, and by an id of headerless files."""
    lengths, eos = [5, 1, 1, 40, 64, 128, 3] * 20, 9
    documents = [[*((7 * nth + place) % 9 for place in range(length - 1)), eos] for nth, length in enumerate(lengths)]
    ends = set(itertools.accumulate(lengths))
    ids = np.array([each for document in documents for each in document], np.uint16)
    if kind == "megatron":
        write_megatron(tmp_path / "a", [[document] for document in documents])
        keys = TokenKeys("training", str(tmp_path / "a"), "auto", None, None, None)
    else:
        ids.tofile(tmp_path / "a.bin")
        keys = TokenKeys("training", str(tmp_path / "a.bin"), "raw", "uint16", eos, None)
    order = {"seed": 3, "seq_len": SEQ, "global_batch_size": 2, "rows": range(2)}
    loader = build_token_loader(
        keys, 10, **order, dataloader=Dataloader(shuffle=False), rows_have=RowFormat(document_mask=True)
    )
    for number, batch in enumerate(islice(loader, len(ids) // SEQ // 2)):
        for row in range(2):
            start = (2 * number + row) * SEQ
            marks = [at - start for at in range(start + 1, start + SEQ) if at in ends]
            assert batch.borders[row, : len(marks) + 2].tolist() == [0, *marks, SEQ]
            labels = [IGNORE if start + at + 1 in ends else int(ids[start + at + 1]) for at in range(SEQ)]
            assert batch.labels[row].tolist() == labels
            assert batch.tokens[row].tolist() == ids[start : start + SEQ].tolist()
    loader.close()


def test_token_files_without_documents_are_refused_with_a_mask(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    keys = TokenKeys("training", str(tmp_path / "a.bin"), "raw", "uint16", None, None)
    with pytest.raises(UserError, match="do not say where documents end") as refused:
        open_tokens(keys, Dataloader(), SEQ, None, document_mask=True)
    assert "set training.token_eos_id" in str(refused.value)
    open_tokens(keys._replace(eos_id=9), Dataloader(), SEQ, None, document_mask=True)


def test_a_kept_validation_set_keeps_its_documents(tmp_path: Path) -> None:
    """The batches of the first pass are used again."""
    held_out = HeldOutSet(None, "validation", make(jsonl(tmp_path), infinite=False), KEPT_BYTES)
    first, again = list(held_out.batches(Feed())), list(held_out.batches(Feed()))
    assert len(first) == len(again) > 1
    for ours, theirs in zip(again, first, strict=True):
        for name in ("tokens", "labels", "positions", "borders"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
