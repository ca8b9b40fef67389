"""Shared by several commands: an argument parser that raises UserError, the run of a file, pages, the repository."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from quadriga.errors import Fault, Problem, UserError, shortened

if TYPE_CHECKING:
    from quadriga.config import Run

ROOT_MARK = "run_train.sh"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError. Options are not abbreviated: the rest are keys of the configuration."""

    def __init__(self, command: str, about: str) -> None:
        super().__init__(prog=f"quadriga {command}", description=about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(Problem(self.prog, message, fix=f"see {self.prog} --help"))


def rank_count(text: str) -> int:
    """The argparse type of `--ngpu`: a whole number from 1 to 999,999,999."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not a number of ranks (1 or more)")
    return int(text)


def repository_of(path: Path) -> Path:
    """The folder above `path` that contains the launch script, else the current directory."""
    above = (folder for folder in path.resolve().parents if (folder / ROOT_MARK).is_file())
    return next(above, Path.cwd())


def run_from_file(
    file: str, ranks: int | None, keys: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Run:
    """The run of a file, as a dry run reads it. `ranks`: None for the product of the degrees."""
    from quadriga.comm.backend import BACKENDS
    from quadriga.config import read
    from quadriga.models.registry import catalogue

    arguments = ["--job.config_file", file, *keys]
    return read(arguments, environ or {}, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=False)


def write_page(target: Path, page: str) -> None:
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise Fault(f"{target} cannot be written: {error}") from None
