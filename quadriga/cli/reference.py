"""Reference of the command line: `docs/cli.md`, made from the argument parsers of all commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from quadriga.cli.arguments import DESCRIBE, Parser, ParserFound
from quadriga.cli.main import COMMANDS, function_of
from quadriga.config.markdown import render

WITHOUT_PARSER = ("version",)


def cli_page() -> str:
    """`docs/cli.md`."""
    parsers = {name: parser_of(name) for name in COMMANDS if name not in WITHOUT_PARSER}
    return render(
        Path(__file__).with_name("cli.md.jinja"),
        overview=[(linked(name), about) for name, about in COMMANDS.items()],
        commands=[(name, usage(parser), parser.description, rows(parser)) for name, parser in parsers.items()],
    )


def linked(name: str) -> str:
    """The name of a command, as a link to its section if it has one."""
    return f"`{name}`" if name in WITHOUT_PARSER else f"[`{name}`](#{name.replace(' ', '-')})"


def parser_of(name: str) -> Parser:
    """The argument parser of a command, which does not run."""
    try:
        function_of(name)(DESCRIBE)
    except ParserFound as found:
        return found.parser
    raise AssertionError(f"quadriga {name} runs without parsing its arguments")


def arguments(parser: Parser) -> list[argparse.Action]:
    """Positional arguments first. `--help`, which every command has, is left out."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return sorted(actions, key=lambda action: bool(action.option_strings))


def usage(parser: Parser) -> str:
    """The line of usage. It is not argparse's, which differs between releases of Python."""
    words = [parser.prog]
    for action in arguments(parser):
        shown = " ".join(filter(None, [*action.option_strings[-1:], placeholder_of(action)]))
        optional = not action.required or action.nargs in ("?", "*")
        words.append(f"[{shown}]" if optional else shown)
    return " ".join(words)


def placeholder_of(action: argparse.Action) -> str:
    """The placeholder of an argument's value; empty for a switch."""
    if action.nargs == 0:
        return ""
    name = action.dest.upper() if action.option_strings else action.dest
    shown = str(action.metavar or ("|".join(map(str, action.choices)) if action.choices else name))
    return f"{shown} ..." if action.nargs in ("*", "+") else shown


def rows(parser: Parser) -> list[tuple[str, str]]:
    """(argument, meaning) of a command."""
    return [
        (f"`{' '.join(filter(None, [', '.join(action.option_strings), placeholder_of(action)]))}`", action.help or "")
        for action in arguments(parser)
    ]
