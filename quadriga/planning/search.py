"""Search over all valid layouts for a number of devices: pruned by memory, ranked by predicted speed. Pure arithmetic.

The search varies degrees, pipeline schedule and micro-batch size, recompute and resharding. The global batch is that of
the file or of the request; local batches are powers of two. The winner is written as a configuration, and is validated
like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from quadriga.config import Run
from quadriga.config.resolve import DEGREES
from quadriga.config.rules_layout import divisors
from quadriga.config.rules_pipeline import SPLIT_BACKWARD
from quadriga.hardware import Device
from quadriga.planning.estimate import Estimate, estimate
from quadriga.planning.memory import memory_of
from quadriga.planning.rates import Rates
from quadriga.planning.variants import Variant, stages_a_rank, vary

SCHEDULES = ("1F1B", "Interleaved1F1B", *SPLIT_BACKWARD)
RECOMPUTE = ({"mode": "none"}, {"mode": "selective", "selective_ac_option": "op"}, {"mode": "full"})
RESHARD = ("default", "never")
ERROR = 0.10  # of a predicted speed: more than the median of published runs, see docs/estimates.md
LARGEST_ROWS = 16  # largest local batch that is tried
# The varied keys that determine the bytes of parameters, gradients and moments on a rank.
STATE_KEYS = (*(key.replace(".", "__") for key in DEGREES.values()), "parallelism__pipeline_parallel_schedule")


@dataclass(frozen=True)
class Candidate:
    """A variant that fits, with its estimate."""

    variant: Variant
    estimate: Estimate

    @property
    def tokens_per_second(self) -> float:
        speed = self.estimate.tokens_per_second_per_device
        assert speed is not None
        return speed

    @property
    def kinds(self) -> int:
        """The number of kinds of parallelism."""
        return sum(getattr(self.variant.run.spec.degrees, axis) > 1 for axis in DEGREES)

    @property
    def name(self) -> str:
        """`dp_shard 4, tp 2, full recompute, 2 rows`."""
        config, degrees = self.variant.run.config, self.variant.run.spec.degrees
        sizes = [f"{axis} {size}" for axis in DEGREES if (size := getattr(degrees, axis)) > 1]
        parts = sizes or ["one rank"]
        if degrees.pp > 1:
            parallelism = config.parallelism
            parts.append(f"{parallelism.pipeline_parallel_schedule} of {parallelism.pipeline_parallel_microbatch_size}")
        recompute = config.activation_checkpoint
        parts.append({"none": "no recompute", "full": "full recompute"}.get(recompute.mode, "recompute per operation"))
        if config.parallelism.fsdp_reshard_after_forward == "never":
            parts.append("kept gathered")
        rows = config.training.local_batch_size
        parts.append(f"{rows} row{'s' if rows > 1 else ''}")
        return ", ".join(parts)


@dataclass(frozen=True)
class SearchResult:
    """`best`: the fastest candidate of each layout that fits: first the preferred one, then the others, the fastest
    first. Preferred is, of those that are within `ERROR` of the fastest, the fastest with the fewest kinds of
    parallelism. `tried`, `fitting`: numbers of candidates."""

    best: tuple[Candidate, ...]
    tried: int
    fitting: int


def search(
    run: Run,
    device: Device,
    *,
    rates: Rates | None = None,
    gpus_per_node: int = 8,
    global_batch: int | None = None,
    progress: Callable[[int, int], None] = lambda tried, fitting: None,
) -> SearchResult:
    """Search the layouts of `run` on its number of devices.

    `rates`: measured ones; None: assumed. `global_batch`: rows per step; None: those of `run`. `progress` is called
    before each candidate, with the numbers of those before.
    """
    rows = global_batch or run.spec.global_batch_size
    tried = fitting = 0
    by_layout: dict[Any, Candidate] = {}
    too_large: set[Any] = set()  # layouts and schedules whose state does not fit
    for choices in candidates(run, rows, gpus_per_node):
        progress(tried, fitting)
        tried += 1
        state = tuple(choices.get(key) for key in STATE_KEYS)
        if device.capacity is None or state in too_large:
            continue
        variant = vary(run, **choices)
        found = estimate(variant.run, device, rates, gpus_per_node)
        if found.setup.state_bytes > device.capacity:
            too_large.add(state)
            continue
        # Pipeline rank 0 mostly needs most memory: if it does not fit, the other ranks are not computed.
        if found.setup.degrees.pp > 1 and memory_of(found.setup, 0).reserved > device.capacity:
            continue
        fit = found.memory_fit()
        if fit is None or not fit.fits or found.time is None:
            continue
        fitting += 1
        candidate = Candidate(variant, found)
        layout = variant.run.spec.degrees
        if layout not in by_layout or candidate.tokens_per_second > by_layout[layout].tokens_per_second:
            by_layout[layout] = candidate
    best = sorted(by_layout.values(), key=lambda each: -each.tokens_per_second)
    near = [each for each in best if each.tokens_per_second >= (1 - ERROR) * best[0].tokens_per_second]
    preferred = sorted(near, key=lambda each: each.kinds)[:1]  # stable: of equally simple ones the fastest
    return SearchResult((*preferred, *(each for each in best if each not in preferred)), tried, fitting)


def candidates(run: Run, global_batch: int, gpus_per_node: int) -> Iterator[dict[str, Any]]:
    """All valid combinations, as keyword arguments of `vary`. The degrees divide heads, widths, sequence and batch."""
    for degrees in layouts(run, gpus_per_node):
        batch = degrees["dp_replicate"] * degrees["dp_shard"]
        if global_batch % batch:
            continue
        sharded = degrees["dp_shard"] * degrees["cp"] > 1 and degrees["pp"] == 1
        fixed: dict[str, Any] = {DEGREES[axis].replace(".", "__"): size for axis, size in degrees.items()}
        fixed["training__global_batch_size"] = global_batch
        for rows in _powers(global_batch // batch):
            for pipeline in _pipelines(run, degrees["pp"], rows):
                for recompute, reshard in product(RECOMPUTE, RESHARD if sharded else RESHARD[:1]):
                    chosen = {f"parallelism__{key}": value for key, value in pipeline.items()}
                    chosen |= {f"activation_checkpoint__{key}": value for key, value in recompute.items()}
                    chosen["parallelism__fsdp_reshard_after_forward"] = reshard
                    yield {**fixed, **chosen, "training__local_batch_size": rows}


def layouts(run: Run, gpus_per_node: int) -> Iterator[dict[str, int]]:
    """Degrees whose product is the number of ranks. Tensor parallelism does not cross machines."""
    model, world, seq_len = run.spec.model, run.spec.world_size, run.spec.seq_len
    chunks_per_rank = 2 if run.config.parallelism.context_parallel_load_balancer == "headtail" else 1
    widths = (model.n_heads, model.n_kv_heads, model.ffn_dim, model.vocab_size)
    for tp in (each for each in _divisors(world) if each <= gpus_per_node):
        if any(width % tp for width in widths):
            continue
        for pp in _divisors(world // tp):
            if pp > 1 and (model.tie_embeddings or pp > model.n_layers):
                continue
            for cp in _divisors(world // tp // pp):
                if seq_len % (tp * cp * (chunks_per_rank if cp > 1 else 1)):
                    continue
                rest = world // tp // pp // cp
                for replicate in _divisors(rest):
                    yield {"pp": pp, "dp_replicate": replicate, "dp_shard": rest // replicate, "cp": cp, "tp": tp}


def _pipelines(run: Run, pp: int, rows: int) -> Iterator[dict[str, Any]]:
    """Schedules and micro-batch sizes for `rows` rows per rank; one empty choice without a pipeline."""
    if pp == 1:
        yield {}
        return
    compiled = run.on_device("cuda").config.compile.compiles("model")
    for schedule in SCHEDULES:
        stages = pp * stages_a_rank(schedule)
        if stages > run.spec.model.n_layers or (compiled and schedule in SPLIT_BACKWARD):
            continue
        for size in _powers(rows):
            count, least = rows // size, 2 * pp if schedule == "DualPipeV" else pp
            if count >= least and (count % pp == 0 or not schedule.startswith("Interleaved")):
                yield {"pipeline_parallel_schedule": schedule, "pipeline_parallel_microbatch_size": size}


def _divisors(number: int) -> list[int]:
    return sorted(set(divisors(number)))


def _powers(number: int) -> list[int]:
    """Powers of two that divide the number, up to `LARGEST_ROWS`."""
    return [2**power for power in range(LARGEST_ROWS.bit_length()) if number % 2**power == 0]
