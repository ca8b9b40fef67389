"""Ends a run that stands still, and says which rank it waited for.

From the first finished step on, a thread on every rank says through the rendezvous store where its rank is. When its
own rank has waited in a collective for longer than `SHARE` of the time allowed, or waits while the next rank has been
silent for as long, it compares what all ranks say and raises the alarm. On the alarm every rank writes down its stack
and its last collectives, a silent one is made to by a signal from a rank on its machine, and all leave with exit code
4. The timeouts of the process groups, which name nobody, come later.

A rank may be slow as long as nobody waits for it, and where others wait in a host group as slow as a disk can be.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TextIO

from torch._C._distributed_c10d import PrefixStore, TCPStore

from quadriga.comm import collectives, flight_recorder
from quadriga.config.schema import Comm
from quadriga.errors import EXIT_STALLED
from quadriga.metrics.events import Events
from quadriga.processes import RESTART_COUNT, parent_of
from quadriga.train import guards
from quadriga.train.progress import Progress
from quadriga.train.stall import Beat, Stall, fault, helper_of, late_rank, silent_ranks, waiting_ranks
from quadriga.train.waits import Still, Wait, Waits, worst

SHARE = 0.7  # of the time that a collective may take; the rest is for finding out, and for leaving
BEATS = 60  # in the same time
RANKS_PER_SECOND = 4000  # that one store serves
APART, ALIVE_SECONDS = 4, 1.0  # beats, and at least seconds, between two readings: a rank that is alive has spoken
STACK_BEATS = 6  # in which a rank has to show its stack
NONE = "-"  # no alarm, no judge


class Watchdog:
    """Watches this rank and the next. Does nothing at one rank."""

    def __init__(
        self,
        comm: Comm,
        host_timeout_seconds: float,
        progress: Progress,
        traces_folder: str,
        events: Events,
        environ: Mapping[str, str],
    ) -> None:
        """`host_timeout_seconds`: how long collectives of host groups may take."""
        self._progress, self._events, self._environ = progress, events, environ
        self._rank, self._world_size = collectives.rank(), collectives.world_size()
        self._limit, self._host_limit = SHARE * comm.train_timeout_seconds, SHARE * host_timeout_seconds
        self._pause = max(comm.train_timeout_seconds / BEATS, self._world_size / RANKS_PER_SECOND)
        self._traces, self._prefix = Path(traces_folder), comm.save_traces_file_prefix
        self._me = Beat(self._rank, socket.gethostname(), os.getpid())
        self._began_anew()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._stack_file: TextIO | None = None

    def _began_anew(self) -> None:
        """Forget for how long anything has stood still: it was this process that did not run."""
        self._waits = Waits(self._limit, self._host_limit, short=2 * self._pause)
        self._neighbour, self._judge = Still(), Still()
        self._last_round = time.monotonic()

    def start(self) -> None:
        """Begin to watch. Call on all ranks, before a collective: after it every rank has spoken."""
        if self._world_size == 1:
            return
        host, port = self._environ["MASTER_ADDR"], int(self._environ["MASTER_PORT"])
        timeout = timedelta(seconds=max(APART * self._pause, 1.0))
        store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        self._store = PrefixStore(f"quadriga/watch/{self._environ.get(RESTART_COUNT, '0')}", store)
        for key in ("alarm", "judge"):
            self._store.compare_set(key, "", NONE)
        self._traces.mkdir(parents=True, exist_ok=True)
        self._stack_file = self._stack_path(self._rank).open("w")
        if number := stack_signal():
            faulthandler.register(number, file=self._stack_file, all_threads=True)
        self._say()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more: this rank does not train any longer."""
        if self._thread is None or self._stack_file is None:
            return
        self._stopped.set()
        self._thread.join()
        self._me = replace(self._me, left=True)
        with suppress(RuntimeError):  # the store may be gone with the first rank
            self._say()
        if number := stack_signal():
            faulthandler.unregister(number)
        self._stack_file.close()
        self._stack_path(self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._stopped.wait(self._pause):
            wait, host_wait = self._waits.look()
            overdue = next((each for each in (wait, host_wait) if each is not None and each.is_too_long), None)
            try:
                self._look_around(wait, host_wait, overdue)
            except RuntimeError:  # of the store: its machine is gone, or it does not answer in time
                if overdue is not None:
                    self._end(self._stall({self._rank: self._me}, (), overdue, store_answers=False))

    def _look_around(self, wait: Wait | None, host_wait: Wait | None, overdue: Wait | None) -> None:
        now = time.monotonic()
        if now - self._last_round > APART * self._pause + 1:
            self._began_anew()
        self._last_round = now
        self._say(wait, host_wait)
        alarm = self._store.get("alarm").decode()
        if alarm != NONE:
            self._end(Stall.from_json(alarm))
        overdue = overdue or self._silence_of_the_next(wait or host_wait)
        if overdue is None:
            return
        judge = self._store.compare_set("judge", NONE, str(self._rank)).decode()
        if judge == str(self._rank):
            self._find_out(overdue)
            self._store.set("judge", NONE)
        elif self._judge.seconds(judge) > 3 * APART * self._pause:
            self._store.set("judge", NONE)  # the judge itself has stopped

    def _silence_of_the_next(self, wait: Wait | None) -> Wait | None:
        """Our own wait, made as long as the next rank has been silent, where that is too long in training."""
        beat = self._read([(self._rank + 1) % self._world_size])[(self._rank + 1) % self._world_size]
        seconds = self._neighbour.seconds(beat.count)
        return wait._replace(seconds=seconds) if wait and seconds > self._limit and not beat.left else None

    def _find_out(self, overdue: Wait) -> None:
        """Compare what the ranks say, and raise the alarm unless the rank that is late has come meanwhile."""
        before = self._read(range(self._world_size))
        for _ in range(max(APART, round(ALIVE_SECONDS / self._pause))):
            time.sleep(self._pause)
            self._say(*self._waits.look())
        after = self._read(range(self._world_size))
        silent, waits = silent_ranks(before, after), [wait for wait in self._waits.look() if wait is not None]
        if silent or any(wait.is_too_long for wait in waits):
            alarm = self._stall(after, silent, worst(waits, default=overdue)).to_json()
            self._end(Stall.from_json(self._store.compare_set("alarm", NONE, alarm)))

    def _stall(
        self, beats: Mapping[int, Beat], silent: tuple[int, ...], overdue: Wait, store_answers: bool = True
    ) -> Stall:
        waiting = waiting_ranks(beats, overdue.host)
        late = late_rank(beats, silent, waiting) if store_answers else None
        return Stall(
            late=late,
            silent=silent,
            accuser=self._me,
            operation=overdue.operation,
            waiting=len(waiting - {*silent}),
            late_waits=late is not None and late.rank in waiting,
            world_size=self._world_size,
            seconds=overdue.seconds,
            began=time.time() - overdue.seconds,
            helper=helper_of(late, beats, silent) if late else None,
        )

    def _say(self, wait: Wait | None = None, host_wait: Wait | None = None) -> None:
        """Let the others know where this rank is. Messages to the store are few and small."""
        self._me = replace(
            self._me,
            count=self._me.count + 1,
            step=self._progress.step,
            phase=self._progress.phase,
            seconds=self._progress.seconds,
            waits=wait.seconds if wait else None,
            waits_in_host=host_wait.seconds if host_wait else None,
            launched=self._waits.launched,
        )
        self._store.set(str(self._rank), self._me.to_json())

    def _read(self, ranks: range | list[int]) -> dict[int, Beat]:
        """What ranks have said last; a rank that has not begun to speak is silent."""
        keys = [str(rank) for rank in ranks]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        spoken = {int(key): Beat.from_json(text) for key, text in zip(keys, self._store.multi_get(keys), strict=True)}
        return {rank: spoken.get(rank, Beat(rank, "?", 0)) for rank in ranks}

    def _end(self, stall: Stall) -> NoReturn:
        """Write down what this rank knows, and leave; the first word about its end is had by this thread."""
        guards.take_the_word()
        try:
            stack = self._write_down(stall)
            error = fault(stall, stack, str(self._traces))
            if stall.accuser.rank == self._rank:
                self._events.tell("fault", self._me.step, error=str(error).splitlines()[0])
            guards.end_process(guards.report_failure(self._environ, error, stall.began))
        finally:
            os._exit(EXIT_STALLED)

    def _write_down(self, stall: Stall) -> str:
        """Leave this rank's stack and last collectives in the traces folder. Returns the stack of the late rank."""
        assert self._stack_file is not None
        faulthandler.dump_traceback(self._stack_file, all_threads=True)
        # Before a silent rank is ended, at which torchrun ends the others.
        flight_recorder.dump(self._traces / f"{self._prefix}{self._rank}")
        late, deadline = stall.late, time.monotonic() + STACK_BEATS * self._pause + 1
        with suppress(RuntimeError):
            if late is not None and self._rank == late.rank:
                self._store.set("stack", self._stack_path(self._rank).read_text())
            elif late is not None and self._rank == stall.helper and late.rank in stall.silent:
                self._store.set("stack", self._stack_of(late, deadline))
        with suppress(RuntimeError):
            while late is not None and time.monotonic() < deadline:
                if self._store.check(["stack"]):
                    return str(self._store.get("stack").decode())
                time.sleep(self._pause / 4)
        return ""

    def _stack_of(self, late: Beat, deadline: float) -> str:
        """Have a silent rank on this machine write down its stack, and end it: it may never do so by itself."""
        number, path, stack = stack_signal(), self._stack_path(late.rank), ""
        if not number or parent_of(late.pid) != os.getppid():
            return stack
        with suppress(ProcessLookupError):
            os.kill(late.pid, number)
            os.kill(late.pid, signal.SIGCONT)
            while not stack.endswith("\n") and time.monotonic() < deadline:
                time.sleep(self._pause / 4)
                stack = path.read_text()
            os.kill(late.pid, signal.SIGKILL)
        return stack

    def _stack_path(self, rank: int) -> Path:
        return self._traces / f"stack_{rank}.txt"  # a name in which torch's tools do not see a trace


def stack_signal() -> int | None:
    """What makes a rank write down its stack, whatever it does; None where the system has no such signals."""
    return signal.SIGRTMIN + 5 if hasattr(signal, "SIGRTMIN") else None
