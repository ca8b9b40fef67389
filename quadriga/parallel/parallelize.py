"""The one legal order in which a model is changed for training, with the reason beside each line."""

from __future__ import annotations

from torch import nn

from quadriga.comm.mesh import Mesh
from quadriga.config.schema import ActivationCheckpoint, Compile, Parallelism, Training
from quadriga.models.plan import ParallelPlan
from quadriga.parallel.activation_checkpoint import apply_activation_checkpoint
from quadriga.parallel.compile import apply_compile
from quadriga.parallel.data_parallel import apply_data_parallel


def parallelize(
    model: nn.Module,
    plan: ParallelPlan,
    mesh: Mesh,
    *,
    parallelism: Parallelism,
    training: Training,
    activation_checkpoint: ActivationCheckpoint,
    compile: Compile,
    reshard_after_forward: bool,
) -> None:
    """Recompute, compile and cut `model` in place, as `plan` allows. It may still be on meta, and keeps every name."""
    compiled = compile.enable and "model" in compile.components

    # First, so that the compiler sees the recomputation and plans memory with it; the other way round the compiled
    # block would be a single operation, to be kept or computed again as a whole.
    apply_activation_checkpoint(model, plan.recompute_units, activation_checkpoint, compiled=compiled)

    # Before the cut, so that gathering and freeing parameters happen around the compiled code and not inside it, where
    # they would break the graph.
    if compiled:
        apply_compile(model, plan.recompute_units, compile)

    # Last, around everything: its hooks must find a block whole, in the forward pass and when it is recomputed.
    apply_data_parallel(
        model,
        plan.shard_units,
        mesh,
        parallelism=parallelism,
        training=training,
        reshard_after_forward=reshard_after_forward,
    )
