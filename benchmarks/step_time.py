"""Predicted step times beside measured ones, after calibration from one run: other batches, sequences, recompute.

    python benchmarks/step_time.py                     # one process on a CPU, about 5 minutes on 2 cores
    python benchmarks/step_time.py --device cuda       # one GPU

Claim: rates measured in one run of the debug model (its trace and its metrics) predict the step time of other batch
sizes, sequence lengths and recompute modes within 10 %. Every run is one process through the launcher, as a user starts
it; its time is the median of the logged steps but the first two.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from common import command_line, save, table, verdict
from trainer import environment, last_words

from quadriga.cli.estimate import read_run
from quadriga.estimate.calibrate import calibrate, seconds_a_step
from quadriga.estimate.estimate import estimate
from quadriga.hardware import find_device

CLAIM = "after calibration from one run, other batches, sequences and recompute modes are predicted within 10 %"
TARGET = 0.10
FILE = "configs/debug/debug.toml"
STEPS = 12
SHARED = (
    *("--metrics.log_freq=1", f"--training.steps={STEPS}", "--metrics.no_enable_tensorboard"),
    *("--checkpoint.no_enable", "--training.mixed_precision_reduce=float32"),
)
PROFILED = (f"--profiling.profile_freq={STEPS}", "--profiling.profiler_active=3", "--profiling.profiler_warmup=3")


def shape(rows: int, seq_len: int, *more: str) -> tuple[str, ...]:
    batch = (f"--training.local_batch_size={rows}", f"--training.global_batch_size={rows}")
    return (*batch, f"--training.seq_len={seq_len}", *more)


NONE, FULL = "--activation_checkpoint.mode=none", "--activation_checkpoint.mode=full"
OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
BASE = shape(4, 256, NONE)
CASES = {
    "the calibration itself": BASE,
    "half the batch": shape(2, 256, NONE),
    "twice the batch": shape(8, 256, NONE),
    "twice the sequence": shape(4, 512, NONE),
    "four times the sequence": shape(2, 1024, NONE),
    "full recompute": shape(4, 256, FULL),
    "recompute per operation": shape(4, 256, *OP),
}


def train(arguments: tuple[str, ...], folder: Path, device: str) -> None:
    command = [sys.executable, "-m", "quadriga.launch", "--job.config_file", FILE, *SHARED, *arguments]
    command += [f"--job.dump_folder={folder}"]
    done = subprocess.run(command, env=environment(1, device), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the run failed with exit code {done.returncode}:\n{last_words(done.stderr)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--name", default="cpu", help="of the device in the table of devices (h200, ...)")
    chosen = parser.parse_args()
    device = find_device(chosen.name)
    figures = {}
    with tempfile.TemporaryDirectory(prefix="quadriga-step-time-") as folder:
        train((*BASE, *PROFILED), Path(folder, "calibration"), chosen.device)
        rates = calibrate(Path(folder, "calibration"), read_run(FILE, 1, (*SHARED, *BASE)), device)
        for name, arguments in CASES.items():
            own = Path(folder, name.replace(" ", "-"))
            train((*arguments, "--profiling.no_enable_profiling"), own, chosen.device)
            time = estimate(read_run(FILE, 1, (*SHARED, *arguments)), device, rates).time
            assert time is not None
            figures[name] = {"measured": seconds_a_step(own), "predicted": time.total}
            print(f"{name}: done", file=sys.stderr, flush=True)
    errors = {name: each["predicted"] / each["measured"] - 1 for name, each in figures.items()}
    rows = [
        [name, f"{each['measured']:.3f}", f"{each['predicted']:.3f}", f"{errors[name]:+.1%}"]
        for name, each in figures.items()
    ]
    print(table(["one step, seconds", "measured", "predicted", "error"], rows))
    met = all(abs(error) <= TARGET for error in errors.values())
    print(f"\ntarget: within {TARGET:.0%}: {verdict(met)}")
    name = "step_time" if chosen.device == "cpu" else f"step_time_{chosen.device}"
    figures_and_rates = {"cases": figures, "rates": rates.to_dict(), "target": TARGET, "met": met}
    save(name, figures_and_rates, command=command_line(), claim=CLAIM)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
