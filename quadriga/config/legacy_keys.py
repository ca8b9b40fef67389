"""Keys and values of torchtitan v0.1.0 to v0.2.2 that have another name here, or do not exist; and changed defaults.

`OLD_DEFAULTS` has the keys of Quadriga whose default has changed, with their old default, for runs that were started
before the change. For each of these keys that the user does not set, a resumed run keeps the value that it was started
with: that of the configuration in its checkpoint, or the old default if the key did not exist then.

A change of a default on which the numbers of a training depend needs a line there. A new key whose default does not
change training needs none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

RENAMED: Mapping[str, str] = {
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.debug_moe_force_load_balance": "debug.moe_force_load_balance",
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "memory_estimation.enabled": "memory_estimation.enable",
    "model.tokenizer_path": "model.hf_assets_path",
    "parallelism.context_parallel_rotate_method": "parallelism.context_parallel_method",
    "mx.use_fp8_dim1_cast_triton_kernel": "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice",
}

# Tables of v0.1.0 that became tables of [quantize].
MOVED_TABLES: Mapping[str, str] = {"float8": "quantize.linear.float8", "mx": "quantize.linear.mx"}

# Values that have another name under the new key.
RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {
    "parallelism.context_parallel_rotate_method": {"allgather": "allgather", "alltoall": "ring"},
    "mx.use_fp8_dim1_cast_triton_kernel": {"true": "triton", "false": "torch"},
}

# Removed keys without effect on the run: accepted, with this remark.
REMOVED: Mapping[str, str] = {
    "job.print_args": "use job.print_config to see the configuration",
    "job.use_for_integration_test": "it had no effect on training",
    "float8.force_recompute_fp8_weight_in_bwd": "[activation_checkpoint] decides what is recomputed",
    **{
        f"fault_tolerance.{key}": "it is a key of fault tolerance, which training does not support"
        for key in (
            "sync_steps",
            "should_quantize",
            "fragment_sync_delay",
            "fragment_update_alpha",
            "module_fqns_per_model_fragment",
            "num_fragments",
        )
    },
}

# Removed keys that would change the run: accepted only if empty or off.
REFUSED: Mapping[str, str] = {
    "parallelism.pipeline_parallel_split_points": "list the stages in parallelism.module_fqns_per_model_part",
    "parallelism.enable_compiled_autograd": "Quadriga does not use compiled autograd; use [compile] without it",
}

SCHEDULE = "parallelism.pipeline_parallel_schedule"
# Base classes of PyTorch. In torchtitan they are the schedule of a CSV file.
SCHEDULE_CLASSES: Mapping[str, str] = {
    "pipelineschedulesingle": "1F1B",
    "pipelineschedulemulti": "Interleaved1F1B",
    "_pipelinescheduleruntime": "Interleaved1F1B",
}

CONVERTER_ALIASES: Mapping[str, str] = {"float8": "quantize.linear.float8", "mx": "quantize.linear.mx"}

OLD_DEFAULTS: Mapping[str, Any] = {
    "lr_scheduler.variant": "early_decay",
    "optimizer.decay_norms_and_biases": False,
}


def resolve_schedule(value: str, known: Collection[str]) -> str:
    """The name of a pipeline schedule for a name in upper or lower case, as PyTorch reads it; else `value`."""
    known_names = {name.lower(): name for name in known}
    return known_names.get(value.lower()) or SCHEDULE_CLASSES.get(value.lower(), value)


def renamed_key(old: str) -> str | None:
    """The current name of a key of an older release; None if it was not renamed."""
    table, _, key = old.partition(".")
    if table in MOVED_TABLES and key and old not in RENAMED:
        return f"{MOVED_TABLES[table]}.{key}"
    return RENAMED.get(old)


def started_with(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each key of `OLD_DEFAULTS` in the run that saved a checkpoint.

    Args:
        saved: the contents of the checkpoint except its tensors; "config" is the configuration as nested tables. Values
            are not checked: a damaged or foreign checkpoint may contain anything.

    Returns:
        Values by key; empty if the checkpoint has no configuration.
    """
    config = saved.get("config")
    if not isinstance(config, Mapping):
        return {}
    return {key: value_in(config, key, default) for key, default in OLD_DEFAULTS.items()}


def value_in(config: Any, key: str, default: Any) -> Any:
    """The value of a key in a configuration of nested tables, else `default`. `config` may be any value."""
    *tables, name = key.split(".")
    table: Any = config
    for each in tables:
        table = table.get(each, {}) if isinstance(table, Mapping) else {}
    return table.get(name, default) if isinstance(table, Mapping) else default
