"""The card of a configuration: a README.md, generated from the resolved run, so every statement in it is true.

The first line is the command that generates the card again. `--check` reads it.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quadriga.config import messages
from quadriga.config.keys import format_toml
from quadriga.config.markdown import code, render
from quadriga.config.mixing import format_mixture
from quadriga.config.read import Run
from quadriga.config.rules import config_value
from quadriga.config.schema import Validation
from quadriga.config.sources import CONFIG_FILE
from quadriga.config.variables import VARIABLES
from quadriga.hardware import Device
from quadriga.units import format_seconds

GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class CardFigures:
    """Figures from arithmetic: parameters, FLOPs of one token (forward and backward), and rows of the estimate.

    `estimated`: (what, for one rank). `devices`: (device, memory, needed, verdict, step time).
    """

    parameters: int
    flops_per_token: float
    estimated: tuple[tuple[str, str], ...] = ()
    devices: tuple[tuple[str, str, str, str, str], ...] = ()


@dataclass(frozen=True)
class CardTarget:
    """The target of a card: the TOML file relative to the repository's root, the number of GPUs, the device."""

    file: str
    gpus: int
    device: str | None = None

    @property
    def unit(self) -> str:
        """The name of a rank in the text: `GPU`, or `rank` if the card is made for the CPU."""
        return "rank" if (self.device or "").lower() == "cpu" else "GPU"

    @property
    def header(self) -> str:
        device = f" --device {shlex.quote(self.device)}" if self.device else ""
        return f"<!-- quadriga card {shlex.quote(self.file)} --ngpu {self.gpus}{device} -->"


def read_target(card: str) -> CardTarget | None:
    """The target in the first line of a card; None if there is none."""
    found = re.match(r"<!-- quadriga card (.+) -->\n", card)
    try:
        arguments = shlex.split(found[1]) if found else []
    except ValueError:  # an open quotation mark
        return None
    match arguments:
        case [file, "--ngpu", gpus, *rest] if re.fullmatch(r"[1-9][0-9]{0,8}", gpus):
            if not rest or (len(rest) == 2 and rest[0] == "--device"):
                return CardTarget(file, int(gpus), rest[1] if rest else None)
    return None


def render_card(run: Run, target: CardTarget, figures: CardFigures, device: Device | None) -> str:
    """The card as Markdown. `run` must be resolved for `target.gpus` ranks; `device` is that of `target.device`."""
    config, spec, training = run.config, run.spec, run.config.training
    place = {"builtin": ", the Python standard library's text", "c4": ", streamed from the Hugging Face Hub"}
    where = f" from {code(training.dataset_path)}" if training.dataset_path else place.get(training.dataset, "")
    return render(
        Path(__file__).with_name("card.md.jinja"),
        run=run,
        target=target,
        figures=figures,
        config=config,
        spec=spec,
        messages=messages,
        described=messages.describe(run, target.unit),
        log=math.log,
        variables=[(code(name), *texts) for name, *texts in VARIABLES],
        data=format_mixture(training) if training.sources else f"{code(training.dataset)}{where}",
        validation_data=_validation_data(config.validation),
        file=f"./{target.file}",
        machines=-(-spec.world_size // GPUS_PER_MACHINE),
        other_numbers=_other_numbers(run),
        hardware=_hardware(run, figures, device),
        keys=[
            (code(key), code(format_toml(config_value(config, key))))
            for key in sorted(run.origin)
            if key != CONFIG_FILE
        ],
    )


def _validation_data(section: Validation) -> str:
    return ", ".join(code(each.label or each.dataset) for each in section.read_sets)


def _other_numbers(run: Run) -> str:
    """The other numbers of ranks on which the file runs."""
    training, degrees = run.config.training, run.spec.degrees
    if run.config.parallelism.data_parallel_shard_degree != -1:
        return ""
    free = " `data_parallel_shard_degree = -1` takes all ranks that remain"
    others = run.spec.world_size // degrees.dp_shard
    if training.global_batch_size == -1:
        return f"{free}, so the file runs on any number of ranks{f' that {others} divides' if others > 1 else ''}."
    rows = training.global_batch_size // training.local_batch_size // degrees.dp_replicate
    fits = [others * shard for shard in range(1, rows + 1) if rows % shard == 0]
    return f"{free}; the global batch of {training.global_batch_size} allows {', '.join(map(str, fits))} ranks."


def _hardware(run: Run, figures: CardFigures, device: Device | None) -> Iterator[str]:
    if device and not (device.memory is None or device.memory_bandwidth is None or device.link_bandwidth is None):
        training = run.config.training
        compute = training.mixed_precision_param
        peak = device.peak_flops(compute, training.float32_matmul_precision)
        yield (
            f"{device.name}: {device.memory / 1e9:.0f} GB, {device.memory_bandwidth / 1e12:.3g} TB/s, {device.link} "
            f"with {device.link_bandwidth / 1e9:.0f} GB/s in each direction ({device.source})."
        )
        if peak is None:
            yield f"This device has no units for {compute}."
        else:
            least = figures.flops_per_token * run.spec.tokens_per_step / (peak * run.spec.world_size)
            yield (
                f"Its peak for {compute} matrix products is {peak / 1e12:.4g} TFLOP/s, so a step takes at least "
                f"{format_seconds(least) if least >= 1 else f'{1000 * least:.0f} ms'}. This is a bound from "
                "arithmetic, not a measurement."
            )
        if cost := messages.float32_cost(training, device):
            yield f"{cost[0].upper()}{cost[1:]}."
    if run.spec.degrees.dp_shard > 1:
        yield "The GPUs of a machine should share a fast link such as NVLink: parameters are gathered over it."
    elif run.spec.world_size > 1:
        yield "Gradients are sent between GPUs once per step."
    else:
        yield "Nothing is sent between GPUs."
    yield "The same file runs on CPUs over gloo (`COMM_BACKEND=gloo`), slowly, for tests of small sizes."
