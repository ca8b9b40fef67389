"""Trains files of torchtitan v0.2.2 with torchtitan and with Quadriga, and compares the runs.

    python benchmarks/fidelity.py --cache FOLDER      # creates an environment with torchtitan in FOLDER (a few GB)
    python benchmarks/fidelity.py --oracle PYTHON     # uses an existing one; 20 minutes on 2 cores
    python benchmarks/fidelity.py --oracle PYTHON --only cosine --out /tmp/trial

Both trainers get the same TOML file, tokenizer and documents, and the same weights: Quadriga's seed checkpoint in
Hugging Face's format, which both read with `checkpoint.initial_load_in_hf`. On the command line each gets its own
folder. Quadriga also gets keys that torchtitan does not have: documents in order, and windows that do not overlap. The
runs have one rank on a CPU. Over all steps, the script compares learning rates (which must be equal), losses and
gradient norms. torchtitan sums the squares of a norm in float32, which has errors of about 1e-4 on a CPU. So the target
applies to the norm of its gradients summed in float64, as in Quadriga. The difference to the norm that it prints is
shown too.

There are two more comparisons: initial weights that each side draws from 5 seeds, and a file with every default of
JobConfig as the package writes it. For the latter, both sides get sizes that a CPU can train on the command line.

The script needs nothing else from the network: the text is that of the Python standard library (or --text FILE).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import command_line, met_or_missed, save, text_table
from made_data import (
    DOCUMENTS,
    TOKENIZER,
    documents_with_tokens,
    split_documents,
    standard_library,
    write_documents,
    write_tokenizer,
)
from torchtitan_oracle import Oracle, read_arguments
from trainer import run_quadriga, write_toml

from quadriga.metrics.jsonl import read_metrics

CLAIM = (
    "from the same file, weights and documents, learning rates equal to torchtitan v0.2.2's, losses within 1e-5, "
    "gradient norms within 1e-4 (bfloat16: 2e-2), and initial weights of the same distributions"
)
STEPS, SEEDS = 30, 5
SEQ_LEN, ROWS = 128, 2
CHARACTERS, FEW_CHARACTERS = 400_000, 16_000  # of the documents; of the documents that end before the run
VALIDATION_STEPS = 4
DEVIATION = 0.02  # relative difference of a parameter's standard deviation

# Arguments for Quadriga only: torchtitan's order of documents and windows.
TORCHTITAN_DATA_ORDER = (
    "--training.dataloader.shuffle=false",
    "--training.dataloader.window_overlap=0",
    "--validation.dataloader.window_overlap=0",
)
BASE: dict[str, Any] = {
    "job.description": "fidelity",
    "model.name": "llama3",
    "model.flavor": "debugmodel",
    "model.hf_assets_path": f"./{TOKENIZER}",
    "optimizer.name": "AdamW",
    "optimizer.lr": 8e-4,
    "lr_scheduler.warmup_steps": 5,
    "training.dataset": "c4_test",
    "training.local_batch_size": ROWS,
    "training.seq_len": SEQ_LEN,
    "training.steps": STEPS,
    "training.mixed_precision_param": "float32",
    "parallelism.data_parallel_shard_degree": 1,
    "activation_checkpoint.mode": "none",
    "checkpoint.enable": True,
    "checkpoint.load_only": True,
    "checkpoint.initial_load_path": "./weights",
    "checkpoint.initial_load_in_hf": True,
    "metrics.log_freq": 1,
    "debug.seed": 42,
}


@dataclass(frozen=True)
class Targets:
    """Largest allowed relative differences over all steps."""

    loss: float
    grad_norm: float


FLOAT32, BFLOAT16 = Targets(1e-5, 1e-4), Targets(2e-2, 2e-2)


@dataclass(frozen=True)
class FidelityCase:
    """A file that both trainers read: `BASE` with `changes`."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    targets: Targets = FLOAT32


WSD = {"lr_scheduler.decay_ratio": 0.5}
CASES = (
    FidelityCase("debug file"),
    FidelityCase("accumulation over 4 micro-batches", {"training.global_batch_size": 4 * ROWS}),
    FidelityCase("documents that end before the run", {"training.dataset_path": "./few_documents"}),
    FidelityCase("linear decay over half of the run", {**WSD, "lr_scheduler.min_lr_factor": 0.1}),
    FidelityCase("sqrt decay", {"lr_scheduler.decay_type": "sqrt"}),
    FidelityCase(
        "sqrt decay over half, to a tenth",
        {**WSD, "lr_scheduler.decay_type": "sqrt", "lr_scheduler.min_lr_factor": 0.1},
    ),
    FidelityCase("cosine decay", {"lr_scheduler.decay_type": "cosine"}),
    FidelityCase("cosine decay to a tenth", {"lr_scheduler.decay_type": "cosine", "lr_scheduler.min_lr_factor": 0.1}),
    FidelityCase(
        "total_steps beyond the run", {"lr_scheduler.total_steps": 2 * STEPS, "lr_scheduler.decay_type": "cosine"}
    ),
    FidelityCase("warm-up longer than the run", {"lr_scheduler.warmup_steps": 200}),
    FidelityCase("warm-up and decay that overlap", {"lr_scheduler.warmup_steps": 20, "lr_scheduler.decay_ratio": 0.8}),
    FidelityCase("no warm-up, no decay", {"lr_scheduler.warmup_steps": 0, "lr_scheduler.decay_ratio": 0.0}),
    FidelityCase("weight decay off", {"optimizer.weight_decay": 0.0}),
    FidelityCase("weight decay 1", {"optimizer.weight_decay": 1.0}),
    # The decay is added to the clipped gradient, and torchtitan clips by its inexact norm. The case without clipping
    # shows that nothing else differs.
    FidelityCase("Adam, weight decay in the gradient", {"optimizer.name": "Adam"}),
    FidelityCase("Adam, nothing clipped", {"optimizer.name": "Adam", "training.max_norm": 1e9}),
    FidelityCase(
        "other betas, eps and clipping",
        {
            "optimizer.beta1": 0.8,
            "optimizer.beta2": 0.99,
            "optimizer.eps": 1e-6,
            "training.max_norm": 0.1,
        },
    ),
    FidelityCase("optimizer in a loop", {"optimizer.implementation": "for-loop"}),
    FidelityCase("recompute every second block", {"activation_checkpoint.mode": "selective"}),
    FidelityCase(
        "recompute by operation",
        {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    ),
    FidelityCase("recompute every block", {"activation_checkpoint.mode": "full"}),
    FidelityCase(
        "validation",
        {
            "validation.enable": True,
            "validation.dataset": "c4_test",
            "validation.dataset_path": "./held_out",
            "validation.local_batch_size": ROWS,
            "validation.seq_len": SEQ_LEN,
            "validation.freq": 10,
            "validation.steps": VALIDATION_STEPS,
        },
    ),
    FidelityCase("mixed precision in bfloat16", {"training.mixed_precision_param": "bfloat16"}, BFLOAT16),
    FidelityCase(
        "all in bfloat16", {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"}, BFLOAT16
    ),
)
WEIGHTS = "initial weights"
# The file with every default has 10,000 steps of 8 x 2,048 tokens, so both sides get these arguments.
ON_A_CPU = (
    *("--training.steps", str(STEPS), "--training.seq_len", str(SEQ_LEN), "--training.local_batch_size", str(ROWS)),
    *("--metrics.log_freq", "1", "--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.initial_load_in_hf"),
    *("--checkpoint.initial_load_path", "./weights"),
)
DEFAULTS = {
    "every default": ((), BFLOAT16),
    "every default, in float32": (("--training.mixed_precision_param", "float32"), FLOAT32),
}


# --- the two trainers ------------------------------------------------------------------------------------------------


class FidelityTrainers:
    """Both trainers, in a folder with the tokenizer, documents and weights that the files name."""

    def __init__(self, oracle: Oracle, folder: Path, text: str) -> None:
        self._oracle, self._folder, self._numbers = oracle, folder, itertools.count()
        count = write_tokenizer(folder / TOKENIZER, text)
        write_documents(folder / DOCUMENTS, split_documents(text))
        write_documents(folder / "few_documents", split_documents(text[:FEW_CHARACTERS]))
        # torchtitan's validation continues one batch after the end of the previous one, and wraps around. With exactly
        # this number of tokens, each validation begins with the first document.
        tokens = (VALIDATION_STEPS + 1) * ROWS * (SEQ_LEN + 1)
        write_documents(folder / "held_out", documents_with_tokens(tokens, text[::-1], count))
        self.defaults = oracle.defaults()
        (folder / "defaults.toml").write_text(self.defaults, encoding="utf-8")
        self.file(BASE, "base.toml")
        self.convert(self.seed("base.toml", "weights-run"), "weights")

    def file(self, keys: Mapping[str, Any], name: str) -> str:
        tables: dict[str, dict[str, Any]] = {}
        for key, value in keys.items():
            section, _, last = key.rpartition(".")
            tables.setdefault(section, {})[last] = value
        return write_toml(self._folder / name, tables).name

    def both(
        self, file: str, *arguments: str
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
        """Records of Quadriga's and torchtitan's training, by kind: `step`, `validation`; torchtitan's also
        `parameter`."""
        with ThreadPoolExecutor(1) as pool:
            titan = pool.submit(self.train_torchtitan, file, *arguments)
            return self.train_quadriga(file, *arguments, *TORCHTITAN_DATA_ORDER), titan.result()

    def train_quadriga(self, file: str, *arguments: str) -> dict[str, list[dict[str, Any]]]:
        folder = self._new("ours")
        run_quadriga(
            self._folder, 1, "quadriga.train", "--job.config_file", file, "--job.dump_folder", folder, *arguments
        )
        metrics = self._folder / folder / "metrics.jsonl"
        return {"step": read_metrics(metrics), "validation": read_metrics(metrics, "validation")}

    def train_torchtitan(self, file: str, *arguments: str) -> dict[str, list[dict[str, Any]]]:
        folder = self._new("theirs")
        record = self._folder / f"{folder}.jsonl"
        given = ["--job.config_file", file, "--job.dump_folder", folder, *arguments]
        found: dict[str, list[dict[str, Any]]] = {"step": [], "validation": [], "parameter": []}
        for one in self._oracle.train(self._folder, record, given):
            found[one.pop("kind")].append(one)
        return found

    def seed(self, file: str, folder: str, *arguments: str) -> str:
        """Save Quadriga's initial weights in the run folder `folder`."""
        given = ["--checkpoint.create_seed_checkpoint", "--checkpoint.load_only=false"]
        given += ["--checkpoint.initial_load_in_hf=false", "--checkpoint.initial_load_path=none"]
        run_quadriga(
            self._folder,
            1,
            "quadriga.train",
            "--job.config_file",
            file,
            "--job.dump_folder",
            folder,
            *given,
            *arguments,
        )
        return folder

    def convert(self, run: str, out: str) -> Path:
        run_quadriga(self._folder, 1, "quadriga.cli", "convert", "to-hf", run, out)
        return self._folder / out

    def _new(self, side: str) -> str:
        return f"{side}-{next(self._numbers)}"


# --- the comparisons -------------------------------------------------------------------------------------------------


def max_relative_difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], key: str) -> float:
    """The largest relative difference of a value over all steps; infinite if a value is NaN or infinite."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True)]
    if not all(map(math.isfinite, itertools.chain(*pairs))):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in pairs)


def compare_trainings(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], targets: Targets, steps: int
) -> dict[str, Any]:
    """The largest differences of two trainings, and whether they are within the targets.

    Raises SystemExit if a side did not record every step, or the sides validated after different steps.
    """
    for name, records in (("Quadriga's", ours["step"]), ("torchtitan's", theirs["step"])):
        if [record["step"] for record in records] != list(range(1, steps + 1)):
            raise SystemExit(f"not every step is in {name} records")
    mine, others = ours["step"], theirs["step"]
    unequal = [a["step"] for a, b in zip(mine, others, strict=True) if a["lr"] != b["lr"]]
    exact = [{**record, "grad_norm": record["exact_grad_norm"]} for record in others]
    found: dict[str, Any] = {
        "loss": max_relative_difference(mine, others, "loss"),
        "grad_norm": max_relative_difference(mine, exact, "grad_norm"),
        "printed_grad_norm": max_relative_difference(mine, others, "grad_norm"),
        "unequal_rates": unequal,
        "targets": {"loss": targets.loss, "grad_norm": targets.grad_norm},
        "losses": [[record["loss"] for record in side] for side in (mine, others)],
        "grad_norms": [[record["grad_norm"] for record in side] for side in (mine, exact, others)],
        "rates": [record["lr"] for record in others],
    }
    met = found["loss"] <= targets.loss and found["grad_norm"] <= targets.grad_norm and not unequal
    if ours["validation"] or theirs["validation"]:
        at = [record["step"] for record in theirs["validation"]]
        if [record["step"] for record in ours["validation"]] != at:
            raise SystemExit("the two did not validate after the same steps")
        found["validation_loss"] = max_relative_difference(ours["validation"], theirs["validation"], "loss")
        found["validated_after"] = at
        met = met and found["validation_loss"] <= targets.loss
    return {**found, "met": met}


def compare_case(sides: FidelityTrainers, case: FidelityCase, steps: int) -> dict[str, Any]:
    file = sides.file({**BASE, **case.changes, "training.steps": steps}, f"{case.name.replace(' ', '-')}.toml")
    found = compare_trainings(*sides.both(file), case.targets, steps)
    return {"changes": dict(case.changes), **found}


def compare_defaults(sides: FidelityTrainers, name: str, steps: int) -> dict[str, Any]:
    more, targets = DEFAULTS[name]
    arguments = (*ON_A_CPU, *more, "--training.steps", str(steps))
    found = compare_trainings(*sides.both("defaults.toml", *arguments), targets, steps)
    keys = sum(len(table) for table in _leaf_tables(tomllib.loads(sides.defaults)))
    return {"command_line": list(arguments), "keys": keys, **found}


def _leaf_tables(tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {key: value for key, value in tree.items() if not isinstance(value, dict)}
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaf_tables(value)


def compare_weights(sides: FidelityTrainers, seeds: int) -> dict[str, Any]:
    """Compare weights that each side draws: mean and standard deviation of every parameter, and the first step."""
    own = {key: value for key, value in BASE.items() if not key.startswith("checkpoint.")}
    file = sides.file({**own, "training.steps": 1}, "own-weights.toml")
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {"ours": {}, "theirs": {}}
    first: dict[str, dict[str, list[float]]] = {side: {"loss": [], "grad_norm": []} for side in ("ours", "theirs")}
    for seed in range(1, seeds + 1):
        chosen = f"--debug.seed={seed}"
        ours, theirs = sides.both(file, chosen)
        for key in first["ours"]:
            first["ours"][key].append(ours["step"][0][key])
            first["theirs"][key].append(theirs["step"][0][key])
        for one in theirs["parameter"]:
            drawn["theirs"].setdefault(one["name"], []).append((one["mean"], one["std"]))
        exported = sides.convert(sides.seed("base.toml", f"seed-{seed}", chosen), f"seed-{seed}-hf")
        for name, moments in moments_of(exported):
            drawn["ours"].setdefault(name, []).append(moments)
    return weights_result(drawn, first)


def moments_of(exported: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    """(name, (mean, standard deviation)) of each parameter of an export. The names are also torchtitan's."""
    import numpy as np
    from safetensors.numpy import load_file

    from quadriga.models.registry import spec_from_hf, tensor_names

    config = exported / "config.json"
    names = tensor_names(spec_from_hf(json.loads(config.read_text()), str(config)))
    from_hf = {names.hf_name(name): name for name in names.shapes}
    for path in sorted(exported.glob("*.safetensors")):
        for name, values in load_file(path).items():
            whole = values.astype(np.float64)
            yield from_hf[name], (float(whole.mean()), float(whole.std()))


def weights_result(
    drawn: Mapping[str, Mapping[str, list[tuple[float, float]]]], first: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, Any]:
    if set(drawn["ours"]) != set(drawn["theirs"]):
        raise SystemExit(f"not the same parameters: {sorted(set(drawn['ours']) ^ set(drawn['theirs']))}")
    parameters = {}
    for name, pairs in drawn["theirs"].items():
        ours, theirs = (statistics.fmean(std for _, std in one) for one in (drawn["ours"][name], pairs))
        # Constant parameters (norms) have a standard deviation of 0; their values are compared.
        same = ours / theirs - 1 if theirs else ours + abs(drawn["ours"][name][0][0] - pairs[0][0])
        parameters[name] = {"ours": ours, "theirs": theirs, "difference": same}
    spread = {}
    for key in first["ours"]:
        mine, others = first["ours"][key], first["theirs"][key]
        within = min(others) <= statistics.fmean(mine) <= max(others) and min(mine) <= statistics.fmean(others) <= max(
            mine
        )
        spread[key] = {"ours": mine, "theirs": others, "mean_within_the_other_spread": within}
    worst = max(abs(one["difference"]) for one in parameters.values())
    met = worst <= DEVIATION and all(one["mean_within_the_other_spread"] for one in spread.values())
    return {"parameters": parameters, "first_step": spread, "worst_deviation": worst, "target": DEVIATION, "met": met}


# --- the command -----------------------------------------------------------------------------------------------------


def row(name: str, found: Mapping[str, Any]) -> list[str]:
    rates = f"{len(found['unequal_rates'])} unequal" if found["unequal_rates"] else "equal"
    held_out = f"{found['validation_loss']:.1e}" if "validation_loss" in found else ""
    norms = (f"{found[key]:.1e}" for key in ("grad_norm", "printed_grad_norm"))
    return [name, rates, f"{found['loss']:.1e}", *norms, held_out, met_or_missed(found["met"])]


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds of the initial weights")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel comparisons, of two processes each")
    parser.add_argument("--text", type=Path, help="documents from this text instead of the standard library's")
    parser.add_argument("--name", default="fidelity", help="name of the result file, without .json")
    chosen, oracle, names = read_arguments(parser, STEPS, [*(case.name for case in CASES), *DEFAULTS, WEIGHTS])
    text = chosen.text.read_text(encoding="utf-8") if chosen.text else standard_library(CHARACTERS)
    with tempfile.TemporaryDirectory(prefix="quadriga-fidelity-") as scratch:
        found = measure_all(FidelityTrainers(oracle, Path(scratch), text), names, chosen)
    header = ["file", "learning rates", "loss", "gradient norm", "as printed", "validation", "claim"]
    print(text_table(header, [row(name, one) for name, one in found.items() if name != WEIGHTS]))
    if WEIGHTS in found:
        print("\n" + weights_table(found[WEIGHTS]))
    figures = {"oracle": dict(oracle.versions), "steps": chosen.steps, "compared": found}
    path = save(chosen.name, figures, command=command_line(), claim=CLAIM, folder=chosen.out)
    print(f"\nwritten: {path}")
    return 0 if all(one["met"] for one in found.values()) else 1


def measure_all(sides: FidelityTrainers, names: Sequence[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """The comparisons by name. Each prints a line when it is done."""
    cases = {case.name: case for case in CASES}

    def one(name: str) -> tuple[str, dict[str, Any]]:
        if name in cases:
            found = compare_case(sides, cases[name], chosen.steps)
        elif name in DEFAULTS:
            found = compare_defaults(sides, name, chosen.steps)
        else:
            found = compare_weights(sides, chosen.seeds)
        shown = (
            row(name, found)
            if name != WEIGHTS
            else [name, f"{found['worst_deviation']:.1%}", met_or_missed(found["met"])]
        )
        print("  ".join(filter(None, shown)), file=sys.stderr, flush=True)
        return name, found

    with ThreadPoolExecutor(chosen.jobs) as pool:
        return dict(pool.map(one, names))


def weights_table(found: Mapping[str, Any]) -> str:
    rows = []
    for key, one in found["first_step"].items():
        shown = (
            f"{statistics.fmean(one[side]):.4f} ({min(one[side]):.4f} to {max(one[side]):.4f})"
            for side in ("ours", "theirs")
        )
        rows.append([f"first {key}", *shown, met_or_missed(one["mean_within_the_other_spread"])])
    worst = max(found["parameters"].items(), key=lambda item: abs(item[1]["difference"]))
    rows.append(
        [
            f"worst std: {worst[0]}",
            f"{worst[1]['ours']:.5f}",
            f"{worst[1]['theirs']:.5f}",
            met_or_missed(found["worst_deviation"] <= found["target"]),
        ]
    )
    return text_table(["initial weights", "Quadriga's", "torchtitan's", "claim"], rows)


if __name__ == "__main__":
    sys.exit(main())
