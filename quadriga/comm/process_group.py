"""The default process group: start, timeouts, host groups, stop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from quadriga.comm import collectives
from quadriga.comm.backend import BACKENDS
from quadriga.comm.network import loopback_variables
from quadriga.config.schema import Comm
from quadriga.log import logger

# By device: the argument of `init_process_group`. CPU tensors of a run on CUDA devices (small objects, offloaded
# gradients) go over gloo.
PROCESS_GROUPS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def start(
    comm: Comm, backend: str, traces_folder: str | None = None, environ: Mapping[str, str] = os.environ
) -> torch.device:
    """Join the default process group and return this rank's device.

    RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous come from `environ`, as torchrun sets them. Without RANK this is a
    run of one rank. It needs no port, and ports that its libraries open are bound to the loopback. The first
    collectives may wait `comm.init_timeout_seconds`, because ranks start at different times; `tighten_timeouts` changes
    this later.

    Args:
        backend: a name in `quadriga.comm.backend.BACKENDS`.
        traces_folder: folder for the flight recorder's trace after a timeout, one file per rank. None: no trace.
    """
    if "RANK" not in environ:
        os.environ.update(loopback_variables(os.environ))
    _record_flights(comm, traces_folder)
    device_type = BACKENDS[backend].device_type
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)  # NCCL binds its communicators to the current device
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    dist.init_process_group(
        PROCESS_GROUPS[device_type],
        timeout=timeout,
        device_id=device if device_type == "cuda" else None,
        **_rendezvous(environ, timeout),
    )
    logger.debug("process group of %d ranks over %s", dist.get_world_size(), backend)
    return device


def _rendezvous(environ: Mapping[str, str], timeout: timedelta) -> dict[str, Any]:
    """The rendezvous, as arguments of `init_process_group`; {} if torch's defaults work.

    The store of torchrun's agent survives a restart of the ranks, and torch would read the addresses of dead ranks from
    it. So each start has its own key prefix.
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


def set_start_timeouts(comm: Comm) -> None:
    """Set the time limit of collectives to `comm.init_timeout_seconds` in the groups of a mesh too.

    They get torch's default of 10 or 30 minutes, not the limit of the default group."""
    collectives.set_timeout(timedelta(seconds=comm.init_timeout_seconds))


def tighten_timeouts(comm: Comm) -> None:
    """After the first step, set the time limit of collectives to `comm.train_timeout_seconds`. Call on all ranks."""
    collectives.barrier()  # all ranks have ended the first step, which the short timeout could cut off
    collectives.set_timeout(timedelta(seconds=comm.train_timeout_seconds))


def host_group(timeout_seconds: float | None = None) -> dist.ProcessGroup | None:
    """A separate gloo group of all ranks for data on the host; None on one rank. Call on all ranks.

    The default group is not used even if it is gloo, because two threads in one gloo group mix up their messages. The
    group's collectives may wait `timeout_seconds`, also if the limit of training is shorter: a slow disk is no hang.
    """
    if dist.get_world_size() == 1:
        return None
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    return dist.new_group(backend="gloo", timeout=timeout, group_desc=collectives.HOST)


def stop() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _record_flights(comm: Comm, traces_folder: str | None) -> None:
    """Let torch record the last collectives, for a dump on a timeout. Torch reads these variables once, at startup."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(comm.trace_buf_size)
    if comm.trace_buf_size > 0 and traces_folder is not None:
        os.makedirs(traces_folder, exist_ok=True)
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
        prefix = os.path.join(traces_folder, comm.save_traces_file_prefix)
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = prefix
        os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = prefix  # the name in torch 2.11
