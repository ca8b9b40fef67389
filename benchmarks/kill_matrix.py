"""The kill matrix: kills runs at random points, starts them again, and compares them with undisturbed runs.

    python benchmarks/kill_matrix.py                   # 60 trials
    python benchmarks/kill_matrix.py --trials 200      # keeps the trials of this code in results/kill_matrix.jsonl

A trial is valid for the code that it ran: each line of the log has a hash of the folders in `common.MEASURES`, and
lines of other code do not count.

Claim: a run that is killed and started again by the same command ends bit-equal to an undisturbed run on the same
layout. This includes every logged loss and gradient norm, the final weights and optimizer state, and the documents of
each step. It holds for whatever is killed by SIGKILL (one rank, all ranks, torchrun, the launcher), and at any time:
within a step, at any byte of a save, while it is published, while outdated checkpoints are deleted, while one is
verified or loaded.

The seed of a trial determines its layout, kind of save, and one or two faults, one per start. Faults are injected in
the process at an exact point (`faults/sitecustomize.py`), without any code in Quadriga.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import (
    BENCHMARKS,
    RESULTS,
    ROOT,
    child_environment,
    command_line,
    measured_folders,
    met_or_missed,
    require_clean_tree,
    save,
    text_table,
)

from quadriga.metrics.jsonl import read_metrics

CLAIM = "a run that is killed at any point and started again ends bit-equal to an undisturbed run"
STEPS, INTERVAL, KEPT = 10, 2, 2
MAX_STARTS, START_SECONDS = 6, 300
PHASES = ("data", "forward and backward", "gradient norm", "optimizer")
SAVES_OF_A_START = STEPS // INTERVAL
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "FSDP 2": (2, ()),
    "DDP 2": (2, ("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1")),
    "TP 2": (2, ("--parallelism.tensor_parallel_degree=2",)),
    "PP 2": (2, ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2")),
    "CP 2": (2, ("--parallelism.context_parallel_degree=2",)),
    "FSDP 2 x TP 2": (4, ("--parallelism.tensor_parallel_degree=2",)),
}
MODES = ("disabled", "async")
MODEL = (
    *("--model.dim=32", "--model.n_layers=2", "--model.n_heads=4", "--model.n_kv_heads=2", "--model.ffn_dim=64"),
    *(
        "--model.vocab_size=320",
        "--training.seq_len=32",
        "--training.local_batch_size=1",
        "--lr_scheduler.warmup_steps=2",
    ),
    *("--training.global_batch_size=8", f"--training.steps={STEPS}", "--metrics.log_freq=1", "--metrics.log_documents"),
    *("--profiling.no_enable_profiling", "--metrics.no_enable_tensorboard", "--checkpoint.enable"),
    *(f"--checkpoint.interval={INTERVAL}", f"--checkpoint.keep_latest_k={KEPT}"),
)


@dataclass(frozen=True)
class Trial:
    seed: int
    layout: str
    mode: str
    faults: tuple[dict[str, Any], ...]


def draw_trial(seed: int, layouts: tuple[str, ...] = tuple(LAYOUTS), modes: tuple[str, ...] = MODES) -> Trial:
    """The trial of a seed."""
    rng = random.Random(f"kill matrix {seed}")
    layout = rng.choice(layouts)
    ranks = LAYOUTS[layout][0]
    first = ("step", "save", "manifest", "rename", "remove")[seed % 5]  # an equal share for each
    faults = [draw_fault(rng, first, ranks)]
    if rng.random() < 0.4:
        faults.append(draw_fault(rng, rng.choice(("verify", "load", "save", "step", "rename")), ranks))
    return Trial(seed, layout, rng.choice(modes), tuple(faults))


def draw_fault(rng: random.Random, moment: str, ranks: int) -> dict[str, Any]:
    """A random fault: the point `at` of a moment, the rank, and the victim. Moments of rank 0 only are on rank 0."""
    places: dict[str, Any] = {
        "step": [rng.randint(2, STEPS), rng.choice(PHASES)],
        "save": rng.random() * SAVES_OF_A_START,  # in saves; converted to bytes when the size of one is known
        "manifest": [rng.randint(1, SAVES_OF_A_START), rng.randint(0, 3000)],
        "rename": [rng.randint(1, 2 * SAVES_OF_A_START - KEPT), rng.choice(("before", "after"))],
        "remove": rng.randint(1, SAVES_OF_A_START - KEPT),
        "verify": rng.randint(1, 200_000),
        "load": rng.choice(("before", "after")),
    }
    only_rank_0 = moment in ("manifest", "rename", "remove")
    victim = rng.choice(("this rank", "all ranks", "torchrun", "launcher"))
    return {
        "moment": moment,
        "at": places[moment],
        "rank": 0 if only_rank_0 else rng.randrange(ranks),
        "victim": victim,
    }


def start_run(folder: Path, layout: str, mode: str, fault: dict[str, Any] | None = None) -> int:
    """Start the run and wait until all its processes have ended. Returns the exit code."""
    ranks, keys = LAYOUTS[layout]
    command = [sys.executable, "-m", "quadriga.launch", "--job.config_file", str(ROOT / "configs/debug/debug.toml")]
    command += ["--job.dump_folder", str(folder), *MODEL, *keys, f"--checkpoint.async_mode={mode}"]
    environ = child_environment(NGPU=str(ranks), COMM_BACKEND="gloo", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    if fault is not None:
        environ["QUADRIGA_FAULT"] = json.dumps(fault)
    environ["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS / "faults"), environ["PYTHONPATH"]])
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        code = subprocess.run(
            command, env=environ, stdout=log, stderr=log, timeout=START_SECONDS, check=False
        ).returncode
    wait_for_exit(folder)
    return code


def wait_for_exit(folder: Path) -> None:
    """Wait for the ranks of a killed launcher, which keep the folder locked until they end. SystemExit after 20 s."""
    deadline = time.monotonic() + 20
    while (holders := [pid for pid in processes() if str(folder) in command_of(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    if holders:
        raise SystemExit(f"orphans: processes {holders} of {folder} are alive 20 s after the end of their launcher")


def processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and int(entry) != os.getpid()]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def final_state(folder: Path) -> dict[str, Any]:
    """The results of a run that must be equal."""
    from quadriga.metrics.documents import read_documents

    records = read_metrics(folder / "metrics.jsonl")
    return {
        "losses": [record["loss"] for record in records],
        "gradient norms": [record["grad_norm"] for record in records],
        "tokens": [record["tokens_seen"] for record in records],
        "documents": {str(step): rows for step, rows in sorted(read_documents(folder).items())},
        "state": final_state_hash(folder),
    }


def final_state_hash(folder: Path) -> str:
    """Hash of the weights, optimizer state, schedule and position in the data after the last step."""
    import torch

    from quadriga.checkpoint import folder as folders
    from quadriga.checkpoint.load import load_tensors
    from quadriga.checkpoint.stored import open_stored

    found = folders.read_checkpoint(folder / "checkpoint" / f"step-{STEPS}")
    if wrong := folders.find_damage(found):
        raise SystemExit("; ".join(wrong))
    planned = open_stored(found.location, None).plan.tensors
    stored = {name: entry for name, entry in planned.items() if not name.startswith("random.")}
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in stored.items()}
    load_tensors(found.location, tensors, None, may_hold_more=True)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    state = {part: found.extra[part] for part in ("lr_scheduler", "dataloader")}
    digest.update(json.dumps([state, found.extra["train_state"]["tokens_seen"]], sort_keys=True).encode())
    return digest.hexdigest()


class Matrix:
    """Runs trials, and the undisturbed run of each layout and kind of save once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undisturbed: dict[tuple[str, str], dict[str, Any]] = {}
        self._bytes: dict[tuple[str, str], int] = {}

    def run(self, trial: Trial) -> dict[str, Any]:
        """The result of a trial: `starts`, exit `codes`, `struck` (per fault), `differs` (empty: bit-equal)."""
        undisturbed = self.undisturbed(trial.layout, trial.mode)
        folder = self._folder / f"trial-{trial.seed}"
        began, codes, hits = time.monotonic(), list[int](), list[bool]()
        while not codes or codes[-1] != 0:
            if len(codes) == MAX_STARTS:
                raise SystemExit(f"trial {trial.seed} did not end in {MAX_STARTS} starts; see {folder}.log")
            number = len(codes)
            codes.append(start_run(folder, trial.layout, trial.mode, self._fault(trial, number)))
            if number < len(trial.faults):
                hits.append(self._marker(trial, number).exists())
        final = final_state(folder)
        return {
            **asdict(trial),
            "starts": len(codes),
            "codes": codes,
            "struck": hits,
            "differs": [what for what in undisturbed if final[what] != undisturbed[what]],
            "seconds": round(time.monotonic() - began, 1),
        }

    def undisturbed(self, layout: str, mode: str) -> dict[str, Any]:
        key = layout, mode
        if key not in self._undisturbed:
            folder = self._folder / f"undisturbed-{len(self._undisturbed)}"
            if code := start_run(folder, layout, mode):
                raise SystemExit(f"the undisturbed run failed with exit code {code}; see {folder}.log")
            self._undisturbed[key] = final_state(folder)
            sizes = [path.stat().st_size for path in (folder / f"checkpoint/step-{STEPS}").glob("*.distcp")]
            self._bytes[key] = min(sizes)
        return self._undisturbed[key]

    def _fault(self, trial: Trial, number: int) -> dict[str, Any] | None:
        if number >= len(trial.faults):
            return None
        fault = dict(trial.faults[number], marker=str(self._marker(trial, number)))
        if fault["moment"] == "save":
            fault["at"] = int(fault["at"] * self._bytes[trial.layout, trial.mode])
        return fault

    def _marker(self, trial: Trial, number: int) -> Path:
        return self._folder / f"trial-{trial.seed}-fault-{number}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--layouts", nargs="*", choices=tuple(LAYOUTS), default=tuple(LAYOUTS))
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--single", action="store_true", help="one fault per trial, none at the second start")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.results == RESULTS:
        require_clean_tree()
    code = code_hash()
    log = options.results / "kill_matrix.jsonl"
    trials = map(json.loads, log.read_text().splitlines() if log.exists() else ())
    done: dict[int, dict[str, Any]] = {trial["seed"]: trial for trial in trials if trial.get("code") == code}
    wanted = range(options.first, options.first + options.trials)
    with tempfile.TemporaryDirectory(prefix="quadriga-kill-") as folder:
        matrix = Matrix(Path(folder))
        for seed in wanted:
            if seed not in done:
                trial = draw_trial(seed, tuple(options.layouts), tuple(options.modes))
                outcome = matrix.run(replace(trial, faults=trial.faults[:1]) if options.single else trial)
                done[seed] = {**outcome, "code": code}
                with log.open("a") as file:
                    file.write(json.dumps(done[seed]) + "\n")
            print(format_trial(done[seed]), flush=True)
    return summarize([done[seed] for seed in wanted], options.results)


def code_hash() -> str:
    """Hash of the code that a trial tests. Changes elsewhere do not invalidate it."""
    return hashlib.sha256(json.dumps(measured_folders("kill_matrix"), sort_keys=True).encode()).hexdigest()[:16]


def format_trial(trial: dict[str, Any]) -> str:
    what = ", then ".join(
        f"{fault['victim']} killed at {fault['moment']} {fault['at']} by rank {fault['rank']}"
        + ("" if hit else " (never reached)")
        for fault, hit in zip(trial["faults"], trial["struck"], strict=False)
    )
    end = f"DIFFERS in {', '.join(trial['differs'])}" if trial["differs"] else "equal"
    return f"trial {trial['seed']}: {trial['layout']}, save {trial['mode']}: {what}; {trial['starts']} starts: {end}"


def summarize(trials: list[dict[str, Any]], results: Path) -> int:
    counts: dict[str, list[int]] = {}
    for trial in trials:
        for fault, hit in zip(trial["faults"], trial["struck"], strict=False):
            for what in (f"moment: {fault['moment']}", f"victim: {fault['victim']}"):
                entry = counts.setdefault(what, [0, 0])
                entry[0] += hit
                entry[1] += bool(hit and trial["differs"])
    for trial in trials:
        counts.setdefault(f"layout: {trial['layout']}", [0, 0])[0] += sum(trial["struck"])
        counts.setdefault(f"save: {trial['mode']}", [0, 0])[0] += sum(trial["struck"])
    different = [trial["seed"] for trial in trials if trial["differs"]]
    print(
        "\n" + text_table(("", "kills", "runs that differ"), [(what, *pair) for what, pair in sorted(counts.items())])
    )
    met = not different
    kills = sum(sum(trial["struck"]) for trial in trials)
    which = f": {different}" if different else ""
    print(f"\n{len(trials)} trials, {kills} kills, {len(different)} that differ{which}; {met_or_missed(met)}")
    figures = {"trials": len(trials), "kills": kills, "different": different, "counts": counts, "met": met}
    figures["code"] = code_hash()
    save("kill_matrix", figures, command=command_line(), claim=CLAIM, folder=results)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
