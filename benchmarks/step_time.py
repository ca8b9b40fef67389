"""Predicted step times beside measured ones, after calibration from one run: other batches, sequences, recompute.

    python benchmarks/step_time.py                     # one process on a CPU, about 12 minutes on 2 cores
    python benchmarks/step_time.py --device cuda       # one GPU

Claim: rates measured in one run of the debug model (its trace and its metrics) predict the step time of other batch
sizes, sequence lengths and recompute modes within 10 %. Every run is one process through the launcher, as a user starts
it; its time is the median of the logged steps but the first two. A shared machine is faster and slower by the minute:
the run to calibrate from is made before and after each case, the prediction is the mean of both, and an error is the
median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import command_line, save, table, verdict
from trainer import environment, last_words

from quadriga.cli.estimate import read_run
from quadriga.estimate.calibrate import calibrate, seconds_a_step
from quadriga.estimate.estimate import estimate
from quadriga.estimate.rates import Rates
from quadriga.hardware import Device, find_device

CLAIM = "after calibration from one run, other batches, sequences and recompute modes are predicted within 10 %"
TARGET = 0.10
FILE = "configs/debug/debug.toml"
STEPS = 8
SHARED = (
    *("--metrics.log_freq=1", f"--training.steps={STEPS}", "--metrics.no_enable_tensorboard"),
    *("--checkpoint.no_enable", "--training.mixed_precision_reduce=float32"),
)
# Steps 3 to 8 of 12 run without the profiler, and tell how long a step takes.
PROFILED = ("--training.steps=12", "--profiling.profile_freq=12", "--profiling.profiler_active=3")
PROFILED += ("--profiling.profiler_warmup=1",)
UNPROFILED = "--profiling.no_enable_profiling"


def shape(rows: int, seq_len: int, *more: str) -> tuple[str, ...]:
    batch = (f"--training.local_batch_size={rows}", f"--training.global_batch_size={rows}")
    return (*batch, f"--training.seq_len={seq_len}", *more)


NONE, FULL = "--activation_checkpoint.mode=none", "--activation_checkpoint.mode=full"
OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
BASE = shape(4, 512, NONE)
CASES = {
    "the same once more": BASE,
    "half the batch": shape(2, 512, NONE),
    "twice the batch": shape(8, 512, NONE),
    "half the sequence": shape(8, 256, NONE),
    "twice the sequence": shape(2, 1024, NONE),
    "full recompute": shape(4, 512, FULL),
    "recompute per operation": shape(4, 512, *OP),
}


def train(arguments: tuple[str, ...], folder: Path, device: str) -> None:
    command = [sys.executable, "-m", "quadriga.launch", "--job.config_file", FILE, *SHARED, *arguments]
    command += [f"--job.dump_folder={folder}"]
    done = subprocess.run(command, env=environment(1, device), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the run failed with exit code {done.returncode}:\n{last_words(done.stderr)}")


def one_round(folder: Path, device: Device | None, device_type: str) -> dict[str, dict[str, float]]:
    """Seconds of a step, measured and predicted, by case."""
    figures: dict[str, dict[str, float]] = {}
    before = rates_now(folder / "calibration-0", device, device_type)
    for number, (name, arguments) in enumerate(CASES.items(), 1):
        own = folder / name.replace(" ", "-")
        train((*arguments, UNPROFILED), own, device_type)
        after = rates_now(folder / f"calibration-{number}", device, device_type)
        run = read_run(FILE, 1, (*SHARED, *arguments, UNPROFILED))
        times = [estimate(run, device, rates).time for rates in (before, after)]
        predicted = statistics.mean(time.total for time in times if time is not None)
        figures[name] = {"measured": seconds_a_step(own, run.config.profiling), "predicted": predicted}
        before = after
    return figures


def rates_now(folder: Path, device: Device | None, device_type: str) -> Rates:
    train((*BASE, *PROFILED), folder, device_type)
    return calibrate(folder, read_run(FILE, 1, (*SHARED, *BASE, *PROFILED)), device)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--name", default="cpu", help="of the device in the table of devices (h200, ...)")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    rounds = []
    for number in range(1, chosen.rounds + 1):
        with tempfile.TemporaryDirectory(prefix="quadriga-step-time-") as folder:
            rounds.append(one_round(Path(folder), find_device(chosen.name), chosen.device))
        print(f"round {number} of {chosen.rounds}: done", file=sys.stderr, flush=True)
    errors = {name: [each[name]["predicted"] / each[name]["measured"] - 1 for each in rounds] for name in CASES}
    rows = [
        [
            name,
            f"{statistics.median(each[name]['measured'] for each in rounds):.3f}",
            f"{statistics.median(each[name]['predicted'] for each in rounds):.3f}",
            f"{statistics.median(errors[name]):+.1%}",
            f"{min(errors[name]):+.1%} to {max(errors[name]):+.1%}",
        ]
        for name in CASES
    ]
    print(table(["one step, seconds", "measured", "predicted", "error", "of the rounds"], rows))
    met = all(abs(statistics.median(each)) <= TARGET for each in errors.values())
    print(f"\ntarget: within {TARGET:.0%}: {verdict(met)}")
    name = "step_time" if chosen.device == "cpu" else f"step_time_{chosen.device}"
    figures = {"rounds": rounds, "errors": errors, "target": TARGET, "met": met}
    save(name, figures, command=command_line(), claim=CLAIM)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
