"""`quadriga compare RUN_A RUN_B`: which run is faster, by how much, with an interval, and where the time was spent."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quadriga.analysis.compare.comparison import compare_settings
from quadriga.analysis.compare.evidence import Analyse
from quadriga.analysis.compare.report import format_comparison
from quadriga.analysis.compare.runs import WARMUP_STEPS, find_bench, folders_of, names_of, read_setting
from quadriga.cli.arguments import Parser, page_file, write_page
from quadriga.errors import EXIT_OK, Problem, UserError, printable, shortened

ABOUT = (
    "Compare runs that differ in one thing: speed, memory, exposed communication, losses, and whether the requested "
    "backend carried the bytes. RUN is a run folder, a folder with repeats of one setting (repeat-1, repeat-2, ...) or "
    "the folder of a bench, for all of its settings. Each is compared with the first. docs/comparisons.md explains the "
    "figures."
)


def main(argv: Sequence[str]) -> int:
    parser = Parser("compare", ABOUT)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="two or more, or one folder of a bench")
    parser.add_argument(
        "--accept-difference",
        metavar="KEY",
        nargs="+",
        action="extend",
        default=[],
        help="keys in which the runs may differ, such as training.steps or environment.git.commit",
    )
    add_compare_arguments(parser)
    options = parser.parse_args(argv)
    found = compare_folders([Path(run) for run in options.runs], options.accept_difference, options.warmup)
    print_comparison(found, options)
    return EXIT_OK


def add_compare_arguments(parser: Parser) -> None:
    help = f"steps at the start of each run that are excluded (default {WARMUP_STEPS})"
    parser.add_argument("--warmup", type=step_count, default=WARMUP_STEPS, metavar="STEPS", help=help)
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    parser.add_argument("--html", type=page_file, metavar="FILE", help="also write a page with plots")


def step_count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,14}", text):
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not a number of steps (1 or more)")
    return int(text)


def compare_folders(paths: Sequence[Path], accepted: Sequence[str], warmup: int) -> dict[str, Any]:
    """The comparison of run folders, as one dict. Raises UserError if they cannot be compared."""
    folders = folders_of(paths)
    if len(folders) < 2:
        raise UserError(Problem("RUN", "a comparison needs two runs", fix="name another run, or the folder of a bench"))
    bench = find_bench(folders)
    names = names_of(folders, bench)
    settings = [read_setting(name, folder, warmup) for name, folder in zip(names, folders, strict=True)]
    varied = None if bench is None else list(bench["varied"])
    runs = sum(len(setting.runs) for setting in settings)
    print(f"reading the traces of {runs} runs", file=sys.stderr, flush=True)
    return compare_settings(settings, varied=varied, accepted=accepted, analyse=load_analyse(), warmup=warmup)


def load_analyse() -> Analyse:
    from quadriga.analysis.trace.analysis import analyse  # not needed to refuse runs

    return analyse


def print_comparison(found: dict[str, Any], options: argparse.Namespace) -> None:
    print(
        json.dumps(found, indent=1, allow_nan=False)
        if options.json
        else "\n".join(map(printable, format_comparison(found)))
    )
    if options.html:
        from quadriga.analysis.compare.page import comparison_page

        write_page(options.html, comparison_page(found))
        print(f"the page is {printable(options.html)}", file=sys.stderr)
