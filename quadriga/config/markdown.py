"""Text from files in Markdown: as it is to be read, never as markup, HTML or a command."""

from __future__ import annotations

import re
import shlex

from quadriga.errors import printable

_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$]")
_SAFE_WORD = re.compile(r"[\w./=-]+", re.ASCII)


def plain(text: str) -> str:
    """Words of a user in running text, in one line."""
    names = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return _MARKUP.sub(lambda found: names.get(found.group(), f"\\{found.group()}"), printable(text))


def code(text: str) -> str:
    """A code span, in which nothing has a meaning; it ends with as many backticks as stand nowhere in the text."""
    shown = printable(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"


def argument(text: str) -> str:
    """One word of a shell command, in quotes where it needs them."""
    return f'"{text}"' if _SAFE_WORD.fullmatch(text) else shlex.quote(printable(text))
