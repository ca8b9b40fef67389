"""A checkpoint of torchtitan on real ranks: every layout gets the rows of one rank, of weights and of both moments.

With three data-parallel ranks a shard ends in the middle of a head; the checkpoint of two ranks is cut between heads.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from pipelines import pipeline, read_run
from ranks import run_ranks
from tiny import to_full_tensor
from torchtitan_checkpoints import SIZES, expected, unpack

from quadriga.checkpoint.load import read_titan
from quadriga.checkpoint.tensors import ModelState, OptimizerState
from quadriga.comm.mesh import build_mesh
from quadriga.models.registry import tensor_names
from quadriga.train.build import build_parts, build_state

FSDP, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
LAYOUTS = {
    "fsdp 2": (2, (f"{FSDP}=2",)),
    "fsdp 3": (3, (f"{FSDP}=3", "--training.global_batch_size=12")),
    "tp 2": (2, (f"{TP}=2",)),
    "pp 2": (2, pipeline(2)),
    "fsdp 2 x tp 2": (4, (f"{FSDP}=2", f"{TP}=2")),
}


def load(place: str, arguments: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What this rank's part of the run has after reading, whole."""
    run = read_run((*arguments, *SIZES), dist.get_world_size())
    parts = build_parts(run, build_mesh(run.spec.degrees, "cpu"), torch.device("cpu"))
    state = build_state(run, parts, None, torch.device("cpu"))
    states = {"model": ModelState(parts), "optimizer": OptimizerState(parts, [state.optimizer])}
    held = {f"{part}.{name}": value for part, one in states.items() for name, value in one.state_dict().items()}
    read_titan(place, held, tensor_names(run.spec.model), dist.new_group(backend="gloo"))
    return {name: to_full_tensor(value) for name, value in held.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved", ["one_rank", "two_ranks"])
def test_every_layout_reads_the_same_rows(tmp_path, saved, layout):
    ranks, arguments = LAYOUTS[layout]
    step = unpack(saved, tmp_path) / ("step-3" if saved == "one_rank" else "step-2")
    found: dict[str, torch.Tensor] = {}
    for one in run_ranks(load, ranks, str(step), arguments):
        found |= one
    wanted = expected(step)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
