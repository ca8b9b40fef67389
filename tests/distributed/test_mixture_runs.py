"""A whole run on a mixture: killed, and resumed on another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import RankError, run_ranks
from test_token_runs import KILLED, STEPS, killed_rank, write_ids
from training import DEBUG_FILE, TINY, largest_difference, train

from quadriga.checkpoint.folder import find_complete
from quadriga.metrics.documents import read_documents

SOURCES = """
[[training.sources]]
dataset = "tokens"
dataset_path = "{folder}/web.bin"
token_dtype = "uint16"
token_eos_id = 319
weight = 0.7

[[training.sources]]
dataset = "jsonl"
dataset_path = "{folder}/books"
weight = 0.2

[[training.sources]]
dataset = "tokens"
dataset_path = "{folder}/code.npy"
weight = 0.1

[[training.stages]]
from_step = 5
weights = {{ books = 3, code = 1 }}
"""


@pytest.mark.more
def test_a_killed_mixture_goes_on_with_other_ranks(tmp_path: Path) -> None:
    """FSDP on two ranks, killed after the second stage has begun, and resumed on one."""
    write_ids(tmp_path / "web.bin", 600)
    np.save(tmp_path / "code.npy", np.arange(400) % 250)
    (tmp_path / "books").mkdir()
    lines = [json.dumps({"text": f"book {number}: " + "words " * number}) for number in range(40)]
    (tmp_path / "books/a.jsonl").write_text("\n".join(lines) + "\n")
    file = tmp_path / "run.toml"
    file.write_text(f'extends = "{DEBUG_FILE}"\n' + SOURCES.format(folder=tmp_path))
    argv = [*TINY, "--metrics.log_documents", "--checkpoint.enable", "--checkpoint.interval=2"]
    argv += [f"--training.steps={STEPS}"]

    straight = train(tmp_path / "straight", 2, *argv, file=str(file))
    expected = read_documents(tmp_path / "straight")
    assert [list(rows) for rows in expected.values()] == [list(range(8))] * STEPS
    named = [{name.partition(":")[0] for names in rows.values() for name in names} for rows in expected.values()]
    assert set().union(*named[:5]) == {"web", "books", "code"}
    assert set().union(*named[5:]) == {"books", "code"}

    folder = tmp_path / "killed"
    with pytest.raises(RankError):
        run_ranks(killed_rank, 2, ["--job.config_file", str(file), f"--job.dump_folder={folder}", *argv], backend=None)
    assert find_complete(folder / "checkpoint").step == KILLED - 1
    resumed = train(folder, 1, *argv, file=str(file))
    assert read_documents(folder) == expected
    assert largest_difference(resumed, straight, "loss") < 1e-5
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours["source_tokens"] == theirs["source_tokens"]
        assert ours["source_epochs"] == theirs["source_epochs"]
        assert sum(ours["source_tokens"].values()) == ours["tokens_seen"]
