"""`quadriga data RUN --step N`: the documents and rows of any step of a run, from its saved configuration."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from quadriga.checkpoint import folder as checkpoints
from quadriga.checkpoint import titan
from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.cli.arguments import run_from_file
from quadriga.cli.data_rows import format_row
from quadriga.cli.estimate import world_size_of
from quadriga.config import Run
from quadriga.config.schema import TOKENS
from quadriga.data.data_check import training_mixture, training_tokens
from quadriga.data.loader import row_format
from quadriga.data.mixture_loader import MixtureLoader, build_mixture_loader
from quadriga.data.rows import RowPart, mixture_row, text_row, text_rows, token_row
from quadriga.data.stream_loader import SINGLE_STREAM, StreamLoader, build_loader
from quadriga.data.tokenizer import build_tokenizer
from quadriga.errors import EXIT_OK, Fault, printable
from quadriga.metrics.documents import format_documents, read_documents
from quadriga.units import format_count, plural


def report_step(folder: Path, step: int, rows: int, full: bool) -> int:
    """Print the first rows of a step, and compare their documents with those that the run logged, if it did.

    Raises UserError: the data cannot be read, or are not those of the run; Fault: the run read other documents.
    """
    run = run_from_file(str(folder / "config.toml"), world_size_of(folder))
    rows = min(rows, run.spec.global_batch_size)
    print(f"step {step:,}: rows 0 to {rows - 1} of {run.spec.global_batch_size:,}", flush=True)
    found = rows_of_step(run, folder, step, rows)
    tokenizer = None if run.spec.tokenizer.assets is None else build_tokenizer(run.spec.tokenizer.assets)
    for number, row in enumerate(found):
        print("\n".join(map(printable, ["", f"row {number}", *format_row(row, tokenizer, full)])))
    print(f"\n{_compared(folder, step, found)}")
    return EXIT_OK


def rows_of_step(run: Run, folder: Path, step: int, rows: int) -> list[list[RowPart]]:
    """The first `rows` rows of the global batch of a step. Token files are read at once. Of texts, and of mixtures
    with texts, all rows from the nearest checkpoint before the step are read."""
    training, spec = run.config.training, run.spec
    if training.sources:
        return _mixture_rows_of_step(run, folder, step, rows)
    if training.dataset == TOKENS:
        files, windows = training_tokens(training, spec)
        first = (step - 1) * spec.global_batch_size
        return [token_row(files, windows, slot) for slot in range(first, first + rows)]
    loader = build_loader(
        training.text_keys,
        build_tokenizer(run.config.model.hf_assets_path),
        seed=spec.seed,
        seq_len=spec.seq_len,
        global_batch_size=spec.global_batch_size,
        rows=range(rows),
        dataloader=training.dataloader,
        rows_have=row_format(training),
    )
    try:
        _advance(loader, run, folder, step, rows)
        cursors, streams = loader.snapshot(), loader.streams
        if streams.seed is None:
            return list(islice(text_rows(streams, SINGLE_STREAM, cursors[SINGLE_STREAM]), rows))
        return [text_row(streams, row, cursors[row]) for row in range(rows)]
    finally:
        loader.close()


def _mixture_rows_of_step(run: Run, folder: Path, step: int, rows: int) -> list[list[RowPart]]:
    """The rows of a mixture. Without texts, token files are read at once."""
    training, spec = run.config.training, run.spec
    if not training.reads_text:
        data = training_mixture(training, spec)
        return [mixture_row(data, {}, step, row) for row in range(rows)]
    loader = build_mixture_loader(
        training,
        build_tokenizer(run.config.model.hf_assets_path),
        spec.model.vocab_size,
        seed=spec.seed,
        seq_len=spec.seq_len,
        global_batch_size=spec.global_batch_size,
        rows=range(rows),
        assets=spec.tokenizer.assets,
    )
    try:
        _advance(loader, run, folder, step, rows)
        _, cursors = loader.snapshot()
        texts = {index: (text.streams, cursors[index]) for index, text in loader.texts.items()}
        return [mixture_row(loader.data, texts, step, row) for row in range(rows)]
    finally:
        loader.close()


def _advance(loader: StreamLoader | MixtureLoader, run: Run, folder: Path, step: int, rows: int) -> None:
    """Moves a loader of the first `rows` rows to the beginning of a step: to the nearest checkpoint before it, and from
    there by reading."""
    start, done = _nearest_checkpoint(run, folder, step), 0
    if start is not None:
        loader.load_state_dict(start.extra["dataloader"])
        done = start.step
    origin = f"checkpoint {start.path}" if start else "the start of the data"
    tokens = format_count((step - 1 - done) * rows * run.spec.seq_len)
    print(f"read from {origin}: {plural(step - 1 - done, 'step')}, about {tokens} tokens", flush=True)
    for _ in range(step - 1 - done):
        loader.next()


def _nearest_checkpoint(run: Run, folder: Path, step: int) -> CheckpointInfo | None:
    """The newest checkpoint of the run that was saved before the step and holds the position in the data."""
    place = run.spec.folders.checkpoint
    inside = folder / Path(place).name  # where the run folder is now
    place = str(inside) if inside.is_dir() else place
    if "://" not in place and not Path(place).is_dir():
        return None
    whole, damaged = checkpoints.list_checkpoints(place)
    before = [found for found in whole if found.step < step and "dataloader" in found.extra]
    newest = max(before, key=lambda found: found.step, default=None)
    theirs = [found.step for found in titan.find_candidates(place, damaged)[0] if found.step < step]
    if theirs and (newest is None or newest.step < max(theirs)):
        what = f"the checkpoint of torchtitan of step {max(theirs):,} is not read"
        print(f"{what}: a run that continued from it has other rows until its own next checkpoint", flush=True)
    return newest


def _compared(folder: Path, step: int, found: Sequence[Sequence[RowPart]]) -> str:
    """What the run logged about these rows. Raises Fault if it read other documents."""
    logged: dict[int, Any] = read_documents(folder).get(step, {})
    here = format_documents([[part.document for part in row if part.document] for row in found], 0)
    both = [row for row in range(len(found)) if row in logged]
    if not both:
        return "the run did not log the documents of these rows (metrics.log_documents)"
    if different := [row for row in both if logged[row] != here[str(row)]]:
        names = ", ".join(logged[different[0]])
        what = f"row {different[0]} of step {step} read the documents {names}"
        raise Fault(f"quadriga data: the run logged other documents: {what}; the data or the configuration changed")
    return f"the run logged the same documents for {plural(len(both), 'row')}"
