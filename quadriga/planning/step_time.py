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

from quadriga.models.operations import Operation, Value
from quadriga.planning.communication import CollectiveCalls, collective_calls
from quadriga.planning.rates import CALL_SECONDS, FITTED, NETWORK_CALL_SECONDS, Rates
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
# On a GPU. A product also reads and writes its matrices: FLOP that the device does meanwhile, per element.
RIDGE = 256.0
SHORT = 512  # tokens: attention over so long a sequence has half the rate of a long one (arXiv:2307.08691, figure 4)
# Bytes per element of an operand of a float8 product: read for its scale, read again, and written in 8 bits. Scales by
# rows need this twice, since the backward pass multiplies the other way.
CAST_BYTES = {"float8": 5, "float8_rowwise": 10}
COPIED, COPIES = ("all_gather", "reduce_scatter"), 2  # collectives with a flat buffer; memory accesses per byte of it
NOT_WHOLE = Value(0)
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
    """Work of all passes of one step, and of the copies of its collectives, without the update."""
    return _WorkOfPasses(setup).of_rank(rank) + _copies(setup, collective_calls(setup, rank))


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
        products = _product_flops(setup, (each for each in operations if each.output not in kept))
        dispatches = 0.0 if setup.compiled else DISPATCHES * len(operations)
        again = Work(products, 0.0, forward.memory, forward.operations, forward_products=products)
        return again + Work(python=dispatches * DISPATCH_SECONDS)

    @cached_property
    def forward(self) -> Work:
        """Work of the forward pass of a block."""
        setup, trace, sizes = self.setup, self.setup.block.trace, self.setup.block.sizes
        products = _product_flops(setup, trace.operations)
        model, degrees = setup.run.spec.model, setup.degrees
        # Queries x keys and weights x values, halved because a token attends to half of the sequence on average.
        length = setup.run.spec.seq_len
        attention = 2.0 * setup.tokens * length * model.n_heads * model.head_dim / degrees.tp
        attention *= causal_attention_cost(length) if setup.device_type == "cpu" else _attention_cost(setup)
        light = [each for each in trace.operations if each.kind in ("cheap", "add", "norm")]
        touched = sum(sizes[each.output] + sum(sizes[name] for name in each.inputs) for each in light)
        unfused = [each for each in light if each.extra and len(each.extra) > 1]  # norms in several steps
        touched += sum(4 * sizes[name] for each in unfused for name in each.extra)
        eager = 1.0 if setup.device_type == "cpu" else FITTED["eager"]
        memory, operations = touched * (0.5 if setup.compiled else eager), len(trace.operations) * 1.5
        memory += _cast_bytes(setup, trace.operations)
        return Work(products, attention, memory, operations, products, attention)

    @cached_property
    def head(self) -> dict[str, Work]:
        """Work of the output layer and the loss, by kind of pass."""
        setup = self.setup
        compiled = setup.run.config.compile.compiles("loss")
        accesses = LOGIT_ACCESSES["compiled" if compiled else "eager"]
        output = setup.head.trace.operations[-1:]
        products, memory = _product_flops(setup, output), 4.0 * accesses / 3 * setup.logits
        memory += _cast_bytes(setup, output)
        forward = Work(products, 0.0, memory, 10, forward_products=products)
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


def _product_flops(setup: Setup, operations: Iterable[Operation]) -> float:
    """FLOP of the products of a micro-batch. On a GPU, multiplied by their cost relative to a large product in the
    compute dtype: a product also moves its matrices, and float8 is faster."""
    return sum(
        2.0 * setup.tokens * each.matrix[0] * each.matrix[1] / setup.degrees.tp * _product_cost(setup, each)
        for each in operations
        if each.matrix is not None
    )


def _product_cost(setup: Setup, operation: Operation) -> float:
    if setup.device_type == "cpu" or operation.matrix is None:
        return 1.0
    widths = [float(width) for width in operation.matrix]
    is_cut_by_rows = setup.block.trace.values.get(operation.output, NOT_WHOLE).spread == "whole"
    widths[0 if is_cut_by_rows else 1] /= setup.degrees.tp
    ridge = RIDGE if setup.itemsize < DTYPE_BYTES["float32"] else 0.0
    faster = FITTED[setup.float8] if setup.float8 and operation.module in setup.float8_modules else 1.0
    return (1 + ridge * sum(1 / size for size in (setup.tokens, *widths))) / faster


def _cast_bytes(setup: Setup, operations: Sequence[Operation]) -> float:
    """Bytes of casts to float8 in a forward pass: of each distinct input, and of each weight."""
    converted = [each for each in operations if each.module in setup.float8_modules]
    if not setup.float8 or setup.device_type == "cpu":
        return 0.0
    sizes = {**setup.block.sizes, **setup.head.sizes}
    inputs = sum(sizes[name] for name in {each.inputs[0] for each in converted}) / setup.itemsize
    weights = sum(each.matrix[0] * each.matrix[1] for each in converted if each.matrix) / setup.degrees.tp
    return CAST_BYTES[setup.float8] * (inputs + weights)


def _copies(setup: Setup, calls: Iterable[CollectiveCalls]) -> Work:
    """Memory accesses of collectives on a GPU that delay its own work: copies into or out of their flat buffers, and,
    if they overlap with that work, their own accesses."""
    if setup.device_type == "cpu":
        return Work()
    copied = [call for call in calls if call.kind in COPIED]
    return Work(
        memory=sum((FITTED["overlap"] if call.axis in OVERLAPPED_AXES else COPIES) * call.bytes for call in copied)
    )


def _attention_cost(setup: Setup) -> float:
    """Cost on a GPU of an attention operation, relative to one over a long sequence on one rank."""
    cp, exchanges_heads = setup.degrees.cp, setup.run.config.parallelism.context_parallel_method == "ulysses"
    unbalanced = 0.0 if exchanges_heads else FITTED["imbalance"] * (1 - 1 / cp)
    return (1 + SHORT / setup.run.spec.seq_len) * (1 + unbalanced)


def call_seconds(calls: CollectiveCalls, stride: int, rates: Rates, gpus_per_node: int) -> float:
    """Seconds of one call of a ring over `calls.ranks` ranks, `stride` apart (alpha-beta model: Hockney, 1994)."""
    inside = calls.ranks * stride <= gpus_per_node
    start = CALL_SECONDS if inside else NETWORK_CALL_SECONDS
    # A ring that has several ranks in each machine uses the network links of all of them.
    rate = rates.link if inside else min(rates.network * max(gpus_per_node // stride, 1), rates.link)
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
    stride_by_axis = strides(setup)
    timed = [
        (call, call.calls * call_seconds(call, stride_by_axis[call.axis], rates, gpus_per_node))
        for call in collective_calls(setup, rank)
    ]
    work = works.of_rank(rank) + _copies(setup, (call for call, _ in timed))
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
        optimizer=_update_seconds(setup, rank, rates, gpus_per_node),
        communication=exposed,
        bubble=idle,
        host=host,
        hidden=hidden,
        by_call=tuple(timed),
    )


def _update_seconds(setup: Setup, rank: int, rates: Rates, gpus_per_node: int) -> float:
    """Seconds of clipping and the update. With CPU offload the host does both, and `fully_shard` copies each shard to
    the device before a gather, and its gradient back after a reduction; neither is assumed to overlap."""
    update, passes = update_of(setup, rank).memory, setup.micro_batches
    if not setup.offload or setup.device_type == "cpu":
        return update / (rates.update or rates.memory)
    copies = passes * (2 if setup.reshards else 1) + (1 if setup.reduces_once else passes)
    copied = copies * setup.parameter_bytes * setup.held(rank)
    return copied / rates.pcie + update * min(gpus_per_node, setup.degrees.world_size) / rates.host_memory


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
    if setup.async_tp:
        within_products = sum(seconds for call, seconds in timed if call.axis == "tp" and call.kind in COPIED)
        waited -= (1 - FITTED["async_tp"]) * within_products
    overlapped += messages
    calls = max(sum(call.calls for call, _ in of_parameters), 1)
    ends = min(2 * overlapped / calls, overlapped)
    exposed = max(overlapped - compute, ends)
    return waited + exposed, overlapped - exposed
