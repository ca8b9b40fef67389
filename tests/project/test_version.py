"""`quadriga.__version__` is the one place that states the version; all others are equal to it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from quadriga import __version__
from quadriga.cli.main import main
from quadriga.config.keys import KEYS

ROOT = Path(__file__).resolve().parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
# The schema of CFF 1.2.0: what is required, and what else is used here.
REQUIRED_KEYS = {"cff-version", "message", "title", "authors"}
KNOWN_KEYS = REQUIRED_KEYS | {"abstract", "type", "version", "license", "keywords", "date-released", "doi", "url"}
KNOWN_KEYS |= {"repository-code", "identifiers", "references", "preferred-citation", "commit", "contact"}


def test_the_package_reads_it_from_the_module() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in pyproject["project"]["dynamic"]
    assert "version" not in pyproject["project"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "quadriga.__version__"}


def test_the_newest_version_of_the_changelog_is_that_of_the_code() -> None:
    headings = re.findall(r"(?m)^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert next(name for name in headings if name != "Unreleased") == __version__
    assert len(headings) == len(set(headings))


def test_the_citation_has_the_version_and_only_keys_of_its_format() -> None:
    assert str(CITATION["version"]) == __version__
    assert set(CITATION) >= REQUIRED_KEYS
    assert set(CITATION) <= KNOWN_KEYS
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] in ("software", "dataset")
    assert all(
        set(author) <= {"name", "given-names", "family-names", "orcid", "website"} for author in CITATION["authors"]
    )


def test_the_citation_has_the_license_of_the_package() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert CITATION["license"] == pyproject["project"]["license"]


def test_the_command_prints_it(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_documents_name_the_wheel_of_this_version() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for named in re.findall(r"quadriga-(\d[\w.]*?)-py3", page.read_text(encoding="utf-8")):
            assert named == __version__, f"{page.name}: quadriga-{named}"


def test_the_changelog_names_keys_that_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    named = {
        name
        for name in re.findall(r"`(\w+\.\w+)`", text)
        if name.partition(".")[0] in {key.partition(".")[0] for key in KEYS}
    }
    assert named - {"metrics.jsonl"}
    assert named - {"metrics.jsonl"} <= set(KEYS)
