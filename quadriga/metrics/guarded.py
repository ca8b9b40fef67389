"""What is done when a file that training could do without cannot be written (`metrics.on_write_failure`).

The reason is told once a file; what should have been written is lost, and the next write is tried again. Where the
configuration says "stop", the run is asked to save and leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from quadriga.errors import printable
from quadriga.log import logger


class RecordWriter(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


W = TypeVar("W", bound=RecordWriter)


class WriteFailures:
    """The failed writes of this rank. `reason`: why the run is to stop; None as long as it is not."""

    def __init__(self, stops: bool) -> None:
        self._stops = stops
        self._failing: dict[str, int] = {}  # what cannot be written, and how often
        self.reason: str | None = None

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """A write to `what`, a file or folder, whose OSError ends nothing."""
        try:
            yield
        except OSError as error:
            self.add(what, error)
        else:
            if lost := self._failing.pop(what, 0):
                logger.warning("%s can be written again; lost: %d %s", what, lost, "write" if lost == 1 else "writes")

    def add(self, what: str, error: Exception) -> None:
        """Take note of a write that failed."""
        why = printable(getattr(error, "strerror", None) or error)
        self._failing[what] = self._failing.get(what, 0) + 1
        if self._failing[what] == 1:
            then = "the run saves and stops" if self._stops else "the run goes on"
            logger.warning("%s cannot be written (%s): what it should say is lost, %s", what, why, then)
        if self._stops and self.reason is None:
            self.reason = f"{what} cannot be written ({why})"


class Guarded(Generic[W]):
    """A logger whose files may fail. It is made at its first write, and again where that could not be done."""

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
