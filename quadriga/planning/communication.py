"""The collectives of a rank in one step, by mesh axis and kind: number of calls and bytes. Exact arithmetic. From them
follow the symmetric heap of a run, and the share of the bytes that each backend carries.

The bytes of a call are those of its largest input or output tensor: the output of an all-gather, the input of a
reduce-scatter. `wire_bytes` are the bytes that a rank sends over the network. Tests compare calls and bytes with those
recorded on real ranks and on fake process groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from quadriga.comm.backend import BACKENDS, backend_by_axis, format_backends
from quadriga.comm.heap import Heap
from quadriga.config import Run
from quadriga.planning.activations import FLOAT32_BYTES
from quadriga.planning.parameters import Unit
from quadriga.planning.setup import Setup

FLOAT64_BYTES = 8  # norms and losses


@dataclass(frozen=True)
class CollectiveCalls:
    """Equal calls. `axis`: of the mesh (`shard` is dp_shard and cp as one axis; `world`, `loss`: see `comm.mesh`).

    `size`: bytes per call. `ranks`: of the group. `when`: `forward`, `backward`, `reduction`, `messages` or `norm`.
    """

    axis: str
    kind: str
    calls: float
    size: float
    ranks: int
    when: str
    what: str

    @property
    def bytes(self) -> float:
        return self.calls * self.size

    @property
    def wire_bytes(self) -> float:
        """Bytes that one rank sends in the step, with ring algorithms."""
        share = (self.ranks - 1) / self.ranks
        factor = {"all_gather": share, "reduce_scatter": share, "all_reduce": 2 * share, "all_to_all": share}
        return self.bytes * factor.get(self.kind, 1.0)


def collective_calls(setup: Setup, rank: int) -> tuple[CollectiveCalls, ...]:
    """The calls of one step on pipeline rank `rank`."""
    wanted = _StepCalls(setup, rank).calls()
    return tuple(each for each in wanted if each.calls and each.ranks > 1)


class _StepCalls:
    def __init__(self, setup: Setup, rank: int) -> None:
        self.setup, self.degrees, self.rank = setup, setup.degrees, rank
        self.stages = setup.stages_of(rank)
        self.passes = setup.micro_batches  # of each stage
        self.first = sum(stage.first for stage in self.stages)
        self.last = sum(stage.last for stage in self.stages)
        self.modes = [mode for number in setup.stage_numbers(rank) for mode in setup.modes_of_blocks(number)]
        self.blocks = len(self.modes)
        axes = ("dp_replicate", "tp", "cp", "pp")
        self.sizes = {"shard": setup.shards, "world": self.degrees.world_size}  # ranks by axis
        self.sizes |= {axis: getattr(self.degrees, axis) for axis in axes}

    def of_axis(self, axis: str, kind: str, calls: float, size: float, when: str, what: str) -> CollectiveCalls:
        return CollectiveCalls(axis, kind, calls, size, self.sizes[axis], when, what)

    def calls(self) -> Iterator[CollectiveCalls]:
        yield from self._parameter_calls()
        if self.degrees.tp > 1:
            yield from self._tensor_parallel_calls()
        if self.degrees.cp > 1:
            yield from self._context_parallel_calls()
        yield from self._pipeline_calls()
        yield from self._norm_calls()

    # --- parameters and their gradients ------------------------------------------------------------------------------

    def _parameter_calls(self) -> Iterator[CollectiveCalls]:
        for number, stage in zip(self.setup.stage_numbers(self.rank), self.stages, strict=True):
            times = self.passes
            if self.degrees.pp > 1 and not self.setup.reshards:
                times = self.setup.gather_counts(self.rank)[number]
            for unit, count in stage.units():
                if unit.weights:
                    yield from self._unit_calls(unit, count, times)

    def _unit_calls(self, unit: Unit, count: int, times: int) -> Iterator[CollectiveCalls]:
        setup, what = self.setup, "blocks" if unit.is_block else "ends"
        numbers = unit.gathered(self.degrees.tp, setup.shards)
        gather = self.of_axis("shard", "all_gather", times * count, setup.gather_bytes(unit), "forward", what)
        again = setup.reshards and (unit.reshard or setup.run.spec.reshard_ends) and unit.weights_in_backward
        yield gather
        if again:
            yield replace(gather, when="backward")
        if not setup.float8_scales_once:
            scales = gather.calls * len(setup.float8_weights(unit)) * (2 if again else 1)
            yield replace(gather, kind="all_reduce", calls=scales, size=FLOAT32_BYTES, what="scales of weights")
        sent = 1 if setup.reduces_once else self.passes
        size = setup.reduce_bytes * numbers
        yield self.of_axis("shard", "reduce_scatter", sent * count, size, "reduction", what)
        yield self.of_axis("dp_replicate", "all_reduce", count, size / setup.shards, "reduction", what)

    # --- tensor parallelism ------------------------------------------------------------------------------------------

    def _tensor_parallel_calls(self) -> Iterator[CollectiveCalls]:
        setup, dim = self.setup, self.setup.run.spec.model.dim
        hidden = setup.tokens * dim * setup.itemsize

        def calls(kind: str, number: float, when: str, what: str, size: float = hidden) -> CollectiveCalls:
            return self.of_axis("tp", kind, self.passes * number, size, when, what)

        again = {"none": 0, "op": 0, "full": 2}
        if setup.sequence_parallel:
            gathers = {"none": 0, "op": 2, "full": 2}
            yield calls("all_gather", 2 * self.blocks + self.last, "forward", "activations")
            yield calls("all_gather", sum(gathers[mode] for mode in self.modes), "backward", "recomputed activations")
            yield calls("all_gather", 2 * self.blocks + self.first, "backward", "gradients of activations")
            yield calls("reduce_scatter", 2 * self.blocks + self.first, "forward", "activations")
            yield calls("reduce_scatter", sum(again[mode] for mode in self.modes), "backward", "recomputed activations")
            yield calls("reduce_scatter", 2 * self.blocks + self.last, "backward", "gradients of activations")
            reductions = 1 if setup.reduces_once else self.passes
            norms = 2 * self.blocks + self.last
            size = dim * (setup.reduce_bytes if setup.keeps_unsharded_grads else setup.itemsize)
            yield self.of_axis("tp", "all_reduce", reductions * norms, size, "reduction", "gradients of norms")
        else:
            again["op"] = 2
            yield calls("all_reduce", 2 * self.blocks + self.first, "forward", "activations")
            yield calls("all_reduce", sum(again[mode] for mode in self.modes), "backward", "recomputed activations")
            yield calls("all_reduce", 2 * self.blocks + self.last, "backward", "gradients of activations")
        if setup.parallel_loss:
            yield calls("all_reduce", 3 * self.last, "forward", "parts of the loss", setup.tokens * FLOAT32_BYTES)
        else:
            whole = setup.tokens * setup.run.spec.model.vocab_size * setup.itemsize
            yield calls("all_gather", self.last, "forward", "logits", whole)

    # --- context parallelism -----------------------------------------------------------------------------------------

    def _context_parallel_calls(self) -> Iterator[CollectiveCalls]:
        setup, cp = self.setup, self.degrees.cp
        method = setup.run.config.parallelism.context_parallel_method
        model, tp = setup.run.spec.model, self.degrees.tp
        query = setup.tokens * model.n_heads * model.head_dim * setup.itemsize / tp
        key = setup.tokens * 2 * model.n_kv_heads * model.head_dim * setup.itemsize / tp
        full = self.passes * sum(mode == "full" for mode in self.modes)
        again = self.passes * sum(mode != "none" for mode in self.modes) if method == "allgather" else full
        passes = self.passes * self.blocks

        def calls(kind: str, number: float, size: float, when: str, what: str) -> CollectiveCalls:
            return self.of_axis("cp", kind, number, size, when, what)

        if method == "allgather":
            yield calls("all_gather", passes, cp * key, "forward", "keys and values")
            yield calls("all_gather", again, cp * key, "backward", "recomputed keys and values")
            yield calls("reduce_scatter", passes, cp * key, "backward", "their gradients")
        elif method == "ring":
            wide = key * FLOAT32_BYTES / setup.itemsize
            yield calls("all_to_all", (cp - 1) * passes, key, "forward", "keys and values")
            yield calls("all_to_all", (cp - 1) * again, key, "backward", "recomputed keys and values")
            yield calls("all_to_all", (cp - 1) * passes, key, "backward", "keys and values")
            yield calls("all_to_all", (cp - 1) * passes, wide, "backward", "their gradients")
        else:
            for size, what in ((query + key, "queries, keys and values"), (query, "results")):
                yield calls("all_to_all", passes, size, "forward", what)
                yield calls("all_to_all", again, size, "backward", f"recomputed {what}")
                yield calls("all_to_all", passes, size, "backward", "their gradients")

    # --- the rest ----------------------------------------------------------------------------------------------------

    def _pipeline_calls(self) -> Iterator[CollectiveCalls]:
        size = self.setup.block.sizes["x"]
        ahead, behind = self.setup.neighbours(self.rank)
        for kind, first, then in (("send", ahead, behind), ("recv", behind, ahead)):
            yield self.of_axis("pp", kind, self.passes * first, size, "messages", "activations")
            yield self.of_axis("pp", kind, self.passes * then, size, "messages", "gradients of activations")

    def _norm_calls(self) -> Iterator[CollectiveCalls]:
        """The squared norm. Parameters that tp shards and parameters that it replicates are summed separately."""
        for axis, calls in (("shard", 2 if self.degrees.tp > 1 else 1), ("tp", 1), ("pp", 1)):
            yield self.of_axis(axis, "all_reduce", calls, FLOAT64_BYTES, "norm", "norm")
        if self.setup.float8_scales_once:
            units = [unit for stage in self.stages for unit, count in stage.units() for _ in range(count)]
            size = FLOAT32_BYTES * sum(len(self.setup.float8_weights(unit)) for unit in units)
            yield self.of_axis("shard", "all_reduce", 1, size, "norm", "scales of weights")
        counts_bad_records = self.setup.run.config.training.dataloader.on_bad_record == "skip"
        table = (3 if counts_bad_records else 2) * FLOAT64_BYTES * self.degrees.world_size
        yield self.of_axis("world", "all_reduce", 1, table, "norm", "each rank's loss and norm")


# --- heap and backends -----------------------------------------------------------------------------------------------


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


NORMS = "norms"


def byte_share_by_backend(run: Run, backend: str) -> dict[str, float]:
    """Share of the bytes that all ranks send in a step, by backend; {} if they send none."""
    setup, served = Setup(run), backend_by_axis(backend, run.spec.degrees)
    sent: Counter[str] = Counter()
    for rank in range(setup.degrees.pp):
        for call in collective_calls(setup, rank):
            axis = NORMS if call.when == "norm" else call.axis
            sent[served[axis]] += round(call.wire_bytes)
    whole = sum(sent.values())
    return {name: size / whole for name, size in sent.items()} if whole else {}


def format_backend_by_axis(run: Run, backend: str) -> str:
    """`nvshmem: shard (89.4 %); nccl: tp, norms (10.6 %); gloo: host`, with shares of the bytes sent in a step."""
    return format_backends(backend_by_axis(backend, run.spec.degrees), byte_share_by_backend(run, backend))
