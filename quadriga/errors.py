"""Errors that are reported to users: each problem names what is wrong and a remedy. No traceback is printed.

Any package may raise `UserError`. Only the entry points (`quadriga.launch`, `quadriga.train`, `quadriga.cli`) catch it,
print its report once, and exit with its exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

EXIT_OK = 0
EXIT_FAULT = 1  # the machine or the code failed
EXIT_USAGE = 2  # an error that the user can correct
EXIT_NO_GOOD_CHECKPOINT = 3  # every checkpoint is damaged, or one is invalid although its hashes are right
EXIT_STALLED = 4  # a rank stopped, or a collective timed out
EXIT_NOT_FINITE = 5  # the loss or the gradients are NaN or infinite, or the loss jumped, and `[health]` says to stop
EXIT_OUT_OF_MEMORY = 6
EXIT_SAVED = 75  # stopped on request, after a save: the same command resumes (EX_TEMPFAIL of sysexits.h)


NEWLINE = "\n"
MAX_PART_CHARS = 600  # printed characters of one part of a problem
MAX_PROBLEMS = 15  # printed problems of one report


def printable(value: object, *, keep: str = "") -> str:
    """`value` as text that is safe to print on a terminal: control characters are escaped, except those in `keep`."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shortened(value: object, most: int = 80) -> str:
    """`printable`, of at most `most` characters, because messages repeat values of any length."""
    text = str(value)
    return printable(text if len(text) <= most else text[: most - 3] + "...")


def _text(value: str) -> str:
    """Text of Quadriga, which may have several lines, with the values in it.

    Further lines are indented, so that a value with line breaks looks like a part of its problem, not like another one.
    """
    kept = value if len(value) <= 4 * MAX_PART_CHARS else value[: 4 * MAX_PART_CHARS - 3] + "..."
    return printable(kept, keep=NEWLINE).replace(NEWLINE, NEWLINE + " " * 8)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with what a user needs to correct it.

    `where` is a key (`training.seq_len`), a file (`data/a.jsonl, line 3`) or a variable (`NGPU`).
    """

    where: str
    what: str
    value: str | None = None  # as the user wrote it
    source: str | None = None  # where it was set: a file, a variable, or `command line`
    allowed: str | None = None
    nearest: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        # Values from users and files may contain control characters, which would move the cursor or forge lines.
        # They may also be long.
        value_text = f" = {shortened(self.value, MAX_PART_CHARS)}" if self.value is not None else ""
        origin = f"  [{shortened(self.source, MAX_PART_CHARS)}]" if self.source else ""
        lines = [f"{shortened(self.where, MAX_PART_CHARS)}{value_text}{origin}", f"    {_text(self.what)}"]
        if self.allowed:
            lines.append(f"    allowed: {_text(self.allowed)}")
        if self.nearest:
            lines.append(f"    did you mean: {shortened(self.nearest, MAX_PART_CHARS)}")
        if self.fix:
            lines.append(f"    to do: {_text(self.fix)}")
        return "\n".join(lines)


class UserError(Exception):
    """An error that the user can correct. It contains every problem found, not only the first."""

    exit_code = EXIT_USAGE

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems: tuple[Problem, ...] = problems

    @property
    def report(self) -> str:
        """The report of all problems, separated by blank lines; after `MAX_PROBLEMS` only their number."""
        count = len(self.problems)
        title = "1 problem" if count == 1 else f"{count} problems"
        shown = [str(problem) for problem in self.problems[:MAX_PROBLEMS]]
        if count > MAX_PROBLEMS:
            shown.append(f"and {count - MAX_PROBLEMS} more")
        return f"quadriga: {title}\n\n" + "\n\n".join(shown)

    def __str__(self) -> str:
        return self.report


class Fault(Exception):
    """A failure of the machine, the code or the numbers. The message is printed as it is, without a traceback: what
    happened, what is safe, and what to do next."""

    exit_code = EXIT_FAULT

    def __init__(self, message: str, exit_code: int = EXIT_FAULT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, its cause, the cause of that, and so on, in the order of a traceback; each once.

    Causes can form a cycle (`raise error from error`). So no other code follows these references.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most similar to `word`, or None if none is similar. Upper and lower case are equal."""
    if len(word) > 200:  # no name is this long, and the comparison takes quadratic time
        return None
    by_lower = {candidate.lower(): candidate for candidate in known}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[match[0]] if match else None
