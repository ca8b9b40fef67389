"""Continues a run of torchtitan v0.2.2 in Quadriga, and a run of Quadriga in torchtitan, and compares with runs that
do not change the trainer.

    python benchmarks/continue_torchtitan.py --cache FOLDER      # creates an environment with torchtitan in FOLDER
    python benchmarks/continue_torchtitan.py --oracle PYTHON     # uses an existing one; 5 minutes on 2 cores

The runs train torchtitan's debug model in float32 on a CPU, with documents in order and windows that do not overlap. Of
the second half of a run, the script compares learning rates (which must be equal), losses and gradient norms. At the
end it compares all weights and both moments: the largest difference, relative to the largest value of the tensor.

- "there, then here": the whole run in torchtitan; its checkpoint of half the steps, in a new run folder, continues in
  Quadriga on one rank, with FSDP on two, and with tensor parallelism on two;
- "here, then there": the whole run in Quadriga; its checkpoint of half the steps is converted by
  `quadriga convert to-torchtitan`, and continues in torchtitan;
- "there, here and there again": the first run's checkpoint of half the steps, a quarter in Quadriga, a quarter in
  torchtitan.

The script needs nothing else from the network: the text is that of the Python standard library.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import command_line, met_or_missed, save, text_table
from made_data import DOCUMENTS, TOKENIZER, split_documents, standard_library, write_documents, write_tokenizer
from torchtitan_oracle import Oracle, read_arguments
from trainer import run_quadriga, write_toml

from quadriga.metrics.jsonl import read_metrics

CLAIM = (
    "a run of torchtitan v0.2.2 continues in Quadriga, and a run of Quadriga in torchtitan, with equal learning rates, "
    "losses within 1e-5 and gradient norms within 1e-4 of the run that does not change the trainer"
)
STEPS, SEQ_LEN, ROWS, CHARACTERS = 20, 128, 2, 200_000
LOSS_TARGET, GRAD_NORM_TARGET = 1e-5, 1e-4  # relative
BASE_CONFIG: dict[str, dict[str, Any]] = {
    "job": {"description": "the trainer changes"},
    "model": {"name": "llama3", "flavor": "debugmodel", "hf_assets_path": f"./{TOKENIZER}"},
    "optimizer": {"name": "AdamW", "lr": 8e-4},
    "lr_scheduler": {"warmup_steps": 5},
    "training": {
        "dataset": "c4_test",
        "local_batch_size": ROWS,
        "seq_len": SEQ_LEN,
        "steps": STEPS,
        "mixed_precision_param": "float32",
    },
    "parallelism": {"data_parallel_shard_degree": 1},
    "activation_checkpoint": {"mode": "none"},
    "checkpoint": {"enable": True, "interval": STEPS // 2, "last_save_model_only": False},
    "metrics": {"log_freq": 1},
    "debug": {"seed": 42},
}
TORCHTITAN_DATA_ORDER = ("--training.dataloader.shuffle=false", "--training.dataloader.window_overlap=0")
LAYOUTS = {
    "there, then here": (1, ()),
    "there, then here with FSDP 2": (
        2,
        ("--parallelism.data_parallel_shard_degree=2", "--training.local_batch_size=1"),
    ),
    "there, then here with TP 2": (2, ("--parallelism.tensor_parallel_degree=2",)),
}
TO_TORCHTITAN, ROUND_TRIP = "here, then there", "there, here and there again"
Records = dict[int, dict[str, Any]]


class ContinuationTrainers:
    """Both trainers, in a folder with the tokenizer and documents that the configuration names."""

    def __init__(self, oracle: Oracle, folder: Path, text: str) -> None:
        self._oracle, self.folder = oracle, folder
        write_tokenizer(folder / TOKENIZER, text)
        write_documents(folder / DOCUMENTS, split_documents(text))
        write_toml(folder / "run.toml", BASE_CONFIG)

    def train_torchtitan(self, run: str, *arguments: str) -> Records:
        given = ["--job.config_file", "run.toml", "--job.dump_folder", run, *arguments]
        records = self._oracle.train(self.folder, self.folder / f"{run}.jsonl", given)
        # The norm from squares in float64, as in Quadriga. torchtitan's float32 norm has errors of about 1e-4 on a CPU.
        return {
            one["step"]: {**one, "grad_norm": one.get("exact_grad_norm", one["grad_norm"])}
            for one in records
            if one["kind"] == "step"
        }

    def train_quadriga(self, run: str, ranks: int = 1, *arguments: str) -> Records:
        module = "quadriga.train" if ranks == 1 else "quadriga.launch"
        given = ("--job.config_file", "run.toml", "--job.dump_folder", run, *TORCHTITAN_DATA_ORDER, *arguments)
        run_quadriga(self.folder, ranks, module, *given)
        return {one["step"]: one for one in read_metrics(self.folder / run / "metrics.jsonl")}

    def to_torchtitan(self, run: str, out: str) -> None:
        run_quadriga(self.folder, 1, "quadriga.cli", "convert", "to-torchtitan", run, f"{out}/checkpoint")

    def copy_checkpoint(self, run: str, step: int, to: str) -> None:
        """Create a run folder `to` with the checkpoint of step `step` of `run` only."""
        place = self.folder / to / "checkpoint"
        place.mkdir(parents=True)
        shutil.copytree(self.folder / run / "checkpoint" / f"step-{step}", place / f"step-{step}")


def compare_steps(whole: Records, resumed: Records, first: int, steps: int) -> dict[str, Any]:
    """The largest differences of steps `first` to `steps` from those of the run that does not change the trainer."""
    wanted = list(range(first, steps + 1))
    if sorted(resumed) != wanted or not set(wanted) <= whole.keys():
        raise SystemExit(f"steps {first} to {steps} are expected, and {sorted(resumed)} were trained")
    found = {
        key: max(abs(resumed[n][key] - whole[n][key]) / abs(whole[n][key]) for n in wanted)
        for key in ("loss", "grad_norm")
    }
    unequal = [n for n in wanted if resumed[n]["lr"] != whole[n]["lr"]]
    losses = [[side[n]["loss"] for n in wanted] for side in (resumed, whole)]
    met = found["loss"] <= LOSS_TARGET and found["grad_norm"] <= GRAD_NORM_TARGET and not unequal
    return {**found, "unequal_rates": unequal, "first": first, "losses": losses, "met": met}


def tensor_differences(one: Path, other: Path) -> dict[str, Any]:
    """The largest relative difference between the tensors of two checkpoints in torchtitan's form, by kind."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    from quadriga.checkpoint.stored import open_stored

    worst: dict[str, float] = {}
    sides = []
    for place in (one, other):
        held = {name: torch.zeros(planned.shape) for name, planned in open_stored(place, None).plan.tensors.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is intended
            load(held, checkpoint_id=place, no_dist=True)
        sides.append(held)
    if sides[0].keys() != sides[1].keys():
        raise SystemExit(f"not the same tensors: {sorted(sides[0].keys() ^ sides[1].keys())[:5]}")
    for name, value in sides[0].items():
        kind = name.rpartition(".")[2]
        most = float(sides[1][name].abs().max()) or 1.0
        worst[kind] = max(worst.get(kind, 0.0), float((value - sides[1][name]).abs().max()) / most)
    return worst


def measure_all(sides: ContinuationTrainers, names: Sequence[str], steps: int) -> dict[str, Any]:
    half, more = steps // 2, (f"--training.steps={steps}", f"--checkpoint.interval={steps // 2}")
    found: dict[str, Any] = {}
    if set(names) & ({ROUND_TRIP} | LAYOUTS.keys()):
        whole = sides.train_torchtitan("stays_there", *more)
        end = sides.folder / "stays_there/checkpoint" / f"step-{steps}"
    for number, name in enumerate(name for name in LAYOUTS if name in names):
        log_progress(name)
        ranks, arguments = LAYOUTS[name]
        run = f"goes_on_here_{number}"
        sides.copy_checkpoint("stays_there", half, run)
        found[name] = compare_steps(whole, sides.train_quadriga(run, ranks, *more, *arguments), half + 1, steps)
        sides.to_torchtitan(run, f"{run}_there")
        found[name]["tensors"] = tensor_differences(sides.folder / f"{run}_there/checkpoint/step-{steps}", end)
    if ROUND_TRIP in names:
        log_progress(ROUND_TRIP)
        there = half + (steps - half) // 2
        sides.copy_checkpoint("stays_there", half, "for_a_while_here")
        sides.train_quadriga("for_a_while_here", 1, f"--lr_scheduler.total_steps={steps}", f"--training.steps={there}")
        sides.to_torchtitan("for_a_while_here", "back_again")
        found[ROUND_TRIP] = compare_steps(whole, sides.train_torchtitan("back_again", *more), there + 1, steps)
        found[ROUND_TRIP]["tensors"] = tensor_differences(sides.folder / f"back_again/checkpoint/step-{steps}", end)
    if TO_TORCHTITAN in names:
        log_progress(TO_TORCHTITAN)
        whole = sides.train_quadriga("stays_here", 1, *more)
        sides.to_torchtitan(f"stays_here/checkpoint/step-{half}", "goes_on_there")
        found[TO_TORCHTITAN] = compare_steps(whole, sides.train_torchtitan("goes_on_there", *more), half + 1, steps)
        sides.to_torchtitan(f"stays_here/checkpoint/step-{steps}", "stays_here_there")
        ends = [sides.folder / run / f"checkpoint/step-{steps}" for run in ("goes_on_there", "stays_here_there")]
        found[TO_TORCHTITAN]["tensors"] = tensor_differences(*ends)
    return found


def log_progress(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def row(name: str, found: Mapping[str, Any]) -> list[str]:
    rates = f"{len(found['unequal_rates'])} unequal" if found["unequal_rates"] else "equal"
    tensors = (f"{found['tensors'][key]:.1e}" for key in ("weight", "exp_avg", "exp_avg_sq"))
    return [name, rates, f"{found['loss']:.1e}", f"{found['grad_norm']:.1e}", *tensors, met_or_missed(found["met"])]


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    chosen, oracle, names = read_arguments(parser, STEPS, [*LAYOUTS, ROUND_TRIP, TO_TORCHTITAN])
    with tempfile.TemporaryDirectory(prefix="quadriga-continue-") as scratch:
        found = measure_all(
            ContinuationTrainers(oracle, Path(scratch), standard_library(CHARACTERS)), names, chosen.steps
        )
    header = ["run", "learning rates", "loss", "gradient norm", "weights", "exp_avg", "exp_avg_sq", "claim"]
    print(text_table(header, [row(name, one) for name, one in found.items()]))
    figures = {"oracle": dict(oracle.versions), "steps": chosen.steps, "runs": found}
    path = save("continue_torchtitan", figures, command=command_line(), claim=CLAIM, folder=chosen.out)
    print(f"\nwritten: {path}")
    return 0 if all(one["met"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
