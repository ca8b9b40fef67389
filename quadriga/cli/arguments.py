"""Shared by several commands: an argument parser that raises UserError, the run of a file, pages, the repository."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quadriga.errors import Fault, Problem, UserError, printable, shortened

if TYPE_CHECKING:
    from quadriga.config import Run

ROOT_MARK = "run_train.sh"


DESCRIBE: Sequence[str] = ("describe",)
"""The arguments, by identity, with which a command raises its parser instead of running: for docs/cli.md."""


class ParserFound(Exception):
    """The parser of a command, before it has parsed."""

    def __init__(self, parser: Parser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError. Options are not abbreviated: the rest are keys of the configuration."""

    def __init__(self, command: str, about: str) -> None:
        super().__init__(prog=f"quadriga {command}", description=about, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, which also calls it for `parse_args`. Raises ParserFound if the arguments are `DESCRIBE`."""
        if args is DESCRIBE:
            raise ParserFound(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(Problem(self.prog, message, fix=f"see {self.prog} --help"))


def rank_count(text: str) -> int:
    """The argparse type of `--ngpu`: a whole number from 1 to 999,999,999."""
    return _count(text, "a number of ranks (1 or more)")


def count(text: str) -> int:
    """The argparse type of another number of things: as `rank_count`."""
    return _count(text, "a whole number from 1 to 999,999,999")


def _count(text: str, what: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not {what}")
    return int(text)


def page_file(text: str) -> Path:
    """The argparse type of a file to write. It is checked before the work, because that may take hours."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not a file in an existing folder")
    return path


def bandwidth(text: str) -> float:
    """The argparse type of a bandwidth: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not a bandwidth (a finite number above 0)")
    return value


def repository_of(path: Path) -> Path:
    """The folder above `path` that contains the launch script, else the current directory."""
    above = (folder for folder in Path(os.path.realpath(path)).parents if (folder / ROOT_MARK).is_file())
    return next(above, Path.cwd())


def run_from_file(file: str, ranks: int | None, keys: Sequence[str] = ()) -> Run:
    """The run of a file, as a dry run reads it. `ranks`: None for the product of the degrees. COMM_BACKEND is
    ignored: what is printed depends on the file and the arguments only."""
    from quadriga.comm.backend import BACKENDS
    from quadriga.config import read
    from quadriga.models.registry import catalogue

    arguments = ["--job.config_file", file, *keys]
    environ = {name: value for name, value in os.environ.items() if name != "COMM_BACKEND"}
    return read(arguments, environ, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=False)


def write_page(target: Path, page: str) -> None:
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise Fault(f"{printable(target)} cannot be written: {error.strerror}") from None
