"""Checkpoints on real ranks: saved on one layout, loaded on another, and written while training goes on."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.manager import CheckpointManager
from quadriga.checkpoint.tensors import ModelState, OptimizerState
from quadriga.config.schema import Checkpoint

STEPS = 4


class Net(nn.Module):
    """Widths that no number of ranks divides, so that shards are uneven and some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(7, 7) for i in range(2)})
        self.norm = nn.LayerNorm(7)
        self.output = nn.Linear(7, 3, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = torch.relu(layer(x))
        return self.output(self.norm(x))


def build(shape: tuple[int, ...]) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    if shape:
        names = ("dp_replicate", "dp_shard")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model, FSDPModule)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def train(model: Net, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Every rank sees the same rows, so that all layouts take the same steps."""
    for step in range(first, last + 1):
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """Everything that a checkpoint must bring back, gathered whole."""
    parts = {"model": ModelState([model]), "optimizer": OptimizerState([model], [optimizer])}
    flat = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.state_dict().items()}
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in flat.items()}
    return {name: value.flatten().tolist() for name, value in whole.items()}


def states(model: Net, optimizer: torch.optim.Optimizer) -> dict:
    return {"model": ModelState([model]), "optimizer": OptimizerState([model], [optimizer])}


def manager_for(folder: str, **keys) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, **keys), folder, dist.new_group(backend="gloo"))


def train_and_save(folder: str, shape: tuple[int, ...]) -> tuple[dict, dict]:
    """Values at the save, and after two more steps."""
    model, optimizer = build(shape)
    train(model, optimizer, 1, STEPS)
    manager_for(folder).save(STEPS, states(model, optimizer), {"train_state": {"tokens": 96}})
    saved = values(model, optimizer)
    train(model, optimizer, STEPS + 1, STEPS + 2)
    return saved, values(model, optimizer)


def load_and_go_on(folder: str, shape: tuple[int, ...]) -> tuple[dict, dict, dict]:
    model, optimizer = build(shape)
    manager = manager_for(folder) if dist.is_initialized() else CheckpointManager(Checkpoint(enable=True), folder)
    found = manager.find()
    manager.load(found, states(model, optimizer))
    loaded = values(model, optimizer)
    train(model, optimizer, STEPS + 1, STEPS + 2)
    return loaded, values(model, optimizer), found.extra


def same_bits(one: dict, other: dict) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_saved_on_two_ranks_loaded_on_two_four_and_one(tmp_path):
    saved, further = run_ranks(train_and_save, 2, str(tmp_path), (2,))[0]
    assert any(value != 0 for value in saved["optimizer.output.weight.exp_avg"])
    assert saved["optimizer.output.weight.step"] == [float(STEPS)]

    again = run_ranks(load_and_go_on, 2, str(tmp_path), (2,))
    for loaded, gone_on, extra in again:  # the same layout: the same bits, also of what follows
        assert same_bits(loaded, saved)
        assert same_bits(gone_on, further)
        assert extra == {"train_state": {"tokens": 96}}

    for shape in ((4,), (2, 2)):
        for loaded, gone_on, _ in run_ranks(load_and_go_on, 4, str(tmp_path), shape):
            assert same_bits(loaded, saved)
            assert gone_on["model.output.weight"] == pytest.approx(further["model.output.weight"], abs=1e-6)

    loaded, gone_on, _ = load_and_go_on(str(tmp_path), ())  # one plain process, no process group
    assert same_bits(loaded, saved)
    assert gone_on["model.output.weight"] == pytest.approx(further["model.output.weight"], abs=1e-6)


def save_in_the_background(folder: str) -> dict:
    """Train on the default group while saves run: what is written must be the state at the save, not later."""
    model, optimizer = build((2,))
    manager = manager_for(folder, async_mode="async", keep_latest_k=2)
    kept = {}
    for step in range(1, 41):
        train(model, optimizer, step, step)
        if step % 10 == 0:
            manager.save(step, states(model, optimizer), {"train_state": {"step": step}})
            kept[step] = values(model, optimizer)
    manager.close()
    other, other_optimizer = build((2,))
    found = manager.find()
    manager.load(found, states(other, other_optimizer))
    return {"step": found.step, "same": same_bits(values(other, other_optimizer), kept[found.step])}


def test_a_save_in_the_background_holds_the_state_of_its_step(tmp_path):
    assert run_ranks(save_in_the_background, 2, str(tmp_path)) == [{"step": 40, "same": True}] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-30", "step-40"]


def save_on_a_full_disk(folder: str, mode: str) -> tuple[str, list[str]]:
    """The disk of the second rank is full: there no file may grow beyond a limit, which is the same to a writer."""
    model, optimizer = build((2,))
    manager = manager_for(folder, async_mode=mode, on_save_failure="stop")
    manager.save(1, states(model, optimizer), {})
    manager.close()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    message = ""
    try:
        manager.save(2, states(model, optimizer), {})
        manager.close()
    except CheckpointError as error:
        message = str(error)
    dist.barrier()
    return message, sorted(os.listdir(folder))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_leaves_the_older_checkpoints_whole(tmp_path, mode):
    for message, left in run_ranks(save_on_a_full_disk, 2, str(tmp_path), mode):
        assert message.startswith("step 2 was not saved")
        assert f"rank 1: [Errno 27] File too large: '{tmp_path}/.step-2.saving/__1_*'" in message
        assert f"complete in {tmp_path}: step-1\n" in message
        assert "free space there" in message
        assert left == ["step-1"], "the room of the failed save is given back"


def save_where_nothing_can_be_written(folder: str) -> str:
    model, optimizer = build((2,))
    manager = manager_for(folder)
    if dist.get_rank() == 0:
        Path(folder).rmdir()
        Path(folder).write_text("a file where a folder should be")
    with pytest.raises(CheckpointError) as caught:
        manager.save(1, states(model, optimizer), {}, last=True)
    return str(caught.value)


def test_a_failed_save_is_reported_on_every_rank(tmp_path):
    folder = tmp_path / "checkpoint"
    for message in run_ranks(save_where_nothing_can_be_written, 2, str(folder)):
        assert message.startswith("step 1 was not saved")
        assert str(folder) in message


def load_another_model(folder: str) -> None:
    model, optimizer = build((2,))
    model.layers["2"] = nn.Linear(7, 7)
    manager = manager_for(folder)
    manager.load(manager.find(), states(model, optimizer))


def test_another_model_is_refused_by_name(tmp_path):
    run_ranks(train_and_save, 2, str(tmp_path), (2,))
    with pytest.raises(RankError, match=r"the checkpoint lacks model\.layers\.2"):
        run_ranks(load_another_model, 2, str(tmp_path))
