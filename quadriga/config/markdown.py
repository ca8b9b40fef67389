"""Markdown: templates, tables, and untrusted text that never becomes markup, HTML or a command."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quadriga.errors import printable
from quadriga.units import format_count, plural

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


FILTERS: Mapping[str, Callable[..., str]] = {
    "argument": argument,
    "bold": lambda size: f"**{size}**" if size > 1 else "1",
    "code": code,
    "format_count": format_count,
    "g": "{:g}".format,
    "j": json.dumps,
    "n": "{:,}".format,
    "on": lambda switch: "on" if switch else "off",
    "plain": plain,
    "plural": plural,
    "quote": shlex.quote,
}


def render(template: Path, **values: Any) -> str:
    """The document of a template. In it, `table` and `FILTERS` can be used besides `values`."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters.update(FILTERS)
    return environment.from_string(template.read_text(encoding="utf-8")).render(values, table=table)
