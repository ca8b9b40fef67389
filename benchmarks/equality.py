"""Compares the losses of the debug configuration on 1, 2 and 4 ranks with FSDP, HSDP and DDP.

    python benchmarks/equality.py                # 200 steps
    python benchmarks/equality.py --steps 20

Claim: with the same global batch, the losses of every layout are within 1e-6 (relative) of those of one rank over 20
steps, and within 1e-5 over 200. Initial weights and batches are bit-equal; only the order of summation differs. Each
layout is one run through the launcher, as a user starts it. The losses are those of its metrics.jsonl, in full
precision. Checkpoints, profiling and TensorBoard are off; they do not change the losses.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, command_line, met_or_missed, save, text_table
from trainer import environment, output_tail

from quadriga.metrics.jsonl import read_metrics

TARGETS = {20: 1e-6, 200: 1e-5}  # steps: largest relative difference
CLAIM = "the losses of every layout are within 1e-6 of one rank's over 20 steps, and within 1e-5 over 200"
DEBUG_FILE = ROOT / "configs" / "debug" / "debug.toml"
DISABLED_KEYS = ("checkpoint.enable", "profiling.enable_profiling", "metrics.enable_tensorboard")


@dataclass(frozen=True)
class Layout:
    name: str
    replicate: int
    shard: int

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard


ONE_RANK = Layout("one rank", 1, 1)
LAYOUTS = (
    Layout("FSDP over 2", 1, 2),
    Layout("FSDP over 4", 1, 4),
    Layout("HSDP, 2 x 2", 2, 2),
    Layout("DDP, 2 copies", 2, 1),
    Layout("DDP, 4 copies", 4, 1),
)


def train_losses(layout: Layout, steps: int) -> tuple[list[float], float]:
    """The loss of every step, and the seconds of the run."""
    with tempfile.TemporaryDirectory(prefix="quadriga-equality-") as folder:
        command = [sys.executable, "-m", "quadriga.launch", "--job.config_file", str(DEBUG_FILE)]
        command += ["--job.dump_folder", str(Path(folder, "run")), "--training.steps", str(steps)]
        command += [word for key in DISABLED_KEYS for word in (f"--{key}", "false")]
        command += ["--parallelism.data_parallel_replicate_degree", str(layout.replicate)]
        command += ["--parallelism.data_parallel_shard_degree", str(layout.shard), "--metrics.log_freq", "1"]
        environ = environment(layout.ranks, "cpu")
        start = time.perf_counter()
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            raise SystemExit(f"{layout.name} failed with exit code {done.returncode}:\n{output_tail(done.stderr)}")
        records = read_metrics(Path(folder, "run", "metrics.jsonl"))
    if [record["step"] for record in records] != list(range(1, steps + 1)):
        raise SystemExit(f"{layout.name}: not every step is in metrics.jsonl")
    return [record["loss"] for record in records], seconds


def relative_differences(losses: list[float], one_rank: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(losses, one_rank, strict=True)]


def compare_layout(layout: Layout, losses: list[float], one_rank: list[float], seconds: float) -> dict[str, Any]:
    differences = relative_differences(losses, one_rank)
    spans = {steps: target for steps, target in TARGETS.items() if steps <= len(differences)}
    greatest = {str(steps): max(differences[:steps]) for steps in spans}
    return {
        "layout": layout.name,
        "ranks": layout.ranks,
        "greatest_relative_difference": greatest,
        "greatest_over_all_steps": max(differences),
        "at_step": differences.index(max(differences)) + 1,
        "bit_equal_steps": sum(difference == 0 for difference in differences),
        "losses": losses,
        "seconds": round(seconds, 1),
        "met": all(max(differences[:steps]) <= target for steps, target in spans.items()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="layouts whose name begins so, e.g. HSDP")
    chosen = parser.parse_args()
    if chosen.steps < min(TARGETS):
        parser.error(f"at least {min(TARGETS)} steps")
    layouts = [each for each in LAYOUTS if not chosen.only or each.name.startswith(tuple(chosen.only))]
    print(f"{ONE_RANK.name} ...", file=sys.stderr, flush=True)
    one_rank, seconds = train_losses(ONE_RANK, chosen.steps)
    compared = [compare_layout(ONE_RANK, one_rank, one_rank, seconds)]
    for layout in layouts:
        print(f"{layout.name} ...", file=sys.stderr, flush=True)
        losses, seconds = train_losses(layout, chosen.steps)
        compared.append(compare_layout(layout, losses, one_rank, seconds))
    spans = [str(steps) for steps in TARGETS if steps <= chosen.steps]
    differences = [f"{span} steps (<= {TARGETS[int(span)]:.0e})" for span in spans]
    header = ["layout", "last loss", *differences, "bit-equal", "time", "claim"]
    print(text_table(header, [row(figures, spans) for figures in compared]))
    figures = {"steps": chosen.steps, "layouts": compared}
    print(f"\nwritten: {save('equality', figures, command=command_line(), claim=CLAIM)}")
    return 0 if all(figures["met"] for figures in compared) else 1


def row(figures: dict[str, Any], spans: list[str]) -> list[str]:
    differences = figures["greatest_relative_difference"]
    shown = [f"{differences[span]:.1e}" for span in spans]
    equal, time_taken = f"{figures['bit_equal_steps']} steps", f"{figures['seconds']:.0f} s"
    return [figures["layout"], f"{figures['losses'][-1]:.6f}", *shown, equal, time_taken, met_or_missed(figures["met"])]


if __name__ == "__main__":
    sys.exit(main())
