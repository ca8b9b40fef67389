"""The page about the command line is up to date, and has every command and every option."""

from __future__ import annotations

import re

import pytest

from quadriga.cli import reference
from quadriga.cli.main import COMMANDS, main

WITH_PARSER = [name for name in COMMANDS if name not in reference.WITHOUT_PARSER]


def test_the_page_is_up_to_date(root):
    assert (root / "docs" / "cli.md").read_text(encoding="utf-8") == reference.cli_page(), "run: quadriga docs"


def test_the_page_has_every_command():
    assert re.findall(r"(?m)^## (.*)$", reference.cli_page()) == WITH_PARSER


@pytest.mark.parametrize("name", WITH_PARSER)
def test_the_page_has_every_option_of_the_help(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    options = set(re.findall(r"(?m)^  (--[\w-]+)", capsys.readouterr().out))
    section = reference.cli_page().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert options == set(re.findall(r"(?m)^\| `(--[\w-]+)", section))
    assert not re.search(r"\| +\|$", section, re.MULTILINE), "an argument has no help"


def test_the_word_for_the_parser_is_an_ordinary_argument(capsys):
    """Only the object `DESCRIBE` asks for the parser, not a user who types the same."""
    assert main(["schema", *reference.DESCRIBE]) == 2
    assert "unrecognized arguments: describe" in capsys.readouterr().err


def test_optional_arguments_are_in_brackets():
    assert reference.usage(reference.parser_of("keys")) == "quadriga keys [words ...]"
    assert reference.usage(reference.parser_of("trace")).startswith("quadriga trace FOLDER [--json]")
    assert "[OUT]" in reference.usage(reference.parser_of("ccl-bench"))


def test_a_command_without_a_parser_is_an_error(monkeypatch):
    monkeypatch.setattr(reference, "function_of", lambda name: lambda arguments: 0)
    with pytest.raises(AssertionError, match="runs without parsing"):
        reference.parser_of("train")
