"""The time of a step: work divided by rates, exposed communication, idle time of the pipeline, host time.

The step of a rank is the sum of the time in which its device computes and the time in which it waits. Assumed rates
(`rates`) are good for ranking layouts; measured rates predict times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import add

from quadriga.planning.communication import CollectiveCalls, collective_calls
from quadriga.planning.rates import CALL_SECONDS, NETWORK_CALL_SECONDS, Rates
from quadriga.planning.setup import Setup, causal_attention_cost
from quadriga.units import DTYPE_BYTES

ATTENTION_BACKWARD = 2.5  # times the forward pass: scores are recomputed (FlashAttention, arXiv:2205.14135)
LOGIT_ACCESSES = {"eager": 12, "compiled": 5}  # memory accesses per float32 logit
# Memory accesses per parameter element. The norm reads the gradient, clipping reads and writes it; Adam reads four
# tensors and writes three.
CLIP_ACCESSES, ADAM_ACCESSES = 3, 7
# Recompute per operation calls Python for each of torch's operations, in the forward pass and in the recompute. There
# are about five per operation that a model declares. Seconds are those of torch's profiler on an AMD EPYC.
DISPATCHES, DISPATCH_SECONDS = 9.5, 40e-6
OVERLAPPED_AXES = {"shard", "dp_replicate"}  # axes whose calls overlap with the work of blocks


@dataclass(frozen=True)
class Work:
    """Work of one rank in a step: FLOP of products and of attention, bytes to and from memory, number of operations.

    `forward_products`, `forward_attention`: FLOP of forward passes and recompute, a part of the above. `python`: host
    seconds of dispatch in Python, besides the launches of operations.
    """

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    operations: float = 0.0
    forward_products: float = 0.0
    forward_attention: float = 0.0
    python: float = 0.0  # seconds

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, vars(self).values(), vars(other).values()))

    def times(self, factor: float) -> Work:
        return Work(*[factor * each for each in vars(self).values()])

    def seconds(self, rates: Rates) -> tuple[float, float, float]:
        """Seconds of products, attention and memory-bound work, on a device that never waits."""
        products, attention = rates.forward_products or rates.products, rates.forward_attention or rates.attention
        return (
            (self.products - self.forward_products) / rates.products + self.forward_products / products,
            (self.attention - self.forward_attention) / rates.attention + self.forward_attention / attention,
            self.memory / rates.memory,
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank, by kind; `total` is their sum."""

    products: float
    attention: float
    memory_bound: float
    optimizer: float
    communication: float  # exposed
    bubble: float
    host: float  # time in which the device waits for the host, and other constant time per step
    hidden: float  # communication that overlaps with computation: not part of the sum
    by_call: tuple[tuple[CollectiveCalls, float], ...]

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.memory_bound

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.communication + self.bubble + self.host


def step_time(setup: Setup, rates: Rates, gpus_per_node: int = 8) -> StepTime:
    """The step time of the slowest pipeline rank. `gpus_per_node`: devices that share the fast link."""
    works, order = _WorkOfPasses(setup), setup.order
    passes = {what for counts in order.counts for what in counts}
    seconds = {what: sum(works.of_pass(*what).seconds(rates)) for what in passes}
    idle = order.idle_shares(seconds) if setup.degrees.pp > 1 else (0.0,)
    times = (_time_of_rank(works, rank, rates, gpus_per_node, share) for rank, share in enumerate(idle))
    return max(times, key=lambda time: time.total)


def work_of(setup: Setup, rank: int) -> Work:
    """Work of all passes of one step, without the update."""
    return _WorkOfPasses(setup).of_rank(rank)


def forward_of(setup: Setup, rank: int) -> Work:
    """Work of the forward passes of one step, without recompute."""
    return _WorkOfPasses(setup).of_kinds(rank, "F")


def update_of(setup: Setup, rank: int) -> Work:
    """Work of clipping and the optimizer update."""
    return Work(memory=setup.held(rank) * (CLIP_ACCESSES * setup.parameter_bytes + _adam_bytes(setup)))


def _adam_bytes(setup: Setup) -> float:
    """Bytes that Adam reads and writes per parameter. With `state_dtype` it works on float32 copies: narrower weights,
    gradients and moments are converted, and all of them except gradients are written back."""
    own, moments, wide = setup.parameter_bytes, setup.moment_bytes, DTYPE_BYTES["float32"]
    if setup.run.config.optimizer.state_dtype is None:
        return ADAM_ACCESSES * own
    conversions = 4 * (wide + moments) * (moments < wide) + 3 * (wide + own) * (own < wide)
    return ADAM_ACCESSES * wide + conversions


class _WorkOfPasses:
    """Work of the parts of a model for one micro-batch, each computed once for all ranks."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self._blocks, self._passes = setup, dict[tuple[str, str], Work](), dict[tuple[int, str], Work]()

    def of_rank(self, rank: int) -> Work:
        """Work of all passes of one step, without the update."""
        return self.of_kinds(rank, "FBIW")

    def of_kinds(self, rank: int, kinds: str) -> Work:
        """Work of the passes of some kinds of one step."""
        passes = self.setup.order.counts[rank].items()
        works = (self.of_pass(stage, kind).times(number) for (stage, kind), number in passes if kind in kinds)
        return sum(works, Work()).times(self.setup.run.spec.accumulation_steps)

    def of_pass(self, number: int, kind: str) -> Work:
        """Work of one pass of a micro-batch through a stage: F forward, B backward, I and W the two parts of B. The
        first stage needs no gradients of its input, so its W is a whole B."""
        stage = self.setup.stages[number]
        if stage.first and kind in "IW":
            return self.of_pass(number, "B") if kind == "W" else Work()
        if (number, kind) not in self._passes:
            work = self.head[kind] if stage.last else Work()
            for mode, count in Counter(self.setup.modes_of_blocks(number)).items():
                work += self.block(mode, kind).times(count)
            self._passes[number, kind] = work
        return self._passes[number, kind]

    def block(self, mode: str, kind: str) -> Work:
        """Work of a block. Recompute is part of every kind except F."""
        if (mode, kind) not in self._blocks:
            again = Work() if kind == "F" else self._again(mode)
            self._blocks[mode, kind] = _work_of_kind(self.forward, kind, ATTENTION_BACKWARD) + again
        return self._blocks[mode, kind]

    def _again(self, mode: str) -> Work:
        setup, forward = self.setup, self.forward
        if mode != "op":
            return forward if mode == "full" else Work()
        kept, operations = setup.kept("op"), setup.block.trace.operations
        products = _product_flops(setup, (each.matrix for each in operations if each.output not in kept))
        dispatches = 0.0 if setup.compiled else DISPATCHES * len(operations)
        again = Work(products, 0.0, forward.memory, forward.operations, forward_products=products)
        return again + Work(python=dispatches * DISPATCH_SECONDS)

    @cached_property
    def forward(self) -> Work:
        """Work of the forward pass of a block."""
        setup, trace, sizes = self.setup, self.setup.block.trace, self.setup.block.sizes
        products = _product_flops(setup, (each.matrix for each in trace.operations))
        model, degrees = setup.run.spec.model, setup.degrees
        # Queries x keys and weights x values, halved because a token attends to half of the sequence on average.
        length = setup.run.spec.seq_len
        attention = 2.0 * setup.tokens * length * model.n_heads * model.head_dim / degrees.tp
        attention *= causal_attention_cost(length) if setup.device_type == "cpu" else 1.0
        light = [each for each in trace.operations if each.kind in ("cheap", "add", "norm")]
        touched = sum(sizes[each.output] + sum(sizes[name] for name in each.inputs) for each in light)
        unfused = [each for each in light if each.extra and len(each.extra) > 1]  # norms in several steps
        touched += sum(4 * sizes[name] for each in unfused for name in each.extra)
        memory, operations = touched * (0.5 if setup.compiled else 1.0), len(trace.operations) * 1.5
        return Work(products, attention, memory, operations, products, attention)

    @cached_property
    def head(self) -> dict[str, Work]:
        """Work of the output layer and the loss, by kind of pass."""
        setup, model = self.setup, self.setup.run.spec.model
        compiled = setup.run.config.compile.compiles("loss")
        accesses = LOGIT_ACCESSES["compiled" if compiled else "eager"]
        products = _product_flops(setup, [(model.dim, model.vocab_size)])
        forward = Work(products, 0.0, 4.0 * accesses / 3 * setup.logits, 10, forward_products=products)
        return {kind: _work_of_kind(forward, kind, 0.0) for kind in "FBIW"}


def _work_of_kind(forward: Work, kind: str, attention: float) -> Work:
    """Work of a kind of pass, from that of the forward pass. A backward pass has two products per forward product: for
    gradients of the input and of the weight. `attention`: cost of its backward pass in forward passes."""
    return {
        "F": forward,
        "B": Work(2 * forward.products, attention * forward.attention, 2 * forward.memory, 2 * forward.operations),
        "I": Work(forward.products, attention * forward.attention, 2 * forward.memory, 1.5 * forward.operations),
        "W": Work(forward.products, 0.0, 0.0, 0.5 * forward.operations),
    }[kind]


def _product_flops(setup: Setup, matrices: Iterable[tuple[int, int] | None]) -> float:
    """FLOP of the products of a micro-batch with these matrices."""
    return sum(2.0 * setup.tokens * each[0] * each[1] / setup.degrees.tp for each in matrices if each is not None)


def call_seconds(calls: CollectiveCalls, stride: int, rates: Rates, gpus_per_node: int) -> float:
    """Seconds of one call of a ring over `calls.ranks` ranks, `stride` apart (alpha-beta model: Hockney, 1994)."""
    inside = calls.ranks * stride <= gpus_per_node
    start = CALL_SECONDS if inside else NETWORK_CALL_SECONDS
    rate = rates.link if inside else rates.network
    wire = calls.wire_bytes / calls.calls if calls.calls else 0.0
    return start * (1 + (calls.ranks - 1) / 10) + wire / rate


def strides(setup: Setup) -> dict[str, int]:
    """Distance in ranks between neighbours of each axis: tp is innermost, pp outermost."""
    degrees = setup.degrees
    replicate = degrees.tp * degrees.cp * degrees.dp_shard
    inner = {"world": 1, "tp": 1, **dict.fromkeys(("cp", "shard", "loss"), degrees.tp)}
    return {**inner, "dp_replicate": replicate, "pp": replicate * degrees.dp_replicate}


def _time_of_rank(works: _WorkOfPasses, rank: int, rates: Rates, gpus_per_node: int, idle_share: float) -> StepTime:
    """`idle_share`: time in which the rank waits for other pipeline ranks, as a share of its own work."""
    setup = works.setup
    work, update = works.of_rank(rank), update_of(setup, rank)
    stride_by_axis = strides(setup)
    timed = [
        (call, call.calls * call_seconds(call, stride_by_axis[call.axis], rates, gpus_per_node))
        for call in collective_calls(setup, rank)
    ]
    products, attention, memory = work.seconds(rates)
    compute = products + attention + memory
    exposed, hidden = _exposed_and_hidden(setup, timed, compute)
    launch_seconds = work.operations * rates.operation + work.python
    host = (launch_seconds if setup.device_type == "cpu" else max(launch_seconds - compute, 0.0)) + rates.step
    idle = (compute + exposed) * idle_share
    return StepTime(
        products=products,
        attention=attention,
        memory_bound=memory,
        optimizer=update.memory / (rates.update or rates.memory),
        communication=exposed,
        bubble=idle,
        host=host,
        hidden=hidden,
        by_call=tuple(timed),
    )


def _exposed_and_hidden(
    setup: Setup, timed: Sequence[tuple[CollectiveCalls, float]], compute: float
) -> tuple[float, float]:
    """Seconds of exposed communication, and of communication that overlaps with the work of blocks.

    Parameters and their gradients are sent during the work of other blocks. Exposed is the time beyond that work, and
    at least the first gather and the last reduction. All other calls are exposed. On a CPU all calls are, because gloo
    uses the cores that compute.
    """
    if setup.device_type == "cpu":
        return sum(seconds for _, seconds in timed), 0.0
    of_parameters = [(call, seconds) for call, seconds in timed if call.axis in OVERLAPPED_AXES and call.when != "norm"]
    overlapped = sum(seconds for _, seconds in of_parameters)
    # Messages of a pipeline overlap with the work of other micro-batches.
    messages = sum(seconds for call, seconds in timed if call.when == "messages")
    waited = sum(seconds for _, seconds in timed) - overlapped - messages
    overlapped += messages
    calls = max(sum(call.calls for call, _ in of_parameters), 1)
    ends = min(2 * overlapped / calls, overlapped)
    exposed = max(overlapped - compute, ends)
    return waited + exposed, overlapped - exposed
