"""An estimate as text: first whether the run fits, then why. For a terminal, and for the card of a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quadriga.hardware import DEVICES, device_named
from quadriga.planning.advice import Advice
from quadriga.planning.estimate import COMMON_DEVICES, TIMES, Estimate, estimate
from quadriga.units import GIB, format_bytes, format_count, format_seconds, plural

WIDTH = 13  # of the row names
TIME_NAMES = {"memory_bound": "memory-bound", "bubble": "pipeline idle"}


def format_estimate(given: Estimate, advice: Sequence[Advice] = ()) -> Iterator[str]:
    """The lines that `quadriga estimate` prints."""
    spec = given.run.spec
    device = f" on {given.device.slug}" if given.device else ""
    yield f"Estimate of {spec.model.name} {spec.model.flavor}, {plural(spec.world_size, 'rank')}{device}"
    yield ""
    yield from (f"  {name:<{WIDTH}}{text}" for name, text in estimate_rows(given))
    yield ""
    yield from _timeline(given)
    yield ""
    yield from _communication(given)
    if advice:
        yield ""
        fit = given.memory_fit()
        yield "What would help:" if fit and not fit.fits else "What would be faster:"
        yield from (f"  - {each}" for each in advice)
    yield ""
    yield "Assumed:"
    yield from (f"  - {each}" for each in given.assumptions)


def estimate_rows(given: Estimate) -> Iterator[tuple[str, str]]:
    """(name, text) of verdict, memory and time. A row that continues the previous one has an empty name."""
    yield "verdict", format_memory_fit(given)
    yield from memory_rows(given)
    yield from time_rows(given)


def format_memory_fit(given: Estimate) -> str:
    needed, fit = format_bytes(given.needed), given.memory_fit()
    if fit is not None:
        margin = f"{format_bytes(abs(fit.capacity - fit.needed))} {'left' if fit.fits else 'missing'}"
        return f"{fit.label}: {needed} of {format_bytes(fit.capacity)} needed per device, {margin}"
    if given.setup.device_type == "cpu":
        return f"{needed} needed per rank; the capacity of the machine is not known"
    fits = [(slug, given.memory_fit(device_named(slug, "device"))) for slug in COMMON_DEVICES]
    return f"{needed} needed per device: {', '.join(f'{slug} {fit.label}' for slug, fit in fits if fit)}"


def device_rows(given: Estimate) -> Iterator[tuple[str, str, str, str, str]]:
    """(device, capacity, needed memory, verdict, step time) for every device of the table with a known capacity."""
    for device in DEVICES:
        found = estimate(given.run, device, gpus_per_node=given.gpus_per_node)
        if fit := found.memory_fit():
            step = _step(found.time.total) if found.time else "no units for this format"
            yield device.slug, format_bytes(fit.capacity), format_bytes(fit.needed), fit.label, step


def memory_rows(given: Estimate) -> Iterator[tuple[str, str]]:
    worst = given.worst
    where = f" (pipeline rank {worst.rank})" if len(given.memories) > 1 else ""
    outside = f", {format_bytes(given.outside_allocator)} outside torch" if given.outside_allocator else ""
    if given.outside_allocator and given.heap:
        outside += " with the symmetric heap"
    peak = worst.peak
    amounts = f"active {format_bytes(peak.total)}, reserved {format_bytes(worst.reserved)}{outside}"
    yield "memory", f"{amounts}; peak: {peak.name}{where}"
    kinds = [part for part in sorted(peak.by_kind.items(), key=lambda part: -part[1]) if part[1] > 0.005 * peak.total]
    yield "", "at the peak: " + ", ".join(f"{kind} {format_bytes(size)}" for kind, size in kinds)
    yield "", f"largest parts: {' and '.join(worst.binding)}"
    if given.heap:
        yield "heap needed", str(given.heap)
    unit = "per rank"
    if worst.host:
        unit = f"of host memory per rank ({format_bytes(given.host_per_machine)} per machine)"
    state = {"parameters": worst.parameters, "gradients": worst.gradients, "Adam's moments": worst.moments}
    parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in state.items())
    yield "state", f"{parts} = {format_bytes(sum(state.values()))} {unit}"
    batches = f", {worst.in_flight} passes at once" if worst.in_flight > 1 else ""
    each = format_bytes(worst.activations_per_block)
    yield "activations", f"{format_bytes(worst.activations)}, {each} per block and micro-batch{batches}"


def time_rows(given: Estimate) -> Iterator[tuple[str, str]]:
    time, spec = given.time, given.run.spec
    work = f"{format_count(given.flops_per_step)}FLOP of the model"
    if time is None:
        yield "time", f"not predicted without a device's figures; {work} per step"
        return
    label = "" if given.rates and given.rates.measured else ", uncalibrated"
    speed = given.tokens_per_second_per_device
    mfu = f", MFU {given.mfu:.0%}" if given.mfu is not None else ""
    yield "time", f"{_step(time.total)} per step{label}: {speed:,.0f} tokens/s per device{mfu}; {work}"
    shares = {TIME_NAMES.get(kind, kind): getattr(time, kind) / time.total for kind in TIMES if kind != "hidden"}
    largest = sorted(shares.items(), key=lambda part: -part[1])
    yield "", ", ".join(f"{name} {share:.0%}" for name, share in largest if share >= 0.005)
    whole = time.total * spec.steps
    yield "", f"{spec.steps:,} steps: {format_seconds(whole)}, {whole * spec.world_size / 3600:,.1f} device-hours"


def _timeline(given: Estimate) -> Iterator[str]:
    if len(given.memories) == 1:
        yield "  moment                     active      of which activations, logits, gathered, gradients"
        for moment in sorted(given.worst.timeline, key=lambda each: -each.total)[:6]:
            kinds = ("activations", "logits and loss", "gathered parameters", "gradients")
            sizes = "  ".join(f"{moment.by_kind.get(kind, 0) / GIB:9.2f}" for kind in kinds)
            yield f"  {moment.name:<24}{format_bytes(moment.total):>11}  {sizes}"
        return
    yield "  pipeline rank   active     reserved    state   activations  passes at once"
    for memory in given.memories:
        state = memory.parameters + memory.gradients + memory.moments
        yield (
            f"  {memory.rank:<13}{format_bytes(memory.peak.total):>11}{format_bytes(memory.reserved):>12}"
            f"{format_bytes(state):>12}{format_bytes(memory.activations):>12}{memory.in_flight:>10}"
        )


def _communication(given: Estimate) -> Iterator[str]:
    sent = given.bytes_by_axis()
    if not sent:
        yield "  Nothing is sent."
        return
    yield f"  {'axis':<14}{'collective':<16}{'calls/step':>12}  {'bytes':>12}  {'sent':>12}"
    for (axis, kind), (calls, size, wire) in sent.items():
        yield f"  {axis:<14}{kind:<16}{calls:>12,.0f}  {format_bytes(size):>12}  {format_bytes(wire):>12}"


def _step(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
