"""How much memory a run needs that its ranks may write into: the largest calls of `fully_shard`, exactly."""

from __future__ import annotations

from quadriga.comm.backend import BACKENDS
from quadriga.comm.heap import Heap
from quadriga.config import Run
from quadriga.planning.setup import Setup


def heap_of(run: Run, backend: str | None = None) -> Heap | None:
    """The heap of every rank, alike on all of them; None where `backend` (or that of the run) does without.

    A unit's parameters are gathered in the computing dtype and their gradients scattered in the reduce dtype, both with
    the rows that fill up the last shard.
    """
    facts = BACKENDS.get(backend or run.spec.backend or "")
    if facts is None or not facts.with_slots:
        return None
    setup = Setup(run)
    units = [unit for stage in setup.stages for unit, count in stage.units() if count]
    numbers = max(unit.gathered(setup.degrees.tp, setup.shards) for unit in units)
    return Heap(gather=setup.itemsize * numbers, scatter=setup.reduce_bytes * numbers)
