"""One meaning, one name: a public function or class has a name that no other one has."""

from __future__ import annotations

import ast
from collections import defaultdict

from tree import PACKAGE, parsed, sources

# Names that several modules share on purpose.
SHARED = {
    "main": "each command and each program has one",
    "estimate": "the one of the Python API is that of planning",
    "resolve": "the one of the Python API is that of the configuration",
    "parallel_plan": "the registry calls that of the model's family",
    "block_trace": "the registry calls that of the model's family",
    "head_trace": "the registry calls that of the model's family",
    "flops_per_token": "the registry calls that of the model's family",
    "flops_per_pair": "the registry calls that of the model's family",
    "hf_config": "the registry calls that of the model's family",
    "spec_from_hf": "the registry calls that of the model's family",
}


def public_names() -> dict[str, list[str]]:
    """The modules that define each public function or class."""
    found = defaultdict(list)
    for path in sources():
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(PACKAGE)))
    return found


def test_a_public_name_has_one_meaning():
    unlike = {name: modules for name, modules in public_names().items() if len(modules) > 1}
    assert unlike.keys() <= SHARED.keys(), unlike


def test_the_exceptions_are_needed():
    counts = {name: len(modules) for name, modules in public_names().items()}
    assert all(counts.get(name, 0) > 1 for name in SHARED)
