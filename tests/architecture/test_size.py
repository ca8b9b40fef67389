"""Say the size out loud: long files and long functions are where understanding ends."""

from __future__ import annotations

import pytest
from tree import PACKAGE, functions, length, sources

FILE_LIMIT, FUNCTION_LIMIT = 400, 60
FUNCTION_LIMITS = {"train_step": 50, "build": 110}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LIMIT, f"{path.name}: {lines} lines"
    for function in functions(path):
        limit = FUNCTION_LIMITS.get(function.name, FUNCTION_LIMIT)
        assert length(function) <= limit, f"{path.name}: {function.name} has {length(function)} lines, limit {limit}"
