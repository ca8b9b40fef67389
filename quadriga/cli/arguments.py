"""Shared by several commands: an argument parser that raises UserError, and the place of the repository."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from quadriga.errors import Problem, UserError, shortened

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
