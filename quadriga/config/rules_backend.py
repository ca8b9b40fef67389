"""Rules of the communication backend: whether it is known, and whether it supports what this run sends."""

from __future__ import annotations

from quadriga.config.rules import BackendProtocol, Conflict, Findings, RuleContext, rule
from quadriga.errors import nearest

BACKEND = "comm.backend"
ASYNC_TP = "parallelism.enable_async_tensor_parallel"
DP_SHARD = "parallelism.data_parallel_shard_degree"
CP = "parallelism.context_parallel_degree"


@rule(BACKEND)
def backend_is_known(ctx: RuleContext) -> Findings:
    name = ctx.config.comm.backend
    if name is not None and name not in ctx.backends:
        usable = ", ".join(ctx.backends)
        yield Conflict("no backend has this name", allowed=usable, nearest=nearest(name, ctx.backends))


@rule(BACKEND, DP_SHARD, CP)
def backend_has_something_to_carry(ctx: RuleContext) -> Findings:
    facts, degrees = _backend_facts(ctx), ctx.degrees
    if facts is not None and facts.fallback_backend is not None and degrees.dp_shard * degrees.cp == 1:
        what = f"{facts.name} carries only sharded parameters and gradients, and this run shards none"
        fix = f"choose {facts.fallback_backend}, which would carry all bytes of this run, or shard over 2 or more ranks"
        yield Conflict(what, fix)


@rule(BACKEND, ASYNC_TP)
def backend_overlaps_tensor_parallelism(ctx: RuleContext) -> Findings:
    facts = _backend_facts(ctx)
    wanted = ctx.config.parallelism.enable_async_tensor_parallel and ctx.degrees.tp > 1
    if facts and wanted and "async_tensor_parallel" not in facts.carries:
        yield Conflict(
            "this backend cannot overlap communication with matrix products",
            _backends_that_carry(ctx, "async_tensor_parallel"),
        )


def _backend_facts(ctx: RuleContext) -> BackendProtocol | None:
    return ctx.backends.get(ctx.config.comm.backend or "")


def _backends_that_carry(ctx: RuleContext, feature: str) -> str:
    able = [name for name, facts in ctx.backends.items() if feature in facts.carries]
    return f"choose {' or '.join(able)}" if able else "switch the feature off: no backend supports it"
