"""Tests `quadriga bench` on two settings that differ in speed, and on two that do not.

    python benchmarks/bench_debug.py             # both, into bench_debug_unlike.json and bench_debug_alike.json
    python benchmarks/bench_debug.py unlike

Claim: for the debug configuration on 2 ranks, with 2 layers and 8 short micro-batches per step, a bench finds that
reducing gradients after every micro-batch is slower than once per step. It shows no difference between two names of the
trace folder. In both cases gloo is credited, and losses differ by rounding at most. Each case is one `quadriga bench`
with 5 repeats.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from common import ROOT, child_environment, command_line, met_or_missed, save, text_table

from quadriga.analysis.compare.report import format_answers

FILE = "configs/debug/debug.toml"
SMALL = ("--model.n_layers", "2")


@dataclass(frozen=True)
class BenchCase:
    varied: str
    keys: tuple[str, ...]
    verdict: str
    losses_within: float
    claim: str


CASES = {
    "unlike": BenchCase(
        "parallelism.reduce_gradients=once,every_micro_batch",
        (*SMALL, "--training.seq_len", "32", "--training.local_batch_size", "1"),
        "slower",
        1e-4,
        "quadriga bench finds that reducing gradients after every micro-batch is slower than once per step",
    ),
    "alike": BenchCase(
        "profiling.save_traces_folder=profile_trace,traces",
        (*SMALL, "--training.seq_len", "128", "--training.global_batch_size", "4"),
        "no difference shown",
        0.0,
        "quadriga bench shows no difference between two names of a folder",
    ),
}
SHOWN = ("step_time_s", "tokens_per_second", "memory_peak_gib", "exposed_communication_s")


def measure(case: BenchCase, ranks: int, steps: int, repeats: int) -> dict[str, Any]:
    arguments = [FILE, "--vary", case.varied, "--repeat", str(repeats), "--ngpu", str(ranks), "--steps", str(steps)]
    arguments += case.keys
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="quadriga-bench-") as folder:
        command = [sys.executable, "-m", "quadriga.cli", "bench", *arguments, "--out", f"{folder}/out", "--json"]
        done = subprocess.run(
            command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, text=True, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"{case.varied}: exit code {done.returncode}")
    found = json.loads(done.stdout)
    ratio = found["figures"][0]["ratios"][0]
    verified = all(each["credited"] for each in found["backend"])
    alike = found["losses"]["largest_difference"]["value"] <= case.losses_within
    return {
        "bench": " ".join(["quadriga", "bench", *arguments]),
        "seconds": round(time.perf_counter() - start, 1),
        "expected": case.verdict,
        "met": ratio["verdict"] == case.verdict and verified and alike,
        "answer": next(format_answers(found)),
        "ratio_of_step_times": ratio,
        "figures": [figure for figure in found["figures"] if figure["name"] in SHOWN],
        "where": found["where"],
        "backend": found["backend"],
        "largest_difference_of_losses": found["losses"]["largest_difference"],
        "warnings": found["warnings"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Bench two settings that differ in speed, and two that do not.")
    parser.add_argument("cases", nargs="*", choices=CASES, default=list(CASES), metavar="unlike|alike")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    rows, met = [], True
    for name in options.cases:
        case = CASES[name]
        found = measure(case, options.ranks, options.steps, options.repeat)
        ratio, met = found["ratio_of_step_times"], met and found["met"]
        low, high = ratio["interval"] or (float("nan"), float("nan"))
        interval = f"{low:.3f} to {high:.3f}"
        rows.append([case.varied, f"{ratio['ratio']:.3f}", interval, ratio["verdict"], met_or_missed(found["met"])])
        save(f"bench_debug_{name}", found, command=command_line(), claim=case.claim)
    print(text_table(["varied", "ratio of step times", "95 % interval", "verdict", "claim"], rows))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
