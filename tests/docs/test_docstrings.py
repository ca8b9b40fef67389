"""Docstrings become reStructuredText that shows what they say."""

from __future__ import annotations

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
