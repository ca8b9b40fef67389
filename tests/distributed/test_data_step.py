"""`quadriga data RUN --step N` shows the documents and ids that the run read in that step, past or future."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from training import TINY, train

from quadriga.cli import data_step
from quadriga.cli.arguments import run_from_file
from quadriga.cli.estimate import world_size_of
from quadriga.cli.main import main
from quadriga.data.mixture_loader import build_mixture_loader
from quadriga.data.rows import row_ids
from quadriga.data.stream_loader import build_loader
from quadriga.data.token_loader import build_token_loader
from quadriga.data.tokenizer import build_tokenizer
from quadriga.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE
from quadriga.metrics.documents import format_documents, read_documents

STEPS, BATCH = 6, 8
RUN = (*TINY, f"--training.steps={STEPS}", "--metrics.log_documents", "--checkpoint.enable", "--checkpoint.interval=2")


def write_lines(folder: Path) -> Path:
    folder.mkdir()
    for part in range(3):
        lines = [json.dumps({"text": f"{part}.{number} " * (1 + number % 40)}) for number in range(60)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


KINDS = ("shuffled", "in order", "tokens", "mixture", "mixture with text", "mixture in order")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    data = write_lines(place / "data")
    keys = ["--training.dataset=jsonl", f"--training.dataset_path={data}"]
    if request.param == "in order":
        keys.append("--training.dataloader.no_shuffle")
    if request.param == "tokens":
        assert main(["tokenize", str(data), str(place / "ids"), "--tokenizer", "builtin:bytes"]) == EXIT_OK
        keys = ["--training.dataset=tokens", f"--training.dataset_path={place}/ids"]
    if request.param.startswith("mixture "):
        (np.arange(5000) % 250).astype("<u2").tofile(place / "plain.bin")
        lines = [json.dumps({"text": f"other {number} " * (1 + number % 7)}) for number in range(90)]
        (place / "other.jsonl").write_text("\n".join(lines) + "\n")
        plain = f'{{dataset = "tokens", dataset_path = "{place}/plain.bin", token_dtype = "uint16", weight = 2}}'
        paths = data, place / "other.jsonl"
        texts = [f'{{dataset = "jsonl", dataset_path = "{path}", weight = 3}}' for path in paths]
        stage = "--training.stages=[{from_step = 4, weights = {data = 1, other = 5, plain = 1}}]"
        keys = [f"--training.sources=[{texts[0]}, {plain}, {texts[1]}]", stage]
        if request.param.endswith("in order"):
            keys.append("--training.dataloader.no_shuffle")
    if request.param == "mixture":
        assert main(["tokenize", str(data), str(place / "ids"), "--tokenizer", "builtin:bytes"]) == EXIT_OK
        (np.arange(5000) % 250).astype("<u2").tofile(place / "plain.bin")
        of_ids = f'{{dataset = "tokens", dataset_path = "{place}/ids", weight = 3}}'
        plain = f'{{dataset = "tokens", dataset_path = "{place}/plain.bin", token_dtype = "uint16", weight = 1}}'
        keys = [f"--training.sources=[{of_ids}, {plain}]"]
    train(place / "run", 1, *RUN, *keys)
    return place / "run"


def batches(folder: Path, steps: int) -> list[tuple[np.ndarray, dict[str, list[str]]]]:
    """Ids and documents of every step, of a loader that starts at the beginning."""
    run = run_from_file(str(folder / "config.toml"), world_size_of(folder))
    training, spec = run.config.training, run.spec
    order = {"seed": spec.seed, "seq_len": spec.seq_len, "global_batch_size": BATCH, "rows": range(BATCH)}
    order["dataloader"] = training.dataloader
    if training.sources:
        sources = training.model_copy(update={"dataloader": order.pop("dataloader")})
        loader = build_mixture_loader(
            sources, build_tokenizer("builtin:bytes"), spec.model.vocab_size, **order, assets=None
        )
    elif training.dataset == "tokens":
        loader = build_token_loader(training.token_keys, spec.model.vocab_size, **order)
    else:
        loader = build_loader(training.text_keys, build_tokenizer("builtin:bytes"), **order)
    read = [loader.next() for _ in range(steps)]
    loader.close()
    ids = [np.concatenate([batch.tokens.numpy(), batch.labels.numpy()[:, -1:]], axis=1) for batch in read]
    return [(each, format_documents(batch.documents, 0)) for each, batch in zip(ids, read, strict=True)]


def test_every_step_is_what_the_run_reads(folder, capsys):
    run, logged = run_from_file(str(folder / "config.toml"), 1), read_documents(folder)
    assert sorted(logged) == list(range(1, STEPS + 1))
    for step, (ids, documents) in enumerate(batches(folder, STEPS + 6), start=1):
        rows = data_step.rows_of_step(run, folder, step, BATCH)
        assert [row_ids(row) for row in rows] == ids.tolist()
        named = {str(number): [part.document for part in row] for number, row in enumerate(rows)}
        assert {row: [":".join(map(str, one)) for one in names] for row, names in named.items()} == documents
        if step in logged:
            assert {str(row): names for row, names in logged[step].items()} == documents
            assert main(["data", str(folder), "--step", str(step), "--rows", str(BATCH)]) == EXIT_OK
            assert f"the run logged the same documents for {BATCH} rows" in capsys.readouterr().out


def test_a_future_step_continues_at_the_newest_checkpoint_before_it(folder, capsys):
    assert main(["data", str(folder), "--step", "9", "--rows", "3"]) == EXIT_OK
    shown = capsys.readouterr().out
    assert "step 9: rows 0 to 2 of 8" in shown
    assert "the run did not log the documents of these rows" in shown
    if "read from" in shown:
        assert run_from_file(str(folder / "config.toml"), 1).config.training.reads_text
        assert "step-6: 2 steps, about " in shown
        assert main(["data", str(folder), "--step", "2"]) == EXIT_OK
        assert "read from the start of the data: 1 step, about " in capsys.readouterr().out
    else:
        assert not run_from_file(str(folder / "config.toml"), 1).config.training.reads_text


def test_other_documents_than_the_logged_ones_are_a_fault(folder, capsys, tmp_path):
    log = folder / "documents/rank0.jsonl"
    before = log.read_text()
    try:
        first = json.loads(before.splitlines()[0])
        first["rows"]["0"] = ["0:9:9"]
        log.write_text(json.dumps(first) + "\n")
        assert main(["data", str(folder), "--step", "1", "--rows", "1"]) == EXIT_FAULT
        assert "row 0 of step 1 read the documents 0:9:9" in capsys.readouterr().err
    finally:
        log.write_text(before)
    assert main(["data", str(tmp_path), "--step", "1"]) == EXIT_USAGE
    assert "is not a run folder" in capsys.readouterr().err
