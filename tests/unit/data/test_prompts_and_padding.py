"""Rows of one record, and prompts that are no labels."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quadriga.config.schema import Dataloader, TextKeys, Training
from quadriga.data.data_check import changed_data
from quadriga.data.loader import IGNORE, RowFormat
from quadriga.data.rows import row_ids, text_row, text_rows
from quadriga.data.stream_loader import SINGLE_STREAM, build_loader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

SEQ, BATCH = 32, 4
BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id
RECORDS = [{"question": "q" * (number % 7), "answer": chr(97 + number) * (1 + 5 * number % 41)} for number in range(26)]


def keys(folder: Path, **more: str) -> TextKeys:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return TextKeys("jsonl", str(path), field="answer", **more)


def make(
    keys: TextKeys,
    rows: range = range(BATCH),
    *,
    infinite: bool = True,
    mask: bool = False,
    mode: str = "pad",
    **options,
):
    return build_loader(
        keys,
        ByteTokenizer(),
        seed=5,
        seq_len=SEQ,
        global_batch_size=BATCH,
        rows=rows,
        dataloader=Dataloader(**options),
        infinite=infinite,
        rows_have=RowFormat(mask, mode),
    )


def expected_row(record: dict[str, str], prompt: bool) -> tuple[list[int], list[int]]:
    """Tokens and labels of a record in a row, filled up."""
    question = f"{record['question']}?" if prompt else ""
    ids = [BOS, *question.encode(), *record["answer"].encode(), EOS]
    labels = ids[1:]
    if prompt:
        labels[: len(question)] = [IGNORE] * len(question)
    tokens, labels = ids[:-1][:SEQ], labels[:SEQ]
    rest = SEQ - len(tokens)
    return tokens + [0] * rest, labels + [IGNORE] * rest


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_a_row_is_one_record(tmp_path: Path, prompt: bool, mask: bool) -> None:
    """In order, one epoch and the beginning of the next; what does not fit is cut, the rest is filled up."""
    loader = make(keys(tmp_path, **({"prompt": "{question}?"} if prompt else {})), mask=mask, shuffle=False)
    expected = [expected_row(record, prompt) for record in (*RECORDS, *RECORDS)]
    for number, batch in enumerate(islice(loader, 10)):
        rows = expected[number * BATCH : (number + 1) * BATCH]
        assert batch.tokens.tolist() == [tokens for tokens, _ in rows]
        assert batch.labels.tolist() == [labels for _, labels in rows]
        lengths = [min(SEQ, len(tokens) - tokens[1:].count(0)) for tokens, _ in rows]
        assert batch.tokens_read == sum(lengths)
        assert batch.counted_labels == sum(label != IGNORE for _, labels in rows for label in labels)
        if mask:
            assert [row[:3] for row in batch.borders.tolist()] == [
                [0, length, SEQ] if length < SEQ else [0, SEQ, SEQ] for length in lengths
            ]
    loader.close()


def test_every_record_is_in_one_row_of_an_epoch_and_a_resume_loses_none(tmp_path: Path) -> None:
    source = keys(tmp_path)
    whole = list(islice(make(source), 13))
    first = [chr(token) for batch in whole[:6] for token in batch.tokens[:, 1].tolist()]
    assert len(first) == len(set(first)), "no record twice before the first epoch ends"
    before = make(source)
    for _ in range(5):
        before.next()
    state = before.state_dict()
    for rows in (range(1), range(1, 4)):
        again = make(source, rows)
        again.load_state_dict(state)
        for batch in whole[5:]:
            assert torch.equal(again.next().tokens, batch.tokens[rows.start : rows.stop])
        again.close()
    with pytest.raises(UserError, match="packing"):
        make(source, mode="concat").load_state_dict(state)


def test_prompts_are_no_labels_where_documents_are_end_to_end(tmp_path: Path) -> None:
    """Also where a window begins within a prompt."""
    source = keys(tmp_path, prompt="{question}{question}{question}?")
    loader, plain = make(source, mode="concat", shuffle=False), make(source, mode="concat", shuffle=False)
    counted = [
        flag
        for record in RECORDS * 2
        for flag in [False] * (2 + 3 * len(record["question"])) + [True] * (len(record["answer"]) + 1)
    ]
    ids = [
        each
        for record in RECORDS * 2
        for each in [BOS, *(3 * record["question"] + "?" + record["answer"]).encode(), EOS]
    ]
    for number, batch in enumerate(islice(loader, 6)):
        for row in range(BATCH):
            start = (number * BATCH + row) * SEQ
            places = range(start + 1, start + SEQ + 1)
            assert batch.tokens[row].tolist() == ids[start : start + SEQ]
            assert batch.labels[row].tolist() == [ids[at] if counted[at] else IGNORE for at in places]
        assert batch.tokens_read == BATCH * SEQ
    loader.close()
    plain.close()


def test_a_prompt_is_in_the_fingerprint(tmp_path: Path) -> None:
    ways = [{}, {"prompt": "{question}"}, {"prompt": "{question}?"}]
    assert len({make(keys(tmp_path, **way)).fingerprint for way in ways}) == 3


def test_data_of_less_than_a_row_are_enough(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    batch = make(TextKeys("jsonl", str(tmp_path / "b.jsonl"))).next()
    assert batch.tokens[:, :2].tolist() == [[BOS, ord("a")]] * BATCH


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_of_one_record_are_shown_as_they_are_read(tmp_path: Path, shuffle: bool) -> None:
    """What `quadriga data` shows of a step."""
    loader = make(keys(tmp_path, prompt="{question}"), shuffle=shuffle)
    for _ in range(9):
        cursors, streams = loader.snapshot(), loader.streams
        if shuffle:
            shown = [text_row(streams, row, cursors[row]) for row in range(BATCH)]
        else:
            shown = list(islice(text_rows(streams, SINGLE_STREAM, cursors[SINGLE_STREAM]), BATCH))
        batch = loader.next()
        for parts, tokens, documents in zip(shown, batch.tokens.tolist(), batch.documents, strict=True):
            ids = row_ids(parts)
            assert ids[:-1] == tokens[: len(ids) - 1]
            assert set(tokens[len(ids) - 1 :]) <= {0}
            assert [part.document for part in parts] == list(documents)
    loader.close()


def test_a_dry_run_sees_that_rows_are_made_in_another_way(tmp_path: Path) -> None:
    """As a start does: one record per row was saved, or is asked for."""
    source = keys(tmp_path)
    spec = SimpleNamespace(seq_len=SEQ, tokenizer=SimpleNamespace(path="builtin:bytes"))
    for saved, asked in (("pad", "concat"), ("concat", "pad"), ("pad", "pad"), ("concat", "concat")):
        loader = make(source, mode=saved)
        loader.next()
        state = loader.state_dict()
        loader.close()
        training = Training(
            dataset="jsonl", dataset_path=source.path, dataset_text_field="answer", packing=asked, seq_len=SEQ
        )
        found = [problem.where for problem in changed_data(state, training, spec)]
        assert (found != []) == (saved != asked), (saved, asked)
        assert (make(source, mode=asked).differences(state) != []) == (saved != asked)
