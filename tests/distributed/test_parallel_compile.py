"""Compiled blocks under FSDP, with every way of recomputing, train the model that eager ones train."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from tiny import Case, train_all

from quadriga.config.run_spec import Degrees
from quadriga.config.schema import ActivationCheckpoint, Compile, Parallelism


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_every_recompute_mode_under_fsdp(backend: str) -> None:
    compiled = Compile(enable=True, backend=backend, components=("model",))
    modes = [
        ActivationCheckpoint(mode="none"),
        ActivationCheckpoint(mode="full"),
        ActivationCheckpoint(selective_ac_option="op"),
        ActivationCheckpoint(selective_ac_option="2"),
        ActivationCheckpoint(mode="memory_budget", memory_budget=0.3),
    ]
    degrees = Degrees(dp_shard=2)
    cases = [Case(degrees), *(Case(degrees, compile=compiled, recompute=mode) for mode in modes)]
    cases.append(Case(degrees, compile=compiled, parallelism=Parallelism(fsdp_reshard_after_forward="always")))
    eager, *others = run_ranks(train_all, 2, cases, timeout=500)[0]
    for other in others:
        assert other.losses == pytest.approx(eager.losses, rel=2e-6)
        assert list(other.weights) == list(eager.weights)
