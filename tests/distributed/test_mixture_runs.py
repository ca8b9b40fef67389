"""A whole run on a mixture: killed, and resumed on another number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from ranks import RankError, run_ranks
from test_token_runs import EOS, KILLED, STEPS, killed_rank, write_ids
from training import DEBUG_FILE, ROOT, TINY, largest_difference, one_rank

from quadriga.checkpoint.folder import find_complete
from quadriga.cli.arguments import run_from_file
from quadriga.data.mixture_loader import MixtureLoader, build_mixture_loader
from quadriga.data.tokenizer import build_tokenizer
from quadriga.metrics.documents import read_documents
from quadriga.metrics.jsonl import read_metrics

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("\n## Mix sources\n")[2]
BATCH = 8


def sources_of_the_page() -> str:
    """The tables of docs/data.md, with the stage at step 5 of this run."""
    example = PAGE.partition("```toml")[2].partition("```")[0]
    tables = example[example.index("[[training.sources]]") :]
    assert "from_step = 900" in tables
    return tables.replace("from_step = 900", "from_step = 5").replace("token_eos_id = 0", f"token_eos_id = {EOS}")


def write_sources(folder: Path) -> None:
    """The pair of Megatron, the folder of JSON lines, and the file of nanoGPT that the page names."""
    write_ids(folder / "web_text_document.bin", 2000)
    lengths = np.full(40, 50, "<i4")
    starts = 2 * np.arange(0, 2000, 50, dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 40, 41)
    index = header + lengths.tobytes() + starts.tobytes() + np.arange(41, dtype="<i8").tobytes()
    (folder / "web_text_document.idx").write_bytes(index)
    write_ids(folder / "code.bin", 600)
    (folder / "books").mkdir()
    lines = [json.dumps({"text": f"book {number}: " + "words " * number}) for number in range(40)]
    (folder / "books/a.jsonl").write_text("\n".join(lines) + "\n")


def hashed(row: np.ndarray) -> str:
    return hashlib.sha256(row.astype("<i8").tobytes()).hexdigest()


def logging_rank(argv: list[str], log: str, killed: bool) -> int:
    """A rank that logs the hash of the ids and labels of each row that it trains; if `killed`, see `killed_rank`."""
    real = MixtureLoader.next

    def next_and_log(self):
        batch = real(self)
        ids = np.concatenate([batch.tokens.numpy(), batch.labels.numpy()], axis=1)
        rows = {row: hashed(each) for row, each in zip(self._rows, ids, strict=True)}
        with Path(f"{log}.{os.environ['RANK']}").open("a") as file:
            file.write(json.dumps({"step": self._step, "rows": rows}) + "\n")
        return batch

    MixtureLoader.next = next_and_log
    return killed_rank(argv) if killed else one_rank(argv)


def logged(folder: Path, name: str, ranks: int) -> dict[int, dict[int, str]]:
    """By step and row, the hash that the ranks logged. Ranks of one row must agree."""
    found: dict[int, dict[int, str]] = {}
    for rank in range(ranks):
        for line in (folder / f"{name}.{rank}").read_text().splitlines():
            record = json.loads(line)
            for row, value in record["rows"].items():
                assert found.setdefault(record["step"], {}).setdefault(int(row), value) == value
    return found


def undisturbed(file: Path) -> dict[int, dict[int, str]]:
    """By step and row, the hash of the ids of a loader alone, of all rows."""
    run = run_from_file(str(file), 1, [*TINY, f"--training.steps={STEPS}"])
    order = {"seed": run.spec.seed, "seq_len": run.spec.seq_len, "global_batch_size": BATCH, "rows": range(BATCH)}
    tokenizer = build_tokenizer("builtin:bytes")
    loader = build_mixture_loader(run.config.training, tokenizer, run.spec.model.vocab_size, **order, assets=None)
    found = {}
    for step in range(1, STEPS + 1):
        batch = loader.next()
        ids = np.concatenate([batch.tokens.numpy(), batch.labels.numpy()], axis=1)
        found[step] = {row: hashed(each) for row, each in enumerate(ids)}
    loader.close()
    return found


@pytest.mark.more
def test_a_killed_mixture_goes_on_with_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixture of docs/data.md on FSDP 2 x TP 2, killed after the second stage has begun, and resumed on FSDP 2."""
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)
    file = tmp_path / "run.toml"
    file.write_text(f'extends = "{DEBUG_FILE}"\n\n{sources_of_the_page()}')
    common = [*TINY, "--metrics.log_documents", "--checkpoint.enable", "--checkpoint.interval=2"]
    common += [f"--training.steps={STEPS}", "--job.config_file", str(file)]
    layout = ["--parallelism.tensor_parallel_degree=2", "--parallelism.data_parallel_shard_degree=2"]

    def start(name: str, ranks: int, log: str, *more: str, killed: bool = False) -> None:
        argv = [f"--job.dump_folder={tmp_path / name}", *common, *more]
        run_ranks(logging_rank, ranks, argv, str(tmp_path / log), killed, backend=None)

    start("straight", 2, "straight.log")
    expected = undisturbed(file)
    assert logged(tmp_path, "straight.log", 2) == expected
    documents = read_documents(tmp_path / "straight")
    named = [{name.partition(":")[0] for names in rows.values() for name in names} for rows in documents.values()]
    assert set().union(*named[:5]) == {"web", "books", "code"}
    assert set().union(*named[5:]) == {"books", "code"}

    with pytest.raises(RankError):
        start("killed", 4, "killed.log", *layout, killed=True)
    assert find_complete(tmp_path / "killed/checkpoint").step == KILLED - 1
    before = logged(tmp_path, "killed.log", 4)
    start("killed", 2, "resumed.log")
    after = logged(tmp_path, "resumed.log", 2)
    assert (min(before), max(before) >= KILLED, min(after), max(after)) == (1, True, KILLED, STEPS)
    for found in (before, after):
        assert {step: rows for step, rows in expected.items() if step in found} == found
    assert read_documents(tmp_path / "killed") == documents
    resumed, straight = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "straight"))
    assert largest_difference(resumed, straight, "loss") < 1e-5
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours["source_tokens"] == theirs["source_tokens"]
        assert ours["source_epochs"] == theirs["source_epochs"]
        assert sum(ours["source_tokens"].values()) == ours["tokens_seen"]
