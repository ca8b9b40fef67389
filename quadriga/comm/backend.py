"""The communication backends: what each can carry, the choice of one, and the backend of each axis. No torch here.

The launcher and the ranks find out what the machine offers, and pass it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.config.run_spec import BackendFacts, Degrees
from quadriga.errors import Problem, UserError, nearest

SHARD = "shard"  # dp_shard and cp as one axis, for all-gathers of parameters and reduce-scatters of gradients


# Gloo itself rejects float8, but `fully_shard` sends a unit with several dtypes as bytes, and every unit has norms. The
# exception is a pipeline stage with `output` alone (docs/float8.md).
DTYPES = frozenset({"float32", "bfloat16", "float64", "float8"})
ASYNC_TP = "async_tensor_parallel"
NCCL_SYMMETRIC, NVSHMEM = "NCCL's symmetric memory for FSDP", "NVSHMEM"

BACKENDS: dict[str, BackendFacts] = {
    facts.name: facts
    for facts in (
        BackendFacts("gloo", "cpu", DTYPES),
        BackendFacts("nccl", "cuda", DTYPES | {ASYNC_TP}),
        # Symmetric memory has one owner per process, and asynchronous tensor parallelism must be the owner.
        BackendFacts("nccl-symm", "cuda", DTYPES, fallback_backend="nccl", capability=(9, 0), needs=NCCL_SYMMETRIC),
        BackendFacts(
            "nvshmem",
            "cuda",
            DTYPES,
            fallback_backend="nccl",
            capability=(7, 0),
            needs=NVSHMEM,
            transport="quadriga.comm.nvshmem:NvshmemTransport",
        ),
    )
}


def register_backend(facts: BackendFacts) -> None:
    """Add a backend to those that a run can choose. The launcher and each rank must call it at startup."""
    BACKENDS[facts.name] = facts


INSTALL_HINTS = {
    NCCL_SYMMETRIC: "install PyTorch 2.13 or newer, or choose nccl",
    NVSHMEM: "install a PyTorch build with NVSHMEM and the package of its library (nvidia-nvshmem-cu12 or -cu13), "
    "or choose nccl",
}


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide which backends work. `torch`: its version. `offers`: whether PyTorch has
    each feature; a feature is left out if that is unknown. `capability`: compute capability, None if unknown."""

    cuda: bool
    torch: str = ""
    offers: Mapping[str, bool] | None = None
    capability: tuple[int, int] | None = None


def choose_backend(requested: str | None, machine: Machine) -> str:
    """The name of the backend that a run will use.

    Args:
        requested: the value of COMM_BACKEND or `comm.backend`; None or "" for the default of the machine.
        machine: what is known about it. Unknown properties are accepted here, because the ranks check again.

    Raises:
        UserError: the backend is unknown, or not available on this machine. A requested backend is never replaced by
            another one.
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
        return Problem(
            "comm.backend", what, requested, allowed=", ".join(BACKENDS), nearest=nearest(requested, BACKENDS)
        )
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
        what = f"this backend needs compute capability {least}, but this device has {here}"
        return Problem("comm.backend", what, requested, fix="choose nccl")
    return None


def backend_by_axis(backend: str, degrees: Degrees) -> dict[str, str]:
    """The backend of each axis of this run. `shard`: parameters and gradients; `norms`: the small sums over all axes;
    `host`: data in host memory, such as checkpoints and stop requests."""
    facts = BACKENDS[backend]
    rest = facts.fallback_backend or backend
    axes = {"dp_replicate": degrees.dp_replicate, "cp": degrees.cp, "tp": degrees.tp, "pp": degrees.pp}
    by_axis = {SHARD: backend} if degrees.dp_shard * degrees.cp > 1 else {}
    by_axis |= {axis: rest for axis, size in axes.items() if size > 1}
    return by_axis | ({"norms": rest, "host": facts.on_host} if degrees.world_size > 1 else {})


def format_backends(by_axis: Mapping[str, str], shares: Mapping[str, float] | None = None) -> str:
    """`nvshmem: shard; nccl: tp, norms; gloo: host`, with the share of bytes after each backend, if `shares` has it."""
    axes: dict[str, list[str]] = {}
    for axis, backend in by_axis.items():
        axes.setdefault(backend, []).append(axis)
    found = {name: f" ({_percent(share)})" for name, share in (shares or {}).items()}
    parts = (f"{backend}: {', '.join(names)}{found.get(backend, '')}" for backend, names in axes.items())
    return "; ".join(parts) or "nothing is sent"


def _percent(share: float) -> str:
    """Three significant digits; 0 and 100 appear only if they are exact."""
    if 0 < share < 1e-3:
        return "under 0.1 %"
    return "over 99.9 %" if 0.999 < share < 1 else f"{100 * share:.3g} %"
