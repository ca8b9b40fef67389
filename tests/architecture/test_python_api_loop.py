"""The Python API is on top: only `quadriga/__init__.py` imports it."""

from __future__ import annotations


def test_nothing_else_imports_the_api():
    from test_package_imports import MAY_IMPORT

    assert {name for name, may in MAY_IMPORT.items() if may & {"api", "trainer"}} == {"", "trainer"}
