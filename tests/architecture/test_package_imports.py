"""Who may import whom, and no cycles. The table is that of docs/architecture.md; imports inside functions count."""

from __future__ import annotations

import pytest
from tree import PACKAGE, Import, imports, module_of, package_of, package_of_module, sources

GROUND = {"errors", "units", "hardware", "log", "limits", "reading", "file_search", "file_systems"}
MAY_IMPORT: dict[str, set[str]] = {
    "": {"api", "trainer", "errors"},
    "errors": set(),
    "units": set(),
    "hardware": {"errors", "limits", "reading"},
    "log": {"errors"},
    "limits": set(),
    "json_collectives": {"errors", "limits"},
    "terminal": {"errors"},
    "tensors": set(),
    "reading": {"errors", "limits"},
    "file_search": {"errors", "limits"},
    "file_systems": {"errors"},
    "config": {"errors", "units", "hardware", "limits", "reading", "file_search"},
    "comm": GROUND | {"config", "json_collectives", "tensors"},
    "data": GROUND | {"config"},
    "optim": GROUND | {"config", "tensors"},
    "metrics": GROUND | {"config"},
    "models": {"errors", "units", "config", "limits", "reading"},
    "checkpoint": {"errors", "units", "log", "config", "limits", "reading", "json_collectives", "tensors"}
    | {"file_systems"},
    "parallel": {"models", "comm", "errors", "units", "log", "config", "tensors"},
    "planning": GROUND | {"config", "models", "comm", "metrics"},
    # planning: the list of remedies that an out-of-memory report proposes is that of the estimates.
    "resilience": GROUND | {"config", "comm", "optim", "metrics", "json_collectives", "planning", "tensors"},
    "train": GROUND
    | {"config", "comm", "data", "models", "optim", "metrics", "parallel", "checkpoint"}
    | {"planning", "resilience", "json_collectives", "tensors", "terminal"},
    "rehearsal": GROUND | {"config", "comm", "data", "models", "planning", "resilience", "train", "tensors"},
    "rehearsal.equivalence": {"errors", "limits", "reading", "config", "comm", "models", "checkpoint", "metrics"},
    "analysis": set(),
    "analysis.pages": {"units"},
    "analysis.trace": {"errors", "units", "hardware", "limits", "reading", "analysis.pages"},
    "analysis.ccl_bench": {"errors", "units", "hardware", "limits", "reading", "analysis.trace"},
    "analysis.compare": {"errors", "units", "metrics", "limits", "reading", "analysis.pages"},
    "launch": GROUND | {"config", "models", "comm", "data", "checkpoint", "planning", "resilience", "terminal"},
    "cli": GROUND
    | {"config", "comm", "models", "launch", "checkpoint", "data", "metrics", "planning", "optim", "terminal"}
    | {"rehearsal.equivalence", "analysis.compare", "analysis.trace", "analysis.ccl_bench"},
    "api": {"errors", "hardware", "log", "config", "comm", "models", "planning", "train"},
    "trainer": {"errors", "log", "api", "config", "comm", "checkpoint", "metrics", "resilience", "train"},
}

# Where only a part of a package may be imported. The first matching prefix decides.
ONLY_FROM: dict[tuple[str, str], tuple[str, ...]] = {
    ("models", "config"): ("quadriga.config.model_spec",),
    ("parallel", "models"): ("quadriga.models.plan", "quadriga.models.kv_heads"),
    ("launch", "models"): ("quadriga.models.registry", "quadriga.models.plan", "quadriga.models.llama.spec"),
    ("launch", "comm"): ("quadriga.comm.backend", "quadriga.comm.heap", "quadriga.comm.network"),
    ("launch", "checkpoint"): tuple(
        f"quadriga.checkpoint.{part}" for part in ("folder", "files", "hf_headers", "messages", "titan")
    ),
    ("launch", "resilience"): ("quadriga.resilience.processes",),
    ("cli", "comm"): ("quadriga.comm.backend",),
    ("cli", "optim"): ("quadriga.optim.schedule",),
    ("planning", "comm"): ("quadriga.comm.backend", "quadriga.comm.heap"),
    ("planning", "models"): ("quadriga.models.registry", "quadriga.models.plan", "quadriga.models.operations"),
    ("planning", "metrics"): ("quadriga.metrics.cycles",),
    ("resilience", "planning"): ("quadriga.planning.advice",),
    ("rehearsal.equivalence", "comm"): ("quadriga.comm.backend",),
    ("analysis.compare", "metrics"): tuple(f"quadriga.metrics.{part}" for part in ("jsonl", "events", "cycles")),
    ("comm", "config"): ("quadriga.config.schema", "quadriga.config.run_spec"),
    ("data", "config"): (
        "quadriga.config.schema",
        "quadriga.config.run_spec",
        "quadriga.config.added_tokens",
        "quadriga.config.assets",
        "quadriga.config.mixing",
        "quadriga.config.special_tokens",
        "quadriga.config.templates",
        "quadriga.config.tokenizer_files",
    ),
    ("launch", "data"): ("quadriga.data.tokenizer", "quadriga.data.data_check"),
    ("optim", "config"): ("quadriga.config.schema",),
    ("metrics", "config"): ("quadriga.config.schema", "quadriga.config.run_spec"),
    ("parallel", "config"): ("quadriga.config.schema",),
    ("checkpoint", "config"): ("quadriga.config.schema",),
    ("api", "comm"): ("quadriga.comm.backend",),
    ("api", "models"): ("quadriga.models.registry",),
    ("api", "train"): ("quadriga.train.__main__",),  # the only module of it without torch
    ("trainer", "comm"): ("quadriga.comm.process_group",),
}

# Imports inside functions are for start-up, and only here.
LAZY_PACKAGES = {"cli", "launch"}
LAZY_FILES = {"models/registry.py", "__init__.py", "train/build.py", "train/__main__.py"}
LAZY_READERS = {"datasets", "pyarrow", "pyarrow.parquet", "tiktoken", "wandb", "tiktoken.load", "huggingface_hub"}
LAZY_READERS |= {"jinja2"}  # documents alone need it, and `--help` is in the same modules
LAZY_READERS |= {"torchao.float8", "torchao.float8.float8_linear"}  # optional, and asked for by one converter alone
LAZY_READERS |= {"fastokens"}  # optional, and asked for by `quadriga tokenize --library` alone
LAZY_READERS |= {"triton", "triton.language"}  # which only builds of torch for CUDA bring along
LAZY_READERS |= {
    "tensorboard.compat.proto",
    "tensorboard.summary.writer.record_writer",
    "quadriga.checkpoint.staging",
    "quadriga.checkpoint.tensors",
    "quadriga.checkpoint.hf",
    "quadriga.checkpoint.load",
    "quadriga.checkpoint.hf_export",
    "fsspec.core",
}  # half a second of start-up


def own_imports(path_imports: list[Import]) -> list[Import]:
    return [found for found in path_imports if found.module.split(".")[0] == "quadriga"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_package_imports_only_what_it_may(path):
    here = package_of(path)
    assert here in MAY_IMPORT, f"{here} is not in the table: add it there and to docs/architecture.md"
    for found in own_imports(list(imports(path))):
        there = package_of_module(found.module)
        if there in (here, ""):
            continue
        assert there in MAY_IMPORT[here], f"{found}: {here} may not import {there}"
        allowed = ONLY_FROM.get((here, there))
        assert allowed is None or found.module.startswith(allowed), f"{found}: {here} sees only {allowed} of {there}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_inside_functions_are_listed(path):
    if package_of(path) in LAZY_PACKAGES or str(path.relative_to(PACKAGE)) in LAZY_FILES:
        return
    late = [found for found in imports(path) if found.inside_function and found.module not in LAZY_READERS]
    assert not late, "; ".join(map(str, late))


def test_the_card_is_not_seen_by_training():
    for path in sources():
        if package_of(path) == "train":
            assert all("config.card" not in found.module for found in imports(path)), path


def test_the_model_does_not_know_it_will_be_cut():
    for path in sources():
        if package_of(path) == "models":
            assert all(not found.module.startswith("torch.distributed") for found in imports(path)), path


def test_arrows_go_one_way():
    """No two packages import each other, directly or through others: the table has no cycle."""
    assert not cycle(MAY_IMPORT)


def test_no_two_files_import_each_other():
    """Neither directly nor through others. Imports inside functions and for annotations count too."""
    modules = {module_of(path): path for path in sources()}
    needs = {name: {found.module for found in imports(path)} & set(modules) - {name} for name, path in modules.items()}
    needs["quadriga"] = set()  # it has the version, and imports the API when a user asks for a name of it
    assert not cycle(needs)


def cycle(needs: dict[str, set[str]]) -> set[str]:
    """The names on cycles, and those that need them; empty without a cycle."""
    left = dict(needs)
    while free := {name for name, own in left.items() if not own & set(left)}:
        for name in free:
            del left[name]
    return set(left)


@pytest.mark.parametrize("last", ["a", "b", "c"])
def test_cycles_are_found(last):
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert last in cycle({"a": {"b"}, "b": {"c"}, "c": {last}})
