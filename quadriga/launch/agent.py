"""torchrun without its noise: what the launcher starts as its child.

    python -m quadriga.launch.agent <torchrun's arguments>

torchrun follows the end of its ranks with a traceback of its own and a box of text; here it says nothing, dies with
the launcher, and writes which ranks ended how (`agent.json` beside the ranks' own records).

Signals do not go through torchrun, which would take them for the end of the run and kill ranks that need longer than a
fixed time to save. They are forwarded to the ranks themselves as soon as all of them have handlers; before
that there is nothing to save, and torchrun ends the ranks.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from quadriga.errors import EXIT_FAULT, EXIT_OK
from quadriga.launch.environment import LOOPBACK_RENDEZVOUS
from quadriga.resilience.processes import AGENT_PID, RECORDS, die_with_parent, last_start, ranks_with_handlers

LAUNCHER_PID = "QUADRIGA_LAUNCHER_PID"
FAILURES_FILE = "agent.json"
SAVE_SIGNAL = signal.SIGUSR2
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, SAVE_SIGNAL)
TORCHRUN_SIGNAL = "SIGQUIT"  # of the signals, the only one that torchrun handles itself


def main(argv: list[str]) -> int:
    """Run torchrun and return 0, or 1 when a rank failed; 128 + n when signal n ended the run."""
    records = Path(os.environ[RECORDS])
    forwarder = SignalForwarder(records, ranks=int(argv[argv.index("--nproc-per-node") + 1]))
    for number in FORWARDED_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
            signal.signal(number, forwarder.forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SAVE_SIGNAL})  # the launcher has blocked it until here
    die_with_parent(int(os.environ[LAUNCHER_PID]))
    os.environ[AGENT_PID] = str(os.getpid())
    drop_torchrun_variables(argv)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from quadriga.launch.rendezvous import register

    logging.disable(logging.ERROR)  # the ranks speak for themselves
    register()
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
    """On one machine, drop the variables that stand for torchrun's options: a cluster sets them for a torchrun of its
    own, and PET_STANDALONE, say, would bring back the rendezvous that listens on all interfaces."""
    if LOOPBACK_RENDEZVOUS in argv:
        for name in [name for name in os.environ if name.startswith("PET_")]:
            del os.environ[name]


class SignalForwarder:
    """Forwards signals to the ranks of this machine, `ranks` in number.

    `interrupt` makes the exception that ends the run where the ranks are not that far yet: what torchrun's own handler
    would raise, as soon as there is a torchrun.
    """

    def __init__(self, records: Path, ranks: int) -> None:
        self._records, self._ranks = records, ranks
        self.interrupt: Callable[[int], BaseException] = lambda number: SystemExit(128 + number)

    def forward(self, number: int, _frame: FrameType | None) -> None:
        pids = ranks_with_handlers(last_start(self._records), os.getpid())
        if len(pids) == self._ranks:
            for pid in pids:
                os.kill(pid, number)
        elif number != SAVE_SIGNAL:  # which asks to save: there is nothing to save yet
            raise self.interrupt(number)


def write_failures(folder: Path, failures: Mapping[int, Any]) -> None:
    """Write {rank: {pid, exitcode, time}} of the ranks that failed; an exit code of -n means killed by signal n."""
    entries = {
        rank: {"pid": failure.pid, "exitcode": failure.exitcode, "time": failure.timestamp}
        for rank, failure in failures.items()
    }
    (folder / FAILURES_FILE).write_text(json.dumps(entries))


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # taking torch down with care takes longer than all else that is left to do
