"""Errors may cause one another in a cycle: only `errors.causes`, which sees each once, follows them."""

from __future__ import annotations

import re

from tree import PACKAGE, sources

FOLLOWS = re.compile(r"\b(\w+) = \1\.__(cause|context)__")


def test_nobody_else_follows_causes():
    files = [*sources(), *sorted((PACKAGE.parent / "scripts").glob("*.py"))]
    assert len(files) > 100
    found = [str(path) for path in files if path.name != "errors.py" and FOLLOWS.search(path.read_text())]
    assert not found, f"use quadriga.errors.causes: {found}"
