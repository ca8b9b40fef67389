"""Handles failed writes of files that training does not need (`metrics.on_write_failure`).

The reason is logged once per file. The content of the failed write is lost, and the next write is tried again. With
"stop" in the configuration, the run is asked to save and exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from quadriga.errors import printable
from quadriga.log import logger


class Logger(Protocol):
    """Takes records: of `Meter`, or of the documents of a step."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


W = TypeVar("W", bound=Logger)


class WriteFailures:
    """The failed writes of this rank. `reason`: why the run must stop; None if it need not."""

    def __init__(self, stops: bool) -> None:
        self._stops = stops
        self._failing: dict[str, int] = {}  # by file or folder, the number of failed writes
        self.reason: str | None = None

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """A context for a write to `what`, a file or folder; an OSError in it is recorded and suppressed."""
        try:
            yield
        except OSError as error:
            self.add(what, error)
        else:
            if lost := self._failing.pop(what, 0):
                logger.warning("%s can be written again; lost: %d %s", what, lost, "write" if lost == 1 else "writes")

    def add(self, what: str, error: Exception) -> None:
        """Record a failed write."""
        why = printable(getattr(error, "strerror", None) or error)
        self._failing[what] = self._failing.get(what, 0) + 1
        if self._failing[what] == 1:
            then = "the run saves and stops" if self._stops else "the run continues"
            logger.warning("%s cannot be written (%s): new content is lost, %s", what, why, then)
        if self._stops and self.reason is None:
            self.reason = f"{what} cannot be written ({why})"


class Guarded(Generic[W]):
    """A writer whose failures are tolerated. It is created at the first write, and again at the next if that fails."""

    def __init__(self, make: Callable[[], W], what: str, failures: WriteFailures) -> None:
        self._make, self.what, self._failures = make, what, failures
        self._writer: W | None = None

    def write(self, record: dict[str, Any]) -> None:
        with self._failures.tolerated(self.what):
            if self._writer is None:
                self._writer = self._make()
            self._writer.write(record)

    def close(self) -> None:
        if self._writer is not None:
            with self._failures.tolerated(self.what):
                self._writer.close()
