"""Break the code on purpose, one place at a time, and see that a test fails.

    python tests/mutants/run.py [NAME ...] [--jobs 2] [--record]

`mutants.json` is a list of {"name", "file", "old", "new", "tests", "why"}: `old` stands exactly once in `file`, and is
replaced by `new` in a copy of the tree; the mutant is dead if one of `tests` (pytest arguments; slow tests do not run)
fails there. To add one, add an entry. "survives" instead of "tests" explains a mutant that no test can kill.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("mutants.json")
LONGEST = 900  # seconds of one mutant's tests: one that hangs is dead too, and told so


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    why: str  # what would go wrong for a user
    tests: tuple[str, ...] = ()
    survives: str = ""  # why no test can tell it from the code


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    dead: bool
    how: str
    seconds: float


def read_mutants() -> list[Mutant]:
    return [
        Mutant(**{**entry, "tests": tuple(entry.get("tests", ()))}) for entry in json.loads(FILE.read_text("utf-8"))
    ]


def copy_tree(folder: Path) -> None:
    """The files that git knows, as they are in the working tree."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def run_tests(folder: Path, tests: Sequence[str], jobs: int = 1, seconds: int = LONGEST) -> tuple[int | None, str]:
    """pytest's exit code, None after so many seconds; and the end of what it printed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise each process of a test compiles all of the copy anew
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
    try:
        done = subprocess.run(
            [*command, *tests], cwd=folder, env=environ, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no end within {seconds} s"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def write_module(path: Path, text: str) -> None:
    """Without its bytecode, which Python would use for a changed file of the same size and second."""
    path.write_text(text, encoding="utf-8")
    Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)


def try_mutant(folder: Path, mutant: Mutant) -> Outcome:
    """Whether the tests of the mutant fail in `folder`, a copy of the tree, which is left as it was."""
    start = time.monotonic()
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return Outcome(mutant, False, f"`old` stands {text.count(mutant.old)} times in {mutant.file}", 0.0)
    write_module(path, text.replace(mutant.old, mutant.new))
    try:
        compile(path.read_text(encoding="utf-8"), mutant.file, "exec")
        code, output = run_tests(folder, mutant.tests)
    except SyntaxError as error:
        return Outcome(mutant, False, f"not Python: {error}", 0.0)
    finally:
        write_module(path, text)
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    how = (
        "no end" if code is None else failed[0] if failed else output.strip().splitlines()[-1] if output.strip() else ""
    )
    return Outcome(mutant, code in (1, None), how, time.monotonic() - start)


def try_all(mutants: Sequence[Mutant], jobs: int) -> list[Outcome]:
    """Every mutant in one of `jobs` copies of the tree, and the tests of all of them once without any."""
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        copies: Queue[Path] = Queue()
        for number in range(jobs):
            copies.put(Path(temporary, str(number)))
            copy_tree(Path(temporary, str(number)))

        def one(mutant: Mutant) -> Outcome:
            folder = copies.get()
            try:
                outcome = try_mutant(folder, mutant)
            finally:
                copies.put(folder)
            verdict = "dead" if outcome.dead else "ALIVE"
            print(f"{verdict:5}  {outcome.seconds:5.0f} s  {mutant.name}: {outcome.how}", flush=True)
            return outcome

        tests = sorted({test for mutant in mutants for test in mutant.tests})
        folder = copies.get()
        code, output = run_tests(folder, tests, jobs, 6 * LONGEST)
        copies.put(folder)
        if code != 0:
            raise SystemExit(f"the tests fail without a mutant:\n{output}")
        return list(pool.map(one, mutants))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants to try; all, if none is named")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/mutants.json")
    given = parser.parse_args()
    chosen = [mutant for mutant in read_mutants() if not given.names or mutant.name in given.names]
    outcomes = try_all([mutant for mutant in chosen if not mutant.survives], given.jobs)
    alive = [outcome.mutant.name for outcome in outcomes if not outcome.dead]
    explained = {mutant.name: mutant.survives for mutant in chosen if mutant.survives}
    print(f"{len(outcomes) - len(alive)} of {len(chosen)} mutants die; explained: {len(explained)}; alive: {alive}")
    if given.record and not given.names:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from common import save

        figures = {
            "mutants": len(chosen),
            "dead": len(outcomes) - len(alive),
            "alive": alive,
            "explained": explained,
            "killed_by": {outcome.mutant.name: outcome.how for outcome in outcomes if outcome.dead},
        }
        claim = "a fault in the training path is found by a test"
        save("mutants", figures, command=["python tests/mutants/run.py --record"], claim=claim)
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
