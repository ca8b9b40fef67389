"""No exception is its own cause: a walk along `__cause__` and `__context__` of anything raised here ends."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tree import PACKAGE, sources

SCRIPTS = sorted((PACKAGE.parent / "scripts").rglob("*.py"))


def cyclic_raises(tree: ast.AST) -> list[str]:
    """The `raise` statements that may tie a cycle.

    1. `raise A from B` where A was not made by a call here: A may be B, or have B among its causes.
    2. Within `except ... as X`, `raise A` of an exception that was made elsewhere and is not X: X becomes its context,
       and it may be among the causes of X.
    """
    found = []

    def visit(node: ast.AST, caught: str | None, made: set[str]) -> None:
        if isinstance(node, ast.Raise) and node.exc is not None and not isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc)
            of_none = isinstance(node.cause, ast.Constant)
            if node.cause is not None and not of_none and name not in made:
                found.append(f"line {node.lineno}: raise {name} from {ast.unparse(node.cause)}")
            elif caught is not None and name != caught and name not in made:
                found.append(f"line {node.lineno}: raise {name} while {caught or 'another'} is handled")
        if isinstance(node, ast.ExceptHandler):
            caught, made = node.name or "", made_in(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            caught, made = None, set()
        for child in ast.iter_child_nodes(node):
            visit(child, caught, made)

    visit(tree, None, set())
    return found


def made_in(handler: ast.ExceptHandler) -> set[str]:
    """Names that the handler itself gives to what a call returns."""
    return {
        ast.unparse(target)
        for line in handler.body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Call)
        for target in line.targets
    }


@pytest.mark.parametrize("path", [*sources(), *SCRIPTS], ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_exception_is_its_own_cause(path: Path):
    assert cyclic_raises(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "body",
    [
        "except E as error: raise error from error",
        "except E as error: raise first or error from error",
        "except E as error: raise self.refused from error",
        "except E as error: raise stored",
        "except E: raise stored",
        "except E as error: raise error.__cause__ from None",
    ],
)
def test_what_may_tie_a_cycle_is_found(body):
    assert len(cyclic_raises(ast.parse(f"try: work()\n{body}"))) == 1


@pytest.mark.parametrize(
    "body",
    [
        "except E as error: raise",
        "except E as error: raise error",
        "except E as error: raise Other(text) from error",
        "except E as error: raise Other(text) from None",
        "except E as error: raise error from None",
        "except E as error:\n told = explained(error)\n raise told from error",
        "except E as error: stored = error\nraise stored",
    ],
)
def test_what_cannot_is_let_through(body):
    assert cyclic_raises(ast.parse(f"try: work()\n{body}")) == []
