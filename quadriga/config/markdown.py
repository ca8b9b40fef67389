"""Markdown: tables, and untrusted text that never becomes markup, HTML or a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from quadriga.errors import printable

_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$]")
_SAFE_WORD = re.compile(r"[\w./=-]+", re.ASCII)


def plain(text: str) -> str:
    """A user's text as one line of Markdown prose."""
    names = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return _MARKUP.sub(lambda found: names.get(found.group(), f"\\{found.group()}"), printable(text))


def code(text: str) -> str:
    """A code span. Its fence has more backticks than any run of them in the text, so the text cannot end it."""
    shown = printable(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"


def argument(text: str) -> str:
    """One word of a shell command, quoted if necessary."""
    return f'"{text}"' if _SAFE_WORD.fullmatch(text) else shlex.quote(printable(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
