"""Ranges in pyproject.toml, exact versions in the requirements, and what the code imports, belong together."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
RANGES = [Requirement(line) for line in PROJECT["dependencies"]] + [one for lines in EXTRAS.values() for one in lines]
# Modules whose package has another name.
PACKAGES = {"yaml": "PyYAML"}
WITH_TORCH = {"triton"}  # a dependency of torch's builds for CUDA, which are the only ones that need it


def pins(name: str) -> dict[str, Requirement]:
    """The requirements of a file and of those that it includes, by name. Comments and blank lines are left out."""
    found: dict[str, Requirement] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r ").strip())
        elif line and not line.startswith("#"):
            found[canonicalize_name(Requirement(line).name)] = Requirement(line)
    return found


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_exact(name: str) -> None:
    inexact = [str(pin) for pin in pins(name).values() if [one.operator for one in pin.specifier] != ["=="]]
    assert not inexact, f"{name}: write {', '.join(inexact)} as NAME==VERSION"


@pytest.mark.parametrize("wanted", RANGES, ids=str)
def test_each_range_contains_the_version_of_the_tests(wanted: Requirement) -> None:
    pin = pins("requirements-dev.txt").get(canonicalize_name(wanted.name))
    assert pin is not None, f"{wanted.name} is in pyproject.toml and has no version in the requirements"
    version = next(iter(pin.specifier)).version
    assert wanted.specifier.contains(version), f"pyproject.toml: {wanted}; requirements: {version}"


def test_the_core_needs_no_extra_of_development() -> None:
    """`requirements.txt` alone trains: it has all of the core, and the extra of data sets."""
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    core |= {canonicalize_name(one.name) for one in EXTRAS["datasets"]}
    assert core <= set(pins("requirements.txt"))


def test_what_is_imported_is_declared() -> None:
    declared = {canonicalize_name(one.name) for one in RANGES} | WITH_TORCH
    undeclared = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in sorted((ROOT / "quadriga").rglob("*.py"))
        for module in imported(path)
        if module not in sys.stdlib_module_names
        and canonicalize_name(PACKAGES.get(module, module)) not in declared | {"quadriga"}
    }
    assert not undeclared, "\n".join(sorted(undeclared))


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, also inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found
