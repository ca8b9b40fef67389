"""Ends a run that makes no progress, and reports which rank it waited for, or where it hangs.

A thread on every rank samples the main thread and sends heartbeats through the rendezvous store.

Until the first step has ended (`starting`), also on one rank: the run hangs if no rank makes progress (see `activity`)
for `TIMEOUT_SHARE` of `comm.init_timeout_seconds`. A download or a compilation of any length is no hang.

After the first step, a rank compares the heartbeats of all ranks in two cases: it has waited in a collective for longer
than `TIMEOUT_SHARE` of the allowed time, or it waits and the next rank has been silent for as long. A single rank never
waits, so its thread ends.

The rank that detects a hang raises the alarm. Then every rank writes its stack and its last collectives. A rank on the
same machine sends a signal to a silent rank, so that it does so too. All exit with code 4. The timeouts of the process
groups, which name no rank, come later.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from quadriga import limits
from quadriga.config.schema import Comm
from quadriga.errors import EXIT_STALLED, UserError
from quadriga.log import logger
from quadriga.metrics.events import EventLog
from quadriga.resilience import exit_reports, hang_report
from quadriga.resilience.activity import ActivityMonitor
from quadriga.resilience.hang_report import HangReport, Heartbeat
from quadriga.resilience.processes import RESTART_COUNT
from quadriga.resilience.progress import Progress
from quadriga.resilience.state_dump import StateDump
from quadriga.resilience.waits import StableTimer, Wait, WaitTracker, worst_wait

TIMEOUT_SHARE = 0.7  # of the time that a collective may take; the rest is for the comparison and the exit
HEARTBEATS = 60  # in the same time
RANKS_PER_SECOND = 4000  # heartbeats per second that one store can serve
READING_GAP = 4  # heartbeats between two readings: a rank that is alive has sent one
ALIVE_SECONDS = 1.0  # minimum time between two readings
STACK_HEARTBEATS = 8  # time for all ranks to write their stacks
STACK_SECONDS = 1.0  # after that, time for a silent rank to write its stack
NONE = "-"  # no alarm, no leader


class Watchdog:
    """Watches this rank and the next, from `start` on. As a context manager it stops at the end of the context."""

    def __init__(
        self,
        comm: Comm,
        host_timeout_seconds: float,
        progress: Progress,
        traces_folder: str,
        environ: Mapping[str, str],
    ) -> None:
        """`host_timeout_seconds`: time limit of collectives in host groups."""
        self.progress, self._environ, self._comm = progress, environ, comm
        progress.before_first_pass = lambda: self.store_barrier("first batch")
        self._in_barrier = False
        self.events: EventLog | None = None  # for the fault, once the run is built
        self._rank, self._world_size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        self._limit, self._host_limit = TIMEOUT_SHARE * comm.train_timeout_seconds, TIMEOUT_SHARE * host_timeout_seconds
        self._start_limit = TIMEOUT_SHARE * comm.init_timeout_seconds
        self._pause = self._pause_within(comm.init_timeout_seconds)
        self._starting, self._activity = True, ActivityMonitor(progress, self._pause)
        self._dump = StateDump(Path(traces_folder), comm.save_traces_file_prefix, self._rank)
        self._heartbeat = Heartbeat(self._rank, socket.gethostname(), os.getpid())
        self._last_heartbeats: dict[int, Heartbeat] = {}  # the last heartbeat of each rank that was read
        self._warned = False  # about values that no rank wrote
        self._reset()
        self._stopped, self._next_round = threading.Event(), threading.Event()
        self._store: PrefixStore | None = None
        self._thread: threading.Thread | None = None
        self._ending = False

    def _pause_within(self, seconds: float) -> float:
        return max(seconds / HEARTBEATS, self._world_size / RANKS_PER_SECOND)

    def _reset(self) -> None:
        """Restart all clocks, because this process itself was suspended."""
        self._waits = WaitTracker(self._limit, self._host_limit, short=2 * self._pause)
        self._next_rank_timer, self._leader_timer = StableTimer(), StableTimer()
        self._activity.reset()
        self._store_answered = time.monotonic()  # time of the store's last answer

    def _reset_if_suspended(self, then: float, pause: float) -> None:
        """Call after a pause. If it took far longer than intended, this process was suspended."""
        if time.monotonic() - then > READING_GAP * pause + 1:
            self._reset()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """After a failure the thread is not joined, because it may wait for a store that is gone."""
        if error is None:
            self.stop()
        elif not self._ending:
            self._stopped.set()
            self._dump.remove()

    def start(self) -> None:
        """Begin to watch."""
        self._dump.open()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def store_barrier(self, name: str) -> None:
        """Wait for all ranks, without a limit while one of them makes progress; a collective has a fixed time limit.

        Without torchrun's store this does nothing: then the ranks meet in a collective, with its time limit.
        """
        if self._world_size == 1 or self._environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return
        store, pause, everyone = self._open_store(), 0.002, f"{name}/all"
        self._activity.reset()  # reaching the barrier is progress; waiting in it is none
        self._in_barrier = True
        try:
            # Keys whose values are never read: on a counter that another process overwrote, the store would fail. The
            # first rank checks the keys of all ranks; the others check only the key that it sets then.
            store.set(f"{name}/{self._rank}", "here")
            names = [f"{name}/{rank}" for rank in range(self._world_size)] if self._rank == 0 else []
            while not store.check([everyone]):
                if names and store.check(names):
                    store.set(everyone, "here")
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, 0.5)
            self._activity.reset()  # all ranks are here
        finally:
            self._in_barrier = False

    def first_step_done(self) -> None:
        """From now on a rank is late if other ranks wait for it. Call on all ranks."""
        if self._world_size == 1:
            self.stop()
            return
        self._starting = False
        self._pause = self._pause_within(self._comm.train_timeout_seconds)
        self._reset()
        self._next_round.set()

    def stop(self) -> None:
        """Stop the thread, because this rank no longer trains."""
        if self._stopped.is_set() or self._thread is None:
            return
        self._stopped.set()
        self._next_round.set()
        self._thread.join()
        self._heartbeat = replace(self._heartbeat, finished=True)
        with suppress(RuntimeError):  # the store may be gone with the first rank
            self._send_heartbeat()
        self._dump.close()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            wait, host_wait = self._start_wait() if self._starting else self._waits.poll()
            overdue = next((each for each in (wait, host_wait) if each is not None and each.is_too_long), None)
            try:
                self._check_peers(wait, host_wait, overdue)
                self._store_answered = time.monotonic()
            except RuntimeError:  # from the store: its machine is gone, or it does not answer in time
                # A busy store may answer again, and before the first step no rank waits in a collective.
                lost = not self._starting or time.monotonic() - self._store_answered > self._start_limit
                if overdue is not None and lost:
                    self._abort(self._build_report({self._rank: self._heartbeat}, (), overdue, store_answers=False))
                if self._starting:
                    self._store = None  # a broken connection never answers; the next round opens another
            then, pause = time.monotonic(), self._pause
            self._next_round.wait(pause)
            self._next_round.clear()
            self._reset_if_suspended(then, pause)

    def _start_wait(self) -> tuple[Wait | None, Wait | None]:
        """The time without progress of this rank, before the end of its first step."""
        seconds = self._activity.poll(waits=self._in_barrier)
        where = f"phase {self._phase!r}"
        return Wait(seconds, f"{where}, without progress", self._start_limit), None

    @property
    def _phase(self) -> str:
        compiles = self._starting and self._activity.compiles
        return f"{self.progress.phase}: compile" if compiles else self.progress.phase

    def _connect(self) -> None:
        """Connect to the store, if there are other ranks. Torchrun's store exists before its ranks start."""
        agent = self._environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self._store is not None or self._world_size == 1 or not (agent or dist.is_initialized()):
            return
        self._store = self._open_store()
        for key in ("alarm", "leader"):
            self._store.compare_set(key, "", NONE)

    def _open_store(self) -> PrefixStore:
        """A new connection, with a key prefix for this start of the ranks."""
        host, port = self._environ["MASTER_ADDR"], int(self._environ["MASTER_PORT"])
        timeout = timedelta(seconds=max(READING_GAP * self._pause, 1.0))
        store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        return PrefixStore(f"quadriga/watch/{self._environ.get(RESTART_COUNT, '0')}", store)

    def _check_peers(self, wait: Wait | None, host_wait: Wait | None, overdue: Wait | None) -> None:
        self._connect()
        self._send_heartbeat(wait, host_wait)
        if self._store is None:
            if overdue is not None:
                self._abort(self._build_report({self._rank: self._heartbeat}, (), overdue))
            return
        if (report := self._read_alarm(self._store, self._store.compare_set("alarm", "", NONE))) is not None:
            self._abort(report)
        silent_wait = self._next_rank_timeout(self._store, wait or host_wait)
        overdue = overdue or silent_wait
        if overdue is None:
            return
        leader = self._store.compare_set("leader", NONE, str(self._rank)).decode(errors="replace")
        if leader == str(self._rank):
            self._diagnose(self._store, overdue)
            self._store.set("leader", NONE)
        elif self._leader_timer.seconds(leader) > 3 * READING_GAP * self._pause:
            self._store.set("leader", NONE)  # the leader itself has stopped

    def _next_rank_timeout(self, store: PrefixStore, wait: Wait | None) -> Wait | None:
        """This rank's wait with the seconds of the next rank's silence, if that is too long in training; else None."""
        next_rank = (self._rank + 1) % self._world_size
        heartbeat = self._read_heartbeats(store, [next_rank])[next_rank]
        seconds = self._next_rank_timer.seconds(heartbeat.count)
        self._heartbeat = replace(self._heartbeat, next_silent=seconds)
        if self._starting:
            return None
        return wait._replace(seconds=seconds) if wait and seconds > self._limit and not heartbeat.finished else None

    def _diagnose(self, store: PrefixStore, overdue: Wait) -> None:
        """Compare the heartbeats of all ranks, and raise the alarm unless the late rank has arrived meanwhile."""
        starting = self._starting
        before = self._read_heartbeats(store, range(self._world_size))
        for _ in range(max(READING_GAP, round(ALIVE_SECONDS / self._pause))):
            then, pause = time.monotonic(), self._pause
            time.sleep(pause)
            self._reset_if_suspended(then, pause)
            self._send_heartbeat(*(self._start_wait() if starting else self._waits.poll()))
        after = self._read_heartbeats(store, range(self._world_size))
        silent = hang_report.silent_ranks(before, after)
        waits = [wait for wait in (self._start_wait() if starting else self._waits.poll()) if wait is not None]
        stuck = any(wait.is_too_long for wait in waits)
        if starting:  # a hang only if no rank makes progress: a rank that does will arrive
            stuck = self._starting and stuck and not hang_report.moving_ranks(after, silent, self._start_limit)
        elif silent:
            stuck = True
        if stuck:
            own = self._build_report(after, silent, worst_wait(waits, default=overdue))
            self._abort(self._read_alarm(store, store.compare_set("alarm", NONE, own.to_json())) or own)

    def _read_alarm(self, store: PrefixStore, text: bytes) -> HangReport | None:
        """The alarm in the store, or None. A value that no rank wrote is removed."""
        if text == NONE.encode():
            return None
        try:
            return HangReport.from_json(text)
        except UserError as error:
            if not self._warned:
                logger.warning("an alarm in the rendezvous store was not written by a rank, and is ignored:\n%s", error)
            self._warned = True
            store.set("alarm", NONE)
            return None

    def _build_report(
        self, heartbeats: Mapping[int, Heartbeat], silent: tuple[int, ...], overdue: Wait, store_answers: bool = True
    ) -> HangReport:
        waiting = hang_report.waiting_ranks(heartbeats, overdue.host)
        late = hang_report.late_rank(heartbeats, silent, waiting) if store_answers else None
        return HangReport(
            late=late,
            silent=silent,
            reporter=self._heartbeat,
            operation=overdue.operation,
            waiting=len(waiting - {*silent}),
            late_waits=late is not None and late.rank in waiting,
            world_size=self._world_size,
            seconds=overdue.seconds,
            began=time.time() - overdue.seconds,
            same_host_rank=hang_report.rank_on_same_host(late, heartbeats, silent) if late else None,
            starting=self._starting,
        )

    def _send_heartbeat(self, wait: Wait | None = None, host_wait: Wait | None = None) -> None:
        """Send this rank's state to the store: one small message."""
        starting = self._starting
        waits = wait if not starting or self._activity.communicates or self._in_barrier else None
        self._heartbeat = replace(
            self._heartbeat,
            count=self._heartbeat.count + 1,
            step=self.progress.step,
            phase=self._phase,
            seconds=self.progress.seconds,
            waits=waits.seconds if waits else None,
            waits_in_host=host_wait.seconds if host_wait else None,
            launched=self._waits.launched,
            no_progress=wait.seconds if wait and starting else None,
        )
        if self._store is not None:
            self._store.set(str(self._rank), self._heartbeat.to_json())

    def _read_heartbeats(self, store: PrefixStore, ranks: range | list[int]) -> dict[int, Heartbeat]:
        """The last heartbeat of each rank; one with count 0 for a rank that has sent none."""
        keys = [str(rank) for rank in ranks]
        if not store.check(keys):
            keys = [key for key in keys if store.check([key])]
        for key, text in zip(keys, store.multi_get(keys), strict=True):
            with suppress(UserError):  # overwritten by another process; the rank will send the next one
                heartbeat = Heartbeat.from_json(text)
                if heartbeat.rank == int(key):
                    self._last_heartbeats[heartbeat.rank] = heartbeat
        return {rank: self._last_heartbeats.get(rank, Heartbeat(rank, "?", 0)) for rank in ranks}

    def _abort(self, report: HangReport) -> NoReturn:
        """Log the fault, write stacks and traces, and exit. This thread alone reports the end of the rank."""
        exit_reports.acquire_exit_lock()
        self._ending = True
        try:
            if report.reporter.rank == self._rank and self.events is not None:
                # First: when another rank ends the silent one, torchrun ends this one too.
                headline = str(hang_report.hang_fault(report, "", str(self._dump.folder))).splitlines()[0]
                self.events.log_event("fault", self._heartbeat.step, error=headline)
            error = hang_report.hang_fault(report, self._dump_state(report), str(self._dump.folder))
            exit_reports.end_process(exit_reports.report_failure(self._environ, error, report.began))
        finally:
            os._exit(EXIT_STALLED)

    def _dump_state(self, report: HangReport) -> str:
        """Write this rank's stack and last collectives into the traces folder. Returns the stack of the late rank."""
        own_stack = self._dump.write()
        late, store = report.late, self._store
        all_dumped = time.monotonic() + STACK_HEARTBEATS * self._pause
        deadline = all_dumped + STACK_SECONDS
        if late is None or store is None:
            return own_stack if late is not None and self._rank == late.rank else ""
        with suppress(RuntimeError):
            if self._rank == late.rank:
                store.set("stack", own_stack[: limits.STACK_BYTES])
            self._wait_for_dumps(store, report, all_dumped)
            if self._rank == report.same_host_rank and late.rank in report.silent:
                stack = self._dump.kill_for_stack(late.rank, late.pid, deadline, self._pause / 4)
                store.set("stack", stack[: limits.STACK_BYTES])
            while time.monotonic() < deadline:
                if store.check(["stack"]):
                    return str(store.get("stack")[: limits.STACK_BYTES].decode(errors="replace"))
                time.sleep(self._pause / 4)
        return ""

    def _wait_for_dumps(self, store: PrefixStore, report: HangReport, deadline: float) -> None:
        """Wait until each rank that is neither silent nor finished has written its stack and its collectives.

        No rank may exit before: the others would lose a peer, and torchrun would kill them while they write. The rank
        that raised the alarm checks the keys of all ranks; the others check only the key that it sets then.
        """
        store.set(f"dumped/{self._rank}", "done")
        names = []
        if self._rank == report.reporter.rank:
            heartbeats = self._read_heartbeats(store, range(self._world_size))
            names = [f"dumped/{each.rank}" for each in heartbeats.values() if not each.finished]
            names = [name for name in names if int(name.partition("/")[2]) not in report.silent]
        while time.monotonic() < deadline and not store.check(["dumped/all"]):
            if names and store.check(names):
                store.set("dumped/all", "done")
            else:
                time.sleep(self._pause / 4)
