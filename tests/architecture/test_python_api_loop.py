"""`quadriga.trainer` does after a step what the loop of the command line does, statement by statement."""

from __future__ import annotations

import ast

from tree import PACKAGE, parsed


def function(file: str, name: str) -> ast.FunctionDef:
    return next(node for node in parsed(PACKAGE / file).body if isinstance(node, ast.FunctionDef) and node.name == name)


def test_the_api_continues_a_step_as_the_loop_does():
    loop = next(node for node in ast.walk(function("train/loop.py", "train")) if isinstance(node, ast.While))
    step, *rest = map(ast.unparse, loop.body)
    assert step == "metrics = train_step(state, trainer.step_config, trainer.mesh)"
    _, names, *own, result = map(ast.unparse, function("trainer.py", "after_step").body)
    assert own == rest
    assert names == "state, spec = (trainer.state, trainer.run.spec)"
    assert result == "return stop_cause"


def test_nothing_else_imports_the_api():
    """It is on top: only `quadriga/__init__.py` names it."""
    from test_package_imports import MAY_IMPORT

    assert {name for name, may in MAY_IMPORT.items() if may & {"api", "trainer"}} == {"", "trainer"}
