"""The launcher's child process: torchrun without its messages.

    python -m quadriga.launch.agent <torchrun's arguments>

torchrun prints its own traceback and a box of text when a rank fails. The agent suppresses both, exits with the
launcher, and writes how ranks ended (`agent.json`, next to the ranks' exit records).

Signals do not go through torchrun: it ends the run on a signal, and kills ranks that need longer than a fixed time to
save. The agent forwards them to the ranks as soon as all ranks have handlers. Before that there is nothing to save, and
torchrun ends the ranks.

torchrun's own rendezvous listens on all interfaces, without authentication, and its c10d backend unpickles values of
its store. One machine needs neither. There is only one agent, so it keeps its state in memory, and it never reads the
store of the ranks. That store is a TCPStore whose socket is bound to 127.0.0.1 before torch receives it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from quadriga.comm.network import LOOPBACK_ADDRESS
from quadriga.errors import EXIT_FAULT, EXIT_OK
from quadriga.launch.environment import LOOPBACK_RENDEZVOUS
from quadriga.resilience.processes import (
    AGENT_PID,
    RECORDS,
    SAVE_SIGNAL,
    STOP_SIGNALS,
    die_with_parent,
    last_start,
    ranks_with_handlers,
)

LAUNCHER_PID = "QUADRIGA_LAUNCHER_PID"
FAILURES_FILE = "agent.json"
TORCHRUN_SIGNAL = "SIGQUIT"  # the only signal that torchrun handles itself


def main(argv: list[str]) -> int:
    """Run torchrun. Returns 0, or 1 if a rank failed, or 128 + n if signal n ended the run."""
    records = Path(os.environ[RECORDS])
    forwarder = SignalForwarder(records, ranks=int(argv[argv.index("--nproc-per-node") + 1]))
    for number in (*STOP_SIGNALS, SAVE_SIGNAL):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup sets SIGHUP to be ignored, and it stays ignored
            signal.signal(number, forwarder.forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SAVE_SIGNAL})  # blocked by the launcher until the handler is set
    die_with_parent(int(os.environ[LAUNCHER_PID]))
    os.environ[AGENT_PID] = str(os.getpid())
    drop_torchrun_variables(argv)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # the ranks print their own errors
    register_loopback_rendezvous()
    try:
        forwarder.interrupt = lambda number: SignalException(f"signal {number}", sigval=signal.Signals(number))
        run(parse_args(argv))
    except ChildFailedError as error:
        write_failures(records, error.failures)
        return EXIT_FAULT
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return EXIT_OK


def drop_torchrun_variables(argv: Sequence[str]) -> None:
    """On one machine, delete the variables that set torchrun's options (`PET_*`).

    A cluster sets them for its own use of torchrun. PET_STANDALONE, for example, would select the rendezvous that
    listens on all interfaces.
    """
    if LOOPBACK_RENDEZVOUS in argv:
        for name in [name for name in os.environ if name.startswith("PET_")]:
            del os.environ[name]


class SignalForwarder:
    """Forwards signals to the `ranks` ranks of this machine.

    `interrupt` makes the exception that ends the run if the ranks have no handlers yet. Once torchrun runs, it is the
    exception that torchrun's own handler would raise.
    """

    def __init__(self, records: Path, ranks: int) -> None:
        self._records, self._ranks = records, ranks
        self.interrupt: Callable[[int], BaseException] = lambda number: SystemExit(128 + number)

    def forward(self, number: int, _frame: FrameType | None) -> None:
        pids = ranks_with_handlers(last_start(self._records), os.getpid())
        if len(pids) == self._ranks:
            for pid in pids:
                os.kill(pid, number)
        elif number != SAVE_SIGNAL:  # there is nothing to save yet
            raise self.interrupt(number)


def register_loopback_rendezvous() -> None:
    """Register the rendezvous of a single agent with torchrun, under the name that the launcher passes. Call once.

    Each start of the ranks gets a new store on a new port of the loopback interface.
    """
    from torch._C._distributed_c10d import HashStore, Store, TCPStore
    from torch.distributed.elastic import rendezvous

    class LoopbackRendezvous(rendezvous.RendezvousHandler):
        def __init__(self, parameters: rendezvous.RendezvousParameters) -> None:
            if parameters.max_nodes != 1:
                raise ValueError(f"{LOOPBACK_RENDEZVOUS} is for one machine, not for {parameters.max_nodes}")
            self._run_id = parameters.run_id
            self._agent_store: Store = HashStore()
            self._rank_store: TCPStore | None = None

        def get_backend(self) -> str:
            return LOOPBACK_RENDEZVOUS

        @property
        def use_agent_store(self) -> bool:
            return True  # the ranks are clients of the agent's store, and no rank creates one

        def next_rendezvous(self) -> rendezvous.RendezvousInfo:
            self._agent_store = HashStore()
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
                listener.bind((LOOPBACK_ADDRESS, 0))
                port, handle = listener.getsockname()[1], listener.fileno()
                # The old store closes, so values of dead ranks are lost.
                self._rank_store = TCPStore(
                    LOOPBACK_ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=handle
                )
                listener.detach()  # the store closes it
            ranks = rendezvous.RendezvousStoreInfo(LOOPBACK_ADDRESS, port)
            return rendezvous.RendezvousInfo(self._agent_store, 0, 1, ranks)

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return self._run_id

        def shutdown(self) -> bool:
            self._rank_store = None
            return True

    rendezvous.rendezvous_handler_registry.register(LOOPBACK_RENDEZVOUS, LoopbackRendezvous)


def write_failures(folder: Path, failures: Mapping[int, Any]) -> None:
    """Write {rank: {pid, exitcode, time}} of the failed ranks. An exit code of -n means killed by signal n."""
    entries = {
        rank: {"pid": failure.pid, "exitcode": failure.exitcode, "time": failure.timestamp}
        for rank, failure in failures.items()
    }
    (folder / FAILURES_FILE).write_text(json.dumps(entries))


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # a regular exit of torch takes longer than the rest of the shutdown
