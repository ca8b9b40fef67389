"""Measures the cost of saves in the background: a model of 100 M parameters that is saved every 10 steps.

    python benchmarks/save_cost.py                     # one process on a CPU, about 20 minutes on 2 cores
    python benchmarks/save_cost.py --device cuda       # one GPU

Claim: with `checkpoint.async_mode = "async"`, 10 steps that begin with a save take at most 3 % longer than 10 steps
without one. Both are measured in one run: every second block of 10 steps begins with a save. So each block with a save
has a neighbour without one, and a slow period of the machine affects both. The time of a block is elapsed time,
including the copy to host memory. The script also reports the bytes per second to disk (hashed and flushed), and the
peak memory of the process before the first save and over the whole run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import command_line, met_or_missed, quartiles, save, text_table
from trainer import environment, output_tail

from quadriga.metrics.events import read_events
from quadriga.metrics.jsonl import read_metrics

CLAIM = "saving a model of 100 M parameters every 10 steps in the background adds at most 3 % to the time of a step"
TARGET = 0.03
BLOCK = 10
MODEL = (
    "--model.dim=768",
    "--model.n_layers=12",
    "--model.n_heads=12",
    "--model.n_kv_heads=12",
    "--model.ffn_dim=2560",
    "--model.vocab_size=2048",
)


def train(steps: int, tokens: int, mode: str, device: str, folder: Path) -> None:
    command = [sys.executable, "-m", "quadriga.launch", "--job.config_file", "configs/debug/debug.toml"]
    command += [*MODEL, f"--job.dump_folder={folder}", f"--training.steps={steps}", "--metrics.log_freq=1"]
    command += ["--training.local_batch_size=1", "--training.global_batch_size=1", f"--training.seq_len={tokens}"]
    command += ["--training.mixed_precision_reduce=float32", "--activation_checkpoint.mode=none"]
    command += ["--profiling.no_enable_profiling", "--metrics.no_enable_tensorboard", "--checkpoint.enable"]
    command += [f"--checkpoint.interval={2 * BLOCK}", f"--checkpoint.async_mode={mode}", "--checkpoint.keep_latest_k=2"]
    done = subprocess.run(command, env=environment(1, device), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the run failed with exit code {done.returncode}:\n{output_tail(done.stderr)}")


def figures_of(folder: Path, steps: int) -> dict[str, Any]:
    """The figures of a run, from pairs of neighbouring blocks with and without a save at their beginning."""
    at = {record["step"]: record["elapsed_seconds"] for record in read_metrics(folder / "metrics.jsonl")}
    records = read_metrics(folder / "metrics.jsonl")
    pairs = []
    for first in range(2 * BLOCK, steps - 2 * BLOCK + 1, 2 * BLOCK):  # a save follows step `first`
        with_save = at[first + BLOCK] - at[first]
        without = at[first + 2 * BLOCK] - at[first + BLOCK]
        pairs.append((with_save, without))
    saves = [event for event in read_events(folder) if event["event"] == "save_end" and event["step"] < steps]
    peaks = [record["memory_peak_gib"] for record in records if "memory_peak_gib" in record]
    inflation = [with_save / without - 1 for with_save, without in pairs]
    low, middle, high = quartiles(inflation)
    return {
        "blocks": [[round(a, 3), round(b, 3)] for a, b in pairs],
        "inflation": {"median": middle, "lower quartile": low, "upper quartile": high},
        "seconds_a_step_without": statistics.median(b for _, b in pairs) / BLOCK,
        "bytes_a_save": saves[-1]["bytes"],
        "seconds_a_save": statistics.median(event["seconds"] for event in saves),
        "seconds_training_waited": statistics.median(event["blocked_seconds"] for event in saves),
        "bytes_per_second": statistics.median(event["bytes"] / event["seconds"] for event in saves),
        "longest_save_in_blocks": max(e["seconds"] for e in saves) / statistics.median(a for a, _ in pairs),
        "memory_gib": {"before the first save": max(peaks[: 2 * BLOCK - 1]), "at most": max(peaks)} if peaks else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512, help="per step; saves cost relatively more with fewer")
    parser.add_argument("--mode", choices=("disabled", "async", "async_with_pinned_mem"), default="async")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    steps = 2 * BLOCK * (chosen.pairs + 1)
    with tempfile.TemporaryDirectory(prefix="quadriga-save-cost-") as folder:
        train(steps, chosen.tokens, chosen.mode, chosen.device, Path(folder, "run"))
        figures = figures_of(Path(folder, "run"), steps)
    met = figures["inflation"]["median"] <= TARGET
    rows = [
        ["longer with a save", f"{figures['inflation']['median']:.1%}"],
        [
            "  quartiles",
            f"{figures['inflation']['lower quartile']:.1%} to {figures['inflation']['upper quartile']:.1%}",
        ],
        ["per save", f"{figures['bytes_a_save'] / 2**30:.2f} GiB in {figures['seconds_a_save']:.1f} s"],
        ["  training waited", f"{figures['seconds_training_waited']:.2f} s"],
        ["  written to disk", f"{figures['bytes_per_second'] / 2**20:.0f} MiB/s, hashed and flushed"],
        ["per step", f"{figures['seconds_a_step_without']:.2f} s of {chosen.tokens} tokens"],
    ]
    if figures["memory_gib"]:
        rows += [[f"memory, {when}", f"{peak:.2f} GiB"] for when, peak in figures["memory_gib"].items()]
    print(text_table(["saving every 10 steps", chosen.mode], rows))
    print(f"\ntarget: at most {TARGET:.0%}: {met_or_missed(met)}")
    figures |= {
        "target": TARGET,
        "tokens_a_step": chosen.tokens,
        "mode": chosen.mode,
        "device": chosen.device,
        "met": met,
    }
    name = "save_cost" if chosen.device == "cpu" else f"save_cost_{chosen.device}"
    if chosen.tokens != parser.get_default("tokens"):
        name += f"_{chosen.tokens}_tokens"
    save(name, figures, command=command_line(), claim=CLAIM)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
