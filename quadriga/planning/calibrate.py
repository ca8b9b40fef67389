"""Rates measured in a finished run: its trace says how long products, attention and the update take, its metrics how
long a step does. What is left of a step is work that memory bounds.

What is reckoned with is read and checked by others: `metrics.jsonl` and a trace of the profiler (`cli.estimate`).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.config import Run
from quadriga.config.schema import Profiling
from quadriga.errors import Problem, UserError
from quadriga.hardware import Device
from quadriga.metrics.cycles import Cycle
from quadriga.planning.communication import collective_calls
from quadriga.planning.rates import OPERATION_SECONDS, Rates
from quadriga.planning.setup import Setup
from quadriga.planning.step_time import forward_of, update_of, work_of

ITERATION = re.compile(r"iteration_([0-9]{1,15})")


@dataclass(frozen=True)
class ProfiledStep:
    """Of one profiled step, on the rank of the trace: what its processor was busy with. `forward_products`,
    `forward_attention`: outside of the backward pass; None where the trace does not tell, as that of a GPU."""

    step: float
    products: float
    attention: float
    update: float
    collectives: float
    forward_products: float | None
    forward_attention: float | None


def calibrate(folder: Path, run: Run, device: Device | None, seconds: ProfiledStep, measured: float) -> Rates:
    """Rates of the machine that `run` was trained on, in `folder`. `seconds`: of its trace; `measured`: of a step
    without the profiler. Raises UserError where these do not tell them."""
    setup = Setup(run, "cpu" if device is None or device.name == "CPU" else "cuda")
    work, forward, update = work_of(setup, 0), forward_of(setup, 0), update_of(setup, 0)
    # A profiler slows the host down: its shares of a step are kept, its sum is not.
    scale = measured / seconds.step
    rest = seconds.step - seconds.products - seconds.attention - seconds.update - seconds.collectives
    if min(seconds.products, seconds.attention, rest, measured) <= 0:
        what = "the run's trace shows no matrix products or no attention, or more of them than its steps take"
        raise UserError(Problem("--calibrate", what, str(folder)))
    link = device.link_bandwidth if device and device.link_bandwidth else None
    sent = sum(call.wire_bytes for call in collective_calls(setup, 0))
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


def seconds_a_step(records: Sequence[Mapping[str, Any]], profiling: Profiling, folder: Path) -> float:
    """The median of the logged steps, but for the first two, which warm up, and for those that the profiler slowed
    down, where at least three others are left.

    `records`: of training, by step, each with `step`, `attempt` and `step_seconds`. Raises UserError: too few of them.
    """
    if len(records) < 4:
        what = f"metrics.jsonl has {len(records)} logged steps, too few to tell how long one takes"
        fix = "train at least 10 steps with --metrics.log_freq=1"
        raise UserError(Problem("--calibrate", what, str(folder), fix=fix))
    newest = records[-1]["attempt"]
    attempt = [record for record in records if record["attempt"] == newest]  # each warms up anew
    first, last = attempt[0]["step"], attempt[-1]["step"]
    cycle = Cycle.of_run(profiling.profile_freq, profiling.profiler_warmup, profiling.profiler_active, last - first + 1)
    settled = attempt[2:] or attempt
    undisturbed = [
        each for each in settled if not profiling.enable_profiling or not cycle.disturbs(each["step"], first)
    ]
    return statistics.median(each["step_seconds"] for each in (undisturbed if len(undisturbed) >= 3 else settled))


def newest_trace(folder: Path) -> Path:
    """The trace of rank 0 that a run left last. Raises UserError where there is none."""
    found = {
        int(match[1]): path
        for path in sorted(folder.glob("**/iteration_*/rank0_trace.json*"))
        if (match := ITERATION.fullmatch(path.parent.name))
    }
    if not found:
        fix = "train with --profiling.enable_profiling; its default keeps 5 steps"
        raise UserError(Problem("--calibrate", "no trace of the profiler is there", str(folder), fix=fix))
    return found[max(found)]
