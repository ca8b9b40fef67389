"""Runs every benchmark of this folder in sequence, each in its own process. The machine should have no other load.

    python benchmarks/all.py                                  # hours on 2 cores
    python benchmarks/all.py --text tinyshakespeare.txt       # the Shakespeare benchmark too
    python benchmarks/all.py --only startup speed

Benchmarks that need other hardware or software are listed with the reason and not run. The exit code of each script
shows whether its claim holds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from common import BENCHMARKS, child_environment, text_table

# Arguments of each run, the fast scripts first. A script with several claims has several runs.
RUNS: dict[str, list[list[str]]] = {
    "estimates": [[]],
    "search": [[]],
    "attention": [[]],
    "loss_speed": [[]],
    "document_attention": [[]],
    "plan_speed": [[]],
    "data_speed": [[]],
    "startup": [[]],
    "trace_speed": [[]],
    "step_time": [[]],
    "bench_debug": [["unlike"], ["alike"]],
    "speed": [[]],
    "cpu_table": [[]],
    "scaling": [[]],
    "save_cost": [["--pairs", "5"], ["--pairs", "2", "--tokens", "1024"]],
    "equality": [["--steps", "200"]],
    "equivalence": [[]],
    "kill_matrix": [["--trials", "80"]],
    "shakespeare": [[]],
}
NOT_RUN_HERE = {
    "continue_torchtitan": "needs torchtitan 0.2.2: python benchmarks/continue_torchtitan.py --cache FOLDER",
    "cuda_dispatch": "needs a CUDA build of torch: make test-cuda-dispatch RECORD=1",
    "fidelity": "needs an environment with torchtitan 0.2.2: python benchmarks/fidelity.py --cache FOLDER",
    "hta": "needs an environment with HolisticTraceAnalysis: python benchmarks/hta.py --hta-python PYTHON",
    "modes": "needs a GPU: python benchmarks/modes.py --models debug 1B",
    "nvshmem_one_gpu": "needs a GPU: python benchmarks/nvshmem_one_gpu.py",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every benchmark and list which claims hold.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--text", type=Path, help="for the Shakespeare benchmark, which is not run without it")
    chosen = parser.parse_args()
    rows = []
    for name in chosen.only:
        if name == "shakespeare" and chosen.text is None:
            rows.append([name, "", "left out: no --text"])
            continue
        for given in [[str(chosen.text)]] if name == "shakespeare" else RUNS[name]:
            shown = " ".join([name, *given])
            print(f"\n== {shown} ==", flush=True)
            start = time.perf_counter()
            command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *given]
            code = subprocess.run(command, env=child_environment(), check=False).returncode
            minutes = (time.perf_counter() - start) / 60
            rows.append([shown, f"{minutes:.1f} min", "held" if code == 0 else f"exit code {code}"])
    rows += [[name, "", f"left out: {why}"] for name, why in NOT_RUN_HERE.items()]
    print("\n" + text_table(["benchmark", "time", "claim"], rows))
    return 0 if all(row[2] == "held" or row[2].startswith("left out") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
