"""Measures steady-state speed: the whole trainer compared with a bare PyTorch loop of the same model.

    python benchmarks/speed.py                              # every case that this machine's CPU can run
    python benchmarks/speed.py --only small-bfloat16-1 --pairs 30
    python benchmarks/speed.py --device cuda --ranks 1 4    # on GPUs
    python benchmarks/speed.py --only debug-bfloat16-1 --seq_len 64 --batch 2 --name speed_bfloat16_short

The last command is for a CPU without bfloat16 units, on which a full step would take minutes. Shorter steps are the
harder case: the time of the trainer outside of the model is the same, and the model takes less.

Claim: at least 0.97 of the speed of the bare loop (`bare.py`), eager, in float32 and bfloat16, in one process, and with
FSDP over 2 and 4 ranks compared with a bare FSDP2 loop under torchrun. The trainer runs with its defaults: it reads and
tokenizes real text, and measures, logs and writes every step. The bare loop draws from a pool in memory and prints its
loss.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import command_line, met_or_missed, save, text_table
from paired import CommandFailed, MedianEstimate, Timings, estimate_median, exit_on_sigterm, time_interleaved
from shapes import DTYPES, SHAPES, Shape
from trainer import bare_command, matching_config, trainer_command, write_toml

TARGET = 0.97
CLAIM = f"the whole trainer reaches at least {TARGET} of the speed of a bare PyTorch loop of the same model"
HEADER = ["case", "ms", "bare ms", "tok/s", "ratio", "95 % of median", "middle half", "pairs", f">= {TARGET}"]


@dataclass(frozen=True)
class SpeedCase:
    shape: str
    dtype: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.dtype}-{self.ranks}"


def all_cases(ranks: list[int]) -> list[SpeedCase]:
    """Both shapes and dtypes in one process; both shapes in float32 over several ranks, in which gloo is fastest."""
    one = [SpeedCase(shape, dtype, 1) for shape in SHAPES for dtype in DTYPES if 1 in ranks]
    return one + [SpeedCase(shape, "float32", count) for count in ranks if count > 1 for shape in SHAPES]


def shape_of(case: SpeedCase, chosen: argparse.Namespace) -> Shape:
    named = SHAPES[case.shape]
    return replace(named, seq_len=chosen.seq_len or named.seq_len, batch=chosen.batch or named.batch)


def measure(case: SpeedCase, chosen: argparse.Namespace) -> dict[str, Any]:
    """The figures of one case, over `chosen.starts` starts of both sides."""
    shape, by_start = shape_of(case, chosen), list[Timings]()
    for _ in range(chosen.starts):
        with tempfile.TemporaryDirectory(prefix="quadriga-speed-") as folder:
            tables = matching_config(shape, case.dtype, case.ranks, Path(folder))
            tables["compile"] = {"enable": chosen.compile}
            ours = trainer_command(write_toml(Path(folder, "run.toml"), tables), case.ranks, chosen.device)
            arguments = ["--shape", case.shape, "--dtype", case.dtype, "--attention", chosen.attention]
            arguments += ["--seq_len", str(shape.seq_len), "--batch", str(shape.batch), "--steps", "1000000"]
            reference = bare_command(case.ranks, chosen.device, *arguments)
            by_start.append(time_interleaved(ours, reference, pairs=chosen.pairs, seconds=chosen.seconds))
    tokens = shape.batch * shape.seq_len
    ours_seconds = estimate_median([seconds for timings in by_start for seconds in timings.ours])
    reference_seconds = estimate_median([seconds for timings in by_start for seconds in timings.reference])
    ratio = estimate_median([ratio for timings in by_start for ratio in timings.ratios])
    return {
        **asdict(case),
        "seq_len": shape.seq_len,
        "batch": shape.batch,
        "device": chosen.device,
        "bare_attention": chosen.attention,
        "compiled": chosen.compile,
        "ratio": asdict(ratio),
        "ratio_of_each_start": [round(estimate_median(timings.ratios).median, 4) for timings in by_start],
        "ours_step_seconds": ours_seconds.median,
        "bare_step_seconds": reference_seconds.median,
        "ours_tokens_per_second": tokens / ours_seconds.median,
        "target": TARGET,
        "met": ratio.median >= TARGET,
    }


def row(figures: dict[str, Any]) -> list[str]:
    ratio = MedianEstimate(**figures["ratio"])
    return [
        f"{figures['shape']}-{figures['dtype']}-{figures['ranks']}",
        f"{1000 * figures['ours_step_seconds']:.0f}",
        f"{1000 * figures['bare_step_seconds']:.0f}",
        f"{figures['ours_tokens_per_second']:,.0f}",
        f"{ratio.median:.3f}",
        f"{ratio.low:.3f} to {ratio.high:.3f}",
        f"{ratio.quartile_1:.3f} to {ratio.quartile_3:.3f}",
        str(ratio.count),
        met_or_missed(figures["met"]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--only", nargs="+", metavar="SHAPE-DTYPE-RANKS", help="these cases, e.g. debug-bfloat16-2")
    parser.add_argument("--pairs", type=int, default=20, help="maximum of pairs per start")
    parser.add_argument("--seconds", type=float, default=45, help="time limit per start, from the sixth pair on")
    parser.add_argument("--starts", type=int, default=2, help="starts of both sides")
    parser.add_argument("--seq_len", type=int, help="sequence length (default: the shape's)")
    parser.add_argument("--batch", type=int, help="global batch, in rows (default: the shape's)")
    parser.add_argument("--attention", default="plain", choices=("plain", "float32"), help="attention of the bare loop")
    parser.add_argument("--compile", action="store_true", help="torch.compile in Quadriga only")
    parser.add_argument("--name", help="name of the result file (default: speed, or speed_cuda)")
    chosen = parser.parse_args()
    exit_on_sigterm()
    wanted = [parse_case(name) for name in chosen.only] if chosen.only else all_cases(chosen.ranks)
    results: list[dict[str, Any]] = []
    for case in wanted:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        try:
            figures = measure(case, chosen)
        except CommandFailed as failure:
            print(failure, file=sys.stderr)
            break
        results.append(figures)
    print(text_table(HEADER, [row(figures) for figures in results]))
    name = chosen.name or ("speed" if chosen.device == "cpu" else "speed_cuda")
    print(f"\nwritten: {save(name, results, command=command_line(), claim=CLAIM)}")
    return 0 if len(results) == len(wanted) and all(figures["met"] for figures in results) else 1


def parse_case(name: str) -> SpeedCase:
    shape, dtype, ranks = name.split("-")
    return SpeedCase(shape, dtype, int(ranks))


if __name__ == "__main__":
    sys.exit(main())
