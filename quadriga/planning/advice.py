"""Advice: the smallest changes that make a run fit, or changes that make a run that fits faster.

Each change is estimated like the run itself, and listed with its cost in step time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from quadriga.config.keys import format_toml
from quadriga.planning.estimate import Estimate, estimate
from quadriga.planning.variants import Variant, format_argument, vary
from quadriga.units import GIB, format_bytes

MAX_ADVICE = 4  # pieces of advice


@dataclass(frozen=True)
class Advice:
    """Changed `keys` with their values. `needed`, `saves`: bytes per device. `slower`: relative change of the step
    time, None if unknown. `fits`: whether the run then fits."""

    keys: tuple[tuple[str, Any], ...]
    summary: str
    needed: float
    saves: float
    slower: float | None
    fits: bool

    def __str__(self) -> str:
        price = "" if self.slower is None else f", {_format_slowdown(self.slower)}"
        end = " and fits" if self.fits else ", which is not enough alone"
        settings = ", ".join(f"{key} = {format_toml(value)}" for key, value in self.keys)
        return f"{self.summary} ({settings}): needs {format_bytes(self.needed)}{price}{end}"

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
    if abs(slower) < 0.005:
        return "same step time"
    return f"{abs(slower):.0%} {'slower' if slower > 0 else 'faster'}"


def advice_for(given: Estimate) -> tuple[Advice, ...]:
    """At most `MAX_ADVICE` changes, the best first. Empty if no device is named."""
    fit = given.memory_fit()
    if fit is None:
        return ()
    return tuple(_to_fit(given) if not fit.fits else _to_be_faster(given))[:MAX_ADVICE]


def format_memory_savings(given: Estimate) -> list[str]:
    """Arguments that reduce the memory of a run, as text, the largest saving first."""
    tried = [_evaluated(given, (name, variant)) for name, variant in _smaller(given)]
    return [
        f"{' '.join(f'--{key}={format_argument(value)}' for key, value in each.keys)}: saves {format_bytes(each.saves)}"
        for each in sorted(tried, key=lambda each: -each.saves)
        if each.saves > 0
    ]


def _to_fit(given: Estimate) -> Iterator[Advice]:
    """Single changes that make the run fit, the cheapest first; else pairs; else single changes by memory needed."""
    single = [_evaluated(given, (name, variant)) for name, variant in _smaller(given)]
    enough = [each for each in single if each.fits]
    if not enough:
        steps = list(_smaller(given))
        pairs = [
            _evaluated(given, one, other)
            for one, other in combinations(steps, 2)
            if not {key for key, _ in one[1].changes} & {key for key, _ in other[1].changes}
        ]
        enough = [each for each in pairs if each.fits]
    yield from sorted(enough, key=lambda each: (each.slower or 0.0, each.needed))
    if not enough:
        yield from sorted(single, key=lambda each: each.needed)


def _to_be_faster(given: Estimate) -> Iterator[Advice]:
    tried = [_evaluated(given, (name, variant)) for name, variant in _faster(given)]
    yield from sorted(
        (each for each in tried if each.fits and each.slower is not None and each.slower < -0.01),
        key=lambda each: each.slower or 0.0,
    )


def _evaluated(given: Estimate, *steps: tuple[str, Variant]) -> Advice:
    changes = {key.replace(".", "__"): value for _, variant in steps for key, value in variant.changes}
    variant = vary(given.run, **changes)
    measured = given.rates if given.rates and given.rates.measured else None
    tried = estimate(variant.run, given.device, measured, given.gpus_per_node)
    fit = tried.memory_fit()
    needed = tried.worst.reserved + tried.outside_allocator
    before, after = given.tokens_per_second_per_device, tried.tokens_per_second_per_device
    return Advice(
        keys=variant.changes,
        summary=" and ".join(name for name, _ in steps),
        needed=needed,
        saves=given.worst.reserved + given.outside_allocator - needed,
        slower=before / after - 1 if before and after else None,
        fits=fit is not None and fit.fits,
    )


def _smaller(given: Estimate) -> Iterator[tuple[str, Variant]]:
    """Single changes that reduce memory."""
    run, spec, config = given.run, given.run.spec, given.run.config
    recompute = config.activation_checkpoint
    if recompute.mode != "full":
        yield "full recompute", vary(run, activation_checkpoint__mode="full")
    if recompute.mode == "none" or (recompute.mode == "selective" and recompute.selective_ac_option != "op"):
        yield (
            "recompute per operation",
            vary(run, activation_checkpoint__mode="selective", activation_checkpoint__selective_ac_option="op"),
        )
    if config.training.loss_chunks == 1:
        yield "a chunked loss", vary(run, training__loss_chunks=8)
    if spec.local_batch_size > 1 and spec.degrees.pp == 1:
        rows = spec.local_batch_size // 2
        yield (
            "half the local batch",
            vary(run, training__local_batch_size=rows, training__global_batch_size=spec.global_batch_size),
        )
    if config.optimizer.state_dtype is None and config.optimizer.beta2 <= 0.99:
        yield "moments in bfloat16", vary(run, optimizer__state_dtype="bfloat16")
    tp = 2 * spec.degrees.tp
    model = spec.model
    if (
        spec.degrees.dp_shard % 2 == 0
        and tp <= given.gpus_per_node
        and not (model.n_kv_heads % tp or model.ffn_dim % tp)
    ):
        yield f"tensor parallelism over {tp}", vary(run, parallelism__tensor_parallel_degree=tp)
    if spec.degrees.dp_replicate > 1:
        yield "shards instead of replicas", vary(run, parallelism__data_parallel_replicate_degree=1)
    if not config.training.enable_cpu_offload:
        yield "state in host memory", vary(run, training__enable_cpu_offload=True)


def _faster(given: Estimate) -> Iterator[tuple[str, Variant]]:
    """Single changes that spend free memory on speed."""
    run, spec, config = given.run, given.run.spec, given.run.config
    recompute = config.activation_checkpoint
    if recompute.mode != "none":
        yield "no recompute", vary(run, activation_checkpoint__mode="none")
    if recompute.mode == "full":
        yield (
            "recompute per operation",
            vary(run, activation_checkpoint__mode="selective", activation_checkpoint__selective_ac_option="op"),
        )
    if config.training.mixed_precision_param == "float32":
        yield "computing in bfloat16", vary(run, training__mixed_precision_param="bfloat16")
    if not config.compile.enable:
        yield "compiled blocks", vary(run, compile__enable=True)
    if spec.reshard_after_forward and spec.degrees.dp_shard * spec.degrees.cp > 1:
        yield "parameters kept gathered", vary(run, parallelism__fsdp_reshard_after_forward="never")
    if spec.degrees.tp > 1:
        yield "no tensor parallelism", vary(run, parallelism__tensor_parallel_degree=1)
