"""The mesh: who stands where, who reads which rows, and what a reduction covers. And the process group's life."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from torch._C._distributed_c10d import Backend
from torch.distributed.device_mesh import DeviceMesh

from quadriga.comm import collectives, process_group
from quadriga.comm import mesh as mesh_module
from quadriga.comm.mesh import build_mesh, init_mesh
from quadriga.config.run_spec import Degrees
from quadriga.config.schema import Comm
from quadriga.json_collectives import all_gather_json, broadcast_json
from quadriga.metrics.step_metrics import StepMetrics
from quadriga.train.step import train_step


def positions(all_degrees: list[Degrees]) -> list[dict[str, Any]]:
    found = []
    for degrees in all_degrees:
        mesh = build_mesh(degrees, "cpu")
        rank = torch.tensor(float(dist.get_rank()))
        found.append(
            {
                "batch": (mesh.batch_rank, mesh.batch_degree),
                "fsdp": tuple(mesh.fsdp.shape),
                "fsdp_ranks": mesh.fsdp.mesh.tolist(),
                "axes": dict(zip(mesh.device_mesh.mesh_dim_names, mesh.device_mesh.shape, strict=True)),
                "sum": mesh.reduce_sum(rank).item(),
                "stages": mesh.sum_over_stages(rank).item(),
                "tp_ranks": mesh.tp.mesh.tolist(),
                "kept": rank.item(),
            }
        )
    return found


def meshes_per_step() -> int:
    """How many meshes torch builds during the last step of a run with context parallelism."""
    made: list[object] = []
    cut = DeviceMesh._create_sub_mesh

    def train_counting(*args: Any) -> StepMetrics:
        made.clear()
        return train_step(*args)

    def count(*args: Any) -> DeviceMesh:
        made.append(args[1:])
        return cut(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceMesh, "_create_sub_mesh", count)
        patch.setattr(tiny, "train_step", train_counting)
        tiny.train(tiny.Case(Degrees(cp=2)))
    return len(made)


def test_a_step_builds_no_mesh() -> None:
    assert run_ranks(meshes_per_step, 2) == [0, 0]


def split_warnings() -> tuple[str, str]:
    """What reaches the standard error from gloo's split with options of NCCL: as such, and in `init_mesh`."""

    def split(*_: Any, **__: Any) -> DeviceMesh:
        assert dist.group.WORLD is not None
        dist.group.WORLD.split_group([0], timedelta(seconds=5), Backend.Options("nccl"), "part", "a part")
        return cast(DeviceMesh, "made")

    def written(call: Callable[[], Any]) -> str:
        with tempfile.TemporaryFile("w+") as file:
            before = os.dup(2)
            os.dup2(file.fileno(), 2)
            try:
                call()
            finally:
                os.dup2(before, 2)
            file.seek(0)
            return file.read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_module, "init_device_mesh", split)
        return written(split), written(lambda: init_mesh("cpu", (1,), ("a",)))


def test_gloo_does_not_warn_of_nccls_options() -> None:
    """Torch splits the default group like this on CUDA."""
    plain, in_init = run_ranks(split_warnings, 1)[0]
    assert "Tried to pass options to ProcessGroupGloo::split" in plain
    assert in_init == ""


def test_layouts_of_four_ranks() -> None:
    fsdp, hsdp, ddp = Degrees(dp_shard=4), Degrees(dp_replicate=2, dp_shard=2), Degrees(dp_replicate=4)
    context, tensor, pipeline = Degrees(dp_shard=2, cp=2), Degrees(dp_shard=2, tp=2), Degrees(dp_shard=2, pp=2)
    by_rank = run_ranks(positions, 4, [fsdp, hsdp, ddp, context, tensor, pipeline])
    by_layout = dict(zip(("fsdp", "hsdp", "ddp", "cp", "tp", "pp"), zip(*by_rank, strict=True), strict=True))

    assert {name: ranks[0]["fsdp"] for name, ranks in by_layout.items()} == {
        "fsdp": (4,),
        "hsdp": (2, 2),
        "ddp": (4, 1),
        "cp": (4,),
        "tp": (2,),
        "pp": (2,),
    }
    for name in ("fsdp", "hsdp", "ddp"):
        assert [rank["batch"] for rank in by_layout[name]] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [rank["batch"] for rank in by_layout["cp"]] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [rank["batch"] for rank in by_layout["tp"]] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [rank["batch"] for rank in by_layout["pp"]] == [(0, 2), (1, 2), (0, 2), (1, 2)]

    # Losses add up over all axes but tp, whose ranks hold the same; only the last stage of a pipeline adds any.
    assert [rank["sum"] for rank in by_layout["cp"]] == [6.0] * 4
    assert [rank["sum"] for rank in by_layout["tp"]] == [2.0, 4.0, 2.0, 4.0]
    assert [rank["sum"] for rank in by_layout["pp"]] == [6.0] * 4
    assert [rank["stages"] for rank in by_layout["pp"]] == [2.0, 4.0, 2.0, 4.0]
    assert [rank["tp_ranks"] for rank in by_layout["tp"]] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["fsdp_ranks"] for rank in by_layout["tp"]] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["kept"] for rank in by_layout["hsdp"]] == [0.0, 1.0, 2.0, 3.0]
    assert by_layout["hsdp"][0]["axes"] == {"pp": 1, "dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 1}


def test_one_rank_reduces_to_itself() -> None:
    alone = run_ranks(positions, 1, [Degrees()])[0][0]
    assert (alone["fsdp"], alone["batch"], alone["sum"], alone["stages"]) == ((1,), (0, 1), 0.0, 0.0)


def test_degrees_must_match_the_ranks() -> None:
    with pytest.raises(RankError, match="the degrees need 3 ranks, but 2 were started"):
        run_ranks(positions, 2, [Degrees(dp_shard=3)])


def life_of_a_group() -> dict[str, Any]:
    comm = Comm(init_timeout_seconds=50, train_timeout_seconds=20, trace_buf_size=64)
    device = process_group.start(comm, "gloo")
    before = dist.distributed_c10d._get_default_timeout(dist.Backend("gloo"))
    mesh = build_mesh(Degrees(dp_shard=dist.get_world_size()), "cpu")
    process_group.tighten_timeouts(comm)
    host = process_group.host_group()
    gathered = all_gather_json({"rank": collectives.rank()})
    received = broadcast_json(f"from {collectives.rank()}")
    options = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options
    recorded = torch._C._distributed_c10d._dump_fr_trace_json()
    result = {
        "device": str(device),
        "gathered": gathered,
        "received": received,
        "timeout": options._timeout,
        "recorded": b"barrier" in recorded,
        "host": host is None or host.size(),
        "loss ranks": mesh.loss_group.size(),
        "default": before > timedelta(0),
    }
    process_group.stop()
    process_group.stop()  # twice is once
    assert not dist.is_initialized()
    return result


def alone() -> dict[str, Any]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    return life_of_a_group()


def test_a_process_group_starts_tightens_and_stops() -> None:
    for rank, result in enumerate(run_ranks(life_of_a_group, 2, backend=None)):
        assert result["device"] == "cpu", rank
        assert result["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert result["received"] == "from 0"
        assert result["timeout"] == timedelta(seconds=20)
        assert result["recorded"]
        assert (result["host"], result["loss ranks"]) == (2, 2)


def test_one_rank_needs_no_rendezvous() -> None:
    result = run_ranks(alone, 1, backend=None)[0]
    assert (result["gathered"], result["received"], result["host"]) == ([{"rank": 0}], "from 0", True)


def timeouts_of_a_start() -> list[timedelta]:
    """Of the groups of all axes, before the first step."""
    comm = Comm(init_timeout_seconds=50)
    process_group.start(comm, "gloo")
    mesh = build_mesh(Degrees(dp_shard=2, tp=2), "cpu")
    process_group.set_start_timeouts(comm)
    process_group.set_start_timeouts(comm)
    groups = [mesh.loss_group, mesh.tp.get_group(), mesh.fsdp.get_group("dp_shard")]
    found = [cast(Any, group)._get_backend(torch.device("cpu")).options._timeout for group in groups]
    process_group.stop()
    return found


def test_a_start_limits_the_groups_of_all_axes() -> None:
    for found in run_ranks(timeouts_of_a_start, 4, backend=None):
        assert found == [timedelta(seconds=50)] * 3


def wait_for_nobody() -> None:
    comm = Comm(train_timeout_seconds=1)
    process_group.start(comm, "gloo")
    process_group.tighten_timeouts(comm)
    if collectives.rank() == 0:
        collectives.barrier()
    else:
        import time

        time.sleep(100)


def test_a_rank_that_stays_away_is_given_up_after_the_training_timeout() -> None:
    with pytest.raises(RankError, match=r"(?i)rank 0 of 2 failed(.|\n)*time"):
        run_ranks(wait_for_nobody, 2, backend=None, timeout=60)
