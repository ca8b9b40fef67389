"""The life of the default process group: start, patience, stop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from quadriga.comm import collectives, gloo, host_slots, nccl, nvshmem
from quadriga.comm.network import loopback_variables
from quadriga.config.schema import Comm
from quadriga.log import logger

# What of a backend is a process group. NCCL's symmetric memory is one of its buffers, not of its group.
BACKEND_MODULES: Mapping[str, ModuleType] = {
    "gloo": gloo,
    "nccl": nccl,
    "nccl-symm": nccl,
    "nvshmem": nvshmem,
    "host-slots": host_slots,
}


def start(
    comm: Comm, backend: str, traces_folder: str | None = None, environ: Mapping[str, str] = os.environ
) -> torch.device:
    """Join the default process group and return this rank's device.

    RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous come from `environ`, as torchrun sets them; without RANK this is a
    run of one rank, which needs no port, and keeps those that its libraries open on the loopback. The first collectives
    may wait `comm.init_timeout_seconds` (ranks start at different times); `be_patient` and `tighten_timeouts` change
    that later.

    Args:
        backend: a name of `quadriga.comm.backend.BACKENDS`.
        traces_folder: where a timeout leaves the flight recorder's trace, one file a rank. None: nowhere.
    """
    if "RANK" not in environ:
        os.environ.update(loopback_variables(os.environ))
    _record_flights(comm, traces_folder)
    module = BACKEND_MODULES[backend]
    device: torch.device = module.device(int(environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    dist.init_process_group(
        module.PROCESS_GROUP,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
        **_rendezvous(environ, timeout),
    )
    logger.debug("process group of %d ranks over %s", dist.get_world_size(), backend)
    return device


def _rendezvous(environ: Mapping[str, str], timeout: timedelta) -> dict[str, Any]:
    """Where the ranks meet, as arguments of `init_process_group`; {} where torch finds it by itself.

    The store of torchrun's agent lives on when torchrun starts the ranks again, and torch would look in it for the
    addresses of ranks that are dead. So each start has a corner of its own.
    """
    if "RANK" not in environ:
        return {"store": HashStore(), "rank": 0, "world_size": 1}
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    start = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = {"rank": int(environ["RANK"]), "world_size": int(environ["WORLD_SIZE"])}
    return {"store": PrefixStore(f"quadriga/start/{start}", store), **place}


def tighten_timeouts(comm: Comm) -> None:
    """After the first step a rank that stays away for `comm.train_timeout_seconds` is lost. Call on all ranks."""
    collectives.barrier()  # nobody may still be in a first step that the short timeout would cut off
    collectives.set_timeout(timedelta(seconds=comm.train_timeout_seconds))


def host_group(timeout_seconds: float | None = None) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for what lies on the host, of no other use; None at one rank. Call on all ranks.

    Not the default group, also where that is gloo: two threads in one gloo group mix up their messages. Its collectives
    may wait `timeout_seconds`, also when those of training are given less: a slow disk is no hang.
    """
    if dist.get_world_size() == 1:
        return None
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    return dist.new_group(backend="gloo", timeout=timeout, group_desc=collectives.HOST)


def stop() -> None:
    """Leave the process group. Safe to call where none was started."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _record_flights(comm: Comm, traces_folder: str | None) -> None:
    """Keep the last collectives in memory, to be dumped on a timeout (torch reads these once, at start)."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(comm.trace_buf_size)
    if comm.trace_buf_size > 0 and traces_folder is not None:
        os.makedirs(traces_folder, exist_ok=True)
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
        prefix = os.path.join(traces_folder, comm.save_traces_file_prefix)
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = prefix
        os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = prefix  # the same, as torch 2.11 spells it
