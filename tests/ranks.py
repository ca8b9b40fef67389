"""Real gloo ranks for tests: started in a fraction of a second, and never left behind.

    def sum_of_ranks(factor):                      # a module-level function of an importable test module
        total = torch.tensor(float(dist.get_rank() * factor))
        dist.all_reduce(total)
        return total.item()

    assert run_ranks(sum_of_ranks, 4, 10) == [60.0] * 4

The ranks are forked from one helper process (multiprocessing's fork server) that has imported torch and Quadriga once
(`preloaded.py`) and done no work since. Forking pytest itself would hang as soon as OpenMP has run in it; starting
fresh interpreters costs seconds. The rendezvous store lives in the calling process, as torchrun's agent keeps it, so no
port is guessed. Warnings in the ranks are errors, as they are in pytest.
"""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ["pytest", "preloaded"]
PR_SET_PDEATHSIG = 1

# Warnings that torch raises inside itself and that no caller can avoid: (message as a regular expression, category).
KNOWN_WARNINGS: list[tuple[str, type[Warning]]] = [
    # torch.compile asks every tensor for its .grad, and hides the warning in a way that errors get through.
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),
    # Importing inductor defines a TorchScript method, which torch itself has deprecated.
    (r"`torch\.jit\.script_method` is deprecated", DeprecationWarning),
]


class RankError(Exception):
    """A rank raised, died or did not come back in time; the message carries its traceback or exit code."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str | None = "gloo",
    environ: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `fn(*args)` on `world_size` real ranks and return their results by rank.

    `fn` must be a module-level function. With a `backend` the default process group stands before `fn` is called; with
    `None` only the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...) does, and `fn` starts what it needs. `environ` adds
    variables. Whatever happens, no process that was started is alive afterwards. Raises RankError for the first rank
    that fails, and when `timeout` seconds have passed.
    """
    store = _rendezvous_store(world_size)
    shared = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours: rank 0 connects to it as the others do
        "TORCHELASTIC_RESTART_COUNT": "0",
        **(environ or {}),
    }
    call = pickle.dumps((fn, args))
    ranks = _start(world_size, shared, backend, call, timeout)
    try:
        return _collect(ranks, time.monotonic() + timeout, timeout)
    finally:
        for process, pipe in ranks:
            _end(process, pipe)


def _rendezvous_store(world_size: int) -> Any:
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)


def _start(
    world_size: int, shared: dict[str, str], backend: str | None, call: bytes, timeout: float
) -> list[tuple[Any, Connection]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks: list[tuple[Any, Connection]] = []
    with _server_environment():
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            environ = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank_main, args=(theirs, environ, backend, call, timeout), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
    return ranks


@contextmanager
def _server_environment() -> Iterator[None]:
    """What the fork server must find when the first rank starts it: one OpenMP thread and the way to our code."""
    wanted = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _collect(ranks: list[tuple[Any, Connection]], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting: dict[Any, int] = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} of {len(ranks)} did not return within {timeout:g} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            process = ranks[rank][0]
            try:
                ok, payload = pickle.loads(ranks[rank][1].recv_bytes())
            except EOFError:
                process.join(5)
                raise RankError(f"rank {rank} of {len(ranks)} died with exit code {process.exitcode}") from None
            if not ok:
                raise RankError(f"rank {rank} of {len(ranks)} failed\n\n{payload}")
            results[rank] = payload
    for process, pipe in ranks:  # all are done: let them take their process groups down together
        pipe.send_bytes(b"all done")
        process.join(5)
    return [results[rank] for rank in range(len(ranks))]


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the rank and whatever it started
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)  # a rank that had not yet made its own group
    process.join()
    process.close()


def _rank_main(pipe: Connection, environ: dict[str, str], backend: str | None, call: bytes, timeout: float) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the fork server
    dismissed = threading.Event()
    threading.Thread(target=_watch, args=(pipe, dismissed), daemon=True).start()
    os.environ.update(environ)
    import torch.distributed as dist

    strict_warnings()
    try:
        fn, args = pickle.loads(call)
        if backend is not None:
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=min(timeout, 30.0)))
        # Plain pickle copies tensors; multiprocessing's own would send handles that die with this process.
        report = pickle.dumps((True, fn(*args)))
    except BaseException:  # noqa: BLE001 - whatever ended the rank belongs into the report
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        signal.pause()  # leaving now would fail the other ranks and hide the first error behind theirs
        return
    pipe.send_bytes(report)
    dismissed.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()


def _watch(pipe: Connection, dismissed: threading.Event) -> None:
    """Die with the calling process: the fork server would live on, since each of its children holds its lifeline."""
    try:
        pipe.recv_bytes()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
    dismissed.set()


def strict_warnings() -> None:
    """Make every warning an error, but for those that torch gives no way to avoid."""
    warnings.resetwarnings()
    warnings.simplefilter("error")
    for message, category in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
