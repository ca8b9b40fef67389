"""What each communication backend can carry, which one serves which axis, and the choice of one. No torch here.

What this machine offers is not asked here but by the launcher and the ranks, who pass in what they found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.config.run_spec import Degrees
from quadriga.errors import Problem, UserError, nearest

SHARD = "shard"  # dp_shard and cp as one axis: what parameters are gathered and gradients scattered over


@dataclass(frozen=True)
class BackendFacts:
    """One backend.

    `device_type` is where the tensors live that it moves, and so where a run over it trains. `carries` names what it
    can move or take part in: dtypes (`float32`, `bfloat16`, `float64`, `float8`) and features
    (`async_tensor_parallel`). `fallback_backend`: the backend of everything but the parameters and gradients of
    `shard`, where that is another one; such a backend has nothing to do in a run that shards nothing. `on_host`: of CPU
    tensors. `capability`: the least compute capability of a device. `needs`: what PyTorch must offer, as in
    `Machine.offers`. `with_slots`: parameters and gradients go through memory that peers write into (`comm.heap`).
    `hidden`: for tests; never named as a choice.
    """

    name: str
    device_type: str
    carries: frozenset[str]
    fallback_backend: str | None = None
    on_host: str = "gloo"
    capability: tuple[int, int] | None = None
    needs: str | None = None
    with_slots: bool = False
    hidden: bool = False


DTYPES = frozenset({"float32", "bfloat16", "float64"})
FLOAT8, ASYNC_TP = "float8", "async_tensor_parallel"
NCCL_SYMMETRIC, NVSHMEM = "NCCL's symmetric memory for FSDP", "NVSHMEM"

BACKENDS: Mapping[str, BackendFacts] = {
    facts.name: facts
    for facts in (
        BackendFacts("gloo", "cpu", DTYPES),
        BackendFacts("nccl", "cuda", DTYPES | {FLOAT8, ASYNC_TP}),
        # Symmetric memory has one owner a process, and asynchronous tensor parallelism wants to be it.
        BackendFacts(
            "nccl-symm", "cuda", DTYPES | {FLOAT8}, fallback_backend="nccl", capability=(9, 0), needs=NCCL_SYMMETRIC
        ),
        BackendFacts(
            "nvshmem",
            "cuda",
            DTYPES | {FLOAT8},
            fallback_backend="nccl",
            capability=(7, 0),
            needs=NVSHMEM,
            with_slots=True,
        ),
        BackendFacts("host-slots", "cpu", DTYPES | {FLOAT8}, fallback_backend="gloo", with_slots=True, hidden=True),
    )
}

INSTALL_HINTS = {
    NCCL_SYMMETRIC: "install PyTorch 2.13 or newer, or choose nccl",
    NVSHMEM: "install a build of PyTorch with NVSHMEM and the package of its library (nvidia-nvshmem-cu12 or -cu13), "
    "or choose nccl",
}


@dataclass(frozen=True)
class Machine:
    """What decides over backends. `offers`: by what PyTorch may offer whether it does; left out where that is not
    known here, as the compute capability of the devices is None where it is not. `torch`: its version."""

    cuda: bool
    torch: str = ""
    offers: Mapping[str, bool] | None = None
    capability: tuple[int, int] | None = None


def choose_backend(requested: str | None, machine: Machine) -> str:
    """The name of the backend that a run will use.

    Args:
        requested: what COMM_BACKEND or `comm.backend` says; None or "" leaves the choice to the machine.
        machine: what is known of it. What is not known is passed: the ranks ask again.

    Raises:
        UserError: the backend is unknown, or cannot be had on this machine. Nothing is ever replaced
            by another backend.
    """
    if not requested:
        return "nccl" if machine.cuda else "gloo"
    problem = _refusal(requested, machine)
    if problem is not None:
        raise UserError(problem)
    return requested


def _refusal(requested: str, machine: Machine) -> Problem | None:
    facts = BACKENDS.get(requested)
    if facts is None:
        what = "no backend has this name"
        usable = ", ".join(name for name, each in BACKENDS.items() if not each.hidden)
        return Problem("comm.backend", what, requested, allowed=usable, nearest=nearest(requested, BACKENDS))
    if facts.device_type == "cuda" and not machine.cuda:
        what = "this backend moves tensors between CUDA devices, and none is visible here"
        fix = "leave the backend unset, or choose gloo to train on the CPU"
        return Problem("comm.backend", what, requested, fix=fix)
    if facts.needs is not None and not (machine.offers or {}).get(facts.needs, True):
        return Problem(
            "comm.backend",
            f"PyTorch {machine.torch} does not offer {facts.needs}",
            requested,
            fix=INSTALL_HINTS[facts.needs],
        )
    if facts.capability is not None and machine.capability is not None and machine.capability < facts.capability:
        least, here = (".".join(map(str, each)) for each in (facts.capability, machine.capability))
        what = f"this backend needs devices of compute capability {least}, and {here} is here"
        return Problem("comm.backend", what, requested, fix="choose nccl")
    return None


def backend_by_axis(backend: str, degrees: Degrees) -> dict[str, str]:
    """By axis which backend carries its bytes, of the axes that this run has. `shard`: parameters and gradients;
    `norms`: the small sums over all axes; `host`: what lies in host memory, such as checkpoints and agreements."""
    facts = BACKENDS[backend]
    rest = facts.fallback_backend or backend
    axes = {"dp_replicate": degrees.dp_replicate, "cp": degrees.cp, "tp": degrees.tp, "pp": degrees.pp}
    by_axis = {SHARD: backend} if shard_degree(degrees) > 1 else {}
    by_axis |= {axis: rest for axis, size in axes.items() if size > 1}
    return by_axis | ({"norms": rest, "host": facts.on_host} if degrees.world_size > 1 else {})


def shard_degree(degrees: Degrees) -> int:
    """Ranks that parameters are cut over."""
    return degrees.dp_shard * degrees.cp


def format_backends(by_axis: Mapping[str, str], shares: Mapping[str, float] | None = None) -> str:
    """`nvshmem: shard; nccl: tp, norms; gloo: host`, and behind a backend its share of the bytes, where it is given."""
    axes: dict[str, list[str]] = {}
    for axis, backend in by_axis.items():
        axes.setdefault(backend, []).append(axis)
    found = {name: f" ({_percent(share)})" for name, share in (shares or {}).items()}
    parts = (f"{backend}: {', '.join(names)}{found.get(backend, '')}" for backend, names in axes.items())
    return "; ".join(parts) or "nothing is sent"


def _percent(share: float) -> str:
    """In tenths; what is not nothing is not shown as 0, and what is not all of it not as 100."""
    if 0 < share < 1e-3:
        return "under 0.1 %"
    return "over 99.9 %" if 0.999 < share < 1 else f"{100 * share:.3g} %"
