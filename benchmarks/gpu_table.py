"""Judges what `gpu_check.sh` measured: one table of targets, figures, and whether they were met.

    python benchmarks/gpu_table.py FOLDER               # the folder of the results, unpacked
    python benchmarks/gpu_table.py FOLDER --record      # keeps the losses of its debug run, made on a CPU

The losses of the CPU are in `gpu_check_losses.json`; `tests/project/test_gpu_check.py` compares them with what the CPU
trains today. A target whose step did not run is shown as such. The exit code is 0 if none is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import BENCHMARKS, met_or_missed, text_table

LOSSES = BENCHMARKS / "gpu_check_losses.json"
WIDE = ("wide_bf16", "wide_compiled", "wide_float8", "wide_mixed")
KERNELS = ("CUDNN_ATTENTION", "FLASH_ATTENTION")  # of bfloat16, that suit a GPU of the Hopper generation
WARM_UP = 3  # steps that do not count in speeds: kernels are chosen and compiled there
NOT_RUN = "not run"


@dataclass(frozen=True)
class Target:
    """`figure`: as text, None if it was not measured. `met`: None if there is no target, or no figure."""

    name: str
    target: str
    figure: str | None = None
    met: bool | None = None

    @property
    def row(self) -> list[str]:
        verdict = NOT_RUN if self.figure is None else "" if self.met is None else met_or_missed(self.met)
        return [self.name, self.target, self.figure or "", verdict]


@dataclass(frozen=True)
class Results:
    """The files of a folder. Records are those of training steps, in their order."""

    runs: dict[str, list[dict[str, Any]]]
    estimates: dict[str, dict[str, Any]]
    probe: dict[str, Any]
    codes: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> Results:
        runs = {path.stem: read_lines(path) for path in sorted(folder.glob("*.jsonl"))}
        steps, probe = runs.pop("steps", []), folder / "probe.json"
        return cls(
            runs={name: [row for row in rows if row["kind"] == "train"] for name, rows in runs.items()},
            estimates={
                path.name.removesuffix(".estimate.json"): json.loads(path.read_text(encoding="utf-8"))
                for path in sorted(folder.glob("*.estimate.json"))
            },
            probe=json.loads(probe.read_text(encoding="utf-8")) if probe.exists() else {},
            codes={each["step"]: each["code"] for each in steps},
        )

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.runs.get(name, [])]

    def speed(self, name: str, key: str) -> float | None:
        """The median of a figure over the steps after warm-up; None without such steps."""
        values = [row[key] for row in self.runs.get(name, []) if row["step"] > WARM_UP and row[key] is not None]
        return statistics.median(values) if values else None

    def answer(self, question: str) -> Any:
        """None if it was not asked, or failed."""
        found = self.probe.get(question)
        return None if isinstance(found, dict) and "failed" in found else found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a file, also those of steps that were trained again after a resume."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def targets(results: Results, cpu_losses: list[float]) -> list[Target]:
    return [
        *(step_ran(results, name) for name in ("debug", *WIDE, "trace", "nvshmem", "tests", "modes")),
        losses_alike("debug run, losses against the CPU's", results.losses("debug"), cpu_losses, 1e-4),
        losses_alike(
            "compiled, losses against eager", results.losses("wide_compiled"), results.losses("wide_bf16"), 1e-2
        ),
        *(speed(results, name) for name in WIDE if name != "wide_float8"),
        float8_speed(results),
        *(memory(results, name, *kind) for name in WIDE for kind in (("active", 0.03), ("reserved", 0.08))),
        resumed(results.runs.get("resume", [])),
        *probed(results),
    ]


def step_ran(results: Results, name: str) -> Target:
    code = results.codes.get(name)
    return Target(f"step {name}", "exit code 0", None if code is None else f"exit code {code}", code == 0)


def losses_alike(name: str, ours: list[float], theirs: list[float], tolerance: float) -> Target:
    """The largest relative difference of two runs; a run with fewer steps misses the target."""
    target = f"<= {tolerance:.0e} relative"
    if not ours or not theirs:
        return Target(name, target)
    if len(ours) != len(theirs):
        return Target(name, target, f"{len(ours)} steps of {len(theirs)}", False)
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return Target(name, target, f"{difference:.1e}", difference <= tolerance)


def speed(results: Results, name: str) -> Target:
    """MFU against the peak of bfloat16. The goal is of runs without recompute."""
    mfu, rate = results.speed(name, "mfu"), results.speed(name, "tokens_per_second_per_device")
    figure = None if rate is None else f"{rate:,.0f} tokens/s, MFU {'unknown' if mfu is None else f'{mfu:.1%}'}"
    if name == "wide_mixed":
        return Target(f"{name}, speed", "(reported)", figure)
    return Target(f"{name}, speed", "MFU >= 45 % (goal 50 %)", figure, mfu is not None and mfu >= 0.45)


def float8_speed(results: Results) -> Target:
    rates = [results.speed(name, "tokens_per_second_per_device") for name in ("wide_float8", "wide_compiled")]
    name, target = "float8 against bfloat16, compiled", ">= 1.20 x"
    if rates[0] is None or rates[1] is None:
        return Target(name, target)
    ratio = rates[0] / rates[1]
    return Target(name, target, f"{ratio:.2f} x, {rates[0]:,.0f} tokens/s", ratio >= 1.2)


def memory(results: Results, name: str, kind: str, tolerance: float) -> Target:
    """The peak of all steps against the estimate for the device that the run found."""
    title, target = f"{name}, {kind} memory", f"estimate within {tolerance:.0%}"
    measured = [row[f"memory_{kind}_gib"] for row in results.runs.get(name, []) if f"memory_{kind}_gib" in row]
    if not measured or name not in results.estimates:
        return Target(title, target)
    peak, predicted = max(measured), results.estimates[name]["memory"][f"peak_{kind}_gib"]
    error = predicted / peak - 1
    return Target(title, target, f"{peak:.2f} GiB, estimate {error:+.1%}", abs(error) <= tolerance)


def resumed(records: list[dict[str, Any]]) -> Target:
    """The steps that were trained twice, before and after a resume, have the same losses to the bit."""
    name, target = "resume, losses of repeated steps", "equal to the bit"
    if not records:
        return Target(name, target)
    first, second = ({row["step"]: row["loss"] for row in records if row["attempt"] == number} for number in (1, 2))
    equal = [first.get(step) == loss for step, loss in second.items()]
    return Target(name, target, f"{sum(equal)} of {len(equal)} equal", bool(equal) and all(equal))


def probed(results: Results) -> Iterator[Target]:
    attention = results.answer("attention_time")
    default = attention and attention["default"]
    yield Target("attention kernel of bfloat16", " or ".join(KERNELS), default, default in KERNELS)
    times = attention and ", ".join(f"{name} {attention[name]['ms']:.2f} ms" for name in KERNELS)
    yield Target("attention of one block, both passes", "(reported)", times)
    yield from parts_of_attention(results.answer("attention_of_parts"))
    race = results.answer("race_of_found_inf")
    wrong = race and race["good_steps_skipped"] + race["bad_steps_taken"]
    figure = race and f"{wrong} of {race['rounds']} wrong"
    yield Target("CPU offload, updates skipped or made wrongly", "0", figure, wrong == 0)
    for question in ("rates", "copies_to_the_device", "norm_time", "update_time"):
        found = results.answer(question)
        shown = found and ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        yield Target(f"probe {question}", "(reported)", shown)


def parts_of_attention(errors: dict[str, list[float]] | None) -> Iterator[Target]:
    """Those of bfloat16 within its rounding, those of float32 within that of the kernel's products."""
    for dtype, tolerance in (("bfloat16", 2e-2), ("float32", 5e-5)):
        name, target = f"context parallelism, attention in {dtype}", f"<= {tolerance:.0e} relative"
        found = [max(values) for case, values in (errors or {}).items() if case.startswith(dtype)]
        yield Target(name, target, f"{max(found):.1e}" if found else None, bool(found) and max(found) <= tolerance)


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge what gpu_check.sh measured.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", action="store_true", help="write gpu_check_losses.json from its debug run")
    chosen = parser.parse_args()
    results = Results.read(chosen.folder)
    if chosen.record:
        LOSSES.write_text(json.dumps(results.losses("debug"), indent=2) + "\n", encoding="utf-8")
        return 0
    found = targets(results, json.loads(LOSSES.read_text(encoding="utf-8")))
    print(text_table(["measured", "target", "figure", "verdict"], [each.row for each in found]))
    return int(any(each.figure is not None and each.met is False for each in found))


if __name__ == "__main__":
    sys.exit(main())
