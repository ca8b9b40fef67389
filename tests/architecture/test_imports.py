"""Importing changes nothing, and what needs no torch does not load it. Each in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

from tree import PACKAGE, ROOT, sources

LIGHT = [
    "quadriga",
    "quadriga.api",
    "quadriga.errors",
    "quadriga.units",
    "quadriga.hardware",
    "quadriga.log",
    "quadriga.limits",
    "quadriga.reading",
    "quadriga.analysis.pages.markup",
    "quadriga.analysis.pages.plots",
    "quadriga.resilience.processes",
    "quadriga.config",
    "quadriga.checkpoint.folder",
    "quadriga.checkpoint.titan",
    "quadriga.config.card",
    "quadriga.config.reference",
    "quadriga.launch.supervisor",
    "quadriga.models.registry",
    "quadriga.models.plan",
    "quadriga.models.llama.spec",
    "quadriga.models.llama.plan",
    "quadriga.comm.backend",
    "quadriga.comm.heap",
    "quadriga.cli.main",
]

QUIET = """
import importlib, json, logging, os, socket, sys
environment, handlers, level = dict(os.environ), list(logging.getLogger().handlers), logging.getLogger().level
class ForbiddenSocket(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("an import opened a socket")
import torch, torch.distributed, torch.distributed.pipelining
# What torch and its like do at their own import is theirs.
environment, handlers = dict(os.environ), list(logging.getLogger().handlers)
socket.socket = ForbiddenSocket
changed = []
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    if dict(os.environ) != environment: changed.append(name + ": environment"); environment = dict(os.environ)
    if list(logging.getLogger().handlers) != handlers: changed.append(name + ": log handlers")
    if logging.getLogger("quadriga").handlers: changed.append(name + ": our handlers")
    if torch.distributed.is_initialized(): changed.append(name + ": process group")
print(json.dumps(changed))
"""


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_tokenizer_is_built_without_torch():
    """The launcher does it before every start."""
    code = "import sys, quadriga.data.tokenizer; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_light_packages_load_no_torch():
    code = "import importlib, json, sys\n[importlib.import_module(n) for n in json.loads(sys.argv[1])]\n"
    code += "print([m for m in ('torch', 'numpy', 'datasets', 'tokenizers') if m in sys.modules])"
    assert run_python(code, json.dumps(LIGHT)).strip() == "[]"


def test_help_and_launch_load_no_templates():
    code = "import sys, quadriga.cli.main, quadriga.launch.supervisor, quadriga.config.reference as reference\n"
    code += "reference.print_keys([]); print('jinja2' in sys.modules)"
    assert run_python(code).splitlines()[-1] == "False"


def test_imports_are_quiet():
    names = []
    for path in sources():
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    names = [name for name in names if not name.endswith("__main__")]
    assert json.loads(run_python(QUIET, json.dumps(names))) == []


def test_the_core_needs_no_optional_library():
    """Training on built-in text imports neither datasets, pyarrow, tiktoken, torchao nor wandb."""
    code = "import sys, quadriga.train.loop, quadriga.train.build\n"
    code += "names = ('datasets', 'pyarrow', 'tiktoken', 'torchao', 'wandb', 'transformers')\n"
    code += "print([name for name in names if name in sys.modules])"
    assert run_python(code).strip() == "[]"
