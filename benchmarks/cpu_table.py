"""Measures the table of speed on a CPU: Quadriga and a bare PyTorch loop of the same model, eager and compiled.

    python benchmarks/cpu_table.py            # the same as `make bench`; at most 25 minutes on 2 cores
    python benchmarks/cpu_table.py --only small-float32 --seconds 120

Each cell is a ratio of step times: above 1, Quadriga is faster. The steps of both sides alternate (paired.py). A cell
ends when half of its 95 % interval is at most 0.02, or after `--seconds`. Quadriga runs with its defaults: it reads
and tokenizes text, and measures, logs and writes each step. The bare loop draws tokens from memory.

A CPU without bfloat16 units (AMX, AVX-512 BF16) emulates the products, and a full step takes minutes. There the rows in
bfloat16 have short steps, in which the work outside of the model weighs more.

Claims: eager, at least 1.00 of the bare loop in float32 and 1.02 in bfloat16; compiled, at least 1.00 of the compiled
bare loop in float32 and 1.10 in bfloat16. In float32 the lower end of the interval is at least 0.97.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import command_line, save, text_table
from paired import CommandFailed, MedianEstimate, estimate_median, exit_on_sigterm, time_interleaved
from shapes import DTYPES, SHAPES, Shape
from trainer import bare_command, matching_config, trainer_command, write_toml

CLAIM = "the trainer is as fast as a bare PyTorch loop of the same model, eager and compiled; faster in bfloat16"
HALF_WIDTH = 0.02  # of the 95 % interval, at which a cell ends
FEWEST_LOW = 0.97  # for the lower end of the interval in float32
BFLOAT16_UNITS = {"amx_bf16", "avx512_bf16"}  # of /proc/cpuinfo
SHORT = {"debug": (64, 2), "small": (16, 1)}  # tokens and rows of a step without such units
HEADER = ["model, dtype, tokens of a step", "Quadriga / bare", "ratio", "95 % of median", "pairs", "target", ""]


@dataclass(frozen=True)
class Cell:
    """Quadriga against the bare loop. `target`: the least ratio; None for a cell that is only shown."""

    shape: str
    dtype: str
    compiled: bool
    bare_compiled: bool

    @property
    def target(self) -> float | None:
        if self.compiled != self.bare_compiled:
            return None
        if self.dtype == "float32":
            return 1.0
        return 1.10 if self.compiled else 1.02

    @property
    def name(self) -> str:
        return f"{_mode(self.compiled)} / {_mode(self.bare_compiled)}"

    def missed_by(self, ratio: MedianEstimate) -> float | None:
        """The distance to the target, 0 if it is met; None for a cell without one."""
        if self.target is None:
            return None
        below = FEWEST_LOW - ratio.low if self.dtype == "float32" else 0.0
        return max(self.target - ratio.median, below, 0.0)


def _mode(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def all_cells(rows: list[str]) -> Iterator[Cell]:
    for row in rows:
        shape, dtype = row.split("-")
        for compiled, bare_compiled in ((False, False), (True, False), (True, True)):
            yield Cell(shape, dtype, compiled, bare_compiled)


def has_bfloat16_units() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and bool(BFLOAT16_UNITS & set(cpuinfo.read_text(encoding="utf-8").split()))


def shape_of(cell: Cell) -> Shape:
    shape = SHAPES[cell.shape]
    if cell.dtype == "float32" or has_bfloat16_units():
        return shape
    length, rows = SHORT[cell.shape]
    return replace(shape, seq_len=length, batch=rows)


def measure(cell: Cell, pairs: int, seconds: float) -> dict[str, Any]:
    """The figures of a cell. Raises CommandFailed if one side ends or hangs."""
    shape = shape_of(cell)
    with tempfile.TemporaryDirectory(prefix="quadriga-bench-") as folder:
        tables = matching_config(shape, cell.dtype, 1, Path(folder)) | {"compile": {"enable": cell.compiled}}
        ours = trainer_command(write_toml(Path(folder, "run.toml"), tables), 1, "cpu")
        arguments = ["--shape", cell.shape, "--dtype", cell.dtype, "--steps", "1000000"]
        arguments += ["--seq_len", str(shape.seq_len), "--batch", str(shape.batch)]
        bare = bare_command(1, "cpu", *arguments, *(["--compile"] if cell.bare_compiled else []))
        timings = time_interleaved(ours, bare, pairs=pairs, seconds=seconds, half_width=HALF_WIDTH)
    ratio = estimate_median(timings.ratios)
    return {
        **asdict(cell),
        "seq_len": shape.seq_len,
        "batch": shape.batch,
        "ratio": asdict(ratio),
        "ours_step_seconds": estimate_median(timings.ours).median,
        "bare_step_seconds": estimate_median(timings.reference).median,
        "target": cell.target,
        "missed_by": cell.missed_by(ratio),
    }


def row(figures: dict[str, Any]) -> list[str]:
    cell = Cell(figures["shape"], figures["dtype"], figures["compiled"], figures["bare_compiled"])
    ratio = MedianEstimate(**figures["ratio"])
    missed_by = figures["missed_by"]
    verdict = "" if missed_by is None else "met" if missed_by == 0 else f"missed by {missed_by:.3f}"
    return [
        f"{cell.shape}, {cell.dtype}, {figures['seq_len'] * figures['batch']:,}",
        cell.name,
        f"{ratio.median:.3f}",
        f"{ratio.low:.3f} to {ratio.high:.3f}",
        str(ratio.count),
        "" if cell.target is None else f"{cell.target:.2f}",
        verdict,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    rows = [f"{shape}-{dtype}" for shape in SHAPES for dtype in DTYPES]
    parser.add_argument("--only", nargs="+", choices=rows, default=rows, metavar="SHAPE-DTYPE", help="these rows")
    parser.add_argument("--pairs", type=int, default=60, help="maximum of pairs in a cell")
    parser.add_argument("--seconds", type=float, default=60, help="time limit of a cell, from the sixth pair on")
    parser.add_argument("--name", default="cpu_table", help="name of the result file")
    chosen = parser.parse_args()
    exit_on_sigterm()
    results: list[dict[str, Any]] = []
    for cell in all_cells(chosen.only):
        print(f"{cell.shape}-{cell.dtype}: {cell.name} ...", file=sys.stderr, flush=True)
        try:
            results.append(measure(cell, chosen.pairs, chosen.seconds))
        except CommandFailed as failure:
            print(failure, file=sys.stderr)
            return 1
    print(text_table(HEADER, [row(figures) for figures in results]))
    print(f"\nwritten: {save(chosen.name, results, command=command_line(), claim=CLAIM)}")
    return 0 if not any(figures["missed_by"] for figures in results) else 1


if __name__ == "__main__":
    sys.exit(main())
