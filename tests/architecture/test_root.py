"""One composition root: few places know the whole configuration, and nobody changes it."""

from __future__ import annotations

import ast

import pytest
from tree import PACKAGE, package_of, parsed, sources

from quadriga.config import JobConfig

MAY_NAME_THE_ROOT = {"api", "trainer", "cli", "launch", "config", "train", "planning", "resilience", "rehearsal"}
MAY_NAME_THE_ROOT |= {"rehearsal.equivalence"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_roots_name_the_root(path):
    if package_of(path) in MAY_NAME_THE_ROOT:
        return
    names = {node.id for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & {"JobConfig", "Run"}, f"{path.name} takes its own section, not the whole"


def test_every_section_is_frozen():
    for name, field in JobConfig.model_fields.items():
        section = field.annotation
        assert section.model_config.get("frozen"), name
    config = JobConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 1


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_gives_each_of_its_names_one_value(path):
    """The second of two definitions would win without a message."""
    assigned = [node for node in parsed(path).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [target for node in assigned for target in getattr(node, "targets", None) or [node.target]]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    assert not {name for name in names if names.count(name) > 1}
