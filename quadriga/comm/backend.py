"""What each communication backend can carry: facts, and the choice of one. No torch here.

Whether a backend can be had on this machine is not asked here but by the launcher, which passes in what it found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.errors import Problem, UserError, nearest


@dataclass(frozen=True)
class BackendFacts:
    """One backend.

    `device_type` is where the tensors live that it moves, and so where a run over it trains. `carries` names what it
    can move or take part in: dtypes (`float32`, `bfloat16`, `float8`) and features (`async_tensor_parallel`).
    `not_built` is why it cannot be chosen yet, or None.
    """

    name: str
    device_type: str
    carries: frozenset[str]
    not_built: str | None = None


BACKENDS: Mapping[str, BackendFacts] = {
    facts.name: facts
    for facts in (
        BackendFacts("gloo", "cpu", frozenset({"float32", "bfloat16"})),
        BackendFacts("nccl", "cuda", frozenset({"float32", "bfloat16", "float8", "async_tensor_parallel"})),
        BackendFacts(
            "nvshmem",
            "cuda",
            frozenset({"float32", "bfloat16"}),
            not_built="Quadriga does not have this backend yet; no byte would go through NVSHMEM",
        ),
    )
}


def choose(requested: str | None, cuda: bool) -> str:
    """The name of the backend that a run will use.

    Args:
        requested: what COMM_BACKEND or `comm.backend` says; None or "" leaves the choice to the machine.
        cuda: whether a CUDA device is visible here.

    Raises:
        UserError: the backend is unknown, not built yet, or cannot be had on this machine. Nothing is ever replaced
            by another backend.
    """
    if not requested:
        return "nccl" if cuda else "gloo"
    problem = _why_not(requested, cuda)
    if problem is not None:
        raise UserError(problem)
    return requested


def _why_not(requested: str, cuda: bool) -> Problem | None:
    usable = ", ".join(name for name, facts in BACKENDS.items() if facts.not_built is None)
    facts = BACKENDS.get(requested)
    if facts is None:
        what = "no backend has this name"
        return Problem("comm.backend", what, requested, allowed=usable, nearest=nearest(requested, BACKENDS))
    if facts.not_built is not None:
        fix = "choose nccl (GPU) or gloo (CPU)"
        return Problem("comm.backend", facts.not_built, requested, allowed=usable, fix=fix)
    if facts.device_type == "cuda" and not cuda:
        what = "this backend moves tensors between CUDA devices, and none is visible here"
        fix = "leave the backend unset, or choose gloo to train on the CPU"
        return Problem("comm.backend", what, requested, fix=fix)
    return None
