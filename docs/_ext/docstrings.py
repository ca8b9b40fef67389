"""Docstrings become reStructuredText, which autodoc reads. They are Markdown with the sections of Google's style.

A block of a docstring is a table, an indented block of code, or prose. In prose only code spans are markup.
"""

from __future__ import annotations

import builtins
import re
from typing import Any

from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
MARKUP = re.compile(r"[\\*|]|_(?=\W|$)")
ROW = re.compile(r"\s*\|.*\|\s*$")
CELLS = re.compile(r"(?<!\\)\|")


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring in reStructuredText."""
    blocks = re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip("\n"))
    return [*"\n\n".join(map(block_to_rst, blocks)).split("\n"), ""]


def block_to_rst(block: str) -> str:
    lines = block.split("\n")
    if block.startswith("    "):
        return "\n".join([".. code-block:: text", "", *lines])
    if all(map(ROW.match, lines)):
        return table_to_rst(lines)
    return prose_to_rst(block)


def table_to_rst(lines: list[str]) -> str:
    rows = [CELLS.split(line.strip().strip("|")) for line in lines]
    rst = [".. list-table::", "   :header-rows: 1", ""]
    for row in (rows[0], *rows[2:]):
        cells = [prose_to_rst(cell.strip().replace("\\|", "|")) for cell in row]
        rst += [f"   {'-' if number else '* -'} {cell}".replace("   -", "     -") for number, cell in enumerate(cells)]
    return "\n".join(rst)


def prose_to_rst(text: str) -> str:
    rst, end = [], 0
    for span in CODE.finditer(text):
        rst += [MARKUP.sub(r"\\\g<0>", text[end : span.start()]), f"``{span.group(2).strip()}``"]
        end = span.end()
        if text[end : end + 1].isalnum():
            rst.append("\\ ")
    return "".join([*rst, MARKUP.sub(r"\\\g<0>", text[end:])])


def convert(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # so that napoleon takes no part of the first line for a type


class BuiltinTypes(SphinxTransform):
    """Types such as `bytes` in signatures are no links: Sphinx would take any attribute of this name for the target."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        for link in list(self.document.findall(addnodes.pending_xref)):
            if link.get("refdomain") == "py" and hasattr(builtins, link["reftarget"]):
                link.replace_self(link.children)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", convert, priority=400)  # napoleon has 500
    app.add_transform(BuiltinTypes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
