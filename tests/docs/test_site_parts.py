"""Parts of the site that need no build: docstrings become reStructuredText, and every page is in the index."""

from __future__ import annotations

import re
import sys

from launching import ROOT

sys.path.append(str(ROOT / "docs/_ext"))
from docstrings import to_rst  # found by the line above


def rst(text: str) -> str:
    return "\n".join(to_rst(text.split("\n")))


def test_code_and_characters_of_markup() -> None:
    assert (
        rst("The key `a.b` of P(|T| <= t), *args and x_.") == "The key ``a.b`` of P(\\|T\\| <= t), \\*args and x\\_.\n"
    )
    assert rst("Spans\nlines: `a\nb`s.") == "Spans\nlines: ``a\nb``\\ s.\n"
    assert rst("``x``") == "``x``\n"


def test_sections_of_google_style_are_left_alone() -> None:
    text = "First.\n\nRaises:\n    UserError: why."
    assert rst(text) == f"{text}\n"


def test_an_indented_block_is_code() -> None:
    assert rst("For example:\n\n    a * b\n      c|d\n\nEnd.") == (
        "For example:\n\n.. code-block:: text\n\n    a * b\n      c|d\n\nEnd.\n"
    )


def test_a_table_is_a_table() -> None:
    assert rst("| a | `b` |\n|---|---|\n| 1 | x \\| y |\n| | z |\n") == (
        ".. list-table::\n   :header-rows: 1\n\n   * - a\n     - ``b``\n   * - 1\n     - x \\| y\n   * - \n     - z\n"
    )


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = re.findall(r"(?m)^[\w-]+$", "\n".join(re.findall(r"(?ms)^```\{toctree\}\n(.*?)^```", index)))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert sorted(listed) == sorted(pages), "docs/index.md: list each page once, in the toctree of its kind"
    assert all(f"]({page}.md)" in index for page in pages), "docs/index.md: link each page in the table, for GitHub"
