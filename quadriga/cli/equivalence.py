"""`quadriga equivalence`: train on many layouts of this machine, and compare each with one plain process."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from quadriga.cli.arguments import Parser, rank_count
from quadriga.errors import EXIT_FAULT, EXIT_OK, Problem, UserError, nearest
from quadriga.launch.environment import visible_gpus
from quadriga.rehearsal.equivalence.rows import (
    ROWS,
    ROWS_PER_STEP,
    SECTIONS,
    SEQ_LEN,
    STEPS,
    TOLERANCES,
    Row,
    parse_layout,
)

ABOUT = (
    f"Train the debug model {STEPS} steps ({ROWS_PER_STEP} sequences of {SEQ_LEN} tokens each) on one plain process "
    "and on each layout, and compare every loss, every gradient norm and the final weights. Without --layout or "
    "--section: all rows of the table with at most --max-ranks. Other arguments are keys for all runs: "
    "--section.key value (see `quadriga keys`)."
)
COLUMNS = f"{'loss':>9} {'grad norm':>9} {'weights':>9} {'seconds':>8}"


def main(argv: Sequence[str]) -> int:
    parser = Parser("equivalence", ABOUT)
    parser.add_argument("--layout", action="append", default=[], metavar="AXIS=N,...", help="such as dp_shard=2,tp=2")
    parser.add_argument("--section", action="append", default=[], help=f"rows of: {', '.join(SECTIONS)}")
    parser.add_argument("--max-ranks", type=rank_count, help="skip larger rows (default: the GPUs here, else 4)")
    parser.add_argument("--list", action="store_true", help="print the rows and run nothing")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    options, keys = parser.parse_known_args(argv)
    max_ranks = options.max_ranks or visible_gpus(os.environ) or 4
    rows = chosen_rows(options.layout, options.section, max_ranks)
    if options.list:
        print("\n".join(f"{row.ranks:>2} ranks  {row.name}" for row in rows))
        return EXIT_OK
    return run_rows(rows, keys, options.json)


def chosen_rows(layouts: Sequence[str], sections: Sequence[str], max_ranks: int) -> list[Row]:
    """The requested rows. Layouts of --layout run at any size."""
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        close, allowed = nearest(unknown[0], SECTIONS), ", ".join(SECTIONS)
        raise UserError(Problem("--section", "no such section", unknown[0], allowed=allowed, nearest=close))
    try:
        named = [Row(parse_layout(text)) for text in layouts]
    except ValueError as error:
        raise UserError(Problem("--layout", str(error))) from None
    pool = [row for name in sections for row in SECTIONS[name]] if sections or named else list(ROWS)
    return [*named, *(row for row in pool if row.ranks <= max_ranks)]


def run_rows(rows: Sequence[Row], keys: Sequence[str], json_file: str | None) -> int:
    from quadriga.rehearsal.equivalence.trial import Trials, summarize_results, train_with_launcher  # imports torch

    width = max((len(row.name) for row in rows), default=0)
    print(f"{'layout':<{width}}  {COLUMNS}")
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="quadriga-equivalence-") as folder:
        trials = Trials(Path(folder), train_with_launcher, keys)
        for row in rows:
            verdict = trials.run(row)
            verdicts.append(verdict)
            row_label = f"{verdict.row.name:<{width}}  "
            if verdict.differences is None:
                print(f"{row_label}failed after {verdict.seconds:.0f} s\n{verdict.why}", flush=True)
                continue
            differences = verdict.differences
            figures = f"{differences.loss:>9.1e} {differences.grad_norm:>9.1e} {differences.weights:>9.1e}"
            figures += f" {verdict.seconds:>8.1f}"
            print(
                row_label + figures + ("" if verdict.met else f"  exceeds the tolerance ({differences.weights_of})"),
                flush=True,
            )
    if json_file is not None:
        summary = summarize_results(verdicts, " ".join(["quadriga", *sys.argv[1:]]))
        Path(json_file).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    missed = sum(not verdict.met for verdict in verdicts)
    print(f"\n{len(verdicts) - missed} of {len(verdicts)} layouts agree with one process, within the tolerance of")
    for dtype, tolerance in TOLERANCES.items():
        print(f"  {dtype}: " + ", ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in tolerance.items()))
    return EXIT_FAULT if missed else EXIT_OK
