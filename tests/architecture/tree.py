"""The source tree as the architecture tests read it: files, packages, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "quadriga"
NESTED = {"analysis", "rehearsal"}  # whose folders are packages of their own


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str  # as imported: `quadriga.config.run_spec`, `torch`
    inside_function: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package_of(path: Path) -> str:
    """`quadriga/data/loader.py` -> `data`; `quadriga/units.py` -> `units`; `quadriga/__init__.py` -> ``.

    A package within a package is one of its own: `quadriga/analysis/trace/read.py` -> `analysis.trace`. Only
    `models/llama` and `config/schema` are parts of the package around them.
    """
    return package_of_module(module_of(path))


def module_of(path: Path) -> str:
    """`quadriga/data/loader.py` -> `quadriga.data.loader`"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of_module(module: str) -> str:
    """The same for a module as it is imported, `quadriga.analysis.trace.read`."""
    parts = module.split(".")[1:3]
    is_package = len(parts) == 2 and parts[0] in NESTED and PACKAGE.joinpath(*parts).is_dir()
    return ".".join(parts if is_package else parts[:1])


def module_exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file; `from a import b` counts as `a.b` where b is a module."""
    yield from find_imports(parsed(path), path, inside_function=False, typing_only=False)


def find_imports(node: ast.AST, path: Path, inside_function: bool, typing_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(path, node.lineno, alias.name, inside_function, typing_only)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the package"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            module = inner if module_exists(inner) else str(node.module)
            yield Import(path, node.lineno, module, inside_function, typing_only)
    inside_function = inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    typing_only = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    for child in ast.iter_child_nodes(node):
        yield from find_imports(child, path, inside_function, typing_only)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    whole = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(node.body) > 1
    return whole - ((first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0)
