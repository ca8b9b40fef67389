"""Writes the stack and the last collectives of this rank, or of a silent rank on this machine, when a run hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from quadriga.comm import flight_recorder
from quadriga.errors import Problem, UserError
from quadriga.resilience.processes import parent_of


class StateDump:
    """The files of this rank in the traces folder: `stack_RANK.txt` and `PREFIX RANK`, the last collectives.

    The file of the stack is open from `open` on, so that the rank can write it at any time; `remove` it after a normal
    end. A signal makes the rank write it, whatever it does.
    """

    def __init__(self, folder: Path, prefix: str, rank: int) -> None:
        self.folder, self._prefix, self._rank = folder, prefix, rank
        self._stack_file: TextIO | None = None

    def open(self) -> None:
        """Create the file of the stack, and register the signal. Raises UserError if it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stack_file = self._stack_path(self._rank).open("w")
        except OSError as error:
            what, fix = (
                f"cannot be written: {error.strerror}",
                "remove the file there, free disk space, or set another folder",
            )
            raise UserError(Problem("comm.save_traces_folder", what, str(self.folder), fix=fix)) from error
        if number := stack_signal():
            faulthandler.register(number, file=self._stack_file, all_threads=True)

    def close(self) -> None:
        """Unregister the signal, and remove the file."""
        if number := stack_signal():
            faulthandler.unregister(number)
        if self._stack_file is not None:
            self._stack_file.close()
        self.remove()

    def remove(self) -> None:
        """Remove the file; the signal stays registered."""
        self._stack_path(self._rank).unlink(missing_ok=True)

    def write(self) -> str:
        """Write the stacks of all threads and the last collectives. Returns the stacks."""
        assert self._stack_file is not None, "call open first"
        faulthandler.dump_traceback(self._stack_file, all_threads=True)
        flight_recorder.dump(self.folder / f"{self._prefix}{self._rank}")
        return self._stack_path(self._rank).read_text()

    def kill_for_stack(self, rank: int, pid: int, deadline: float, pause: float) -> str:
        """Make a silent rank on this machine write its stack, and kill it, because it may never exit by itself.

        Returns the stack as far as it was written before `deadline` (of `time.monotonic`), read every `pause` seconds.
        """
        number, path, stack = stack_signal(), self._stack_path(rank), ""
        if not number or parent_of(pid) != os.getppid():
            return stack
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)
            while not stack.endswith("\n") and time.monotonic() < deadline:
                time.sleep(pause)
                stack = path.read_text()
            os.kill(pid, signal.SIGKILL)
        return stack

    def _stack_path(self, rank: int) -> Path:
        return self.folder / f"stack_{rank}.txt"  # a name that torch's tools do not take for a trace


def stack_signal() -> int | None:
    """The signal on which a rank writes its stack; None if the system has no such signals."""
    return signal.SIGRTMIN + 5 if hasattr(signal, "SIGRTMIN") else None
