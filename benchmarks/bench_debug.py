"""`quadriga bench` on two settings that differ and on two that do not: does it say so rightly in both cases?

    python benchmarks/bench_debug.py

Claim: of the debug configuration on 2 ranks with shorter steps, recomputing every block is found slower than
recomputing none; and between two names for the folder of the traces no difference is shown. In both, the losses of the
settings are equal to the last digit and gloo is credited with the bytes. Each is one `quadriga bench` with 5 repeats.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import ROOT, child_environment, command_line, save, table, verdict

CLAIM = "quadriga bench finds full recompute slower than none, and shows no difference between two names of a folder"
FILE = "configs/debug/debug.toml"
CASES = {
    "activation_checkpoint.mode=none,full": "slower",
    "profiling.save_traces_folder=profile_trace,traces": "no difference shown",
}
SHORTER = ("--training.seq_len", "64", "--training.global_batch_size", "4")
SHOWN = ("step_time_s", "tokens_per_second", "memory_peak_gib", "exposed_communication_s")


def measure(varied: str, expected: str, ranks: int, steps: int, repeats: int) -> dict[str, Any]:
    arguments = [
        FILE,
        "--vary",
        varied,
        "--repeat",
        str(repeats),
        "--ngpu",
        str(ranks),
        "--steps",
        str(steps),
        *SHORTER,
    ]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="quadriga-bench-") as folder:
        command = [sys.executable, "-m", "quadriga.cli", "bench", *arguments, "--out", f"{folder}/out", "--json"]
        done = subprocess.run(
            command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, text=True, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"{varied}: exit code {done.returncode}")
    found = json.loads(done.stdout)
    ratio = found["figures"][0]["ratios"][0]
    credited = all(each["credited"] for each in found["backend"])
    equal = found["losses"]["largest_difference"]["value"] == 0.0
    return {
        "command": " ".join(["quadriga", "bench", *arguments]),
        "seconds": round(time.perf_counter() - start, 1),
        "expected": expected,
        "verdict": ratio["verdict"],
        "met": ratio["verdict"] == expected and credited and equal,
        "ratio_of_step_times": ratio,
        "figures": [figure for figure in found["figures"] if figure["name"] in SHOWN],
        "where": found["where"],
        "backend": found["backend"],
        "largest_difference_of_losses": found["losses"]["largest_difference"],
        "warnings": found["warnings"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Bench two settings that differ, and two that do not.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    figures = {
        varied: measure(varied, expected, options.ranks, options.steps, options.repeat)
        for varied, expected in CASES.items()
    }
    rows = []
    for varied, found in figures.items():
        ratio = found["ratio_of_step_times"]
        low, high = ratio["interval"] or (float("nan"), float("nan"))
        rows.append(
            [varied, f"{ratio['ratio']:.3f}", f"{low:.3f} to {high:.3f}", ratio["verdict"], verdict(found["met"])]
        )
    print(table(["varied", "ratio of step times", "95 % interval", "verdict", "claim"], rows))
    print(f"\n{save('bench_debug', figures, command=command_line(), claim=CLAIM)}")
    return 0 if all(found["met"] for found in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
