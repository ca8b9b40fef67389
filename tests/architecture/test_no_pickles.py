"""No value that another process sent is unpickled: torch's object collectives, which pickle, are called nowhere."""

from __future__ import annotations

import ast

import pytest
from tree import PACKAGE, parsed, sources

PICKLING = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_collective_pickles(path):
    names = (
        node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in ast.walk(parsed(path))
    )
    called = sorted(PICKLING & set(names))
    assert not called, f"{called}: quadriga.json_collectives sends the same as JSON"
