"""Compares the losses of one training in all modes of one device: dtypes, compile, recompute, float8.

    python benchmarks/modes.py --models debug 1B                  # on a GPU
    python benchmarks/modes.py --device cpu --steps 5 -- --training.seq_len 32 --model.dim 64 --model.n_layers 2

Claim: recompute and compile do not change a run beyond the tolerance of its dtype; bfloat16 and float8 change it only
by their rounding. Arguments after `--` are passed to every run. On a CPU, float8 is emulated and not compiled.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import command_line, met_or_missed, save, text_table
from trainer import environment, output_tail

from quadriga.metrics.jsonl import read_metrics

CLAIM = "recompute and compile do not change a run; bfloat16 and float8 change it only by their rounding"
MODELS = {"debug": "debugmodel", "1B": "1B"}
SHARED = (
    *("--model.hf_assets_path", "builtin:bytes", "--training.dataset", "builtin", "--training.local_batch_size", "2"),
    *("--metrics.log_freq", "1", "--metrics.enable_tensorboard", "false", "--profiling.enable_profiling", "false"),
    *("--activation_checkpoint.mode", "none"),
)
FLOAT32 = ("--training.mixed_precision_param", "float32")
BF16 = ("--training.mixed_precision_param", "bfloat16")
FLOAT8 = (*BF16, "--model.converters", "quantize.linear.float8", "--quantize.linear.float8.recipe_name")


@dataclass(frozen=True)
class Mode:
    """`baseline`: the mode whose losses are the reference; `tolerance`: the largest allowed relative difference."""

    name: str
    keys: tuple[str, ...]
    baseline: str
    tolerance: float


def modes(device: str) -> tuple[Mode, ...]:
    compiled = ("--compile.enable",)
    eight_bits = ("--quantize.linear.float8.emulate",) if device == "cpu" else compiled
    full = ("--activation_checkpoint.mode=full",)
    op = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
    budget = ("--activation_checkpoint.mode", "memory_budget")
    return (
        Mode("float32", FLOAT32, "float32", 0.0),
        Mode("float32, compiled", FLOAT32 + compiled, "float32", 1e-4),
        Mode("float32, full recompute", FLOAT32 + full, "float32", 1e-5),
        Mode("bfloat16", BF16, "float32", 2e-2),
        Mode("bfloat16, compiled", BF16 + compiled, "bfloat16", 1e-2),
        Mode("bfloat16, full recompute", BF16 + full, "bfloat16", 1e-2),
        Mode("bfloat16, recompute per operation", BF16 + op, "bfloat16", 1e-2),
        Mode("bfloat16, compiled, recompute per operation", BF16 + op + compiled, "bfloat16", 1e-2),
        Mode("bfloat16, compiled, memory budget", BF16 + budget + compiled, "bfloat16", 1e-2),
        Mode("float8 tensorwise", (*FLOAT8, "tensorwise", *eight_bits), "bfloat16", 3e-2),
        Mode("float8 rowwise", (*FLOAT8, "rowwise", *eight_bits), "bfloat16", 3e-2),
    )


def train(
    model: str, mode: Mode, steps: int, device: str, further: list[str], dry: bool = False
) -> list[dict[str, Any]]:
    """Train, and return the records of all steps. `dry`: only check the command by a dry run, without records."""
    with tempfile.TemporaryDirectory(prefix="quadriga-modes-") as folder:
        command = [sys.executable, "-m", "quadriga.launch", "--model.flavor", MODELS[model], *SHARED, *mode.keys]
        command += ["--training.steps", str(steps), "--job.dump_folder", str(Path(folder, "run")), *further]
        environ = environment(1, device) | ({"DRY_RUN": "1"} if dry else {})
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{model}, {mode.name}: exit code {done.returncode}\n{output_tail(done.stderr)}")
        return [] if dry else read_metrics(Path(folder, "run", "metrics.jsonl"))


def compare_mode(
    model: str, mode: Mode, losses: list[float], baseline: list[float], last: dict[str, Any]
) -> dict[str, Any]:
    difference = max(abs(a - b) / b for a, b in zip(losses, baseline, strict=True))
    return {
        "model": model,
        "mode": mode.name,
        "against": mode.baseline,
        "greatest_relative_difference": difference,
        "allowed": mode.tolerance,
        "losses": losses,
        "last_record": last,
        "met": difference <= mode.tolerance and losses[-1] < losses[0],
    }


def row(figures: dict[str, Any]) -> list[str]:
    first, last = (f"{figures['losses'][step]:.4f}" for step in (0, -1))
    difference = f"{figures['greatest_relative_difference']:.1e}"
    return [
        figures["model"],
        figures["mode"],
        first,
        last,
        figures["against"],
        difference,
        met_or_missed(figures["met"]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["debug"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="modes whose name begins so, and their baselines")
    parser.add_argument("further", nargs="*", metavar="-- KEYS", help="keys for every run")
    parser.add_argument("--dry", action="store_true", help="only check the command of each mode by a dry run")
    chosen = parser.parse_args()
    results = []
    for model in chosen.models:
        losses: dict[str, list[float]] = {}
        for mode in modes(chosen.device):
            needed = mode.name in ("float32", "bfloat16")
            if chosen.only and not needed and not mode.name.startswith(tuple(chosen.only)):
                continue
            print(f"{model}, {mode.name} ...", file=sys.stderr, flush=True)
            records = train(model, mode, chosen.steps, chosen.device, chosen.further, chosen.dry)
            if chosen.dry:
                continue
            losses[mode.name] = [record["loss"] for record in records]
            results.append(compare_mode(model, mode, losses[mode.name], losses[mode.baseline], records[-1]))
    if chosen.dry:
        return 0
    header = ["model", "mode", "first loss", "last loss", "against", "difference", "claim"]
    print(text_table(header, [row(each) for each in results]))
    name = "modes" if chosen.device == "cpu" else "modes_cuda"
    print(f"\nwritten: {save(name, results, command=command_line(), claim=CLAIM)}")
    return 0 if all(each["met"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
