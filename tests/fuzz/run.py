"""Fuzz readers from the command line, and record how many cases passed.

A record keeps the rows of readers that were not fuzzed this time; each row names its commit.

python tests/fuzz/run.py --cases 20000 [--only NAME ...] [--start N] [--record benchmarks/results/fuzz.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), str(Path(__file__).parent)]

from fuzzing import fuzz, readers  # noqa: E402 (found by the line above)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000, help="cases of each reader")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", nargs="*", default=[], help="names of readers")
    parser.add_argument("--record", type=Path, help="a result file, written from a clean commit")
    given = parser.parse_args()
    names = [reader.name for reader in readers()]
    if unknown := set(given.only) - set(names):
        parser.error(f"no such reader: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    figures: dict[str, dict[str, float | str]] = {}
    failed = 0
    for reader in readers():
        if given.only and reader.name not in given.only:
            continue
        start = time.monotonic()
        failures = fuzz(reader, range(given.start, given.start + given.cases))
        for failure in failures:
            print(failure, file=sys.stderr)
        failed += len(failures)
        figures[reader.name] = {
            "cases": given.cases,
            "failed": len(failures),
            "seconds": round(time.monotonic() - start, 1),
        }
        print(reader.name, json.dumps(figures[reader.name]), flush=True)
    if given.record and not failed:
        from common import git, save

        commit = git("rev-parse", "--short=7", "HEAD")
        before = json.loads(given.record.read_text())["figures"] if given.record.exists() else {}
        fuzzed = {name: {**row, "commit": commit} for name, row in figures.items()}
        figures = {name: row for name, row in (before | fuzzed).items() if name in names}
        claim = "whatever the bytes, a reader answers or refuses with one message"
        command = f"python tests/fuzz/run.py --cases {given.cases} --record {given.record.name}"
        save(given.record.stem, figures, command=[command], claim=claim, folder=given.record.resolve().parent)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
