"""Fuzz readers from the command line, and record how many cases passed.

Each reader that passes is recorded at once, and the rows of the others stay. Each row names its commit.

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


def record(file: Path, reader: str, row: dict[str, float | str], names: list[str]) -> None:
    """Put the row of a reader, none of whose cases failed, into a result file. `names`: the readers that there are."""
    from common import git, save

    before = json.loads(file.read_text())["figures"] if file.exists() else {}
    rows = before | {reader: {**row, "commit": git("rev-parse", "--short=7", "HEAD")}}
    save(
        file.stem,
        {name: row for name, row in rows.items() if name in names},
        command=[f"python tests/fuzz/run.py --cases {row['cases']} --record {file.name}"],
        claim="whatever the bytes, a reader answers or refuses with one message",
        folder=file.resolve().parent,
    )


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
    failed = 0
    for reader in readers():
        if given.only and reader.name not in given.only:
            continue
        start = time.monotonic()
        failures = fuzz(reader, range(given.start, given.start + given.cases))
        for failure in failures:
            print(failure, file=sys.stderr)
        failed += len(failures)
        row = {"cases": given.cases, "failed": len(failures), "seconds": round(time.monotonic() - start, 1)}
        print(reader.name, json.dumps(row), flush=True)
        if given.record and not failures:
            record(given.record, reader.name, row, names)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
