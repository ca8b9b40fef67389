"""Mixtures of real files, through the loader: the same ids on any number of ranks, across stages and resumes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from token_writers import write_megatron, write_raw

from quadriga.config.mixing import StageShares
from quadriga.config.schema import Dataloader, MixtureStage, TextKeys, Training, TrainingSource
from quadriga.data import token_files
from quadriga.data.data_check import changed_data
from quadriga.data.loader import Batch
from quadriga.data.mixture import Mixture
from quadriga.data.mixture_loader import MixtureLoader, build_mixture_loader
from quadriga.data.stream_loader import build_loader
from quadriga.data.tokenizer import build_tokenizer
from quadriga.errors import UserError

BATCH, SEQ_LEN, VOCAB, SEED, STEPS, LATER = 84, 8, 60_000, 11, 24, 10
WEB, CODE = range(1_000, 9_000), range(30_000, 30_700)  # ids in the order of the files: each window begins with its own
DOCUMENTS = 200
SHARES = [StageShares(0, (700_000, 200_000, 100_000)), StageShares(LATER, (0, 750_000, 250_000))]


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """A pair of Megatron, a folder of JSONL and a file of nanoGPT, 70/20/10 and then 0/3/1."""
    write_megatron(tmp_path / "web", [[list(WEB)[at : at + 50]] for at in range(0, len(WEB), 50)])
    write_raw(tmp_path / "code.bin", list(CODE))
    (tmp_path / "books").mkdir()
    for part in range(4):
        lines = [json.dumps({"text": f"book {part} {number}" + "!" * number}) for number in range(DOCUMENTS // 4)]
        (tmp_path / f"books/{part}.jsonl").write_text("\n".join(lines) + "\n")
    sources = (
        TrainingSource(name="web", dataset="tokens", dataset_path=str(tmp_path / "web"), weight=0.7),
        TrainingSource(dataset="jsonl", dataset_path=str(tmp_path / "books/*.jsonl"), weight=0.2),
        TrainingSource(dataset="tokens", dataset_path=str(tmp_path / "code.bin"), token_dtype="uint16", weight=0.1),
    )
    stages = (MixtureStage(from_tokens=LATER * BATCH * SEQ_LEN - 5, weights={"code": 1, "books": 3}),)
    return Training(sources=sources, stages=stages, seq_len=SEQ_LEN, global_batch_size=BATCH)


def make(training: Training, rows: range = range(BATCH), seed: int = SEED, **options) -> MixtureLoader:
    training = training.model_copy(update={"dataloader": Dataloader(**options)})
    tokenizer = build_tokenizer("builtin:bytes") if training.reads_text else None
    sizes = {"seq_len": SEQ_LEN, "global_batch_size": BATCH, "rows": rows}
    return build_mixture_loader(training, tokenizer, VOCAB, seed=seed, assets=None, **sizes)


def ranks_of(count: int) -> list[range]:
    return [range(BATCH * rank // count, BATCH * (rank + 1) // count) for rank in range(count)]


def batches(loader: MixtureLoader, steps: int) -> list[Batch]:
    read = [loader.next() for _ in range(steps)]
    loader.close()
    return read


def digest(parts: list[Batch]) -> str:
    content = [torch.cat([getattr(part, name) for part in parts]).numpy().tobytes() for name in ("tokens", "labels")]
    documents = [rows for part in parts for rows in part.documents]
    return hashlib.sha256(b"".join(content) + str(documents).encode()).hexdigest()


def saved(loaders: list[MixtureLoader]) -> str:
    """The state of the run, as a checkpoint holds it: the positions of all ranks."""
    state = loaders[0].state_dict()
    for loader in loaders:
        state["lanes"].update(loader.state_dict()["lanes"])
    return json.dumps(state)


def in_parts(training: Training, parts: list[tuple[int, int]], **options) -> list[str]:
    """The batches of a run that is stopped after some steps, and goes on with another number of ranks."""
    found, state = [], None
    for ranks, steps in parts:
        loaders = [make(training, rows, num_workers=ranks % 3, **options) for rows in ranks_of(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        found += [digest([loader.next() for loader in loaders]) for _ in range(steps)]
        state = saved(loaders)
        for loader in loaders:
            loader.close()
    return found


@pytest.mark.parametrize("shuffle", [True, False])
def test_ids_of_every_step_are_the_same_on_4_3_7_and_1_ranks(training, shuffle):
    """The stops are within a period of the order, and one is before, one after the second stage begins."""
    expected = [digest([batch]) for batch in batches(make(training, shuffle=shuffle), STEPS)]
    assert len(set(expected)) == STEPS
    assert in_parts(training, [(4, 7), (3, 2), (7, 9), (1, STEPS - 18)], shuffle=shuffle) == expected


def test_a_stop_after_any_step(training):
    expected = [digest([batch]) for batch in batches(make(training), 14)]
    for stop in range(14):
        assert in_parts(training, [(2, stop), (3, 14 - stop)]) == expected


def test_rows_and_counts_are_those_of_the_shares(training):
    loader = make(training)
    mixture, names = Mixture(SHARES, BATCH, SEED), ["web", "books", "code"]
    for step, batch in enumerate(batches(loader, STEPS)):
        assert [documents[0][0] for documents in batch.documents] == [names[i] for i in mixture.rows(step)[0]]
        windows = dict(zip(names, mixture.windows_before(step + 1).tolist(), strict=True))
        assert {name: counts["tokens"] for name, counts in batch.sources.items()} == {
            name: count * SEQ_LEN for name, count in windows.items()
        }
        assert sum(windows.values()) == (step + 1) * BATCH
        assert batch.sources["code"]["epochs"] == windows["code"] / (len(CODE) // SEQ_LEN)
    assert abs(windows["web"] - 0.7 * LATER * BATCH) < 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_of_token_files_shows_each_window_once(training, shuffle):
    shown = defaultdict(list)
    for batch in batches(make(training, shuffle=shuffle), STEPS):
        for ids in batch.tokens.tolist():
            for name, file in (("web", WEB), ("code", CODE)):
                if ids[0] in file:
                    assert ids == list(range(ids[0], ids[0] + SEQ_LEN))
                    shown[name].append((ids[0] - file.start) // SEQ_LEN)
    counts = Counter(shown["code"])
    assert set(counts) == set(range((len(CODE) - 1) // SEQ_LEN))
    assert max(counts.values()) == min(counts.values()) + 1 > 3, "the last epoch is not complete"
    assert len(set(shown["web"])) == len(shown["web"])
    if not shuffle:
        assert set(shown["web"]) == set(range(len(shown["web"])))


def test_an_epoch_of_texts_shows_each_document_once(training):
    """Row r reads stream r, and a document is in one stream per epoch."""
    rows = defaultdict(set)
    for batch in batches(make(training), 3 * STEPS):
        for row, documents in enumerate(batch.documents):
            for name, *document in documents:
                if name == "books":
                    rows[tuple(document)].add(row)
    assert all(len(of) == 1 for of in rows.values())
    assert sum(epoch == 0 for epoch, _, _ in rows) == DOCUMENTS
    assert max(epoch for epoch, _, _ in rows) > 0


def test_a_row_reads_the_windows_of_its_stream_in_their_order(training):
    """As if the text alone were read, by row r from stream r."""
    books, mixed = training.sources[1], defaultdict(list)
    for batch in batches(make(training), STEPS):
        for row, ids in enumerate(batch.tokens.tolist()):
            if batch.documents[row][0][0] == "books":
                mixed[row].append(ids)
    tokenizer, options = build_tokenizer("builtin:bytes"), {"seq_len": SEQ_LEN, "global_batch_size": BATCH}
    alone = build_loader(
        TextKeys("jsonl", books.dataset_path),
        tokenizer,
        seed=f"{SEED} books",
        rows=range(BATCH),
        dataloader=Dataloader(),
        **options,
    )
    windows = [alone.next().tokens.tolist() for _ in range(STEPS)]
    alone.close()
    assert len(mixed) == BATCH
    assert all(read == [step[row] for step in windows[: len(read)]] for row, read in mixed.items())


def test_two_sources_of_one_length_have_different_orders(training):
    web = training.sources[0]
    twins = (web.model_copy(update={"weight": 0.5}), web.model_copy(update={"weight": 0.5, "name": "twin"}))
    shown = defaultdict(list)
    for batch in batches(make(training.model_copy(update={"sources": twins, "stages": ()})), 4):
        for row, ids in enumerate(batch.tokens.tolist()):
            shown[batch.documents[row][0][0]].append(ids[0])
    assert len(shown["web"]) == len(shown["twin"]) == 2 * BATCH
    assert set(shown["web"]) != set(shown["twin"])


def changed(training: Training, **update: object) -> Training:
    """With other values in the first source."""
    first, *others = training.sources
    return training.model_copy(update={"sources": (first.model_copy(update=update), *others)})


def test_another_weight_is_refused_with_what_differs_and_what_to_do(training):
    loader = make(training)
    batches(loader, 3)
    state = json.loads(saved([loader]))
    other = make(changed(training, weight=0.5))
    with pytest.raises(UserError) as refusal:
        other.load_state_dict(state)
    share = refusal.value.problems[0]
    assert share.where == "data of the checkpoint: web: share"
    assert (share.what, share.value) == ("was 70 % when it was saved", "62.5 %")
    assert "from_step of at least 3" in share.fix
    assert "--checkpoint.allow_change" in share.fix
    other = make(training.model_copy(update={"sources": training.sources[:2], "stages": ()}))
    assert any(problem.where.endswith("checkpoint: sources") for problem in other.differences(state))
    (seed,) = make(training, seed=12).differences(state)
    assert seed.where == "data of the checkpoint: seed"


def test_the_dry_run_finds_the_same_differences(training, tmp_path):
    """Which opens no text and has no torch."""
    loader = make(training)
    batches(loader, 3)
    state = json.loads(saved([loader]))
    tokenizer = SimpleNamespace(path="builtin:bytes", kind="bytes", assets="builtin:bytes")
    spec = SimpleNamespace(seed=SEED, seq_len=SEQ_LEN, global_batch_size=BATCH, tokenizer=tokenizer)
    assert changed_data(state, training, spec) == []
    (tmp_path / "books/4.jsonl").write_text(json.dumps({"text": "another file"}) + "\n")
    other = changed(training, weight=0.5)
    found = changed_data(state, other, spec)
    assert "data of the checkpoint: dataset of books" in [problem.where for problem in found]
    assert found == make(other).differences(state)
    (problem,) = changed_data(state, Training(), spec)
    assert (problem.what, problem.value) == ("was a mixture when it was saved", "one data set")


def test_a_stage_that_has_not_begun_may_change(training):
    expected = [digest([batch]) for batch in batches(make(training), 9)]
    loader = make(training)
    batches(loader, 6)
    state = json.loads(saved([loader]))
    stages = (MixtureStage(from_step=9, weights={"web": 1}),)
    resumed = make(training.model_copy(update={"stages": stages}))
    resumed.load_state_dict(state)
    read = batches(resumed, 4)
    assert [digest([batch]) for batch in read[:3]] == expected[6:]
    assert {documents[0][0] for documents in read[3].documents} == {"web"}
    stages = (MixtureStage(from_step=5, weights={"web": 1}),)
    (problem,) = make(training.model_copy(update={"stages": stages})).differences(state)
    assert problem.where == "data of the checkpoint: stage from step 5"
    assert problem.value == "web 100 %"


def test_texts_that_were_repaired_are_read_on_and_others_are_refused(training, tmp_path):
    loader = make(training)
    batches(loader, 3)
    state = json.loads(saved([loader]))
    with (tmp_path / "books/3.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    assert not make(training).differences(state)
    (tmp_path / "books/4.jsonl").write_text(json.dumps({"text": "another file"}) + "\n")
    (problem,) = make(training).differences(state)
    assert problem.where == "data of the checkpoint: dataset of books"
    (tmp_path / "books/4.jsonl").unlink()
    write_raw(tmp_path / "code.bin", list(CODE)[:-1])
    (problem,) = make(training).differences(state)
    assert problem.where == "data of the checkpoint: code: source"


def test_one_data_set_and_a_mixture_are_not_taken_for_each_other(training):
    loader = make(training)
    state = json.loads(saved([loader]))
    books = training.sources[1]
    sizes = {"seq_len": SEQ_LEN, "global_batch_size": BATCH, "rows": range(BATCH)}
    alone = build_loader(books.text_keys, build_tokenizer("builtin:bytes"), seed=SEED, dataloader=Dataloader(), **sizes)
    for here, other in ((alone, state), (loader, alone.state_dict())):
        (problem,) = here.differences(json.loads(json.dumps(other)))
        assert problem.where == "data of the checkpoint"
        assert "--job.dump_folder" in problem.fix


def test_a_read_that_fails_consumes_nothing(training, monkeypatch):
    expected = digest([batches(make(training), 1)[0]])
    loader = make(training)
    before = loader.snapshot()
    monkeypatch.setattr(token_files.TokenFiles, "read_documents", lambda *_: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(OSError, match="broken"):
        loader.next()
    monkeypatch.undo()
    loader.restore(before)
    assert digest([loader.next()]) == expected
    loader.close()


def test_skipped_records_name_their_source_and_place(training, tmp_path):
    with (tmp_path / "books/2.jsonl").open("a") as file:
        file.write("no json\n")
    loader = make(training, on_bad_record="skip")
    read = batches(loader, STEPS)
    (record,) = {record._replace(nth=0) for batch in read for record in batch.skipped if record.source == "books"}
    assert loader.format_location(record).endswith("2.jsonl, line 51")
    assert read[-1].bad_records >= 1


def test_problems_of_all_sources_are_reported_together(training, tmp_path):
    (tmp_path / "books/0.jsonl").write_text("no json\n")
    write_raw(tmp_path / "code.bin", [VOCAB + 1] * 100)
    with pytest.raises(UserError) as refusal:
        make(training)
    places = " ".join(problem.where for problem in refusal.value.problems)
    assert "0.jsonl" in places
    assert "code.bin" in places


def test_tokens_and_epochs_become_shares(training):
    amounts = ({"tokens": 6_000}, {"tokens": 2_000}, {"epochs": 3.0})
    sources = tuple(
        source.model_copy(update={"weight": None, **amount})
        for source, amount in zip(training.sources, amounts, strict=True)
    )
    loader = make(training.model_copy(update={"sources": sources, "stages": ()}))
    code = 3 * ((len(CODE) - 1) // SEQ_LEN) * SEQ_LEN
    assert f"code: share={round(100 * code / (8_000 + code), 4):g} %" in loader.fingerprint
    run = loader.describe(15)  # 10,080 tokens: 8,000 and three epochs
    assert "2.99 epochs, 3.0 epochs asked for" in run[3] or "3 epochs, 3.0 epochs asked for" in run[3]
    assert "6,000 tokens asked for" in run[1]


def test_epochs_begin_in_the_log(training, caplog):
    with caplog.at_level(logging.INFO, logger="quadriga"):
        batches(make(training), STEPS)
    assert next(text for text in caplog.messages if "of code begins" in text) == "data: epoch 2 of code begins"
    assert "data: epoch 2 of books begins" in caplog.messages
