"""Progress of a long command on standard error: a bar on a terminal, else a line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from quadriga.errors import printable
from quadriga.units import format_seconds

LINE_SECONDS = 10.0  # between two lines, if standard error is not a terminal
Show = Callable[[float, str, Sequence[str]], None]


@contextmanager
def progress_shown(title: str) -> Iterator[Show]:
    """A function that shows the share that is done (0 to 1), a description, and notes, which stay on the terminal."""
    if not sys.stderr.isatty():
        yield _Lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn(title), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)

        def show(share: float, description: str, notes: Sequence[str] = ()) -> None:
            for note in notes:
                bar.console.print(printable(note), markup=False, highlight=False)
            bar.update(task, completed=share, description=description)

        yield show


class _Lines:
    def __init__(self, title: str) -> None:
        self._title, self._printed = title, time.monotonic()

    def __call__(self, share: float, description: str, notes: Sequence[str] = ()) -> None:
        for note in notes:
            print(printable(note), file=sys.stderr)
        if (now := time.monotonic()) - self._printed >= LINE_SECONDS:
            self._printed = now
            print(f"{self._title}: {description}", file=sys.stderr, flush=True)


def format_time_left(seconds: float, share: float) -> str:
    """`, 30.0s left`, if the share of the work was done in so many seconds. Empty if nothing was done."""
    return f", {format_seconds(seconds * (1 - share) / share)} left" if share > 0 else ""
