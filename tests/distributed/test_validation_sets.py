"""Whole runs that validate on several sets: the losses of each set are those of one rank on every layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_token_runs import write_ids
from training import DEBUG_FILE, TINY, train

from quadriga.metrics.jsonl import read_metrics

DATA = """
[[training.sources]]
name = "ids"
dataset = "tokens"
dataset_path = "{folder}/web.bin"
token_dtype = "uint16"
weight = 0.7

[[training.sources]]
name = "books"
dataset = "jsonl"
dataset_path = "{folder}/books.jsonl"
weight = 0.3

[validation]
enable = true
freq = 2
windows = 11

[[validation.sets]]
name = "books"
dataset = "jsonl"
dataset_path = "{folder}/held.jsonl"

[[validation.sets]]
dataset = "tokens"
dataset_path = "{folder}/code.npy"
"""
TP, PP = "--parallelism.tensor_parallel_degree=2", "--parallelism.pipeline_parallel_degree=2"
MICROBATCH = "--parallelism.pipeline_parallel_microbatch_size=1"
LAYOUTS = {
    "FSDP 2": (2, ()),
    "TP 2": (2, (TP,)),
    "CP 2": (2, ("--parallelism.context_parallel_degree=2",)),
    "PP 2": (2, (PP, MICROBATCH, "--training.local_batch_size=2")),
    "FSDP 2 x TP 2": (4, (TP,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of text and one of ids to train on, and two others to validate on: of 11 windows and more, and of 7."""
    folder = tmp_path_factory.mktemp("data")
    write_ids(folder / "web.bin", 600)
    np.save(folder / "code.npy", np.arange(7 * 32 - 5) % 250)
    for name in ("books", "held"):
        lines = [json.dumps({"text": f"{name} {number}: " + "words " * number}) for number in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.toml").write_text(f'extends = "{DEBUG_FILE}"\n' + DATA.format(folder=folder))
    return folder


def validated(folder: Path, name: str, ranks: int, *arguments: str) -> list[dict[str, Any]]:
    """The validations of a run of two steps, which computes in float32."""
    more = ("--training.steps=2", "--checkpoint.no_enable", *arguments)
    train(folder / name, ranks, *TINY, *more, file=str(folder / "run.toml"))
    return read_metrics(folder / name / "metrics.jsonl", "validation")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:  # inherited by the forked rank
        patch.setattr("quadriga.train.validate.LARGE_SHARE", 0.0)
        return validated(folder, "one", 1)


def test_one_rank_reads_each_set(alone: list[dict[str, Any]], folder: Path) -> None:
    """The last window of the ids is short: 7 x 32 - 5 ids have one label less."""
    found = [(one["step"], one["set"], one["tokens"]) for one in alone]
    assert found == [(step, *each) for step in (1, 2) for each in (("books", 11 * 32), ("code", 7 * 32 - 6))]
    assert len({one["loss"] for one in alone}) == 4
    events = [json.loads(line) for line in (folder / "one/events.jsonl").read_text().splitlines()]
    (slow,) = [event for event in events if event["event"] == "slow_validation"]
    assert slow["step"] == 2, "there is no validation before the first one"
    assert slow["seconds"] > 0
    assert slow["between"] > 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "FSDP 2" else pytest.mark.slow) for name in LAYOUTS]
)
def test_each_set_has_the_loss_of_one_rank(name: str, alone: list[dict[str, Any]], folder: Path) -> None:
    ranks, arguments = LAYOUTS[name]
    found = validated(folder, name, ranks, *arguments)
    for ours, theirs in zip(found, alone, strict=True):
        assert [ours[key] for key in ("step", "set", "tokens")] == [theirs[key] for key in ("step", "set", "tokens")]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_the_api_returns_each_loss(folder: Path, alone: list[dict[str, Any]], tmp_path: Path) -> None:
    """Training on one rank, validated by hand after its first step; and the refusal of one number for two sets."""
    import quadriga

    overrides = [*TINY, "--training.steps=2", "--checkpoint.no_enable", f"--job.dump_folder={tmp_path}"]
    overrides += ["--validation.freq=1000"]
    run = quadriga.resolve(quadriga.load_config(str(folder / "run.toml"), overrides))
    with quadriga.build(run, log=False) as trainer:
        trainer.step()
        losses = trainer.evaluate_sets()
        with pytest.raises(quadriga.UserError, match="evaluate_sets"):
            trainer.evaluate()
    assert losses == {one["set"]: pytest.approx(one["loss"], rel=1e-6) for one in alone if one["step"] == 1}
    assert os.environ.get("RANK") is None
