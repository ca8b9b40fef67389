"""Rates measured in a finished run: its trace says how long products, attention and the update take, its metrics how
long a step does. What is left of a step is work that memory bounds.

From the folder alone: `config.toml`, `environment.json`, `metrics.jsonl` and a trace of the profiler.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.config import Run
from quadriga.config.schema import Profiling
from quadriga.cycles import Cycle
from quadriga.errors import Problem, UserError
from quadriga.estimate.communication import calls_of
from quadriga.estimate.rates import OPERATION_SECONDS, Rates
from quadriga.estimate.setup import Setup
from quadriga.estimate.step_time import forward_of, update_of, work_of
from quadriga.hardware import Device

PRODUCTS = re.compile(r"aten::(mm|addmm|bmm|_scaled_mm)$|gemm|cutlass|sm\d+_xmma|nvjet", re.IGNORECASE)
ATTENTION = re.compile(r"attention|flash_|fmha", re.IGNORECASE)
UPDATE = re.compile(r"Optimizer\.step#|_fused_adam|_foreach_norm|_foreach_mul_", re.IGNORECASE)
STEP = re.compile(r"ProfilerStep#\d+$")
BACKWARD = re.compile(r"^autograd::engine::evaluate_function")
COLLECTIVE = re.compile(r"nccl|gloo:|c10d::", re.IGNORECASE)
PATTERNS = {"update": UPDATE, "collectives": COLLECTIVE, "attention": ATTENTION, "products": PRODUCTS}


@dataclass(frozen=True)
class Seconds:
    """Of one profiled step, on the rank of the trace: what its processor was busy with. `forward_products`,
    `forward_attention`: outside of the backward pass; None where the trace does not tell, as that of a GPU."""

    step: float
    products: float
    attention: float
    update: float
    collectives: float
    forward_products: float | None
    forward_attention: float | None


def calibrate(folder: Path, run: Run, device: Device | None) -> Rates:
    """Rates of the machine that `run` was trained on. Raises UserError where its folder does not tell them."""
    trace = _newest_trace(folder)
    seconds = seconds_of_trace(trace)
    measured = seconds_a_step(folder, run.config.profiling)
    setup = Setup(run, "cpu" if device is None or device.name == "CPU" else "cuda")
    work, forward, update = work_of(setup, 0), forward_of(setup, 0), update_of(setup, 0)
    # A profiler slows the host down: its shares of a step are kept, its sum is not.
    scale = measured / seconds.step
    rest = seconds.step - seconds.products - seconds.attention - seconds.update - seconds.collectives
    if min(seconds.products, seconds.attention, rest) <= 0:
        what = f"{trace} shows no matrix products, or more of them than its steps take"
        raise UserError(Problem("--calibrate", what))
    link = device.link_bandwidth if device and device.link_bandwidth else None
    sent = sum(call.wire_bytes for call in calls_of(setup, 0))
    if seconds.collectives > 0 and sent:
        link = sent / (scale * seconds.collectives)
    products = _by_direction(
        *(forward.products, work.forward_products - forward.products, work.products - work.forward_products),
        seconds.forward_products,
        seconds.products,
    )
    attention = _by_direction(
        *(forward.attention, work.forward_attention - forward.attention, work.attention - work.forward_attention),
        seconds.forward_attention,
        seconds.attention,
    )
    return Rates(
        products=products[1] / scale,
        attention=attention[1] / scale,
        forward_products=products[0] / scale,
        forward_attention=attention[0] / scale,
        memory=work.memory / (scale * rest),
        link=link or float("inf"),
        network=device.network_bandwidth if device else link or float("inf"),
        update=update.memory / (scale * seconds.update) if seconds.update else None,
        operation=0.0 if setup.device_type == "cpu" else OPERATION_SECONDS,
        measured=str(folder),
    )


def _by_direction(
    forward: float, again: float, backward: float, forward_seconds: float | None, seconds: float
) -> tuple[float, float]:
    """FLOP/s of the forward and of the backward pass. `again`: FLOP of forward passes within backward passes."""
    if not forward_seconds:
        return (both := (forward + again + backward) / seconds), both
    rate = forward / forward_seconds
    # A run that recomputes does so more slowly than it went forward, which may leave nothing: then a tenth is left.
    return rate, backward / max(seconds - forward_seconds - again / rate, 0.1 * seconds)


def seconds_a_step(folder: Path, profiling: Profiling) -> float:
    """The median of the steps that were logged, but for the first two, which warm up, and for those that the profiler
    slowed down, where at least three others are left."""
    path = folder / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(Problem("--calibrate", f"{path} cannot be read: {error}", str(folder))) from None
    logged = [record for record in records if record.get("kind") == "train" and "step_seconds" in record]
    if len(logged) < 4:
        what = f"{path} has {len(logged)} logged steps, too few to tell how long one takes"
        fix = "train at least 10 steps with --metrics.log_freq=1"
        raise UserError(Problem("--calibrate", what, str(folder), fix=fix))
    attempt = [record for record in logged if record["attempt"] == logged[-1]["attempt"]]  # each warms up anew
    first, last = attempt[0]["step"], attempt[-1]["step"]
    cycle = Cycle.of(profiling.profile_freq, profiling.profiler_warmup, profiling.profiler_active, last - first + 1)
    settled = attempt[2:] or attempt
    calm = [each for each in settled if not profiling.enable_profiling or not cycle.disturbs(each["step"], first)]
    return statistics.median(each["step_seconds"] for each in (calm if len(calm) >= 3 else settled))


def _newest_trace(folder: Path) -> Path:
    found = sorted(folder.glob("**/iteration_*/rank0_trace.json*"))
    if not found:
        fix = "train with --profiling.enable_profiling; its default keeps 5 steps"
        raise UserError(Problem("--calibrate", "no trace of the profiler is there", str(folder), fix=fix))
    return max(found, key=lambda path: int(re.findall(r"iteration_(\d+)", str(path))[-1]))


def seconds_of_trace(path: Path) -> Seconds:
    """Sums over the profiled steps, by what an event is. Of nested events the outermost of a kind counts."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if STEP.match(event.get("name", "")) and event.get("cat") == "user_annotation"]
    if not steps:
        raise UserError(Problem("--calibrate", f"{path} has no marks of steps"))
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy")]
    busy = on_device or [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    totals: dict[str, float] = defaultdict(float)
    for kind, pattern in PATTERNS.items():
        totals[kind] = sum(_outermost([event for event in busy if pattern.search(event["name"])]))
    count = len(steps)
    seconds = {kind: total / count / 1e6 for kind, total in totals.items()}
    outside = [] if on_device else _outside(busy, BACKWARD)

    def forward(kind: str) -> float | None:
        found = [event for event in outside if PATTERNS[kind].search(event["name"])]
        return sum(_outermost(found)) / count / 1e6 if found else None

    return Seconds(
        step=sum(event["dur"] for event in steps) / count / 1e6,
        **seconds,
        forward_products=forward("products"),
        forward_attention=forward("attention"),
    )


def _outside(events: list[dict[str, Any]], pattern: re.Pattern[str]) -> list[dict[str, Any]]:
    """Events that lie in none of those that the pattern finds, on their thread."""
    ends: dict[Any, float] = {}
    found = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        thread = event.get("pid"), event.get("tid")
        if event["ts"] < ends.get(thread, -1.0):
            continue
        if pattern.search(event["name"]):
            ends[thread] = event["ts"] + event["dur"]
        else:
            found.append(event)
    return found


def _outermost(events: list[dict[str, Any]]) -> Iterator[float]:
    """Durations, in microseconds, of events that lie in no other one of their thread."""
    ends: dict[Any, float] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        thread = event.get("pid"), event.get("tid")
        if event["ts"] >= ends.get(thread, -1.0):
            ends[thread] = event["ts"] + event["dur"]
            yield event["dur"]
