"""A seeded fuzzer over readers: whatever the bytes, a reader answers or refuses with one message, in bounded time.

To add a reader, write in a file `readers_NAME.py` of this folder:

    def build(folder: Path) -> None: ...      # writes a sound input: one file or a tree
    def read(folder: Path) -> int | None: ... # reads it as the product does; an exit code if it is a command

    READERS = [Reader("goodput", build, read)]

A case copies the sound input, damages one file of it (`mutate.damaged`, by a seed made of the reader's name and the
number of the case) and reads. It passes if `read` returns None, 0 or 2, or raises `UserError`; its report must be short
and free of control characters. Any other exception, exit code, or too long a time fails.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mutate import TOKENS, damaged

from quadriga.errors import UserError

HERE = Path(__file__).parent
LONGEST_REPORT = 20_000  # characters: every problem of a file is told, each of them short
NOT_READY = "Before it can train:"  # of a dry run, which prints what a start would refuse below what the run would be
MEMORY_GROWTH = 1 << 30  # bytes over all cases of a reader


@dataclass(frozen=True)
class Reader:
    """One way that bytes from elsewhere enter the product."""

    name: str
    build: Callable[[Path], None]
    read: Callable[[Path], int | None]
    tokens: list[bytes] = field(default_factory=list)  # beside those of `mutate`
    damages: tuple[str, ...] = ("**/*",)  # which files of the input are damaged
    seconds: float = 20.0  # of one case, on a loaded machine


class TooSlow(BaseException):
    """Not an Exception, so that no reader can take it for a fault of the file."""


@dataclass
class Failure:
    reader: str
    case: int
    what: str
    files: dict[str, bytes]

    def __str__(self) -> str:
        shown = "\n".join(f"    {name}: {content[:400]!r}" for name, content in self.files.items())
        return f"{self.reader}, case {self.case}: {self.what}\n  damaged:\n{shown}"


def readers() -> list[Reader]:
    """All readers of the folder's `readers_*.py`, by name."""
    found = [
        reader for file in sorted(HERE.glob("readers_*.py")) for reader in importlib.import_module(file.stem).READERS
    ]
    return sorted(found, key=lambda reader: reader.name)


def fuzz(reader: Reader, cases: range) -> list[Failure]:
    """The cases that failed, at most five; each can be repeated alone by its number."""
    failures: list[Failure] = []
    with tempfile.TemporaryDirectory() as temporary:
        sound = Path(temporary, "sound")
        sound.mkdir()
        reader.build(sound)
        if (failed := _read(reader, sound)) is not None:
            return [Failure(reader.name, -1, f"the sound input is refused: {failed}", {})]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for case in cases:
            folder = Path(temporary, "case")
            shutil.copytree(sound, folder, symlinks=True)
            changed = _damage(reader, folder, random.Random(f"{reader.name} {case}"))
            if (failed := _read(reader, folder)) is not None:
                failures.append(Failure(reader.name, case, failed, changed))
            shutil.rmtree(folder)
            if len(failures) == 5:
                break
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if grown > MEMORY_GROWTH:
            failures.append(Failure(reader.name, -1, f"memory grew by {grown >> 20} MiB over the cases", {}))
    return failures


def _damage(reader: Reader, folder: Path, rng: random.Random) -> dict[str, bytes]:
    files = sorted({file for pattern in reader.damages for file in folder.glob(pattern) if file.is_file()})
    chosen = rng.choice(files)
    content = damaged(chosen.read_bytes(), rng, TOKENS + reader.tokens)
    chosen.write_bytes(content)
    return {str(chosen.relative_to(folder)): content}


def _read(reader: Reader, folder: Path) -> str | None:
    """What was wrong about how the reader answered; None if nothing was."""
    out, err = io.StringIO(), io.StringIO()
    start = time.monotonic()
    try:
        with _time_limit(reader.seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = reader.read(folder)
    except UserError as error:
        return _report_fault(error.report)
    except TooSlow:
        return f"not done within {reader.seconds:.0f} s"
    except SystemExit as error:
        return None if error.code in (0, 2) else f"exit code {error.code}"
    except Exception:  # noqa: BLE001 (any exception is what is looked for)
        return f"a traceback:\n{traceback.format_exc(limit=-6)}"
    if code not in (None, 0, 2):
        return f"exit code {code} after {time.monotonic() - start:.1f} s: {err.getvalue()[-2000:]}"
    if "Traceback (most recent call last)" in err.getvalue():
        return f"a traceback was printed:\n{err.getvalue()[-2000:]}"
    message = err.getvalue() or out.getvalue().partition(NOT_READY)[2]
    return _report_fault(message) if code == 2 else None


def _report_fault(report: str) -> str | None:
    if not report.strip():
        return "a refusal without a message"
    if len(report) > LONGEST_REPORT:
        return f"a report of {len(report)} characters"
    bad = {c for c in report if not c.isprintable() and c != "\n"}
    return f"control characters in the report: {sorted(bad)}" if bad else None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def end(signum: int, frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))
