"""The CCL-Bench workload card of a run: every field of its schema, and a section `quadriga` for what the schema lacks.

A field is empty if neither the run folder nor the command line has its value. The section `quadriga` then gives the
reason. `batch_size` is the global one, because the schema's `mfu` needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quadriga.config import Run
from quadriga.config.messages import moments_dtype
from quadriga.hardware import Device, find_device

CARD_NAME = "workload_card.yaml"
PRECISION = {"float32": "fp32", "bfloat16": "bf16"}
LIBRARIES = {"gloo": "Gloo", "nccl": "NCCL", "nccl-symm": "NCCL", "nvshmem": "NVSHMEM"}
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
    device = _device(environment)
    nodes = _nodes(environment)
    return {
        "version": 1,
        "description": _description(run, given, profiled),
        "hf_url": given.texts["hf_url"] or _hf_url(run),
        "trace_url": given.texts["trace_url"],
        "contributor": given.texts["contributor"],
        "contact": given.texts["contact"],
        "workload": {
            "model": _model(run),
            "data": _data(run),
            "hardware": _hardware(run, environment, given, device, nodes),
        },
        "Model-executor": _executor(run, environment),
        "metric_source": {"traces": ["json"], "metrics_specific_trace": []},
        "quadriga": {
            **_quadriga_section(run, environment, profiled, last),
            "collective_backend": {
                "declared": environment.get("backend"),
                "achieved": dict(collectives_by_axis) or None,
            },
            "empty_fields": _empty(environment, given),
        },
    }


def _description(run: Run, given: CardOptions, profiled: Sequence[int]) -> str:
    spec = run.spec
    text = given.texts["description"] or run.config.job.description
    return (
        f"{text.rstrip('.')}. Batch: {spec.global_batch_size} sequences globally = {spec.degrees.batch} data-parallel "
        f"ranks x {spec.local_batch_size} local x {spec.accumulation_steps} accumulated, of {spec.seq_len} tokens. "
        f"Profiled steps: {len(profiled)}."
    )


def _model(run: Run) -> dict[str, Any]:
    spec = run.spec.model
    return {
        "phase": "training",
        "moe": False,
        "granularity": "model_fwd_bwd_pass",
        "model_family": FAMILIES.get(spec.flavor, f"{spec.name}-{spec.flavor}"),
        "precision": PRECISION[run.config.training.mixed_precision_param],
        "epochs": 1,
        "iteration": run.spec.steps,
        "model_arch": {
            "num_params": spec.n_parameters,
            "num_params_embedding": spec.vocab_size * spec.dim,  # without the output layer, which is a matrix product
            "num_layers": spec.n_layers,
            "num_heads": spec.n_heads,
            "head_dim": spec.head_dim,
        },
    }


def _data(run: Run) -> dict[str, Any]:
    spec = run.spec
    return {
        "batch_size": spec.global_batch_size,
        "batch_size_scope": "global",
        "local_batch_size": spec.local_batch_size,
        "gradient_accumulation_steps": spec.accumulation_steps,
        "seq_len": spec.seq_len,
        "input_len": spec.seq_len,
        "output_len": 0,  # nothing is generated in training
        "dataset": run.config.training.dataset,
    }


def _hardware(
    run: Run, environment: Mapping[str, Any], given: CardOptions, device: Device | None, nodes: int
) -> dict[str, Any]:
    link = device.link if device else None
    scale_up = given.scale_up_gbps or (device.link_bandwidth * BITS if device and device.link_bandwidth else None)
    on_gpu = bool(environment.get("devices"))
    return {
        "network_topo": {
            "topology": given.texts["topology"] or (link if nodes == 1 else None),
            "bandwidth_gbps": [given.scale_out_gbps, scale_up],  # the schema's order: scale-out, scale-up
        },
        "xpu_spec": {
            "type": "GPU" if on_gpu else "CPU",
            "model": _device_name(device, environment),
            "total_count": run.spec.world_size,
            "count_per_node": given.gpus_per_node or run.spec.world_size // nodes,
        },
        "driver_version": given.texts["driver_version"] or _cuda(environment) or ("none" if not on_gpu else None),
    }


def _executor(run: Run, environment: Mapping[str, Any]) -> dict[str, Any]:
    degrees, backend = run.spec.degrees, str(environment.get("backend"))
    pipeline = run.config.parallelism.pipeline_parallel_microbatch_size
    version = environment.get("nccl") if backend.startswith("nccl") else f"torch {_torch(environment)}"
    return {
        "framework": {
            "name": f"quadriga {environment.get('quadriga')}",
            "compiler_tool_selection": "inductor" if run.config.compile.enable else "plain_pytorch",
        },
        "model_plan_parallelization": {
            "dp_replicate": degrees.dp_replicate,
            "dp_shard": degrees.dp_shard,
            "tp": degrees.tp,
            "pp": degrees.pp,
            "cp": degrees.cp,
            "ep": 1,
            "pp_mb": pipeline if degrees.pp > 1 else 1,
        },
        "communication_library": {
            "name": LIBRARIES.get(backend, backend),
            "version": version,
            "env": dict(environment.get("environment") or {}),
        },
        "protocol_selection": ["tcp", "tcp"] if backend == "gloo" else [None, None],
    }


def _quadriga_section(
    run: Run,
    environment: Mapping[str, Any],
    profiled: Sequence[int],
    last: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Facts for which the schema has no field."""
    spec, training, recompute = run.spec, run.config.training, run.config.activation_checkpoint
    tied = "tied: it is also the output matrix, so `mfu`, which excludes it, is too low"
    return {
        "profiled_steps": list(profiled),
        "profiler_warmup_steps": run.config.profiling.profiler_warmup,
        "tokens_per_step": spec.tokens_per_step,
        "data_parallel_ranks": spec.degrees.batch,
        "rows_of_a_rank_per_step": spec.rows_per_rank,
        "activation_checkpoint": {"mode": recompute.mode, "selective_ac_option": recompute.selective_ac_option},
        "compile": list(run.config.compile.components) if run.config.compile.enable else [],
        "dtypes": {
            "parameters": training.dtype,
            "compute": training.mixed_precision_param,
            "reduce": training.mixed_precision_reduce,
            "moments": moments_dtype(run),
        },
        "embedding": tied if spec.model.tie_embeddings else "not tied",
        "last_record": {key: last[key] for key in ("step", "loss", "tokens_seen")} if last else None,
        "host_of_rank_0": environment.get("host"),
        "bandwidth_order": "bandwidth_gbps and protocol_selection: scale-out, scale-up; Gbit/s per device, direction",
    }


def _empty(environment: Mapping[str, Any], given: CardOptions) -> dict[str, str]:
    """The reasons of empty fields."""
    why = {name: NOT_GIVEN for name in ("trace_url", "contributor", "contact") if not given.texts[name]}
    if given.scale_out_gbps is None:
        why["bandwidth_gbps[0] (scale-out)"] = NOT_GIVEN
    if environment.get("backend") != "gloo":
        why["protocol_selection"] = "the library chooses it, and the run does not record the choice"
    return why


def _hf_url(run: Run) -> str | None:
    family = FAMILIES.get(run.spec.model.flavor)
    return HUB + family.replace("llama", "Llama").replace("b", "B") if family else None


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


def _cuda(environment: Mapping[str, Any]) -> str | None:
    return f"cuda_{environment['cuda']}" if environment.get("cuda") and environment.get("devices") else None


def _nodes(environment: Mapping[str, Any]) -> int:
    """The number of machines of the run, from its NNODES; else 1."""
    text = str((environment.get("environment") or {}).get("NNODES", "1"))
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def _torch(environment: Mapping[str, Any]) -> str:
    return str((environment.get("libraries") or {}).get("torch", "of an unknown version"))
