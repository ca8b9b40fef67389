"""docs/gpus.md lists every place of the project that says "not measured yet", with its command."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/gpus.md"
# "not measured yet", "not measured on a GPU yet" and "no measurement on a GPU yet", also over the end of a line.
PHRASE = re.compile(r"(?i)(?:not measured|no measurement)(?: on (?:a )?GPUs?)? yet")
PLACES = ("*.md", "docs/*.md", "configs/**/*.md", "benchmarks/*.md", "benchmarks/*.py", "quadriga/**/*.py")


def phrases() -> Iterator[Path]:
    """Each file that says so, once per time."""
    for pattern in PLACES:
        for path in sorted(ROOT.glob(pattern)):
            if path != PAGE:
                yield from [path] * count(path.read_text(encoding="utf-8"))


def count(text: str) -> int:
    return len(PHRASE.findall(re.sub(r"\s+(?:#\s+)?", " ", text)))


def rows() -> Iterator[tuple[Path, str, str]]:
    """The place, the command and the figure of each row."""
    table = PAGE.read_text(encoding="utf-8").partition("## Open measurements")[2].partition("\n## ")[0]
    for line in table.splitlines():
        if line.startswith("|") and "](" in line:
            _, place, command, figure = (cell.strip() for cell in line.strip("|").split("|"))
            target = re.findall(r"\]\(([^)#]+)", place)[0]
            yield (PAGE.parent / target).resolve(), command, figure


def test_the_page_lists_each_place_that_says_so() -> None:
    listed = Counter(place for place, _, figure in rows() if figure == "none yet")
    said = Counter(phrases())
    assert listed == said, "docs/gpus.md needs one row for each `not measured yet`, and none for one that is gone"


def test_each_row_has_a_command_and_a_figure() -> None:
    assert len(list(rows())) >= 10
    for place, command, figure in rows():
        assert "`" in command or "commands of that section" in command, place
        assert figure, place


def test_the_phrase_is_found() -> None:
    assert count("Not measured yet: x. This is not\n# measured on a GPU yet. No measurement on a GPU yet.") == 3
    assert count("It was measured. It is not measured here.") == 0
