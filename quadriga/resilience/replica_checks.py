"""Checks that the replicas of the weights are equal to the bit (`health.replica_check_interval`).

Replicas hold the same weights and receive the same gradients. Only broken hardware or a software error makes them
differ, and no loss shows it. Each rank hashes the bits of its shards on the device, and the hashes are compared along
`dp_replicate`. The cost is one pass over the weights and two small collectives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from quadriga.comm import collectives
from quadriga.comm.mesh import Mesh
from quadriga.json_collectives import all_gather_json
from quadriga.log import logger
from quadriga.resilience.bad_steps import CommonFault
from quadriga.tensors import to_local
from quadriga.units import format_some, strip_wrappers

BITS = {1: torch.int8, 2: torch.int16}  # by bytes per number; wider numbers are read as several of 32 bits
BLOCK = 1 << 22  # numbers hashed at once: a few temporary tensors of 32 MiB
MAX_NAMES = 4

ReplicaReport = tuple[
    Sequence[int], dict[str, int]
]  # a rank's coordinate in the mesh; the hashes of its shards that differ, by name


class ReplicaCheck:
    """Compares every `interval` steps; never if `interval` is 0 or there is only one copy."""

    def __init__(self, interval: int, parts: Sequence[torch.nn.Module], mesh: Mesh) -> None:
        copies = mesh.device_mesh["dp_replicate"].size()
        if interval > 0 and copies == 1:
            logger.info("health.replica_check_interval: there is only one copy of the weights, so nothing is compared")
        self._interval = interval if copies > 1 else 0
        self._mesh = mesh
        self._named = [(strip_wrappers(name), p) for part in parts for name, p in part.named_parameters()]

    def is_due(self, step: int) -> bool:
        return self._interval > 0 and step % self._interval == 0

    @torch.no_grad()
    def compare(self, step: int) -> None:
        """Call on all ranks. If copies differ, raises CommonFault on all ranks, with replica, rank and parameter."""
        hashes = hashes_of([parameter for _, parameter in self._named])
        group = self._mesh.device_mesh.get_group("dp_replicate")
        # The maximum of the hashes and of their complements gives the maximum and the minimum in one collective.
        greatest, complement = collectives.all_reduced(torch.stack((hashes, ~hashes)), dist.ReduceOp.MAX, group)
        differs = greatest != ~complement
        if self._mesh.all_gather_numbers(differs.any().int()).any():
            places = differs.nonzero().flatten().tolist()
            own = {self._named[place][0]: int(hashes[place]) for place in places}
            coordinate = list(self._mesh.device_mesh.get_coordinate() or ())
            reports = all_gather_json([coordinate, own])
            raise CommonFault("\n".join(_message_lines(step, reports)))


def hashes_of(parameters: Sequence[Tensor]) -> Tensor:
    """A hash of the bits of this rank's shard of each parameter, in order: int64, shape (parameters,), on their device.

    The hash is the sum modulo 2^64 of each number times an odd weight of its position. If one number changed, the hash
    always differs, because an odd weight is invertible modulo 2^64. If several changed, it is equal once in 2^64 cases.
    """
    shards = [_bits(parameter) for parameter in parameters]
    places = torch.arange(min(max(map(len, shards)), BLOCK), device=shards[0].device)
    weights = ((places * -0x61C8864680B583EB) ^ (places << 7)) | 1
    hashes = []
    for bits in shards:
        total = weights.new_zeros(())
        for block in bits.split(BLOCK):
            total = total * 0x5851F42D4C957F2D + (block * weights[: len(block)]).sum()
        hashes.append(total)
    return torch.stack(hashes)


def _bits(parameter: Tensor) -> Tensor:
    """This rank's shard as integers, flattened."""
    local = to_local(parameter).detach().flatten()
    return local.view(BITS.get(local.element_size(), torch.int32))


def _message_lines(step: int, reports: Sequence[ReplicaReport]) -> Iterator[str]:
    names = list(dict.fromkeys(name for _, hashes in reports for name in hashes))
    yield f"step {step}: copies of the weights differ, but must be equal to the bit: {format_some(names, MAX_NAMES)}"
    outliers = [rank for rank in range(len(reports)) if _is_outlier(rank, reports)]
    for rank in outliers:
        yield f"rank {rank} (replica {reports[rank][0][1]}) has other weights than most replicas"
    if not outliers:
        ranks = ", ".join(str(rank) for rank, (_, hashes) in enumerate(reports) if hashes)
        yield f"between ranks {ranks}: there are too few copies to find the wrong one"
    yield "checkpoints since the last comparison without a difference may have wrong weights"
    yield "to do: check the devices of these ranks; resume from an earlier checkpoint: --checkpoint.load_step"


def _is_outlier(rank: int, reports: Sequence[ReplicaReport]) -> bool:
    """Whether a rank's hash of some shard differs from that of the majority of its copies."""
    coordinate, own = reports[rank]
    copies = [hashes for other, hashes in reports if _shard(other) == _shard(coordinate)]
    for name, value in own.items():
        (most, votes), *_ = Counter(hashes[name] for hashes in copies).most_common(1)
        if 2 * votes > len(copies) and value != most:
            return True
    return False


def _shard(coordinate: Sequence[int]) -> list[int]:
    """A coordinate of the mesh (pp, dp_replicate, dp_shard, cp, tp) without dp_replicate."""
    return [*coordinate[:1], *coordinate[2:]]
