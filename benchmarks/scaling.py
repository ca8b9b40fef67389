"""Measures how speed, memory and cost per rank change with the size of a run.

    python benchmarks/scaling.py                     # both parts, about 15 minutes on 2 cores
    python benchmarks/scaling.py --only runs
    python benchmarks/scaling.py --only ranks --ranks 8 512 16384

Part `runs` trains a model of the debug size (float32, one process with all cores, FSDP where there are several) and
changes one thing at a time: tokens of a row, rows, layers, ranks. It shows the median step, tokens/s and the FLOP/s
that the step reached, each as a multiple of the first row, and the resident memory of rank 0 beside the estimate of
active memory.

Part `ranks` builds one rank of the 8B model among up to 16,384, on fake process groups and fake tensors, and takes one
step. It reports what grows with the number of ranks: the seconds for the meshes, for the whole build and for the step
(without communication), the memory of the process, and the chunks in the plan of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from common import ROOT, child_environment, command_line, save, text_table
from shapes import SHAPES, Shape
from trainer import environment, matching_config, output_tail, write_toml

from quadriga import limits
from quadriga.cli.arguments import run_from_file
from quadriga.metrics.jsonl import read_metrics
from quadriga.models.registry import flops_per_token, parallel_plan
from quadriga.planning.memory import memory_of
from quadriga.planning.setup import Setup
from quadriga.units import GIB, MIB

CLAIM = "reported: speed and memory by sequence, batch, layers and ranks; cost per rank on up to 16,384 ranks"
STEPS, WARMUP = 6, 2  # of one run; the first ones are not counted
REFERENCE = ROOT / "configs" / "llama3_8b" / "llama3_8b.toml"
WORLD_SIZES = (8, 64, 512, 4096, 16384)
LAYOUTS = {"FSDP": "over all ranks", "HSDP": "shards over 64 ranks"}
TENSORS_PER_PARAMETER = 3  # the parameter and two moments
RUNS_HEADER = ["changed", "step", "tokens/s", "FLOP/s", "resident MiB", "estimate MiB"]
RANKS_HEADER = ["ranks", "layout", "meshes s", "build s", "step s", "memory GiB", "chunks of a plan", "limit"]
RUNS_NOTE = "step, tokens/s and FLOP/s: times those of the first row of the group"


# --- runs ------------------------------------------------------------------------------------------------------------


def sweeps() -> Iterator[tuple[str, int, Shape, int]]:
    """(what changes, its value, the shape, ranks)."""
    base = replace(SHAPES["debug"], batch=4)
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        yield "tokens of a row", length, replace(base, seq_len=length, batch=1), 1
    for rows in (1, 2, 4, 8, 16):
        yield "rows", rows, replace(base, batch=rows), 1
    for layers in (2, 4, 8, 16):
        yield "layers", layers, replace(base, n_layers=layers), 1
    for ranks in (1, 2, 4, 8):
        yield "ranks", ranks, replace(base, batch=8), ranks


def measure_run(shape: Shape, ranks: int) -> dict[str, Any]:
    """Train STEPS steps in a process of its own. Raises SystemExit with the end of its output if it fails."""
    with tempfile.TemporaryDirectory(prefix="quadriga-scaling-") as folder:
        tables = matching_config(shape, "float32", ranks, Path(folder))
        tables["training"]["steps"] = STEPS
        file = write_toml(Path(folder, "run.toml"), tables)
        module = "quadriga.train" if ranks == 1 else "quadriga.launch"
        command = [sys.executable, "-m", module, "--job.config_file", str(file)]
        done = subprocess.run(command, env=environment(ranks, "cpu"), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command[1:])} failed:\n{output_tail(done.stderr)}")
        records = read_metrics(Path(folder, "run", "metrics.jsonl"), "train")
        run = run_from_file(str(file), ranks)
    seconds = statistics.median(record["step_seconds"] for record in records[WARMUP:])
    rate = shape.batch * shape.seq_len / seconds
    return {
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "flops_per_second": rate * flops_per_token(run.spec.model, shape.seq_len),
        "resident_bytes": records[-1]["memory_peak_gib"] * GIB,
        "estimated_bytes": memory_of(Setup(run.on_device("cpu"), "cpu"), 0).peak.total,
    }


def measure_runs() -> list[dict[str, Any]]:
    found = []
    for what, value, shape, ranks in sweeps():
        print(f"{what} = {value} ...", file=sys.stderr, flush=True)
        found.append({"what": what, "value": value, **measure_run(shape, ranks)})
    return found


def rows_of_runs(runs: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The rows of the table. Times and rates are shown as multiples of the first row of a sweep."""
    first: dict[str, dict[str, Any]] = {}
    for figures in runs:
        base = first.setdefault(figures["what"], figures)
        rates = [figures[key] / base[key] for key in ("step_seconds", "tokens_per_second", "flops_per_second")]
        sizes = [figures[key] / MIB for key in ("resident_bytes", "estimated_bytes")]
        yield [
            f"{figures['what']} = {figures['value']:,}",
            *(f"{rate:.2f}" for rate in rates),
            *(f"{size:,.0f}" for size in sizes),
        ]


# --- ranks -----------------------------------------------------------------------------------------------------------


def layout_of(name: str, ranks: int) -> tuple[int, list[str]]:
    """The shard degree, and the keys of the layout."""
    shards = ranks if name == "FSDP" else min(ranks, 64)
    degrees = {"data_parallel_shard_degree": shards, "data_parallel_replicate_degree": ranks // shards}
    return shards, [f"--parallelism.{key}={value}" for key, value in degrees.items()]


def measure_ranks(ranks: int, name: str, limit: float) -> dict[str, Any]:
    """Rehearse the last rank of the reference file; `failed` says why if it does not work within `limit` seconds."""
    shards, keys = layout_of(name, ranks)
    file = ["--job.config_file", str(REFERENCE), "--model.hf_assets_path=builtin:bytes"]
    given = child_environment(RANK=str(ranks - 1), WORLD_SIZE=str(ranks), NGPU=str(ranks))
    found: dict[str, Any] = {"ranks": ranks, "layout": name, "shards": shards}
    found["mesh_seconds"], failed = seconds_for_meshes(ranks, shards, given, limit)
    found["chunks"] = chunks_of_plan(run_from_file(str(REFERENCE), ranks, [file[2], *keys]), shards)
    if failed is None:
        command = [sys.executable, "-m", "quadriga.rehearsal.rehearse", *file, *keys]
        printed, failed = run_limited(command, given, limit)
        for key, pattern in (
            ("build_seconds", r"built in ([0-9.]+) s"),
            ("step_seconds", r"one step in ([0-9.]+) s"),
            ("memory", r"itself took ([0-9.]+) (GiB|MiB)"),
        ):
            if match := re.search(pattern, printed):
                found[key] = float(match[1]) * ({"GiB": GIB, "MiB": MIB}[match[2]] if key == "memory" else 1)
    return found | {"failed": failed}


def seconds_for_meshes(
    ranks: int, shards: int, environ: dict[str, str], limit: float
) -> tuple[float | None, str | None]:
    command = [sys.executable, __file__, "--one-mesh", str(ranks), str(shards)]
    printed, failed = run_limited(command, environ, limit)
    return (None, failed) if failed else (json.loads(printed.splitlines()[-1])["seconds"], None)


def build_one_mesh(ranks: int, shards: int) -> None:
    """Print the seconds that the last of `ranks` ranks needs for its meshes, and the memory of its process."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from quadriga.comm.mesh import build_mesh
    from quadriga.config.run_spec import Degrees

    start = time.perf_counter()
    dist.init_process_group("fake", rank=ranks - 1, world_size=ranks, store=FakeStore())
    build_mesh(Degrees(dp_shard=shards, dp_replicate=ranks // shards), "cpu")
    seconds = time.perf_counter() - start
    dist.destroy_process_group()
    print(json.dumps({"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def run_limited(command: list[str], environ: dict[str, str], limit: float) -> tuple[str, str | None]:
    """The output of a command, and why it failed (None if it did not)."""
    try:
        done = subprocess.run(
            command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "", f"takes more than {limit:.0f} s"
    return done.stdout, None if done.returncode == 0 else output_tail(done.stderr, 1)


def chunks_of_plan(run: Any, shards: int) -> int:
    """Chunks in the plan of a checkpoint: DCP writes one for each shard that has elements."""
    rows = [parameter.shape[0] for parameter in parallel_plan(run.spec.model).parameters]
    return TENSORS_PER_PARAMETER * sum(-(-count // -(-count // shards)) for count in rows)


def row_of_ranks(figures: dict[str, Any]) -> list[str]:
    shown = [
        f"{figures[key]:.1f}" if figures.get(key) is not None else "-" for key in ("mesh_seconds", "build_seconds")
    ]
    step, memory = figures.get("step_seconds"), figures.get("memory")
    return [
        f"{figures['ranks']:,}",
        f"{figures['layout']} {LAYOUTS[figures['layout']]}",
        *shown,
        "-" if step is None else f"{step:.1f}",
        "-" if memory is None else f"{memory / GIB:.2f}",
        f"{figures['chunks']:,}",
        figures["failed"] or ("refused" if figures["chunks"] > limits.PLAN_CHUNKS else ""),
    ]


# --- plots -----------------------------------------------------------------------------------------------------------

PANEL, GAP, TOP, STYLE = (
    (320, 190),
    60,
    40,
    ("text{font:12px system-ui,sans-serif;fill:#7d8590}.b{fill:#1f77d0}.e{fill:#d9731a}.t{font-weight:600}"),
)


def plot(runs: list[dict[str, Any]]) -> str:
    """An SVG with two rows of bars for each sweep: tokens/s, and resident memory with the estimate beside it."""
    names = list(dict.fromkeys(figures["what"] for figures in runs))
    width, height = len(names) * (PANEL[0] + GAP), 2 * (PANEL[1] + GAP) + TOP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="tokens per second and memory by sequence, rows, layers and ranks">',
        f"<style>{STYLE}</style>",
    ]
    for column, name in enumerate(names):
        own = [figures for figures in runs if figures["what"] == name]
        left = column * (PANEL[0] + GAP) + 10
        labels = [f"{figures['value']:,}" for figures in own]
        speeds = [[figures["tokens_per_second"] / own[0]["tokens_per_second"]] for figures in own]
        sizes = [[figures["resident_bytes"] / MIB, figures["estimated_bytes"] / MIB] for figures in own]
        parts += bars(left, TOP, f"tokens/s by {name}, times the first", labels, speeds)
        parts += bars(left, TOP + PANEL[1] + GAP, f"MiB by {name}: resident, estimated", labels, sizes)
    return "\n".join([*parts, "</svg>"]) + "\n"


def bars(left: float, top: float, title: str, labels: list[str], groups: list[list[float]]) -> Iterator[str]:
    highest, slot = max(max(group) for group in groups), PANEL[0] / len(groups)
    yield f'<text class="t" x="{left}" y="{top - 12}">{escape(title)}</text>'
    for index, (label, group) in enumerate(zip(labels, groups, strict=True)):
        each = 0.8 * slot / len(group)
        for number, value in enumerate(group):
            tall, x = (PANEL[1] - 30) * value / highest, left + index * slot + number * each
            y = top + PANEL[1] - 20 - tall
            yield f'<rect class="{"be"[number]}" x="{x:.1f}" y="{y:.1f}" width="{each - 2:.1f}" height="{tall:.1f}"/>'
        middle = left + index * slot + 0.4 * slot
        yield f'<text x="{middle:.1f}" y="{top + PANEL[1] - 4}" text-anchor="middle">{escape(label)}</text>'
        above = top + PANEL[1] - 24 - (PANEL[1] - 30) * group[0] / highest
        yield f'<text x="{middle:.1f}" y="{above:.1f}" text-anchor="middle">{group[0]:,.3g}</text>'


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--only", choices=("runs", "ranks"), help="one part (default: both)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=list(WORLD_SIZES), help="numbers of ranks of part `ranks`"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for one number of ranks")
    parser.add_argument("--one-mesh", type=int, nargs=2, metavar=("RANKS", "SHARDS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one_mesh:
        build_one_mesh(*chosen.one_mesh)
        return 0
    if chosen.only != "ranks":
        runs = measure_runs()
        print(text_table(RUNS_HEADER, [*rows_of_runs(runs)]))
        print(RUNS_NOTE)
        print(f"\nwritten: {save('scaling_runs', runs, command=command_line(), claim=CLAIM)}")
        picture = ROOT / "docs" / "scaling.svg"
        picture.write_text(plot(runs), encoding="utf-8")
        print(f"written: {picture.relative_to(ROOT)}{os.linesep}")
    if chosen.only != "runs":
        ranks = [measure_ranks(count, name, chosen.limit) for name in LAYOUTS for count in chosen.ranks]
        print(text_table(RANKS_HEADER, [row_of_ranks(figures) for figures in ranks]))
        print(f"\nwritten: {save('scaling_ranks', ranks, command=command_line(), claim=CLAIM)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
