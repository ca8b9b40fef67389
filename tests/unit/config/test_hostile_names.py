"""Values and file names that are markup, HTML, scripts or control characters: shown as they are read, never obeyed."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import pytest
import tomli_w

from quadriga.cli.main import main
from quadriga.config.card import read_target
from quadriga.config.markdown import argument, code, plain
from quadriga.launch.supervisor import main as launch
from quadriga.log import PrintableFormatter

HOSTILE = [
    "<script>alert(1)</script>",
    "</summary><img src=x onerror=alert(1)>",
    "a | b | c",
    "`` ` ```",
    "[x](javascript:alert(1))",
    "![x](http://example.org/a.png)",
    "line\n\n# heading\n```\ncode",
    "\x1b[2J\x1b[31m\x07\r",
    "$(touch owned) `touch owned` '; touch owned; '",
    "-->",
    "&lt;b&gt;",
    "\u202e\u0000"[:1],
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_shows_what_a_file_says(text, tmp_path, capsys):
    document = {
        "job": {"description": text, "dump_folder": text},
        "training": {"dataset": "text", "dataset_path": text},
    }
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(document))
    assert main(["card", str(file), "--ngpu", "1", "--print"]) == 0, capsys.readouterr().err
    card = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in card)
    pytest.importorskip("markdown_it")
    html = rendered(card)
    for tag in ("<script", "<img", 'href="javascript', "</summary><img"):
        assert tag not in html
    assert html.count("<h1>") == 1
    assert html.count("<h2>") == card.count("\n## ")
    assert html.count("<details>") == html.count("</details>") == 1


def rendered(text: str) -> str:
    """As GitHub renders Markdown: HTML passes."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_markdown_is_text(text):
    assert "\n" not in plain(text) + code(text)
    pytest.importorskip("markdown_it")
    for html in (rendered(plain(text)), rendered(code(text))):
        assert "<script" not in html
        assert "<img" not in html
        assert "<a " not in html
    assert rendered(code(text)).startswith("<p><code>")
    assert len(shlex.split(argument(text))) == 1


@pytest.mark.parametrize("name", ["a-->b.toml", "a\x1b[2Jb.toml", "a\nb.toml"])
def test_a_card_of_a_file_whose_name_would_end_its_first_line_is_refused(name, tmp_path, capsys):
    file = tmp_path / name
    file.write_text("")
    assert main(["card", str(file), "--ngpu", "1", "--print"]) == 2
    err = capsys.readouterr().err
    assert "rename the file" in err
    assert all(char.isprintable() or char == "\n" for char in err)


def test_commands_on_a_card_take_a_name_as_one_argument(tmp_path, capsys):
    file = tmp_path / "$(touch owned) `x` ;a.toml"
    file.write_text("")
    assert main(["card", str(file), "--ngpu", "1", "--print"]) == 0
    card = capsys.readouterr().out
    commands = [line for line in card.splitlines() if "CONFIG_FILE=" in line and line.endswith("run_train.sh")]
    assert commands
    for line in commands:
        assert any(part.startswith("CONFIG_FILE=") and part.endswith(";a.toml") for part in shlex.split(line))


@pytest.mark.parametrize(
    "first", ["<!-- quadriga card ' -->", "<!-- quadriga card a --ngpu " + "9" * 5000 + " -->", "\0"]
)
def test_a_card_that_is_something_else_is_no_order(first):
    assert read_target(first + "\n") is None


@pytest.mark.parametrize("text", [text for text in HOSTILE if "\0" not in text])
def test_what_a_dry_run_prints_is_printable(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "".join(char for char in text if char != "/")[:100] + ".toml"
    document = {"job": {"description": text, "dump_folder": text[:50].replace("/", "")}}
    Path(name).write_text(tomli_w.dumps(document))
    assert launch(
        [], {"DRY_RUN": "1", "CONFIG_FILE": name.replace("$", "$") if "$" not in name else "x", "NGPU": "1"}
    ) in (0, 2)
    shown = capsys.readouterr()
    assert all(char.isprintable() or char == "\n" for char in shown.out + shown.err)


def test_log_lines_are_printable_and_colours_pass():
    record = logging.LogRecord("quadriga", logging.INFO, "", 0, "in %s\n  %s", ("\x1b[2Ja", "b\r"), None)
    assert PrintableFormatter("%(message)s").format(record) == "in \\x1b[2Ja\n  b\\r"
    record = logging.LogRecord("quadriga", logging.INFO, "", 0, "\x1b[1mstep 1\x1b[0m", (), None)
    record.as_it_is = True
    assert PrintableFormatter("%(message)s").format(record) == "\x1b[1mstep 1\x1b[0m"
