"""Where each rank stands: the named axes of a run, and what is derived from them, all created here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from quadriga.comm.collectives import all_reduced
from quadriga.config.run_spec import Degrees

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run as a box of five axes, outermost first: pp, dp_replicate, dp_shard, cp, tp.

    `device_mesh` has all five by name, size 1 included. `fsdp` is what `fully_shard` takes: (shard,) or
    (replicate, shard), where the context axis has joined the shard axis; `tp` is of the same root mesh, so that a
    parameter may be cut over both. `batch_rank` of `batch_degree` says which rows
    of the global batch this rank reads; ranks along cp, tp and pp share theirs. `loss_group` holds the ranks whose
    losses add up to the loss of the global batch: all but those along tp, which know the same (a rank without the last
    pipeline stage adds 0).
    """

    device_mesh: DeviceMesh
    fsdp: DeviceMesh
    tp: DeviceMesh
    batch_rank: int
    batch_degree: int
    loss_group: dist.ProcessGroup

    @property
    def cp(self) -> DeviceMesh:
        return self.device_mesh["cp"]

    @property
    def reads_rows(self) -> bool:
        """Whether this rank is the first of those that read the same rows."""
        return all(self.device_mesh.get_local_rank(axis) == 0 for axis in ("pp", "cp", "tp"))

    @property
    def pp(self) -> DeviceMesh:
        return self.device_mesh["pp"]

    def groups(self) -> Iterator[tuple[str, dist.ProcessGroup]]:
        """Every group of more than one rank that this rank is in, under its axis' name; a name may come twice.

        Beside the five axes: `world`, `loss`, and `shard`, which is dp_shard and cp as one.
        """
        world = dist.group.WORLD
        assert world is not None
        named = [("world", world), ("loss", self.loss_group)]
        named += [(axis, self.device_mesh.get_group(axis)) for axis in self.device_mesh.mesh_dim_names or ()]
        for axis in self.fsdp.mesh_dim_names or ():
            named.append(("shard" if axis == "dp_shard" else axis, self.fsdp.get_group(axis)))
        named.append(("tp", self.tp.get_group()))
        return ((axis, group) for axis, group in named if group.size() > 1)

    def reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over `loss_group`, on every rank; `tensor` itself is left alone."""
        return all_reduced(tensor, dist.ReduceOp.SUM, self.loss_group)

    def reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduced(tensor, dist.ReduceOp.MAX, self.loss_group)

    def loss_rows(self, by_rank: torch.Tensor) -> torch.Tensor:
        """Of a table with a row a rank, the rows of one `loss_group`, the same one on every rank."""
        return by_rank[:: self.tp.size()]  # the innermost axis

    def sum_over_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the pipeline axis, on every rank; `tensor` itself is left alone."""
        return all_reduced(tensor, dist.ReduceOp.SUM, self.device_mesh.get_group("pp"))


def build_mesh(degrees: Degrees, device_type: str) -> Mesh:
    """Name the axes. Needs the default process group, of `degrees.world_size` ranks.

    Data parallelism by mesh: FSDP is (S,), HSDP is (R, S), DDP is (N, 1).

    Raises:
        RuntimeError: the process group has another number of ranks.
    """
    if dist.get_world_size() != degrees.world_size:
        raise RuntimeError(f"the degrees ask for {degrees.world_size} ranks, and {dist.get_world_size()} are here")
    shape = (degrees.pp, degrees.dp_replicate, degrees.dp_shard, degrees.cp, degrees.tp)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    ranks_of_loss = (degrees.pp * degrees.batch * degrees.cp, degrees.tp)
    loss = init_device_mesh(device_type, ranks_of_loss, mesh_dim_names=("loss", "tp"))
    parameters = _parameter_mesh(degrees, device_mesh)
    replica, shard = device_mesh.get_local_rank("dp_replicate"), device_mesh.get_local_rank("dp_shard")
    return Mesh(
        device_mesh=device_mesh,
        fsdp=parameters["dp_replicate", "dp_shard"] if degrees.dp_replicate > 1 else parameters["dp_shard"],
        tp=parameters["tp"],
        batch_rank=replica * degrees.dp_shard + shard,
        batch_degree=degrees.batch,
        loss_group=loss.get_group("loss"),
    )


def _parameter_mesh(degrees: Degrees, device_mesh: DeviceMesh) -> DeviceMesh:
    """The axes that parameters are spread over; cp, along which they are the same, is one more to shard them over."""
    if degrees.cp == 1:
        return device_mesh
    # cp stands right beside dp_shard, so that a second mesh with the two as one axis numbers the ranks alike
    # (flattening is private in torch).
    shape = (degrees.pp, degrees.dp_replicate, degrees.dp_shard * degrees.cp, degrees.tp)
    return init_device_mesh(device_mesh.device_type, shape, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
