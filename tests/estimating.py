"""What the tests of the estimate share: runs read through the door, and their rehearsal with fake tensors."""

from __future__ import annotations

from typing import Any

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.models.registry import catalogue

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
    return tuple(f"--parallelism.{SHORT[name]}={_shown(value)}" for name, value in degrees.items())


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_of(*arguments: str, ranks: int, base: tuple[str, ...] = DEBUG) -> Run:
    facts: dict[str, Any] = {"catalogue": catalogue(), "backends": BACKENDS}
    return read([*base, *arguments], {}, world_size=ranks, training=False, **facts)
