"""Every benchmark of this folder in turn, each in a process of its own. Meant for a machine that does nothing else.

python benchmarks/all.py                                  # about 20 minutes on 2 cores
python benchmarks/all.py --text tinyshakespeare.txt       # the Shakespeare benchmark too
python benchmarks/all.py --only startup speed
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from common import BENCHMARKS, child_environment, table

NAMES = ("startup", "speed", "equality", "data_speed", "shakespeare")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every benchmark and list which claims hold.")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--text", type=Path, help="for the Shakespeare benchmark, which is left out without it")
    parser.add_argument("--long", action="store_true", help="equality over 200 steps instead of 20")
    chosen = parser.parse_args()
    arguments_of = {"shakespeare": [str(chosen.text)], "equality": ["--steps", "200" if chosen.long else "20"]}
    rows = []
    for name in chosen.only:
        if name == "shakespeare" and chosen.text is None:
            rows.append([name, "", "left out: no --text"])
            continue
        print(f"\n== {name} ==", flush=True)
        arguments = arguments_of.get(name, [])
        start = time.perf_counter()
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
        code = subprocess.run(command, env=child_environment(), check=False).returncode
        minutes = (time.perf_counter() - start) / 60
        rows.append([name, f"{minutes:.1f} min", "held" if code == 0 else f"exit code {code}"])
    print("\n" + table(["benchmark", "time", "claim"], rows))
    return 0 if all(row[2] == "held" or row[2].startswith("left out") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
