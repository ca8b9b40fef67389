"""Every relative link of a page leads to a file of the repository, and its anchor to a heading there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / name
    for name in subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split("\n")
    if name
]
LINK = re.compile(r"\]\(([^()\s]+)\)")
ANCHOR = re.compile(r'<a (?:id|name)="([^"]+)"')
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def without_code(text: str) -> str:
    return CODE.sub("", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page, made of its headings as GitHub makes them."""
    text = page.read_text(encoding="utf-8")
    found: dict[str, int] = {}
    names = set(ANCHOR.findall(text))
    for heading in re.findall(r"(?m)^#{1,6} +(.*?) *$", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        shown = re.sub(r"\]\([^)]*\)|[\[\]`*]", "", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = found.get(name, 0)
        found[name] = number + 1
        names.add(f"{name}-{number}" if number else name)
    return names


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of `text`, which is that of `page`, that lead nowhere."""
    broken = []
    for link in LINK.findall(without_code(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        exists = target.exists() and target.is_relative_to(ROOT)
        if not exists or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found() -> None:
    page = ROOT / "docs/operations.md"
    text = (
        "[a](operations.md#exit-codes) [b](none.md) [c](#nowhere) [d](https://example.org/x) `[e](x.md)` [f](../../x)"
    )
    assert broken_links(page, text) == ["none.md", "#nowhere", "../../x"]
