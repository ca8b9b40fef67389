"""Stop and save requests: signals, files and the save timer, agreed on by all ranks.

SIGTERM, SIGINT, SIGUSR1, SIGHUP and a file `STOP` in the run folder request a save and an exit. SIGUSR2 and a file
`SAVE` request a save; training continues. A request reaches any rank, and all ranks must act at the same step. After
each step all ranks start an asynchronous MAX all-reduce of the request flags on a gloo group of their own, and read the
result after the next step. So no rank blocks. The save timer of the first rank (`checkpoint.interval_minutes`) uses the
same flags.
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
from quadriga.resilience.processes import SAVE_SIGNAL, STOP_SIGNALS, handle_signals, records_folder, signal_handlers

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
BY_FILE = 128  # represents the file STOP among the numbers of signals
# Failures that a rank detects. All ranks act on the greatest number.
BY_FAILED_WRITE, BY_LOST_FOLDER = 129, 130
POLL_SECONDS = 1.0  # between two polls for the files


@dataclass(frozen=True)
class Decision:
    """What all ranks do after this step. `stop`: the number of the signal that requests it, or a `BY_` constant.

    `save`: on request, or because the timer has expired.
    """

    stop: int | None = None
    save: bool = False


class StopRequests:
    """Collects the requests to this rank and reduces them over all ranks. With checkpoints off, saves are refused."""

    def __init__(
        self,
        folder: str | Path,
        environ: Mapping[str, str],
        group: dist.ProcessGroup | None,
        saves: bool,
    ) -> None:
        """`group`: a gloo group of all ranks that only this thread uses; None for one rank. `saves`: checkpoints are
        on."""
        self._folder, self._environ, self._group = Path(folder), environ, group
        self._saves = saves
        self._is_first = group is None or dist.get_rank() == 0
        self._stop, self._save = 0, False  # requests to this rank, by a signal or a file
        self._save_file_seen = False  # a file SAVE that appears during a save requests another one
        self._last_poll = time.monotonic()
        self._identity = _identity(self._folder)  # the run folder may be removed or replaced
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._outdated = False  # the pending requests are older than the last save, which fulfilled them

    @contextmanager
    def install_handlers(self) -> Iterator[None]:
        """Handle signals as requests within the context. Afterwards the previous handlers are restored."""
        with ExitStack() as undo:
            if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
                undo.enter_context(signal_handlers(self._on_signal, STOP_SIGNALS, even_if_ignored=[SAVE_SIGNAL]))
                undo.enter_context(handle_signals(self._environ))
            yield
            self._finish()  # safe, because all ranks have started the same number of reductions

    def sync(self, save_is_due: bool = False) -> Decision:
        """The decision of all ranks on the requests up to the step before. Call after every step, on all ranks.

        `save_is_due`: whether the save timer has expired; only the first rank's value counts.
        """
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
        """Request a save and an exit of all ranks, because this rank cannot write a required file."""
        self._stop = max(self._stop, BY_FAILED_WRITE)

    def mark_saved(self) -> None:
        """Record a finished save, which fulfils all save requests so far. Call on all ranks."""
        self._outdated = self._pending is not None
        if self._save_file_seen:
            self._save_file_seen = False
            self._remove(SAVE_FILE)

    def mark_stopped(self) -> None:
        """Remove the request files, because the run ends on request."""
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
            os.write(2, b"interrupted twice: exit at once; checkpoints that were finished before are complete\n")
            os._exit(128 + number)
        if self._is_first and not self._stop:
            what = "saves and exits" if self._saves else "exits"
            os.write(
                2, f"{stop_cause_name(number)}: the run finishes its step, {what}\n".encode()
            )  # not by the logger, whose lock the interrupted code may hold
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
            except OSError as error:  # a folder with this name, or a disk that became read-only
                logger.warning("%s cannot be removed (%s)", self._folder / name, error.strerror)


def _identity(folder: Path) -> tuple[int, int] | None:
    """(device, inode) of a folder, to detect another one with its name; (0, 0) if it is missing, None if unknown."""
    try:
        status = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    except OSError:  # a server that does not answer now does not mean that the folder is gone
        return None
    return status.st_dev, status.st_ino


def stop_cause_name(cause: int) -> str:
    """The text for the cause of a stop."""
    if cause in (BY_FAILED_WRITE, BY_LOST_FOLDER):
        return "a failed write" if cause == BY_FAILED_WRITE else "the loss of the run folder"
    return f"the file {STOP_FILE}" if cause == BY_FILE else signal.Signals(cause).name


def log_exit(cause: int, step: int, steps: int, checkpoint: str | None) -> int:
    """Log the state of a run that ends on request. Returns the exit code.

    Args:
        cause: `stop` of the decision.
        checkpoint: the folder in which `step` is saved; None if it is not saved.
    """
    code = EXIT_SAVED if checkpoint else 128 + (signal.SIGTERM if cause == BY_FILE else cause)
    where = f"{stop_cause_name(cause)}: stopped after step {step} of {steps}"
    if checkpoint:
        logger.info("%s; saved in %s; the same command resumes from there (exit code %d)", where, checkpoint, code)
    else:
        logger.info("%s; nothing was saved, because checkpoints are off (exit code %d)", where, code)
    return code


def _decode(flags: torch.Tensor) -> Decision:
    stop, save = flags.tolist()
    return Decision(stop or None, bool(save))
