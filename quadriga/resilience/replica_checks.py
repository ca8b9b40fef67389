"""Copies of the weights that must be equal to the bit: are they? (`health.replica_check_interval`)

Replicas hold the same weights and get the same gradients, so nothing but broken hardware or a fault of software drives
them apart, and no loss shows it. Each rank hashes the bits of its shards on the device; the hashes are compared along
`dp_replicate`. That is one pass over the weights and two small collectives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from quadriga.checkpoint.states import strip_wrappers
from quadriga.comm import collectives
from quadriga.comm.mesh import Mesh
from quadriga.json_collectives import all_gather_json
from quadriga.log import logger
from quadriga.resilience.bad_steps import CommonFault
from quadriga.units import format_some

BITS = {1: torch.int8, 2: torch.int16}  # by bytes; wider numbers are read as several of 32 bits
BLOCK = 1 << 22  # numbers that are hashed at once: 32 MiB of working memory, a few times
MAX_NAMES = 4

ReplicaReport = tuple[
    Sequence[int], dict[str, int]
]  # a rank's place in the mesh; the hashes of shards that differ, by name


class ReplicaCheck:
    """Compares every `interval` steps; never where `interval` is 0 or there is one copy alone."""

    def __init__(self, interval: int, parts: Sequence[torch.nn.Module], mesh: Mesh) -> None:
        copies = mesh.device_mesh["dp_replicate"].size()
        if interval > 0 and copies == 1:
            logger.info(
                "health.replica_check_interval: there is one copy of the weights, and nothing to compare it with"
            )
        self._interval = interval if copies > 1 else 0
        self._mesh = mesh
        self._named = [(strip_wrappers(name), p) for part in parts for name, p in part.named_parameters()]

    def is_due(self, step: int) -> bool:
        return self._interval > 0 and step % self._interval == 0

    @torch.no_grad()
    def compare(self, step: int) -> None:
        """Call on all ranks. Raises CommonFault on all, naming replica, rank and parameter, where copies differ."""
        hashes = hashes_of([parameter for _, parameter in self._named])
        group = self._mesh.device_mesh.get_group("dp_replicate")
        # The greatest of the hashes and of their complements: the greatest and the least, in one collective.
        greatest, complement = collectives.all_reduced(torch.stack((hashes, ~hashes)), dist.ReduceOp.MAX, group)
        differs = greatest != ~complement
        if collectives.all_gather_numbers(differs.any().int()).any():
            places = differs.nonzero().flatten().tolist()
            own = {self._named[place][0]: int(hashes[place]) for place in places}
            coordinate = list(self._mesh.device_mesh.get_coordinate() or ())
            reports = all_gather_json([coordinate, own])
            raise CommonFault("\n".join(_message_lines(step, reports)))


def hashes_of(parameters: Sequence[Tensor]) -> Tensor:
    """A hash of the bits of this rank's shard of each, in their order: int64, shape (parameters,), on their device.

    Each number is multiplied by an odd one that belongs to its place, and all are added up, modulo 2^64. One number
    that changed shows for certain, since an odd number divides no power of two; several do, but once in 2^64.
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
    """This rank's shard as integers in one row."""
    local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach().flatten()
    return local.view(BITS.get(local.element_size(), torch.int32))


def _message_lines(step: int, reports: Sequence[ReplicaReport]) -> Iterator[str]:
    names = list(dict.fromkeys(name for _, hashes in reports for name in hashes))
    yield f"step {step}: copies of the weights differ, which must be equal to the bit: {format_some(names, MAX_NAMES)}"
    outliers = [rank for rank in range(len(reports)) if _is_outlier(rank, reports)]
    for rank in outliers:
        yield f"rank {rank} (replica {reports[rank][0][1]}) holds other weights than most replicas do"
    if not outliers:
        ranks = ", ".join(str(rank) for rank, (_, hashes) in enumerate(reports) if hashes)
        yield f"between ranks {ranks}: of so few copies none can say which is right"
    yield "saves since the last comparison that found all equal may hold wrong weights"
    yield "to do: have the devices of these ranks checked; go on from an earlier save: --checkpoint.load_step"


def _is_outlier(rank: int, reports: Sequence[ReplicaReport]) -> bool:
    """Whether a rank's hash of some shard is unlike that of most ranks that hold a copy of it."""
    coordinate, own = reports[rank]
    copies = [hashes for other, hashes in reports if _shard(other) == _shard(coordinate)]
    for name, value in own.items():
        (most, votes), *_ = Counter(hashes[name] for hashes in copies).most_common(1)
        if 2 * votes > len(copies) and value != most:
            return True
    return False


def _shard(coordinate: Sequence[int]) -> list[int]:
    """A place in the mesh (pp, dp_replicate, dp_shard, cp, tp) without which copy it is."""
    return [*coordinate[:1], *coordinate[2:]]
