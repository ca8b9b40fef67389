"""What earlier versions saved still resumes, to the bit, on several ranks; what is crafted runs nothing on any of them.

`older/step-2.tar.gz` was saved by commit 9b4208f on two ranks (FSDP), before there was a `plan.json`.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crafted import ATTACKS, seal_again
from ranks import RankError, run_ranks
from torch.distributed import checkpoint as dcp
from training import train
from weights import Weights

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint import metadata_file, plan
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.checkpoint.tensors import read, stored_tensors
from quadriga.config.schema import Checkpoint

OLDER = Path(__file__).parent / "older"
NUMBERS = ("loss", "grad_norm", "lr", "tokens_seen")


@pytest.fixture
def older(tmp_path: Path) -> Path:
    place = tmp_path / "older/checkpoint"
    with tarfile.open(OLDER / "step-2.tar.gz") as archive:
        archive.extractall(place, filter="data")
    return place / "step-2"


def empty(step: Path) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(one.shape, dtype=one.dtype) for name, one in stored_tensors(step).items()}


def by_dcp(step: Path) -> dict[str, torch.Tensor]:
    """As stock torch.distributed.checkpoint reads a folder; of one that the test trusts."""
    tensors = empty(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=step)
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_older_checkpoint_is_read_as_dcp_reads_it(older: Path) -> None:
    assert not (older / "plan.json").exists()
    ours = empty(older)
    read(older, ours, None, facts=folders.read(older).files)
    assert len(ours) > 30
    assert sum(tensor.count_nonzero().item() for tensor in ours.values()) > 10_000
    assert same(ours, by_dcp(older))


def resumed(step: Path, ranks: int) -> list[tuple[float, ...]]:
    arguments = ("--training.dataset_path", str(OLDER / "text"), "--training.steps=5")
    records = train(step.parents[1], ranks, *arguments, file=str(OLDER / "tiny.toml"))
    assert [record["step"] for record in records] == [3, 4, 5]
    return [tuple(record[name] for name in NUMBERS) for record in records]


def test_an_older_checkpoint_resumes_to_the_bit(older: Path, tmp_path: Path) -> None:
    """The run that goes on from it is the run that goes on from the same state with a plan, bit for bit."""
    newer = tmp_path / "newer/checkpoint/step-2"
    shutil.copytree(older, newer)
    (newer / "plan.json").write_bytes(metadata_file.read((older / ".metadata").read_bytes()).as_json())
    (newer / ".metadata").write_bytes(b"not opened")
    seal_again(newer)
    assert resumed(older, 2) == resumed(newer, 2)
    last = older.with_name("step-5")
    assert (last / "plan.json").is_file(), "what is saved now has a plan"
    assert not same(by_dcp(last), by_dcp(older)), "it did train"
    assert same(by_dcp(last), by_dcp(newer.with_name("step-5")))


def test_stock_dcp_reads_what_is_saved_on_two_ranks(older: Path) -> None:
    resumed(older, 2)
    last = older.with_name("step-5")
    ours = empty(last)
    read(last, ours, None, facts=folders.read(last).files)
    assert same(ours, by_dcp(last))
    written = plan.parse((last / "plan.json").read_bytes())
    assert written.tensors == metadata_file.read((last / ".metadata").read_bytes()).tensors
    assert "plan.json" in folders.read(last).files


def refusals(place: str, flag: str, names: list[str]) -> list[str]:
    """On each rank: what a load of each crafted checkpoint tells, on a resume and by `initial_load_path`."""
    group = dist.new_group(backend="gloo")
    told = []
    for name in names:
        step = Path(place, name, "step-8")
        for section, run in (
            (Checkpoint(enable=True), step.parent),
            (Checkpoint(enable=True, initial_load_path=str(step)), Path(place, "new")),
        ):
            manager = CheckpointManager(section, run, group)
            weights = Weights(0)
            try:
                manager.load(manager.find(), {"model": weights})
            except Exception as error:  # noqa: BLE001 (its kind is looked at)
                told.append(f"{type(error).__name__}: {error}")
            else:
                told.append("loaded")
            assert not os.path.exists(flag)
    return told


def test_crafted_checkpoints_are_refused_alike_on_all_ranks(tmp_path: Path) -> None:
    CheckpointManager(Checkpoint(enable=True), tmp_path).save(8, {"model": Weights(8)}, {})
    for name, attack in ATTACKS.items():
        step = tmp_path / name / "step-8"
        shutil.copytree(tmp_path / "step-8", step)
        attack(step, tmp_path / "flag")
        seal_again(step)
    first, second = run_ranks(refusals, 2, str(tmp_path), str(tmp_path / "flag"), list(ATTACKS))
    assert not (tmp_path / "flag").exists()
    assert len(first) == 2 * len(ATTACKS)
    for one, other in zip(first, second, strict=True):
        assert one.startswith(("CheckpointError: ", "UserError: "))
        assert one == other
        assert "Traceback" not in one


def test_a_run_of_two_ranks_refuses_a_crafted_checkpoint(older: Path, tmp_path: Path) -> None:
    """The whole trainer, with a checkpoint that fits it but for what it would run."""
    for name in ("a_command_is_called", "second_unpickling_differs_in_a_later_protocol"):
        step = tmp_path / name / "checkpoint/step-2"
        shutil.copytree(older, step)
        ATTACKS[name](step, tmp_path / "flag")
        seal_again(step)
        with pytest.raises(RankError, match=r"\.metadata is refused"):
            resumed(step, 2)
        assert not (tmp_path / "flag").exists()
