"""What the files of CI, of issues, of pre-commit and of Docker name exists, and is what the Makefile runs."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"(?m)^([a-z][\w-]*):(?!=)", MAKEFILE))
FIELD_TYPES = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


WORKFLOW = parsed(GITHUB / "workflows" / "ci.yml")
JOBS: dict[str, Any] = WORKFLOW["jobs"]


def commands(job: str) -> list[str]:
    """The shell commands of a job, line by line."""
    return [line for step in JOBS[job]["steps"] for line in step.get("run", "").splitlines()]


def test_every_job_has_what_github_requires() -> None:
    for name, job in JOBS.items():
        assert job["runs-on"], name
        assert 0 < job["timeout-minutes"] < 360, f"{name}: GitHub ends a job after six hours"
        assert all(("uses" in step) != ("run" in step) for step in job["steps"]), name
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step), name
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert {"push", "pull_request", "schedule"} <= set(WORKFLOW[True])  # YAML 1.1 reads the key `on` as true


def test_commands_are_targets_of_the_makefile() -> None:
    used = {match for job in JOBS for line in commands(job) for match in re.findall(r"\bmake ([a-z][\w-]*)", line)}
    assert used <= TARGETS
    assert used >= {"lint", "test", "test-more", "test-all"}


def test_the_tests_of_ci_run_are_run_there_too() -> None:
    used = set(re.findall(r"(?m)^make (.+)$", (ROOT / ".ci/run").read_text(encoding="utf-8")))
    targets = {target for line in used for target in line.split()} - {"setup-dev"}
    everywhere = " ".join(line for job in JOBS for line in commands(job))
    assert all(f"make {target} " in everywhere for target in targets)


def test_oldest_and_newest_python_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = JOBS["test"]["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 as a number would be 3.1
    assert f">={versions[0]}" == project["requires-python"]
    assert versions[-1] == "3.13"


def test_paths_of_commands_exist() -> None:
    words = {word for job in JOBS for line in commands(job) for word in line.split()}
    paths = {word for word in words if word.startswith(("tests/", "benchmarks/", "docs/", "requirements"))}
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_nightly_tests_run_by_schedule_alone() -> None:
    assert "schedule" in JOBS["nightly"]["if"]
    assert [name for name, job in JOBS.items() if any("test-all" in line for line in commands(name))] == ["nightly"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_valid(form: Path) -> None:
    content = parsed(form)
    assert {"name", "description", "body"} <= set(content)
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert fields
    assert {field["type"] for field in content["body"]} <= FIELD_TYPES
    names = [field["id"] for field in fields]
    assert len(names) == len(set(names))
    assert all(field["attributes"]["label"] for field in fields)


def test_hooks_run_what_make_lint_runs() -> None:
    hooks = {hook["id"]: hook for repo in parsed(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    recipe = MAKEFILE[MAKEFILE.index("\nlint:") :].split("\n\n")[0]
    programs = {" ".join(hook["entry"].split(" --")[0].split()) for hook in hooks.values()}
    linted = {re.sub(r" \.$| --check", "", line.strip()).removesuffix(" .") for line in recipe.splitlines()[2:]}
    assert programs == linted


def test_docker_copies_what_exists_and_is_not_ignored() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [word for line in re.findall(r"(?m)^COPY (.+)$", text) for word in line.split()[:-1]]
    assert {"requirements.txt", "pyproject.toml", "setup.py", "quadriga", "configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in allowed), f"{source} is not in .dockerignore"
