"""The policy of [checkpoint] in one plain process: when to save, what to load, what to refuse."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.checkpoint.manifest import STATE_FILE, format_manifest
from quadriga.checkpoint.tensors import ModelState, OptimizerState, RandomState
from quadriga.config.schema import Checkpoint
from quadriga.errors import EXIT_NO_GOOD_CHECKPOINT, UserError


class Run:
    """A tiny training run that can be saved."""

    def __init__(self, width: int = 6, optimizer: type = torch.optim.AdamW, **keys) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 2))
        self.optimizer = optimizer(self.model.parameters(), lr=0.02, weight_decay=0.1, **keys)
        self.losses: list[float] = []

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            x = torch.randn(4, self.model[0].in_features, generator=torch.Generator().manual_seed(step))
            loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())

    @property
    def states(self) -> dict:
        return {"model": ModelState([self.model]), "optimizer": OptimizerState([self.model], [self.optimizer])}

    def values(self) -> dict[str, torch.Tensor]:
        return {f"{part}.{key}": v.clone() for part, s in self.states.items() for key, v in s.state_dict().items()}


def manager(folder: Path, **keys) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **keys), folder)


def saved(folder: Path, steps=(3,), **keys) -> Run:
    run, one = Run(), manager(folder, **keys)
    done = 0
    for step in steps:
        run.train(done + 1, step)
        one.save(step, run.states, {"train_state": {"step": step}, "dataloader": {"lanes": {"0": step}}})
        done = step
    one.close()
    return run


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("keys", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, kind, keys):
    straight = Run(optimizer=kind, **keys)
    straight.train(1, 3)
    manager(tmp_path).save(3, straight.states, {})
    straight.train(4, 6)

    resumed = Run(optimizer=kind, **keys)
    one = manager(tmp_path)
    one.load(one.find(), resumed.states)
    resumed.train(4, 6)
    assert resumed.losses == straight.losses[3:]
    assert same(resumed.values(), straight.values())


def test_a_save_before_the_first_step_holds_zeros_and_moves_nothing(tmp_path):
    run = Run(optimizer=torch.optim.Adam)  # with weight decay in the gradient, the hard case
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    manager(tmp_path).save(0, run.states, {})
    assert same(before, run.model.state_dict())
    assert all(not value.any() for name, value in run.values().items() if name.startswith("optimizer."))
    assert run.optimizer.param_groups[0]["lr"] == 0.02
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_learning_rate_is_the_configurations_not_the_checkpoints(tmp_path):
    saved(tmp_path)
    run, one = Run(), manager(tmp_path)
    run.optimizer.param_groups[0]["lr"] = 0.5
    one.load(one.find(), run.states)
    assert run.optimizer.param_groups[0]["lr"] == 0.5


def test_names_are_the_same_under_wrappers():
    plain, wrapped = Run(), Run()
    names = list(plain.states["optimizer"].state_dict())
    wrapped.model[0] = torch.compile(wrapped.model[0], backend="eager")
    assert list(wrapped.states["optimizer"].state_dict()) == names
    assert list(wrapped.states["model"].state_dict()) == list(plain.states["model"].state_dict())


def test_newest_chosen_and_old_ones_deleted(tmp_path):
    saved(tmp_path, steps=(2, 4, 6), keep_latest_k=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-4", "step-6"]
    assert manager(tmp_path).find().extra["train_state"] == {"step": 6}
    assert manager(tmp_path, load_step=4).find().step == 4
    with pytest.raises(UserError, match="load_step") as refused:
        manager(tmp_path, load_step=2).find()
    assert "4, 6" in refused.value.report


def test_a_damaged_newest_is_passed_over(tmp_path):
    saved(tmp_path, steps=(2, 4))
    tensors = tmp_path / "step-4" / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    one, run = manager(tmp_path), Run()
    found = one.find()
    assert found.step == 2
    one.load(found, run.states)


def reseal(step: Path, **changes) -> None:
    """Write a manifest with valid hashes of the files as they are: it has no secret."""
    state = json.loads((step / STATE_FILE).read_text())
    for name in state["files"]:
        content = (step / name).read_bytes()
        state["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / STATE_FILE).write_text(format_manifest({**state, **changes}))


def other_plan(step: Path, old: bytes, new: bytes) -> None:
    plan = step / "plan.json"
    assert old in plan.read_bytes()
    plan.write_bytes(plan.read_bytes().replace(old, new))
    reseal(step)


def linked(name: str) -> Callable[[Path], object]:
    return lambda step: (step / name).symlink_to((step / name).rename(step.parent.parent / "moved"))


SWAPPED = {
    "a link to its tensors": linked("__0_0.distcp"),
    "a link to its plan": linked("plan.json"),
    "a link to its manifest": linked(STATE_FILE),
}


@pytest.mark.parametrize("change", SWAPPED.values(), ids=SWAPPED.keys())
def test_what_no_load_would_accept_is_passed_over(tmp_path, change):
    saved(tmp_path / "run", steps=(2, 4))
    change(tmp_path / "run" / "step-4")
    one, run = manager(tmp_path / "run"), Run()
    found = one.find()
    assert found.step == 2
    one.load(found, run.states)
    with pytest.raises((CheckpointError, UserError)) as refused:
        manager(tmp_path / "new", initial_load_path=str(tmp_path / "run" / "step-4")).find()
    assert "step-4" in str(refused.value)
    with pytest.raises(CheckpointError) as refused:
        manager(tmp_path / "run", load_step=4).find()
    assert refused.value.exit_code == EXIT_NO_GOOD_CHECKPOINT


def test_a_plan_that_is_refused_ends_the_run_for_good(tmp_path):
    """Its hash is right, so the file is not damaged: no other step is taken in silence, and no restart would help."""
    saved(tmp_path)
    other_plan(tmp_path / "step-3", b"__0_0.distcp", b".metadata")
    one, run = manager(tmp_path), Run()
    with pytest.raises(CheckpointError, match=r"plan\.json is refused") as refused:
        one.load(one.find(), run.states)
    assert refused.value.exit_code == EXIT_NO_GOOD_CHECKPOINT


def test_generators_that_were_not_saved_start_anew(tmp_path, caplog):
    old, run, one = saved(tmp_path), Run(), manager(tmp_path)
    with caplog.at_level(logging.INFO, "quadriga"):
        one.load(one.find(), {**run.states, "random": RandomState(0, torch.device("cpu"))})
    assert "random generators that are not in the checkpoint start anew" in caplog.text
    assert same(run.values(), old.values())


def test_a_folder_that_lost_its_manifest_gives_its_weights(tmp_path):
    """As `torch.distributed.checkpoint` alone would leave it: the names of the weights begin with `model.`."""
    old, run = saved(tmp_path / "run"), Run()
    for name in (STATE_FILE, "plan.json"):
        (tmp_path / "run" / "step-3" / name).unlink()
    one = manager(tmp_path / "new", initial_load_path=str(tmp_path / "run" / "step-3"))
    run.train(1, 1)
    one.load(one.find(), run.states)
    assert same(run.model.state_dict(), old.model.state_dict())


def test_a_store_without_a_driver_names_the_keys(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.folder or checkpoint\.initial_load_path"):
        manager("nosuch://x/y")


def test_what_a_killed_save_left_is_cleaned_up_but_not_by_a_reader(tmp_path):
    (tmp_path / ".step-7.saving").mkdir()
    assert manager(tmp_path, load_only=True).find() is None
    assert (tmp_path / ".step-7.saving").exists()
    assert manager(tmp_path).find() is None
    assert not (tmp_path / ".step-7.saving").exists()


def test_parts_can_be_left_out(tmp_path):
    old = saved(tmp_path)
    run, one = Run(), manager(tmp_path, exclude_from_loading=("optimizer", "dataloader"))
    found = one.find()
    assert list(found.extra) == ["train_state"]
    one.load(found, run.states)
    assert same(run.model.state_dict(), old.model.state_dict())
    assert not run.optimizer.state


def test_when_a_save_is_due(tmp_path):
    def due(last=20, **keys):
        one = manager(tmp_path, **keys)
        return [step for step in range(1, 21) if one.should_save(step, last=step == last)]

    assert due(interval=6) == [6, 12, 18, 20]
    assert due(interval=500) == [20]
    assert due(interval=500, enable_first_step_checkpoint=True) == [1, 20]
    assert due(interval=5, load_only=True) == []
    assert [CheckpointManager(Checkpoint(), tmp_path).should_save(20, last=True)] == [False]


def test_minutes_count_from_the_last_save(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("quadriga.checkpoint.manager.time.monotonic", lambda: now[0])
    one, run = manager(tmp_path, interval_minutes=2.0), Run()
    saves = []
    for step in range(1, 11):
        now[0] += 50
        if one.should_save(step, last=False, wanted=one.interval_has_passed()):
            one.save(step, run.states, {})
            saves.append(step)
    assert saves == [3, 6, 9]


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_a_last_save_of_the_model_only(tmp_path, name, dtype):
    run, one = Run(), manager(tmp_path, last_save_model_only=True, export_dtype=name)
    run.train(1, 2)
    one.save(2, run.states, {}, last=True)
    found = one.find()
    assert found.contents == ("model",)
    with pytest.raises(UserError, match="a run cannot resume from it"):
        one.load(found, Run().states)

    with pytest.raises(UserError, match="a run cannot resume from it"):
        manager(tmp_path / "all", initial_load_path=str(tmp_path), initial_load_model_only=False).find()

    # but a new run can start from its weights
    other, fresh = manager(tmp_path / "other", initial_load_path=str(tmp_path)), Run()
    found = other.find()
    assert (found.resume, found.extra) == (False, {})
    other.load(found, fresh.states)
    for name, value in run.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], value.to(dtype).float())
    assert not fresh.optimizer.state


def test_everything_of_another_run(tmp_path):
    old = saved(tmp_path / "old")
    keys = {"initial_load_path": str(tmp_path / "old" / "step-3"), "initial_load_model_only": False}
    one, run = manager(tmp_path / "new", **keys), Run()
    found = one.find()
    assert found.extra["train_state"] == {"step": 3}
    one.load(found, run.states)
    assert same(run.values(), old.values())
    one.save(4, run.states, {})
    assert one.find().step == 4, "its own checkpoint comes first"


def test_a_start_from_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="initial_load_path"):
        manager(tmp_path, initial_load_path=str(tmp_path / "none")).find()
    with pytest.raises(UserError, match="load_step"):
        manager(tmp_path, load_step=5).find()
    assert manager(tmp_path).find() is None


def test_another_model_is_refused_with_names_and_shapes(tmp_path):
    saved(tmp_path)
    one, wide = manager(tmp_path), Run(width=8)
    with pytest.raises(UserError) as refused:
        one.load(one.find(), wide.states)
    assert "model.0.weight: [6, 6] in the checkpoint, [8, 8] in the run" in refused.value.report
    short = Run()
    short.model = short.model[:2]
    with pytest.raises(UserError, match=r"only the checkpoint has model\.2\.bias"):
        one.load(one.find(), {"model": ModelState([short.model])})


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_save_holds_the_moment_it_was_made(tmp_path, mode):
    run, one = Run(), manager(tmp_path, async_mode=mode)
    run.train(1, 2)
    then, extra = run.values(), {"train_state": {"tokens": 2}}
    one.save(2, run.states, extra)
    extra["train_state"]["tokens"] = 99
    run.train(3, 6)
    one.close()
    other = Run()
    found = one.find()
    one.load(found, other.states)
    assert same(other.values(), then)
    assert found.extra == {"train_state": {"tokens": 2}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there is memory to pin")
def test_where_nothing_can_be_pinned_one_line_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    with caplog.at_level(logging.INFO, "quadriga"):
        saved(tmp_path, steps=(1, 2), async_mode="async_with_pinned_mem")
    assert [record.message for record in caplog.records if "unpinned" in record.message] == [
        "checkpoints: no tensor is on CUDA, so copies are in unpinned memory"
    ]
    assert manager(tmp_path).find().step == 2


def test_a_folder_that_cannot_be_written(tmp_path):
    place = tmp_path / "checkpoint"
    place.write_text("a file")
    with pytest.raises(UserError, match=r"checkpoint\.folder"):
        manager(place)
    place.unlink()
    one = manager(place)
    place.rmdir()
    place.write_text("a file")
    with pytest.raises(CheckpointError, match="step 1 was not saved") as caught:
        one.save(1, Run().states, {}, last=True)
    assert str(place) in str(caught.value)
