"""The CCL-Bench workload card of a run: every field of its schema, and a section `quadriga` for what the schema lacks.

A field is empty if neither the run folder nor the command line has its value. The section `quadriga` then gives the
reason. `batch_size` is the global one, because the schema's `mfu` needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from quadriga.config import Run
from quadriga.config.markdown import render
from quadriga.config.messages import moments_dtype
from quadriga.hardware import Device, find_device

CARD_NAME = "workload_card.yaml"
FAMILIES = {
    "8B": "llama-3.1-8b",
    "70B": "llama-3.1-70b",
    "405B": "llama-3.1-405b",
    "1B": "llama-3.2-1b",
    "3B": "llama-3.2-3b",
}
HUB = "https://huggingface.co/meta-llama/"
NOT_GIVEN = "not given; set it with an option of `quadriga ccl-bench write`"
BITS = 8 / 1e9  # from bytes/s to Gbit/s


@dataclass(frozen=True)
class CardOptions:
    """Facts from the command line that a run folder does not contain; None if not given."""

    scale_out_gbps: float | None
    scale_up_gbps: float | None
    gpus_per_node: int | None
    texts: Mapping[str, str | None]

    ABOUT: ClassVar[Mapping[str, str]] = {
        "description": "what the workload is (default: the run's own description)",
        "contributor": "your name",
        "contact": "your address",
        "trace_url": "where the traces can be downloaded",
        "hf_url": "the model on Hugging Face (default: that of a known size)",
        "topology": "of the network (default, on one machine: the link between its devices)",
        "driver_version": "of the devices (default: the CUDA version that torch was built for)",
    }


def build_card(
    run: Run,
    environment: Mapping[str, Any],
    given: CardOptions,
    profiled: Sequence[int],
    last: Mapping[str, Any] | None,
    collectives_by_axis: Mapping[str, Any],
) -> dict[str, Any]:
    """The card of a run.

    Args:
        environment: contents of its environment.json.
        profiled: the steps of the run that the traces contain.
        last: its newest training record.
        collectives_by_axis: by axis, the collectives in the traces.
    """
    device, on_gpu = _device(environment), bool(environment.get("devices"))
    family = FAMILIES.get(run.spec.model.flavor)
    text = render(
        Path(__file__).with_name("workload_card.json.jinja"),
        run=run,
        environment=environment,
        given=given,
        texts=given.texts,
        description=_description(run, given, profiled),
        family=family,
        hf_url=HUB + family.replace("llama", "Llama").replace("b", "B") if family else None,
        device=device,
        device_name=_device_name(device, environment),
        link_gbps=device.link_bandwidth * BITS if device and device.link_bandwidth else None,
        nodes=_nodes(environment),
        on_gpu=on_gpu,
        backend=str(environment.get("backend")),
        profiled=list(profiled),
        moments_dtype=moments_dtype(run),
        last_record={key: last[key] for key in ("step", "loss", "tokens_seen")} if last else None,
        collectives_by_axis=dict(collectives_by_axis),
        empty=_empty(environment, given),
    )
    card: dict[str, Any] = json.loads(text)
    return card


def _description(run: Run, given: CardOptions, profiled: Sequence[int]) -> str:
    spec = run.spec
    text = given.texts["description"] or run.config.job.description
    return (
        f"{text.rstrip('.')}. Batch: {spec.global_batch_size} sequences globally = {spec.degrees.batch} data-parallel "
        f"ranks x {spec.local_batch_size} local x {spec.accumulation_steps} accumulated, of {spec.seq_len} tokens. "
        f"Profiled steps: {len(profiled)}."
    )


def _empty(environment: Mapping[str, Any], given: CardOptions) -> dict[str, str]:
    """The reasons of empty fields."""
    why = {name: NOT_GIVEN for name in ("trace_url", "contributor", "contact") if not given.texts[name]}
    if given.scale_out_gbps is None:
        why["bandwidth_gbps[0] (scale-out)"] = NOT_GIVEN
    if environment.get("backend") != "gloo":
        why["protocol_selection"] = "the library chooses it, and the run does not record the choice"
    return why


def _device(environment: Mapping[str, Any]) -> Device | None:
    names = environment.get("devices") or ["cpu"]
    return find_device(str(names[0]))


def _device_name(device: Device | None, environment: Mapping[str, Any]) -> str:
    """`nvidia_h100`, as in the tables of CCL-Bench's tools; the driver's name for a device that `hardware` lacks."""
    if device is None:
        return str((environment.get("devices") or ["cpu"])[0])
    if device.name == "CPU":
        return "cpu"
    family = "_".join(word for word in device.name.lower().split() if not word.endswith("gb"))
    return f"{'amd' if family.startswith('mi') else 'nvidia'}_{family}"


def _nodes(environment: Mapping[str, Any]) -> int:
    """The number of machines of the run, from its NNODES; else 1."""
    text = str((environment.get("environment") or {}).get("NNODES", "1"))
    return int(text) if re.fullmatch(r"0*[1-9][0-9]{0,8}", text) else 1
