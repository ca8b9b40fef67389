"""Measures startup: the time of a command, and of a run to its first step.

    python benchmarks/startup.py

Claims: `quadriga --help` and the dry run of the 8B configuration each finish in under 1 s. From `python -m
quadriga.train` to the first step, the debug run takes at most 1.5 times as long as a bare PyTorch script that builds
the same model and runs the same first step (16 rows of 256 tokens in micro-batches of 2). The debug run is the shipped
file unchanged: it reads and tokenizes text, starts the process group, TensorBoard and the profiler, and writes its
records. The starts of both alternate; the figure is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, child_environment, command_line, met_or_missed, save, text_table
from paired import CommandFailed, TimedCommand, exit_on_sigterm, seconds_to_first_step
from trainer import STEP_LINE, bare_command, environment

ANSWER_TARGET, FIRST_STEP_TARGET = 1.0, 1.5  # seconds; times the bare script
CLAIM = "commands finish in under 1 s; the first step takes at most 1.5 times as long as the bare script's"
DEBUG_FILE = ROOT / "configs" / "debug" / "debug.toml"
REFERENCE_FILE = ROOT / "configs" / "llama3_8b" / "llama3_8b.toml"
DEBUG_BATCH = ("--shape", "debug", "--seq_len", "256", "--batch", "16", "--micro_batch", "2")


def seconds_to_answer(argv: list[str], environ: dict[str, str]) -> float:
    """Seconds of a command from start to end. Raises CommandFailed if its exit code is not 0."""
    start = time.perf_counter()
    done = subprocess.run(argv, check=False, env=environ, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode != 0:
        raise CommandFailed(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stderr}")
    return taken


def time_commands(repeats: int) -> list[dict[str, Any]]:
    """Time `quadriga --help` and the dry run, each in a new interpreter."""
    launch = {"DRY_RUN": "1", "NGPU": "4", "CONFIG_FILE": str(REFERENCE_FILE), "PYTHON": sys.executable}
    commands = {
        "quadriga --help": ([sys.executable, "-m", "quadriga.cli", "--help"], child_environment()),
        "DRY_RUN=1 run_train.sh (8B)": (
            [str(ROOT / "run_train.sh"), "--model.hf_assets_path", "builtin:bytes"],  # nothing was downloaded
            child_environment(**launch),
        ),
    }
    times = {name: [seconds_to_answer(*command) for _ in range(repeats)] for name, command in commands.items()}
    return [
        {
            "what": name,
            "seconds": taken,
            "median": statistics.median(taken),
            "best": min(taken),
            "target": ANSWER_TARGET,
            "met": statistics.median(taken) < ANSWER_TARGET,
        }
        for name, taken in times.items()
    ]


def time_first_steps(repeats: int, device: str, overrides: list[str]) -> dict[str, Any]:
    """Seconds to the first step line of Quadriga and of the bare script, alternating. The first start of each is not
    timed, so that the files of both are in the page cache."""
    ours, bare = [], []
    for repeat in range(repeats + 1):
        with tempfile.TemporaryDirectory(prefix="quadriga-startup-") as folder:
            argv = [sys.executable, "-m", "quadriga.train", "--job.config_file", str(DEBUG_FILE)]
            argv += ["--job.dump_folder", str(Path(folder, "run")), *overrides]
            quick = seconds_to_first_step(TimedCommand("quadriga", argv, STEP_LINE, environment(1, device)))
        plain = seconds_to_first_step(bare_command(1, device, *DEBUG_BATCH, "--steps", "1"))
        if repeat:
            ours.append(quick)
            bare.append(plain)
    ratio = statistics.median(ours) / statistics.median(bare)
    return {
        "what": "first step of the debug run",
        "overrides": overrides,
        "ours_seconds": ours,
        "bare_seconds": bare,
        "ours_median": statistics.median(ours),
        "bare_median": statistics.median(bare),
        "ours_best": min(ours),
        "bare_best": min(bare),
        "ratio": ratio,
        "ratio_of_the_best": min(ours) / min(bare),
        "target": FIRST_STEP_TARGET,
        "met": ratio <= FIRST_STEP_TARGET,
    }


def print_tables(commands: list[dict[str, Any]], first: dict[str, Any]) -> None:
    rows = [
        [each["what"], seconds_text(each["median"]), seconds_text(each["best"]), met_or_missed(each["met"])]
        for each in commands
    ]
    print(text_table(["command", "median", "best", f"< {ANSWER_TARGET} s"], rows))
    rows = [
        ["quadriga", seconds_text(first["ours_median"]), seconds_text(first["ours_best"]), ""],
        ["bare script", seconds_text(first["bare_median"]), seconds_text(first["bare_best"]), ""],
        ["ratio", f"{first['ratio']:.2f}", f"{first['ratio_of_the_best']:.2f}", met_or_missed(first["met"])],
    ]
    print("\n" + text_table(["to the first step", "median", "best", f"<= {FIRST_STEP_TARGET}"], rows))


def seconds_text(amount: float) -> str:
    return f"{amount:.2f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--override", nargs=argparse.REMAINDER, default=[], help="further arguments of the debug run")
    chosen = parser.parse_args()
    exit_on_sigterm()
    try:
        commands = time_commands(chosen.repeats)
        first = time_first_steps(chosen.repeats, chosen.device, chosen.override)
    except CommandFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    print_tables(commands, first)
    results = {"answers": commands, "first_step": first}
    name = "startup" if chosen.device == "cpu" else "startup_cuda"
    print(f"\nwritten: {save(name, results, command=command_line(), claim=CLAIM)}")
    return 0 if first["met"] and all(each["met"] for each in commands) else 1


if __name__ == "__main__":
    sys.exit(main())
