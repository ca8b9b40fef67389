"""Rates measured in a finished run.

Its trace gives the time of products, attention and the update; its metrics give the time of a step. The rest of a step
is memory-bound work. `cli.estimate` reads and checks the files: `metrics.jsonl` and a trace of the profiler.
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
    """Seconds of the mean profiled step on the rank of the trace, in all and by kind of work. `forward_products`,
    `forward_attention`: outside of the backward pass; None if the trace does not show this, as on a GPU."""

    step: float
    products: float
    attention: float
    update: float
    collectives: float
    forward_products: float | None
    forward_attention: float | None


def calibrate(folder: Path, run: Run, device: Device | None, seconds: ProfiledStep, measured: float) -> Rates:
    """Rates of the machine on which `run` was trained.

    `folder`: the run folder, for messages. `seconds`: of its trace. `measured`: seconds of a step without the profiler.
    Raises UserError if the trace has no products or attention, or more of them than its steps take.
    """
    setup = Setup(run, "cpu" if device is None or device.name == "CPU" else "cuda")
    work, forward, update = work_of(setup, 0), forward_of(setup, 0), update_of(setup, 0)
    # A profiler slows the host down, so only the shares of a step are taken from the trace.
    scale = measured / seconds.step
    rest = seconds.step - seconds.products - seconds.attention - seconds.update - seconds.collectives
    if min(seconds.products, seconds.attention, rest, measured) <= 0:
        what = "the run's trace shows no matrix products or no attention, or more of them than its steps take"
        raise UserError(Problem("--calibrate", what, str(folder)))
    link = device.link_bandwidth if device and device.link_bandwidth else None
    sent = sum(call.wire_bytes for call in collective_calls(setup, 0))
    if seconds.collectives > 0 and sent:
        link = sent / (scale * seconds.collectives)
    flops = (forward.products, work.forward_products, work.products)
    forward_products, products = _by_direction(*flops, seconds.forward_products, seconds.products)
    flops = (forward.attention, work.forward_attention, work.attention)
    forward_attention, attention = _by_direction(*flops, seconds.forward_attention, seconds.attention)
    return Rates(
        products=products / scale,
        attention=attention / scale,
        forward_products=forward_products / scale,
        forward_attention=forward_attention / scale,
        memory=work.memory / (scale * rest),
        link=link or float("inf"),
        network=device.network_bandwidth if device else link or float("inf"),
        update=update.memory / (scale * seconds.update) if seconds.update else None,
        operation=0.0 if setup.device_type == "cpu" else OPERATION_SECONDS,
        measured=str(folder),
    )


def _by_direction(
    forward: float, with_recompute: float, whole: float, forward_seconds: float | None, seconds: float
) -> tuple[float, float]:
    """FLOP/s of the forward and of the backward pass. FLOP of the forward pass, with what the backward pass recomputes,
    and of all passes."""
    again, backward = with_recompute - forward, whole - with_recompute
    if not forward_seconds:
        return (both := (forward + again + backward) / seconds), both
    rate = forward / forward_seconds
    # Recompute is slower than the forward pass, so the difference can be near zero or negative: a tenth is the least.
    return rate, backward / max(seconds - forward_seconds - again / rate, 0.1 * seconds)


def seconds_a_step(records: Sequence[Mapping[str, Any]], profiling: Profiling, folder: Path) -> float:
    """Median seconds of the logged steps of the newest attempt.

    The first two steps, which warm up, do not count. Steps that the profiler slows do not count if at least three
    others are left. `records`: of training, by step, each with `step`, `attempt` and `step_seconds`.
    Raises UserError if there are fewer than 4.
    """
    if len(records) < 4:
        what = f"metrics.jsonl has {len(records)} logged steps, too few for a step time"
        fix = "train at least 10 steps with --metrics.log_freq=1"
        raise UserError(Problem("--calibrate", what, str(folder), fix=fix))
    newest = records[-1]["attempt"]
    attempt = [record for record in records if record["attempt"] == newest]  # each attempt warms up again
    first, last = attempt[0]["step"], attempt[-1]["step"]
    cycle = Cycle.of_run(profiling.profile_freq, profiling.profiler_warmup, profiling.profiler_active, last - first + 1)
    settled = attempt[2:] or attempt
    profiled = profiling.enable_profiling
    undisturbed = [each for each in settled if not (profiled and cycle.disturbs(each["step"], first))]
    return statistics.median(each["step_seconds"] for each in (undisturbed if len(undisturbed) >= 3 else settled))


def newest_trace(folder: Path) -> Path:
    """The newest trace of rank 0 in a run folder. Raises UserError if there is none."""
    found = {
        int(match[1]): path
        for path in sorted(folder.glob("**/iteration_*/rank0_trace.json*"))
        if (match := ITERATION.fullmatch(path.parent.name))
    }
    if not found:
        fix = "train with --profiling.enable_profiling; its default keeps 5 steps"
        raise UserError(Problem("--calibrate", "the folder has no profiler trace", str(folder), fix=fix))
    return found[max(found)]
