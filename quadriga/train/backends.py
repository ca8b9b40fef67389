"""The backend of a run: what torch and the device support, the collectives to use, the record in `metrics.jsonl`."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

import torch

from quadriga.comm import collectives, nvshmem
from quadriga.comm.backend import BACKENDS, NCCL_SYMMETRIC, NVSHMEM, Machine, backend_by_axis
from quadriga.comm.heap import VARIABLE, symmetric_size
from quadriga.comm.mesh import Mesh
from quadriga.comm.sharding import ShardCollectives, open_shard_collectives
from quadriga.config import Run
from quadriga.log import logger
from quadriga.metrics.guarded import Guarded, Logger
from quadriga.metrics.loggers import JSONL_NAME
from quadriga.planning.communication import heap_of
from quadriga.resilience import exit_reports


def machine_for(backend: str | None, local_rank: int) -> Machine:
    """The properties of this rank's machine that `backend` depends on."""
    cuda, facts = torch.cuda.is_available(), BACKENDS.get(backend or "")
    offers = {}
    if facts is not None and facts.needs == NCCL_SYMMETRIC:
        offers[NCCL_SYMMETRIC] = collectives.has_symmetric_memory()
    elif facts is not None and facts.needs == NVSHMEM and cuda:  # without CUDA its library may print errors
        offers[NVSHMEM] = nvshmem.is_offered()
    asked = cuda and facts is not None and facts.capability is not None
    capability = torch.cuda.get_device_capability(local_rank) if asked else None
    return Machine(cuda, torch.__version__, offers, capability)


def collectives_for_shards(
    run: Run, backend: str, mesh: Mesh, device: torch.device, environ: MutableMapping[str, str] = os.environ
) -> ShardCollectives | None:
    """The collectives that `fully_shard` uses instead of torch's; None if it keeps torch's. Call on all ranks.

    Raises:
        UserError: the user's NVSHMEM_SYMMETRIC_SIZE is too small for this run.
    """
    heap = heap_of(run, backend)
    if heap is not None and backend == "nvshmem":
        environ[VARIABLE] = symmetric_size(heap, environ)
    if heap is not None:
        logger.debug("symmetric memory: %s", heap)
        if backend == "nvshmem":
            exit_reports.skip_finalizers()  # they can wait for the library, which has closed
    group = mesh.fsdp.get_group("dp_shard")
    return open_shard_collectives(backend, group, heap, device, run.config.comm.init_timeout_seconds)


def write_backends_record(loggers: Sequence[Logger], run: Run, backend: str, attempt: int, first_step: int) -> None:
    """Begin this start's part of `metrics.jsonl` with a record of the backend of each axis."""
    record = {
        "kind": "backends",
        "step": first_step,
        "attempt": attempt,
        "time": time.time(),
        "backend": backend,
        "backends": backend_by_axis(backend, run.spec.degrees),
    }
    for each in loggers:
        if isinstance(each, Guarded) and Path(each.what).name == JSONL_NAME:
            each.write(record)
