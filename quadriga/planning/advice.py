"""Advice: the smallest changes that make a run fit, or changes that make a run that fits faster.

Each change is estimated like the run itself, and listed with its cost in step time. State in host memory comes last in
every list: it costs most, and the rates of hosts vary most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from quadriga.config import Run
from quadriga.config.keys import format_toml
from quadriga.planning.estimate import Estimate, estimate
from quadriga.planning.variants import Variant, format_argument, vary
from quadriga.units import GIB, format_bytes

MAX_ADVICE = 4  # pieces of advice
PER_OPERATION = {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"}
SHARD_DEGREE = "parallelism__data_parallel_shard_degree"
OFFLOAD = "training.enable_cpu_offload"
Step = tuple[str, Variant]  # a change with its name


@dataclass(frozen=True)
class Advice:
    """Changed `keys` with their values. `needed`, `saves`: bytes per device. `slower`: relative change of the step
    time, None if not predicted. `fits`: whether the run then fits."""

    keys: tuple[tuple[str, Any], ...]
    summary: str
    needed: float
    saves: float
    slower: float | None
    fits: bool

    def __str__(self) -> str:
        end = " and fits" if self.fits else ", which is not enough alone"
        price = "" if self.slower is None else f"; {_format_slowdown(self.slower)}"
        settings = ", ".join(f"{key} = {format_toml(value)}" for key, value in self.keys)
        return f"{self.summary} ({settings}): needs {format_bytes(self.needed)}{end}{price}"

    @property
    def offloads(self) -> bool:
        return OFFLOAD in dict(self.keys)

    def to_dict(self) -> dict[str, Any]:
        return {
            "set": dict(self.keys),
            "words": self.summary,
            "needed_gib": self.needed / GIB,
            "saves_gib": self.saves / GIB,
            "slower": self.slower,
            "fits": self.fits,
        }


def _format_slowdown(slower: float) -> str:
    if slower >= 1:
        return f"about {1 + slower:.0f} times slower"
    if abs(slower) < 0.005:
        return "same predicted step time"
    return f"{abs(slower):.0%} {'slower' if slower > 0 else 'faster'}"


def advice_for(given: Estimate) -> tuple[Advice, ...]:
    """At most `MAX_ADVICE` changes, the best first. Empty if no device is named."""
    fit = given.memory_fit()
    if fit is None:
        return ()
    return tuple(_to_fit(given) if not fit.fits else _to_be_faster(given))[:MAX_ADVICE]


def format_memory_savings(given: Estimate) -> list[str]:
    """Arguments that reduce the memory of a run, as text, the largest saving first, and CPU offload last."""
    tried = [_evaluated(given, step) for step in _smaller(given)]
    return [
        f"{' '.join(f'--{key}={format_argument(value)}' for key, value in each.keys)}: saves {format_bytes(each.saves)}"
        for each in sorted(tried, key=lambda each: (each.offloads, -each.saves))
        if each.saves > 0
    ]


def _to_fit(given: Estimate) -> Iterator[Advice]:
    """Single changes that make the run fit, the cheapest first; else pairs; else single changes by memory needed.

    CPU offload comes last. If it alone is enough, pairs without it are listed before it."""
    steps = _smaller(given)
    single = [_evaluated(given, step) for step in steps]
    enough = [each for each in single if each.fits]
    if all(each.offloads for each in enough):
        usable = [step for step in steps if not enough or OFFLOAD not in _keys(step)]
        pairs = [pair for pair in combinations(usable, 2) if not _keys(pair[0]) & _keys(pair[1])]
        enough += [each for each in (_evaluated(given, *pair) for pair in pairs) if each.fits]
    yield from sorted(enough, key=lambda each: (each.offloads, each.slower or 0.0, each.needed))
    if not enough:
        most = sorted(single, key=lambda each: each.needed)[:MAX_ADVICE]
        yield from sorted(most, key=lambda each: each.offloads)


def _keys(step: Step) -> set[str]:
    return {key for key, _ in step[1].changes}


def _to_be_faster(given: Estimate) -> Iterator[Advice]:
    tried = [_evaluated(given, step) for step in _faster(given)]
    useful = [each for each in tried if each.fits and each.slower is not None and each.slower < -0.01]
    yield from sorted(useful, key=lambda each: each.slower or 0.0)


def _evaluated(given: Estimate, *steps: Step) -> Advice:
    changes = {key.replace(".", "__"): value for _, variant in steps for key, value in variant.changes}
    variant = vary(given.run, **changes)
    measured = given.rates if given.rates and given.rates.measured else None
    tried = estimate(variant.run, given.device, measured, given.gpus_per_node)
    fit = tried.memory_fit()
    before, after = given.tokens_per_second_per_device, tried.tokens_per_second_per_device
    return Advice(
        keys=variant.changes,
        summary=" and ".join(name for name, _ in steps),
        needed=tried.needed,
        saves=given.needed - tried.needed,
        slower=before / after - 1 if before and after else None,
        fits=fit is not None and fit.fits,
    )


@dataclass(frozen=True)
class Remedy:
    """A change of a run that reduces its memory. `kind`: what it reduces, `activations` or `state` (parameters,
    gradients and moments). `changes`: keyword arguments of `vary`; {} for a change outside of the configuration.

    `summary`: its name in advice; "": estimates do not try it. `effect`: what it does, for the out-of-memory report of
    a run without an estimate; "": that report does not propose it.
    """

    kind: str
    changes: Mapping[str, Any]
    summary: str = ""
    effect: str = ""

    def __str__(self) -> str:
        arguments = [f"--{key.replace('__', '.')}={format_argument(value)}" for key, value in self.changes.items()]
        return f"{' '.join(arguments)}: {self.effect}" if arguments else self.effect


def remedies(run: Run, gpus_per_node: int = 8) -> Iterator[Remedy]:
    """All remedies that the run does not use yet. Advice and out-of-memory reports have them in this order."""
    yield from _for_activations(run)
    yield from _for_state(run, gpus_per_node)
    yield Remedy("state", {}, effect="a machine with more memory, or fewer other processes on this one")


def _for_activations(run: Run) -> Iterator[Remedy]:
    spec, config, recompute = run.spec, run.config, run.config.activation_checkpoint
    rows, batch = spec.local_batch_size, spec.global_batch_size

    def remedy(summary: str, effect: str, **changes: Any) -> Remedy:
        return Remedy("activations", changes, summary, effect)

    if recompute.mode != "full":
        effect = "keeps one activation per block, for about a third more computation"
        yield remedy("full recompute", effect, activation_checkpoint__mode="full")
    if recompute.mode == "none" or (recompute.mode == "selective" and recompute.selective_ac_option != "op"):
        yield remedy("recompute per operation", "", **PER_OPERATION)
    if config.training.loss_chunks == 1:
        effect = "holds the logits of an eighth of the tokens at a time, at no extra computation"
        yield remedy("a chunked loss", effect, training__loss_chunks=8)
    pipeline = spec.degrees.pp > 1
    # A schedule needs as many micro-batches as it has stages, and some need a multiple of the ranks.
    micro_batch = config.parallelism.pipeline_parallel_microbatch_size if pipeline else 1
    least, unit = micro_batch * max(len(spec.stage_ranks), 1), micro_batch * spec.degrees.pp
    fewer = next((n for n in range(rows // 2, least - 1, -1) if rows % n == 0 and n % unit == 0), None)
    if fewer is not None:
        effect = f"the same batch in {rows // fewer} times as many passes"
        sizes = {"training__local_batch_size": fewer, "training__global_batch_size": batch}
        yield remedy("" if pipeline else "a smaller local batch", effect, **sizes)
    if config.training.mixed_precision_param == "float32":
        yield remedy("", "halves activations", training__mixed_precision_param="bfloat16")
    if spec.degrees.dp_shard % 2 == 0 and batch % max(spec.degrees.batch // 2, 1) == 0:
        effect = "each rank holds half as much of a sequence"
        yield remedy("", effect, parallelism__context_parallel_degree=2 * spec.degrees.cp)


def _for_state(run: Run, gpus_per_node: int) -> Iterator[Remedy]:
    config, degrees, model = run.config, run.spec.degrees, run.spec.model

    def remedy(summary: str, effect: str, **changes: Any) -> Remedy:
        return Remedy("state", changes, summary, effect)

    if config.optimizer.state_dtype is None and config.optimizer.beta2 <= 0.99:
        yield remedy("moments in bfloat16", "", optimizer__state_dtype="bfloat16")
    tp = 2 * degrees.tp
    if degrees.dp_shard % 2 == 0 and tp <= gpus_per_node and not (model.n_kv_heads % tp or model.ffn_dim % tp):
        yield remedy(f"tensor parallelism over {tp}", "", parallelism__tensor_parallel_degree=tp)
    if degrees.dp_replicate > 1:
        effect = f"shards parameters and optimizer state over {degrees.dp_replicate} times as many ranks"
        shards = {} if config.parallelism.data_parallel_shard_degree == -1 else {SHARD_DEGREE: -1}
        yield remedy("shards instead of replicas", effect, parallelism__data_parallel_replicate_degree=1, **shards)
    elif degrees.world_size == 1 or degrees.dp_shard > 1:
        yield remedy("", "more ranks (NGPU, NNODES): parameters and optimizer state are sharded over all of them")
    if run.spec.reduce_gradients == "once" and run.spec.accumulation_steps > 1:
        effect = "holds no whole-model gradients between micro-batches"
        yield remedy("", effect, parallelism__reduce_gradients="every_micro_batch")
    if not run.spec.reshard_after_forward and degrees.dp_shard > 1:
        effect = "holds the gathered parameters of one block at a time"
        yield remedy("", effect, parallelism__fsdp_reshard_after_forward="always")
    if config.checkpoint.enable and config.checkpoint.async_mode != "disabled":
        effect = "makes no copy of the state in host memory to save it"
        yield remedy("", effect, checkpoint__async_mode="disabled")
    if not config.training.enable_cpu_offload:
        effect = "keeps parameters and optimizer state in host memory, but is slower"
        yield remedy("state in host memory", effect, training__enable_cpu_offload=True)


def _smaller(given: Estimate) -> list[Step]:
    """Single changes that reduce memory."""
    found = remedies(given.run, given.gpus_per_node)
    return [(each.summary, vary(given.run, **each.changes)) for each in found if each.summary]


def _faster(given: Estimate) -> Iterator[Step]:
    """Single changes that spend free memory on speed."""
    run, spec, config = given.run, given.run.spec, given.run.config
    recompute = config.activation_checkpoint
    if recompute.mode != "none":
        yield "no recompute", vary(run, activation_checkpoint__mode="none")
    if recompute.mode == "full":
        yield "recompute per operation", vary(run, **PER_OPERATION)
    if config.training.mixed_precision_param == "float32":
        yield "computing in bfloat16", vary(run, training__mixed_precision_param="bfloat16")
    if not config.compile.enable:
        yield "compiled blocks", vary(run, compile__enable=True)
    if spec.reshard_after_forward and spec.degrees.dp_shard * spec.degrees.cp > 1:
        yield "parameters kept gathered", vary(run, parallelism__fsdp_reshard_after_forward="never")
    rows = spec.local_batch_size * spec.degrees.batch * spec.degrees.tp
    if spec.degrees.tp > 1 and spec.global_batch_size % rows == 0:
        yield "no tensor parallelism", vary(run, parallelism__tensor_parallel_degree=1)
