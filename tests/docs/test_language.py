"""The rules of docs/style.md that a program can check: lengths of sentences, and words that we do not use."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STYLE = ROOT / "docs/style.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CODE = sorted((ROOT / "quadriga").rglob("*.py"))
MEAN_WORDS, MOST_WORDS = 18, 40
WORD = re.compile(r"[\w'%+./-]*\w[\w'%]*")
BREAK = re.compile(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. )")
SENTENCE_END = re.compile(r"(?<=[.!?])[\s)\"*_]+(?=[A-Z0-9`*\[(\"])")


def words_not_used() -> list[re.Pattern[str]]:
    """The first column of the table."""
    table = STYLE.read_text(encoding="utf-8").partition("## Words that we do not use")[2].partition("\n## ")[0]
    cells = re.findall(r"(?m)^\| `((?:[^`])+)` \|", table)
    return [re.compile(r"(?i)\b(?:" + cell.replace(r"\|", "|") + r")\b") for cell in cells]


NOT_USED = words_not_used()


def prose(markdown: str) -> str:
    """A page without code, tables, headings, links' targets and comments."""
    lines, in_code = [], False
    for line in re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL).splitlines():
        fence = line.lstrip().startswith("```")
        in_code ^= fence
        skipped = in_code or fence or line.startswith(("#", "    ")) or line.lstrip().startswith("|")
        lines.append("" if skipped else re.sub(r"`[^`]*`", "`code`", re.sub(r"\]\([^)]*\)", "]", line)))
    return "\n".join(lines)


def sentences(text: str) -> Iterator[str]:
    """The sentences of prose: each ends at a full stop, an exclamation mark or a question mark."""
    for paragraph in BREAK.split(text):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            if len(WORD.findall(sentence)) > 1:
                yield sentence


def tables(markdown: str) -> str:
    """The cells of a page's tables, without code."""
    rows = [line for line in markdown.splitlines() if line.lstrip().startswith("|")]
    return re.sub(r"`[^`]*`", "`code`", re.sub(r"\]\([^)]*\)", "]", "\n".join(rows)))


def found_in(text: str) -> list[str]:
    return [match.group() for pattern in NOT_USED for match in pattern.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    lengths = {sentence: len(WORD.findall(sentence)) for sentence in sentences(prose(page.read_text(encoding="utf-8")))}
    long = [f"{count} words: {sentence}" for sentence, count in lengths.items() if count > MOST_WORDS]
    assert not long, "\n".join(long)
    mean = sum(lengths.values()) / max(1, len(lengths))
    assert mean <= MEAN_WORDS, f"{page.name}: {mean:.1f} words per sentence"


@pytest.mark.parametrize("page", [page for page in PAGES if page != STYLE], ids=lambda page: page.name)
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not found_in(prose(text) + tables(text))


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_uses_the_words_of_the_field(path: Path) -> None:
    """In docstrings, messages and comments: strings of several words, without what is code in them."""
    found = []
    for line, text in texts_in(path):
        found += [f"{path.name}:{line}: {word}" for word in found_in(re.sub(r"`[^`]*`", "`code`", text))]
    assert not found, "\n".join(found)


def texts_in(path: Path) -> Iterator[tuple[int, str]]:
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_the_rules_can_fail() -> None:
    assert found_in("This rank tells its wish at the door.") == ["wish", "door", "tells"]
    assert found_in("4 bytes a rank, 10 GiB a step") == ["bytes a rank", "GiB a step"]
    assert list(sentences("One is here. Two are there; three too! (Are there four?) `x` ends.")) == [
        "One is here.",
        "Two are there; three too!",
        "(Are there four?",
        "`x` ends.",
    ]
