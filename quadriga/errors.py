"""What a user sees when something is wrong: problems that can be acted on, never a traceback.

Any package may raise `UserError`; only the entry points (`quadriga.launch`, `quadriga.train`, `quadriga.cli`) catch it,
print its report once and leave with its exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

EXIT_OK = 0
EXIT_FAULT = 1  # the machine or the code failed
EXIT_USAGE = 2  # the user asked for something that cannot be
EXIT_NO_GOOD_CHECKPOINT = 3  # published saves are there, and every one is damaged
EXIT_STALLED = 4  # a rank stopped, or a collective waited for too long
EXIT_NOT_FINITE = 5  # the loss or the gradients are no numbers, or jumped, and `[health]` says to stop
EXIT_OUT_OF_MEMORY = 6
EXIT_SAVED = 75  # asked to leave: saved and left; the same start goes on from there (EX_TEMPFAIL: try again)


NEWLINE = "\n"
MAX_PART_CHARS = 600  # characters of one part of a problem, as it is shown
MAX_PROBLEMS = 15  # problems of one report


def printable(value: object, *, keep: str = "") -> str:
    """`value` as text that a terminal may be sent: control characters are escaped, but for those in `keep`."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shortened(value: object, most: int = 80) -> str:
    """`printable`, of at most `most` characters: what was read may be long, and messages repeat it."""
    text = str(value)
    return printable(text if len(text) <= most else text[: most - 3] + "...")


def _text(value: str) -> str:
    """Words of ours, which may be of several lines, and what they repeat."""
    kept = value if len(value) <= 4 * MAX_PART_CHARS else value[: 4 * MAX_PART_CHARS - 3] + "..."
    return printable(kept, keep=NEWLINE)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the words that a user needs to mend it.

    `where` is a key (`training.seq_len`), a file (`data/a.jsonl, line 3`) or a variable (`NGPU`).
    """

    where: str
    what: str
    value: str | None = None  # as the user wrote it
    source: str | None = None  # the file, `command line` or the variable that said it
    allowed: str | None = None
    nearest: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        # What a user or a file said may hold control characters; they would move the cursor or forge lines.
        # And it may be long.
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
    """Something that the user can mend. Carries every problem found, not only the first."""

    exit_code = EXIT_USAGE

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems: tuple[Problem, ...] = problems

    @property
    def report(self) -> str:
        """The whole report, one blank line between two problems."""
        count = len(self.problems)
        title = "1 problem" if count == 1 else f"{count} problems"
        shown = [str(problem) for problem in self.problems[:MAX_PROBLEMS]]
        if count > MAX_PROBLEMS:
            shown.append(f"and {count - MAX_PROBLEMS} more")
        return f"quadriga: {title}\n\n" + "\n\n".join(shown)

    def __str__(self) -> str:
        return self.report


class Fault(Exception):
    """What the machine or the numbers did to a run. The message is for the user as it stands: what happened, what is
    safe, what to do next; no traceback is shown with it."""

    exit_code = EXIT_FAULT

    def __init__(self, message: str, exit_code: int = EXIT_FAULT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what caused it, what caused that, and so on, as a traceback shows them; each once.

    Errors may cause one another in a cycle (`raise error from error`), so nobody else follows these references.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was most likely meant to be, or None. Case does not count."""
    if len(word) > 200:  # no name is as long, and comparing takes quadratic time
        return None
    by_lower = {candidate.lower(): candidate for candidate in known}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[match[0]] if match else None
