"""Compares predicted step times with measured ones after calibration from one run: batches, sequences, recompute.

    python benchmarks/step_time.py                     # one process on a CPU, about 8 minutes on 2 cores
    python benchmarks/step_time.py --device cuda --name h200       # one GPU

Claim: rates measured in one run of the debug model (its trace and its metrics) predict the step time of other batch
sizes, sequence lengths and recompute modes within 10 %. The speed of a shared machine varies, which a prediction cannot
include. So the base run of the calibration and the case alternate, a few steps each, and the script compares the ratio
of their step times, measured in pairs and predicted. Times are those of the median pair. The calibration is repeated
three times, and the median of the three predictions counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, command_line, met_or_missed, save, text_table
from paired import TimedCommand, Timings, exit_on_sigterm, time_interleaved
from paired import estimate_median as interval
from trainer import environment, output_tail, trainer_command

from quadriga.cli.arguments import run_from_file
from quadriga.cli.estimate import measured_rates
from quadriga.hardware import Device, find_device
from quadriga.planning.estimate import estimate
from quadriga.planning.rates import Rates

CLAIM = "after calibration from one run, step times of other batches, sequences and modes are predicted within 10 %"
TARGET = 0.10
FILE = "configs/debug/debug.toml"
CALIBRATIONS = 3
SHARED = (
    *("--metrics.log_freq=1", "--metrics.no_enable_tensorboard", "--checkpoint.no_enable"),
    "--training.mixed_precision_reduce=float32",
)
# Steps 3 to 8 of 12 run without the profiler, and give the step time.
PROFILED = (
    *("--training.steps=12", "--profiling.profile_freq=12"),
    *("--profiling.profiler_active=3", "--profiling.profiler_warmup=1"),
)
ENDLESS = ("--training.steps=1000000", "--profiling.no_enable_profiling")


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


def calibrated_rates(folder: Path, device: Device | None, device_type: str) -> Rates:
    """Train the base run in `folder`, and measure its rates."""
    command = [sys.executable, "-m", "quadriga.launch", "--job.config_file", FILE, *SHARED, *BASE, *PROFILED]
    command += [f"--job.dump_folder={folder}"]
    done = subprocess.run(command, env=environment(1, device_type), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the run failed with exit code {done.returncode}:\n{output_tail(done.stderr)}")
    rates = measured_rates(str(folder), device)
    assert rates is not None
    return rates


def predicted_step_seconds(arguments: tuple[str, ...], device: Device | None, rates: Rates) -> float:
    """The predicted seconds of a step."""
    time = estimate(run_from_file(FILE, 1, (*SHARED, *arguments, *ENDLESS)), device, rates).time
    assert time is not None
    return time.total


def time_case(arguments: tuple[str, ...], chosen: argparse.Namespace) -> Timings:
    """Alternating steps of a case (`ours`) and of the base run (`reference`)."""
    with tempfile.TemporaryDirectory(prefix="quadriga-step-time-") as folder:

        def endless(name: str, keys: tuple[str, ...]) -> TimedCommand:
            where = f"--job.dump_folder={folder}/{name}"
            return trainer_command(ROOT / FILE, 1, chosen.device, *SHARED, *keys, *ENDLESS, where)

        return time_interleaved(
            endless("case", arguments), endless("base", BASE), pairs=chosen.pairs, seconds=chosen.seconds
        )


def measure_case(name: str, chosen: argparse.Namespace, device: Device | None, rates: list[Rates]) -> dict[str, Any]:
    timings = time_case(CASES[name], chosen)
    longer = interval([case / base for case, base in zip(timings.ours, timings.reference, strict=True)])
    predicted = statistics.median(
        predicted_step_seconds(CASES[name], device, each) / predicted_step_seconds(BASE, device, each) for each in rates
    )
    base = statistics.median(timings.reference)
    return {
        "base_seconds": base,
        "measured": longer.median * base,
        "predicted": predicted * base,
        "error": predicted / longer.median - 1,
        "error_low": predicted / longer.high - 1,
        "error_high": predicted / longer.low - 1,
        "pairs": longer.count,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--name", default="cpu", help="name of the device in the table of devices (h200, ...)")
    parser.add_argument("--pairs", type=int, default=60, help="maximum of pairs per case")
    parser.add_argument("--seconds", type=float, default=40, help="time limit per case, from the sixth pair on")
    chosen = parser.parse_args()
    exit_on_sigterm()
    device = find_device(chosen.name)
    with tempfile.TemporaryDirectory(prefix="quadriga-step-time-") as folder:
        numbers = range(CALIBRATIONS)
        rates = [calibrated_rates(Path(folder, str(number)), device, chosen.device) for number in numbers]
    figures: dict[str, dict[str, Any]] = {}
    for name in CASES:
        figures[name] = measure_case(name, chosen, device, rates)
        print(f"{name}: done", file=sys.stderr, flush=True)
    rows = [
        [
            name,
            f"{each['measured']:.3f}",
            f"{each['predicted']:.3f}",
            f"{each['error']:+.1%}",
            f"{each['error_low']:+.1%} to {each['error_high']:+.1%}",
            str(each["pairs"]),
        ]
        for name, each in figures.items()
    ]
    print(text_table(["one step, seconds", "measured", "predicted", "error", "95 % of median", "pairs"], rows))
    met = all(abs(each["error"]) <= TARGET for each in figures.values())
    print(f"\ntarget: within {TARGET:.0%}: {met_or_missed(met)}")
    name = "step_time" if chosen.device == "cpu" else f"step_time_{chosen.device}"
    saved = {"cases": figures, "calibrations": CALIBRATIONS, "target": TARGET, "met": met}
    save(name, saved, command=command_line(), claim=CLAIM)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
