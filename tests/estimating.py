"""What the tests of the estimate share: runs read with all checks, and their rehearsal with fake tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.config.run_spec import Degrees
from quadriga.models.registry import catalogue
from quadriga.planning.communication import collective_calls
from quadriga.planning.setup import Setup

DEBUG = (
    *("--model.flavor=debugmodel", "--model.hf_assets_path=builtin:bytes", "--training.dataset=builtin"),
    *("--training.seq_len=128", "--training.local_batch_size=4", "--metrics.no_enable_tensorboard"),
)
SHORT = {
    "pp": "pipeline_parallel_degree",
    "rep": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "method": "context_parallel_method",
    "schedule": "pipeline_parallel_schedule",
    "reshard": "fsdp_reshard_after_forward",
    "reduce": "reduce_gradients",
    "sp": "enable_sequence_parallel",
    "whole_logits": "disable_loss_parallel",
    "microbatch": "pipeline_parallel_microbatch_size",
}
RECOMPUTE = {
    "none": ("--activation_checkpoint.mode=none",),
    "full": ("--activation_checkpoint.mode=full",),
    "op": ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
    "2": ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"),
}
COMPUTE = {
    "f32": ("--training.mixed_precision_param=float32", "--training.mixed_precision_reduce=float32"),
    "bf16": ("--training.mixed_precision_param=bfloat16", "--training.mixed_precision_reduce=float32"),
}


def keys(**degrees: Any) -> tuple[str, ...]:
    """`tp=2, schedule="GPipe"` as arguments."""
    return tuple(f"--parallelism.{SHORT[name]}={_format_value(value)}" for name, value in degrees.items())


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_of(*arguments: str, ranks: int, base: tuple[str, ...] = DEBUG) -> Run:
    facts: dict[str, Any] = {"catalogue": catalogue(), "backends": BACKENDS}
    return read([*base, *arguments], {}, world_size=ranks, training=False, **facts)


def by_group(run: Run, rank: int) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Predicted calls and bytes, under the names that a recorder gives to axes: of those with the same ranks, one."""
    degrees = run.spec.degrees
    calls: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    same = one_name_a_group(degrees)
    for call in collective_calls(Setup(run, "cpu"), rank // (degrees.world_size // degrees.pp)):
        name = call.kind, same.get(call.axis, call.axis)
        calls[name] += round(call.calls)
        sizes[name] += round(call.bytes)
    return calls, sizes


def one_name_a_group(degrees: Degrees) -> dict[str, str]:
    """Axes that hold the same ranks are one group of torch's, and go by one name."""
    same = {} if degrees.dp_shard > 1 else {"cp": "shard"}
    sizes = {"pp": degrees.pp, "dp_replicate": degrees.dp_replicate, "shard": degrees.dp_shard * degrees.cp}
    cut = [axis for axis, size in {**sizes, "tp": degrees.tp}.items() if size > 1]
    if degrees.tp == 1 or len(cut) == 1:
        same["world"] = cut[0] if len(cut) == 1 else "loss"
    return same
