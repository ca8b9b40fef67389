"""Reads docs/promises.md, and checks each row against the tests, result files and headings that it names."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/promises.md"
# The command of a marker; tests without one are run by `make test`.
COMMANDS = {"slow": "make test-all", "more": "make test-more", "cuda_dispatch": "make test-cuda-dispatch"}
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Promise:
    text: str
    stated: tuple[Path, ...]  # pages
    anchors: tuple[str, ...]  # `page.md#anchor`, relative to the root
    tests: tuple[tuple[str, str], ...]
    results: tuple[str, ...]
    run_by: frozenset[str]


def rows(markdown: str) -> Iterator[Promise]:
    """The rows of the one table, without those that name an area."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        text, stated, tests, run_by = (cell.strip() for cell in line.strip("|").split("|"))
        if stated or tests or run_by:
            links = [(PAGE.parent / link).resolve() for link in LINK.findall(stated)]
            anchors = [str(link.relative_to(ROOT)) for link in links]
            yield Promise(
                text,
                tuple(ROOT / anchor.partition("#")[0] for anchor in anchors),
                tuple(anchors),
                tuple(TEST.findall(tests)),
                tuple(link for link in LINK.findall(tests) if link.endswith(".json")),
                frozenset(CODE.findall(run_by)),
            )


def faults(promise: Promise) -> Iterator[str]:
    """What is wrong about a row."""
    if not promise.anchors or not (promise.tests or promise.results):
        yield "no page or no test is named"
    for anchor in promise.anchors:
        page, _, heading = anchor.partition("#")
        if not (ROOT / page).is_file():
            yield f"there is no {page}"
        elif heading not in headings(ROOT / page):
            yield f"{page} has no heading #{heading}"
    wanted: set[str] = set()
    for file, name in promise.tests:
        found = commands_of(file, name)
        if not found:
            yield f"there is no {file}::{name}"
        wanted |= found
    for link in promise.results:
        result = (PAGE.parent / link).resolve()
        if not result.is_file():
            yield f"there is no {link}"
            continue
        script = json.loads(result.read_text(encoding="utf-8"))["command"].split()[1]
        if not (ROOT / script).is_file():
            yield f"there is no {script}"
        wanted.add(script)
    if wanted != promise.run_by:
        yield f"is run by {', '.join(sorted(wanted))}, and not by {', '.join(sorted(promise.run_by))}"


@cache
def headings(page: Path, deepest: int = 6) -> dict[str, str]:
    """The text of each heading down to a level, by its anchor on GitHub."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    in_code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        in_code ^= line.lstrip().startswith("```")
        match = re.match(r"(#{1,6}) (.*)", line)
        if in_code or match is None:
            continue
        text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[2]).strip()
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        anchor = f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1
        if len(match[1]) <= deepest:
            found[anchor] = text
    return found


@cache
def commands_of(file: str, name: str) -> frozenset[str]:
    """The targets of `make` that run a test, or some of its cases; none if there is no such test.

    A marker on the test holds for all of it. A marker among its parameters holds for some cases, so that `make test`
    runs the others, unless every case that is written out has it.
    """
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name and name.startswith("test_"):
            of_module = [
                part
                for value in _assigned("pytestmark", tree)
                for part in (value.elts if isinstance(value, ast.List) else [value])
            ]
            on_it = [*node.decorator_list, *of_module]
            whole = {COMMANDS[mark] for decorator in on_it for mark in _marks(decorator, tree)}
            some = {
                COMMANDS[mark]
                for decorator in node.decorator_list
                if not _marks(decorator, tree)
                for part in _parts(decorator, tree)
                for mark in _marks(part, tree)
            }
            return frozenset(whole or {"make test"} | some)
    return frozenset()


def _marks(node: ast.AST, tree: ast.Module) -> set[str]:
    """The marker that a node is: `pytest.mark.slow`, or a name that the module gives it."""
    if isinstance(node, ast.Name):
        values = _assigned(node.id, tree)
        return {mark for value in values if not isinstance(value, ast.Name) for mark in _marks(value, tree)}
    is_mark = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    return {node.attr} & COMMANDS.keys() if is_mark and isinstance(node, ast.Attribute) else set()


def _parts(node: ast.AST, tree: ast.Module, depth: int = 3) -> Iterator[ast.AST]:
    """All nodes of an expression, and of the values of the names in it."""
    for part in ast.walk(node):
        yield part
        if isinstance(part, ast.Name) and depth:
            for value in _assigned(part.id, tree):
                yield from _parts(value, tree, depth - 1)


def _assigned(name: str, tree: ast.Module) -> list[ast.expr]:
    return [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets)
    ]
