"""What is asked of a run from outside while it trains: to save, or to save and leave.

SIGTERM, SIGINT, SIGUSR1 and SIGHUP, and a file `STOP` in the run folder, ask to leave; SIGUSR2 and a file `SAVE` ask to
save and go on. Whichever rank is asked, all act at the same step: after each step the ranks start to tell each other
what they were asked, and read it after the next one, so that nothing waits for it. What the clock of the first rank
says (`checkpoint.interval_minutes`) travels with it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from quadriga.errors import EXIT_SAVED
from quadriga.log import logger
from quadriga.resilience.processes import handle_signals, records_folder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAVE_SIGNAL = signal.SIGUSR2
STOP_FILE, SAVE_FILE = "STOP", "SAVE"
BY_FILE = 128  # stands for the file STOP among the numbers of signals
# What a rank found itself. The greatest number is the one that all act on.
BY_FAILED_WRITE, BY_LOST_FOLDER = 129, 130
POLL_SECONDS = 1.0  # between two polls for the files


@dataclass(frozen=True)
class Decision:
    """What all ranks do after this step. `stop`: the number of the signal that asks for it, or `BY_FILE`.

    `save`: on request, or since it is time.
    """

    stop: int | None = None
    save: bool = False


class StopRequests:
    """Collects what is asked of this rank, and agrees with the others. Without checkpoints, saves are refused."""

    def __init__(
        self,
        folder: str | Path,
        environ: Mapping[str, str],
        group: dist.ProcessGroup | None,
        saves: bool,
    ) -> None:
        """`group`: a gloo group of all ranks, used by this thread alone; None: one rank alone. `saves`: checkpoints are
        on."""
        self._folder, self._environ, self._group = Path(folder), environ, group
        self._saves = saves
        self._is_first = group is None or dist.get_rank() == 0
        self._stop, self._save = 0, False  # asked of this rank, by a signal or a file
        self._save_file_seen = False  # a file SAVE: one that is dropped during a save asks for another
        self._last_poll = time.monotonic()
        self._identity = _identity(self._folder)  # of the run folder, which may be removed, or become another
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._outdated = False  # what is pending was asked before a save that has been made since

    @contextmanager
    def install_handlers(self) -> Iterator[None]:
        """Take signals as requests from here on. Afterwards they do what they did before."""
        with ExitStack() as undo:
            if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
                for number in (*STOP_SIGNALS, SAVE_SIGNAL):
                    if number == SAVE_SIGNAL or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                        undo.callback(signal.signal, number, signal.signal(number, self._on_signal))
                undo.enter_context(handle_signals(self._environ))
            yield
            self._finish()  # every rank has begun as many reductions as the others

    def sync(self, save_is_due: bool = False) -> Decision:
        """What the ranks agreed on. Call after every step, on all ranks. `save_is_due`: as the first rank finds."""
        if self._is_first:
            self._poll_files()
        if self._save and not self._saves:
            logger.warning("asked to save, but checkpoints are off (checkpoint.enable): nothing is saved")
            self._remove(SAVE_FILE)
            self._save = False
        decision = self._finish()
        flags = torch.tensor([self._stop, self._save or (save_is_due and self._is_first)], dtype=torch.int64)
        self._save = False
        if self._group is None:
            return _decode(flags)
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending, self._outdated = (work, flags), False
        return decision

    def report_write_failure(self) -> None:
        """Ask all ranks to save and leave, since this one cannot write what it must."""
        self._stop = max(self._stop, BY_FAILED_WRITE)

    def mark_saved(self) -> None:
        """Say that a save has been made: it answers every request to save so far. Call on all ranks."""
        self._outdated = self._pending is not None
        if self._save_file_seen:
            self._save_file_seen = False
            self._remove(SAVE_FILE)

    def mark_stopped(self) -> None:
        """Say that the run ends since it was asked to: that answers the request."""
        self._remove(STOP_FILE)
        self._remove(SAVE_FILE)

    def _finish(self) -> Decision:
        if self._pending is None:
            return Decision()
        (work, flags), self._pending = self._pending, None
        work.wait()
        decision = _decode(flags)
        return Decision(stop=decision.stop) if self._outdated else decision

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self._save = True
            return
        if number == signal.SIGINT and self._stop == number and records_folder(self._environ) is None:
            os.write(2, b"interrupted twice: left at once; saves that were finished before are whole\n")
            os._exit(128 + number)
        if self._is_first and not self._stop:
            what = "saves and leaves" if self._saves else "leaves"
            os.write(
                2, f"{stop_cause_name(number)}: the run finishes its step, {what}\n".encode()
            )  # a logger may be at work
        self._stop = number

    def _poll_files(self) -> None:
        if time.monotonic() - self._last_poll < POLL_SECONDS:
            return
        self._last_poll = time.monotonic()
        self._save_file_seen = os.path.lexists(self._folder / SAVE_FILE)
        self._save = self._save or self._save_file_seen
        if os.path.lexists(self._folder / STOP_FILE):
            self._stop = self._stop or BY_FILE
        if _identity(self._folder) not in (None, self._identity):
            self._stop = BY_LOST_FOLDER

    def _remove(self, name: str) -> None:
        if self._is_first:
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:  # a folder of this name, or a disk that became read-only
                logger.warning("%s cannot be removed (%s)", self._folder / name, error.strerror)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another of the same name; (0, 0) where there is none, None where nobody can tell."""
    try:
        status = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    except OSError:  # a server that does not answer now is no folder that is gone
        return None
    return status.st_dev, status.st_ino


def stop_cause_name(cause: int) -> str:
    """What asked for the end of the run, in words."""
    if cause in (BY_FAILED_WRITE, BY_LOST_FOLDER):
        return "a failed write" if cause == BY_FAILED_WRITE else "the loss of the run folder"
    return f"the file {STOP_FILE}" if cause == BY_FILE else signal.Signals(cause).name


def log_exit(cause: int, step: int, steps: int, checkpoint: str | None) -> int:
    """Say where a run stands that leaves on request. Returns the exit code.

    Args:
        cause: as agreed.
        checkpoint: where `step` is saved; None: nowhere.
    """
    code = EXIT_SAVED if checkpoint else 128 + (signal.SIGTERM if cause == BY_FILE else cause)
    where = f"{stop_cause_name(cause)}: left after step {step} of {steps}"
    if checkpoint:
        logger.info("%s; saved in %s, and the same start goes on from there (exit code %d)", where, checkpoint, code)
    else:
        logger.info("%s; nothing was saved, for checkpoints are off (exit code %d)", where, code)
    return code


def _decode(flags: torch.Tensor) -> Decision:
    stop, save = flags.tolist()
    return Decision(stop or None, bool(save))
