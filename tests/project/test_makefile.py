"""The two commands of the README do their own set-up, and the set-up installs the command `quadriga`."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"(?m)^([a-z][\w-]*):(?!=)", MAKEFILE))


def planned(*arguments: str, folder: Path = ROOT) -> str:
    """What `make` would run, with nothing built."""
    command = ["make", "--dry-run", "--always-make", *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["setup", "setup-dev", "train", "test", "test-more", "lint", "docs"])
def test_every_target_installs_the_requirements_and_then_the_package(target: str) -> None:
    commands = planned(target)
    requirements = commands.index("-m pip install --disable-pip-version-check -r requirements.txt")
    package = commands.index("--no-deps --no-build-isolation --editable .")
    assert commands.index("-m venv .venv") < requirements < package


def test_all_targets_but_files_are_phony() -> None:
    (phony,) = re.findall(r"(?m)^\.PHONY: (.*)$", MAKEFILE)
    assert set(phony.split()) == TARGETS


def test_the_command_is_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["quadriga"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_documents_name_real_targets() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    for page in pages:
        used = set(re.findall(r"(?m)(?:^|`)make ([a-z][\w-]*)", page.read_text(encoding="utf-8")))
        assert used <= TARGETS, f"{page.name}: {used - TARGETS}"


def test_the_readme_shows_where_the_command_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.index("source .venv/bin/activate") < readme.index("$ quadriga ")
