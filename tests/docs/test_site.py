"""The documentation site builds without a warning, has every page, and each of its links leads somewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from launching import ROOT

pytestmark = pytest.mark.more

OUTSIDE = ("http:", "https:", "mailto:", "data:")


def checkout(folder: Path) -> Path:
    """A copy of the files of the repository, so that a build writes nothing next to them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", *options, "docs", "site"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=1800)


class Page(HTMLParser):
    """The links of a page, and the names that links can have after `#`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.anchors.add(value)
            if value and name in ("href", "src"):
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.resolve().rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            place = (path.parent / target.partition("?")[0]).resolve() if target else path
            missing = not place.is_file() or (anchor and place in pages and anchor not in pages[place].anchors)
            if not link.startswith(OUTSIDE) and missing:
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return broken


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    done = build(folder)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / "site"


def test_every_page_and_every_package_is_in_the_site(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages
    assert not {name for name in pages if not (site / f"{name}.html").is_file()}
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "quadriga").rglob("*.py")]
    for module in modules:
        if not module.name.startswith("__"):
            package = ".".join(module.parent.parts)
            text = (site / f"_api/{package}.html").read_text(encoding="utf-8")
            assert f'id="module-{package}.{module.name}"' in text or f">{package}.{module.name}<" in text


def test_docstrings_tables_and_sources_are_shown(site: Path) -> None:
    text = (site / "_api/quadriga.metrics.html").read_text(encoding="utf-8")
    assert '<a class="reference internal" href="../_files/quadriga/metrics/events.py.html">' in text
    assert "<th" in text.partition('id="quadriga-metrics-events"')[2].partition("<section")[0]
    assert "Appends events" in text
    assert "class" in (site / "_files/quadriga/metrics/events.py.html").read_text(encoding="utf-8")


def test_every_link_leads_somewhere(site: Path) -> None:
    assert broken_links(site) == []
    assert "_files/quadriga/train/step.py.html" in Page((site / "architecture.html").read_text(encoding="utf-8")).links


def test_a_broken_link_of_the_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y">1</a><a href="#x">2</a><a href="c.html">3</a></p>')
    (tmp_path / "b.html").write_text('<a href="a.html#x">1</a><a href="https://example.org/#q">2</a>')
    assert broken_links(tmp_path) == ["a.html: b.html#y", "a.html: c.html"]


SOUND = "[a](index.md#one) [b](../quadriga/train/step.py) [c](../quadriga) [d](../README.md#run-it)"
BROKEN = {
    "[a](nothing.md)": "'nothing.md'",
    "[a](index.md#nothing)": "local id not found in doc 'index': 'nothing'",
    "[a](#nothing)": "cross-reference target not found: 'nothing'",
    "[a](../quadriga/nothing.py)": "'../quadriga/nothing.py'",
    "```{eval-rst}\n.. automodule:: quadriga.nothing\n```": "No module named 'quadriga.nothing'",
    "```{eval-rst}\n:py:class:`quadriga.errors.Nothing`\n```": "quadriga.errors.Nothing",
}


def build_pages(folder: Path, texts: list[str]) -> subprocess.CompletedProcess[str]:
    """A site of an index and one page for each text, `page0` and so on."""
    docs = checkout(folder) / "docs"
    for page in docs.glob("*.md"):
        page.unlink()
    names = [f"page{number}" for number in range(len(texts))]
    (docs / "index.md").write_text("# One\n\n```{toctree}\n" + "\n".join(names) + "\n```\n", encoding="utf-8")
    for name, text in zip(names, texts, strict=True):
        (docs / f"{name}.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
    return build(folder, "-D", "module_pages_package=")


@pytest.fixture(scope="module")
def warnings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of a site with all broken pages, each from the word WARNING on."""
    done = build_pages(tmp_path_factory.mktemp("broken"), list(BROKEN))
    assert done.returncode != 0
    return done.stderr.split("WARNING: ")[1:]


def test_what_is_sound_gives_no_warning(tmp_path: Path) -> None:
    done = build_pages(tmp_path, [SOUND])
    assert done.returncode == 0, done.stderr
    assert not [link for link in broken_links(tmp_path / "site") if link.startswith("page0.html")]


@pytest.mark.parametrize("text", BROKEN)
def test_a_warning_is_an_error(text: str, warnings: list[str]) -> None:
    """Each text gives one, and the build fails."""
    assert len([warning for warning in warnings if BROKEN[text] in warning]) == 1, warnings
    assert len(warnings) == len(BROKEN)
