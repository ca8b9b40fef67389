"""Runs all rows of the table of layouts, each compared with one process, and prints the table of docs/numerics.md.

    python benchmarks/equivalence.py              # about 45 minutes on 2 cores; writes results/equivalence.json
    python benchmarks/equivalence.py --section "loss in pieces"     # only those rows, into a separate file
    python benchmarks/equivalence.py --table      # prints the table of all these files, for docs/numerics.md

Claim: every layout trains as one process does, within the tolerances of quadriga/rehearsal/equivalence/rows.py. The
rows are those of `quadriga equivalence`, which starts each with the launcher, on GPUs too. Here the ranks are forked,
as in the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, command_line, save

from quadriga.rehearsal.equivalence.rows import SECTIONS

FIGURES = ("loss", "grad_norm", "weights")
TEST = "tests/distributed/equivalence/test_table.py::test_a_layout_trains_as_one_process_does"
CLAIM = "every layout trains as one process does, within the tolerances of quadriga/rehearsal/equivalence/rows.py"


def run_tests(section: str | None) -> int:
    tests = ["tests/distributed/equivalence"]
    if section is not None:
        tests = [f"{TEST}[{row.name}]" for row in SECTIONS[section]]
    command = [sys.executable, "-m", "pytest", *tests, "-m", "slow or not slow"]
    with tempfile.TemporaryDirectory(prefix="quadriga-equivalence-") as folder:
        figures = Path(folder, "figures.json")
        environ = {**os.environ, "EQUIVALENCE_JSON": str(figures)}
        code = subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode
        rows = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    name = "_".join(["equivalence", *(section or "").split()])
    print(f"written: {save(name, rows, command=command_line(), claim=CLAIM)}")
    return code


def markdown_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| layout | ranks | loss | gradient norm | weights |"
    yield "|---|---|---|---|---|"
    section = None
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            yield f"| **{section}** | | | | |"
        figures = " | ".join("failed" if "failed" in row else format_figure(row[name]) for name in FIGURES)
        yield f"| {row['layout']} | {row['ranks']} | {figures} |"


def format_figure(figure: float) -> str:
    return f"{figure:.0e}" if figure else "0"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only print the table of the last results")
    parser.add_argument("--section", choices=list(SECTIONS), help="only the rows of this section")
    chosen = parser.parse_args()
    code = 0 if chosen.table else run_tests(chosen.section)
    files = [RESULTS / "equivalence.json", *sorted(RESULTS.glob("equivalence_*.json"))]
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["figures"]]
    print("\n".join(markdown_table(rows)))
    return code


if __name__ == "__main__":
    sys.exit(main())
