"""Rules of the communication backend: whether it is known, and whether it can carry what this run sends."""

from __future__ import annotations

from quadriga.config.case import BackendFacts, Case, Clash, Verdicts, rule
from quadriga.errors import nearest

BACKEND = "comm.backend"
ASYNC_TP = "parallelism.enable_async_tensor_parallel"
DP_SHARD = "parallelism.data_parallel_shard_degree"
CP = "parallelism.context_parallel_degree"
FLOAT8 = "quantize.linear.float8"


@rule(BACKEND)
def backend_is_known(case: Case) -> Verdicts:
    name = case.config.comm.backend
    if name is None:
        return
    facts = case.backends.get(name)
    usable = ", ".join(known for known, about in case.backends.items() if not about.hidden)
    if facts is None:
        yield Clash("no backend has this name", allowed=usable, nearest=nearest(name, case.backends))
    elif facts.hidden:
        yield f"{BACKEND} = {name} moves bytes through the shared memory of one machine: it is there for tests"


@rule(BACKEND, DP_SHARD, CP)
def backend_has_something_to_carry(case: Case) -> Verdicts:
    facts, degrees = _facts(case), case.degrees
    if facts is not None and facts.beside is not None and degrees.dp_shard * degrees.cp == 1:
        what = f"{facts.name} carries parameters and gradients that are sharded, and this run shards none"
        fix = f"choose {facts.beside}, which would carry every byte of this run, or shard over 2 ranks or more"
        yield Clash(what, fix)


@rule(BACKEND, ASYNC_TP)
def backend_overlaps_tensor_parallelism(case: Case) -> Verdicts:
    facts = _facts(case)
    wanted = case.config.parallelism.enable_async_tensor_parallel and case.degrees.tp > 1
    if facts and wanted and "async_tensor_parallel" not in facts.carries:
        yield Clash(
            "this backend cannot overlap communication with matrix products",
            _those_that_carry(case, "async_tensor_parallel"),
        )


@rule(BACKEND, f"{FLOAT8}.enable_fsdp_float8_all_gather", "model.converters")
def backend_carries_float8(case: Case) -> Verdicts:
    facts = _facts(case)
    wanted = case.config.quantize.linear.float8.enable_fsdp_float8_all_gather
    if facts and wanted and FLOAT8 in case.config.model.converters and "float8" not in facts.carries:
        yield Clash("this backend cannot move float8", _those_that_carry(case, "float8"))


def _facts(case: Case) -> BackendFacts | None:
    return case.backends.get(case.config.comm.backend or "")


def _those_that_carry(case: Case, feature: str) -> str:
    able = [name for name, facts in case.backends.items() if feature in facts.carries and not facts.hidden]
    return f"choose {' or '.join(able)}" if able else "switch the feature off: no backend here can"
