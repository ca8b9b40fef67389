"""`quadriga card FILE --ngpu N`: generate the README.md of a configuration. `quadriga docs`: generate all documents."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from quadriga.cli.arguments import Parser, rank_count, repository_of, run_from_file
from quadriga.cli.reference import cli_page
from quadriga.config import Run
from quadriga.config.card import CardFigures, CardTarget, read_target, render_card
from quadriga.config.reference import reference_page
from quadriga.config.torchtitan import regenerate
from quadriga.errors import EXIT_FAULT, EXIT_OK, Problem, UserError, printable
from quadriga.hardware import DEVICES, Device, device_named
from quadriga.limits import README_BYTES
from quadriga.models.registry import flops_per_token
from quadriga.planning.estimate import estimate
from quadriga.planning.report import device_rows, estimate_rows
from quadriga.reading import read_text


def main(argv: Sequence[str]) -> int:
    parser = Parser("card", "Generate the README.md next to a configuration, from the resolved run.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a TOML file")
    parser.add_argument(
        "--ngpu", type=rank_count, help="GPUs that it is made for (default: those of the existing card)"
    )
    parser.add_argument("--device", help=f"device to describe: {', '.join(device.slug for device in DEVICES)}")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a card is missing or outdated")
    parser.add_argument("--print", action="store_true", help="print the card instead of writing it")
    options = parser.parse_args(argv)
    stale = 0
    for name in options.files:
        file = Path(name)
        card = make_card(target_for(file, options.ngpu, options.device), file)
        if options.print:
            print(card, end="")
        else:
            refuse_other_readme(file)
            again = ["quadriga", "card", name, *(["--ngpu", str(options.ngpu)] if options.ngpu else [])]
            stale += write_or_check(card_path(file), card, options.check, shlex.join(again))
    return EXIT_FAULT if stale else EXIT_OK


def docs(argv: Sequence[str]) -> int:
    """`quadriga docs`: generate configuration.md, cli.md, tables of from-torchtitan.md, and the cards of configs/."""
    pages = "docs/configuration.md, docs/cli.md, tables of docs/from-torchtitan.md, and the cards of configs/"
    parser = Parser("docs", f"Generate {pages}.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args(argv).check
    root = repository_of(Path(__file__))
    stale = write_or_check(root / "docs" / "configuration.md", reference_page(), check)
    stale |= write_or_check(root / "docs" / "cli.md", cli_page(), check)
    page = root / "docs" / "from-torchtitan.md"
    stale |= write_or_check(page, regenerate(page.read_text(encoding="utf-8")), check)
    for file in sorted(root.glob("configs/*/*.toml")):
        stale |= write_or_check(card_path(file), make_card(target_for(file, None, None), file), check)
    return EXIT_FAULT if stale else EXIT_OK


def card_path(file: Path) -> Path:
    return file.parent / "README.md"


def write_or_check(place: Path, text: str, check: bool, command: str = "quadriga docs") -> bool:
    """Write a generated file, or only compare it (`check`). Returns whether it is out of date and was not written.

    `command`: what writes it, for the message.
    """
    if place.is_file() and place.read_bytes() == text.encode():
        print(printable(f"{place}: up to date"), file=sys.stderr)
        return False
    if check:
        print(
            printable(f"{place}: {'out of date' if place.is_file() else 'missing'}; write it with `{command}`"),
            file=sys.stderr,
        )
        return True
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    print(printable(f"{place}: written"), file=sys.stderr)
    return False


def refuse_other_readme(file: Path) -> None:
    """Raise UserError if another text than the card of `file` would be overwritten."""
    place = card_path(file)
    if not os.path.lexists(place):
        return
    there = read_target(read_text(place, README_BYTES, what="card"))
    if there is None or Path(there.file).name != file.name:
        what = "exists, and is not a card" if there is None else f"is the card of {there.file}"
        fix = "move it away, or print the card instead: --print"
        raise UserError(Problem(str(place), what, fix=fix))


def target_for(file: Path, gpus: int | None, device: str | None) -> CardTarget:
    """The target of a card: the options, else the target of the existing card. Raises UserError without both."""
    place = card_path(file)
    there = read_target(read_text(place, README_BYTES, what="card")) if place.is_file() else None
    if there is not None and Path(there.file).name != file.name:
        there = None
    if gpus is None and there is None:
        fix = f"quadriga card {shlex.quote(str(file))} --ngpu N"
        raise UserError(
            Problem("--ngpu", "is needed, because there is no card yet that has the number of GPUs", fix=fix)
        )
    name = os.path.relpath(os.path.realpath(file), repository_of(file))
    if not name.isprintable() or "-->" in name or "--!>" in name:
        what = "a card contains the name of its file, which must not have control characters or the end of a comment"
        raise UserError(Problem("the file of a card", what, name, fix="rename the file"))
    return CardTarget(
        file=name,
        gpus=gpus or (there.gpus if there else 1),
        device=device or (there.device if there else None),
    )


def make_card(target: CardTarget, file: Path) -> str:
    """The text of the card of `file`."""
    run = run_from_file(str(file), target.gpus)
    name = target.device or run.config.estimate.device
    device = None if name is None else device_named(name, "--device")
    return render_card(run, target, figures_of(run, device), device)


def figures_of(run: Run, device: Device | None) -> CardFigures:
    """The figures of a run for its card, from arithmetic."""
    model, predicted = run.spec.model, estimate(run, device)
    return CardFigures(
        model.n_parameters,
        flops_per_token(model, run.spec.seq_len),
        tuple(estimate_rows(predicted)),
        tuple(device_rows(predicted)),
    )
