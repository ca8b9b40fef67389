"""Bytes of the symmetric heap of a run, computed exactly from the largest calls of `fully_shard`."""

from __future__ import annotations

from quadriga.comm.backend import BACKENDS
from quadriga.comm.heap import Heap
from quadriga.config import Run
from quadriga.planning.setup import Setup


def heap_of(run: Run, backend: str | None = None) -> Heap | None:
    """The heap, equal on all ranks; None if `backend` (default: the run's) needs none.

    The parameters of a unit are gathered in the compute dtype, and their gradients scattered in the reduce dtype. Both
    include the padding of the last shard.
    """
    facts = BACKENDS.get(backend or run.spec.backend or "")
    if facts is None or facts.transport is None:
        return None
    setup = Setup(run)
    units = [unit for stage in setup.stages for unit, count in stage.units() if count]
    numbers = max(unit.gathered(setup.degrees.tp, setup.shards) for unit in units)
    return Heap(gather=setup.itemsize * numbers, scatter=setup.reduce_bytes * numbers)
