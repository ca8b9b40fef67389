"""Where Python objects are made of bytes: the list, held to SECURITY.md. Whoever adds a place has to say why there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from tree import ROOT, parsed

MODULES = {"pickle", "_pickle", "pickletools", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
NAMES = {
    "add_safe_globals",
    "safe_globals",
    "clear_safe_globals",
    "allow_pickle",
    "weights_only",
    "load_state_dict_from_url",
}
NAMES |= {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "ProcessPoolExecutor"}
NAMES |= {"send_object_list", "recv_object_list", "read_pickle", "find_class", "Unpickler"}
CALLS = {"torch.load", "torch.jit.load", "torch.package.PackageImporter", "np.load", "numpy.load"}
LISTED: dict[str, set[str]] = {
    "quadriga/checkpoint/stored.py": {"pickletools"},
    "quadriga/cli/convert_titan.py": {"pickle"},
    "quadriga/metrics/profiler.py": {"pickle"},
    "quadriga/analysis/trace/analysis.py": {"multiprocessing", "ProcessPoolExecutor"},
}
FILES = sorted(path for folder in ("quadriga", "scripts") for path in (ROOT / folder).rglob("*.py"))


def found(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from {node.module.split(".")[0]} & MODULES
            yield from {alias.name for alias in node.names} & NAMES
        elif isinstance(node, ast.Call):
            yield from {ast.unparse(node.func)} & CALLS
            yield from {keyword.arg or "" for keyword in node.keywords} & NAMES
        elif isinstance(node, ast.Attribute):
            yield from {node.attr} & NAMES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_makes_objects_of_bytes_is_listed(path):
    name = str(path.relative_to(ROOT))
    assert set(found(path)) == LISTED.get(name, set())


@pytest.mark.parametrize("name", LISTED)
def test_security_md_gives_the_reason(name):
    assert f"`{name}`" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_pickle_is_only_written():
    for name in LISTED:
        for node in ast.walk(parsed(ROOT / name)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr in ("dump", "dumps")


def test_the_list_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\nfrom torch import load\nimport torch\ntorch.load(x, weights_only=False)\n")
    assert set(found(bad)) == {"pickle", "torch.load", "weights_only"}
