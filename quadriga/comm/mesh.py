"""The device mesh of a run: its named axes, and the groups and coordinates that follow from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from quadriga.comm.collectives import all_reduced
from quadriga.config.run_spec import Degrees

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run as a mesh of five axes, outermost first: pp, dp_replicate, dp_shard, cp, tp.

    `device_mesh` has all five axes by name, also those of size 1. `fsdp` is the mesh for `fully_shard`: (shard,) or
    (replicate, shard), where shard is dp_shard and cp as one axis. `tp` has the same root mesh as `fsdp`, so that a
    parameter can be sharded over both. `batch_rank` of `batch_degree` selects the rows of the global batch that this
    rank reads; ranks along cp, tp and pp read the same rows. `loss_group`: the ranks whose losses add up to the loss of
    the global batch. That is one rank per tp group, because all ranks of a tp group have the same loss; a rank without
    the last pipeline stage adds 0.
    """

    device_mesh: DeviceMesh
    fsdp: DeviceMesh
    tp: DeviceMesh
    batch_rank: int
    batch_degree: int
    loss_group: dist.ProcessGroup

    # torch builds a mesh anew each time that one of its axes is named, and every step names some.
    @cached_property
    def cp(self) -> DeviceMesh:
        return self.device_mesh["cp"]

    @cached_property
    def reads_rows(self) -> bool:
        """Whether this rank is the first of the ranks that read the same rows."""
        return all(self.device_mesh.get_local_rank(axis) == 0 for axis in ("pp", "cp", "tp"))

    @cached_property
    def pp(self) -> DeviceMesh:
        return self.device_mesh["pp"]

    def groups(self) -> Iterator[tuple[str, dist.ProcessGroup]]:
        """Every group of more than one rank that contains this rank, with its axis name; a name may occur twice.

        Besides the five axes: `world`, `loss`, and `shard`, which is dp_shard and cp as one.
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
        """The sum over `loss_group`, on every rank, as a new tensor."""
        return all_reduced(tensor, dist.ReduceOp.SUM, self.loss_group)

    def loss_rows(self, by_rank: torch.Tensor) -> torch.Tensor:
        """Of a table with one row per rank, the rows of one `loss_group`, the same on every rank."""
        return by_rank[:: self.tp.size()]  # the innermost axis

    def all_gather_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers of every rank, bit for bit, on every rank: shape (ranks, *shape), float or integer.

        The implementation is an all-reduce of tables that are 0 except in a rank's own row. Its latency grows with the
        logarithm of the number of ranks; that of an all-gather grows linearly.
        """
        ranks = dist.get_world_size()
        table = torch.zeros(ranks, *numbers.shape, dtype=numbers.dtype, device=numbers.device)
        table[dist.get_rank()] = numbers
        if ranks > 1:
            dist.all_reduce(table)
        return table

    def sum_over_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the pipeline axis, on every rank, as a new tensor."""
        return all_reduced(tensor, dist.ReduceOp.SUM, self.device_mesh.get_group("pp"))


def build_mesh(degrees: Degrees, device_type: str) -> Mesh:
    """Create the mesh. Needs the default process group, with `degrees.world_size` ranks.

    `fsdp` by kind of data parallelism: FSDP is (S,), HSDP is (R, S), DDP is (N, 1).

    Raises:
        RuntimeError: the process group has another number of ranks.
    """
    if dist.get_world_size() != degrees.world_size:
        raise RuntimeError(f"the degrees need {degrees.world_size} ranks, but {dist.get_world_size()} were started")
    shape = (degrees.pp, degrees.dp_replicate, degrees.dp_shard, degrees.cp, degrees.tp)
    device_mesh = init_mesh(device_type, shape, AXES)
    ranks_of_loss = (degrees.pp * degrees.batch * degrees.cp, degrees.tp)
    loss = init_mesh(device_type, ranks_of_loss, ("loss", "tp"))
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
    """The axes for parameters. cp joins dp_shard, because parameters are equal along cp and can be sharded over it."""
    if degrees.cp == 1:
        return device_mesh
    # cp is the axis after dp_shard, so a second mesh with the two as one axis has the ranks in the same order
    # (flattening a mesh is private in torch).
    shape = (degrees.pp, degrees.dp_replicate, degrees.dp_shard * degrees.cp, degrees.tp)
    return init_mesh(device_mesh.device_type, shape, ("pp", "dp_replicate", "dp_shard", "tp"))


def init_mesh(device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """torch's `init_device_mesh`, without a warning of gloo for each axis.

    On CUDA it splits the default group, with NCCL's options for all backends. gloo ignores them, as it should, and
    warns on each rank (`ProcessGroupGloo::split`). The warning is one of C++ and goes to the standard error directly,
    except inside of a call such as `Tensor.apply_`, which hands it to Python's filters.
    """
    made: list[DeviceMesh] = []

    def make(unused: float) -> float:
        made.append(init_device_mesh(device_type, shape, mesh_dim_names=names))
        return unused

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tried to pass options to ProcessGroupGloo::split")
        torch.zeros(1).apply_(make)
    return made[0]
