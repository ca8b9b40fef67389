"""`quadriga configs`: list the configurations that Quadriga ships, print the path of one, or copy them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from quadriga.cli.arguments import Parser, repository_of
from quadriga.errors import EXIT_OK, Problem, UserError, nearest, printable
from quadriga.reading import read_toml


def main(argv: Sequence[str]) -> int:
    parser = Parser("configs", "List the configurations that Quadriga ships, print the path of one, or copy them.")
    parser.add_argument("name", nargs="?", help="print only the path of this configuration, for other commands")
    parser.add_argument("--copy", metavar="FOLDER", type=Path, help="copy their folders into FOLDER")
    options = parser.parse_args(argv)
    files = {file.stem: file for file in sorted(shipped_folder().glob("*/*.toml"))}
    if options.name is not None and options.name not in files:
        close = nearest(options.name, files)
        raise UserError(Problem(options.name, "no such configuration", allowed=", ".join(files), nearest=close))
    chosen = files if options.name is None else {options.name: files[options.name]}
    if options.copy is not None:
        copied = [copy_new(file.parent, options.copy / file.parent.name) for file in chosen.values()]
        print("\n".join(printable(folder / f"{folder.name}.toml") for folder in copied))
    elif options.name is not None:
        print(chosen[options.name])
    else:
        for name, file in chosen.items():
            print(f"{name:<15} {read_toml(file)['job']['description']}\n{'':<15} {file}")
    return EXIT_OK


def shipped_folder() -> Path:
    """The folder of the configurations: in the package, where a wheel has them, else in the checkout."""
    inside = Path(__file__).resolve().parents[1] / "configs"
    return inside if inside.is_dir() else repository_of(Path(__file__)) / "configs"


def copy_new(source: Path, target: Path) -> Path:
    """Copy the files of a folder. Files that exist and are equal stay.

    Raises:
        UserError: a file exists and is different; nothing is copied.
    """
    files = sorted(path for path in source.iterdir() if path.is_file())
    for file in files:
        there = target / file.name
        if there.exists() and there.read_bytes() != file.read_bytes():
            fix = "choose another folder, or delete the file"
            raise UserError(Problem("--copy", "a file exists and is different", str(there), fix=fix))
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, target / file.name)
    return target
