"""A checkpoint from somebody who means harm: it is refused by name, nothing of it runs, and no tensor is changed."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from crafted import ATTACKS, Harm, seal_again
from weights import Weights

from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.config.schema import Checkpoint
from quadriga.errors import UserError


def manager(folder: Path, **keys) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **keys), folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    manager(folder).save(8, {"model": Weights(8)}, {"train_state": {"step": 8, "tokens_seen": 1}})
    return folder / "step-8"


def load(one: CheckpointManager) -> Weights:
    weights = Weights(0)
    one.load(one.find(), {"model": weights})
    return weights


@pytest.mark.parametrize("way", ["resume", "initial_load_path", "foreign"])
@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_by_name_and_nothing_runs(pristine, tmp_path, name, way):
    step, flag = tmp_path / "run/step-8", tmp_path / "flag"
    shutil.copytree(pristine, step)
    ATTACKS[name](step, flag)
    if way == "foreign":
        (step / "train_state.json").unlink()
    else:
        seal_again(step)
    one = manager(step.parent) if way == "resume" else manager(tmp_path / "new", initial_load_path=str(step))
    weights = Weights(0)
    with pytest.raises((CheckpointError, UserError)) as told:
        one.load(one.find(), {"model": weights})
    assert not flag.exists()
    assert str(step) in str(told.value)
    assert "Traceback" not in str(told.value)
    assert len(str(told.value)) < 2000
    if "shard" not in name:  # found before any tensor is read
        assert weights.held["a.weight"].eq(0).all()


def test_metadata_is_not_looked_at_where_there_is_a_plan(pristine, tmp_path):
    step, flag = tmp_path / "run/step-8", tmp_path / "flag"
    shutil.copytree(pristine, step)
    (step / ".metadata").write_bytes(pickle.dumps(Harm(flag)))
    seal_again(step)
    assert load(manager(step.parent)).held["a.weight"].eq(8).all()
    assert not flag.exists()


def test_the_plan_is_parsed_once_and_dcp_reads_no_file_of_its_own(pristine, tmp_path, monkeypatch):
    """What was checked is what is used."""
    from quadriga.checkpoint import metadata_file, plan

    calls = []
    for module, name in ((plan, "parse"), (metadata_file, "read")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda data, original=original, name=name: calls.append(name) or original(data)
        )
    monkeypatch.setattr(pickle, "load", lambda file: pytest.fail("a file was unpickled"))
    for legacy in (False, True):
        step = tmp_path / str(legacy) / "step-8"
        shutil.copytree(pristine, step)
        if legacy:
            (step / "plan.json").unlink()
            seal_again(step)
        assert load(manager(step.parent)).held["a.weight"].eq(8).all()
    assert calls == ["parse", "read"]


def test_pickled_entries_of_a_foreign_folder_are_left_alone(tmp_path):
    """Trainers put their counters beside the weights as pickled bytes: never planned, never read."""
    from torch.distributed import checkpoint as dcp

    place, flag = tmp_path / "dcp", tmp_path / "flag"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**Weights(4).held, "train_state": Harm(flag)}, checkpoint_id=place)
    assert load(manager(tmp_path / "run", initial_load_path=str(place))).held["a.weight"].eq(4).all()
    assert not flag.exists()


def test_the_planner_refuses_bytes():
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

    from quadriga.checkpoint.plan import PlanError
    from quadriga.checkpoint.stored import TensorPlanner

    nothing = torch.Size((0,))
    item = ReadItem(LoadItemType.BYTE_IO, MetadataIndex("a"), nothing, MetadataIndex("a"), nothing, nothing)
    with pytest.raises(PlanError, match="'a' is a pickled object, which is not read"):
        TensorPlanner().load_bytes(item, None)


def test_the_cli_runs_nothing_either(pristine, tmp_path, capsys):
    from quadriga.cli.checkpoints import main

    for name in ("second_unpickling_differs", "the_plan_lies_and_so_does_metadata"):
        step, flag = tmp_path / name / "step-8", tmp_path / "flag"
        shutil.copytree(pristine, step)
        ATTACKS[name](step, flag)
        seal_again(step)
        main([str(step.parent), "--verify"])
        assert not flag.exists()
    assert "verified" in capsys.readouterr().out, "its hashes do fit: they protect against damage, not forgery"
