"""The one legal order in which a model is changed for training, with the reason beside each line.

Modules are exchanged first, then the matrices within a block are cut. Then, from the inside out as the parts lie
around a block when it runs: gather( compiled( recompute( block ) ) ). All of them change modules in place and take
effect at the first call.
"""

from __future__ import annotations

from torch import nn

from quadriga.comm.mesh import Mesh
from quadriga.comm.sharding import ShardCollectives
from quadriga.config.schema import ActivationCheckpoint, Compile, LinearFloat8, Parallelism, Training
from quadriga.models.plan import ParallelPlan
from quadriga.parallel.activation_checkpoint import apply_activation_checkpoint
from quadriga.parallel.chunked_loss import return_hidden_states
from quadriga.parallel.compile import apply_compile
from quadriga.parallel.context_parallel import apply_context_parallel
from quadriga.parallel.data_parallel import apply_data_parallel
from quadriga.parallel.float8 import apply_float8
from quadriga.parallel.tensor_parallel import apply_tensor_parallel


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
    float8: LinearFloat8 | None = None,
    collectives: ShardCollectives | None = None,
    blocks_before: int = 0,
    run_folder: str = ".",
) -> None:
    """Recompute, compile and cut `model` in place, as `plan` allows. It may still be on meta, and keeps every name.

    `blocks_before`: recompute units of the earlier pipeline stages of this rank. `run_folder`: for figures of the
    compiler's memory budget.
    """
    compiled = compile.enable and "model" in compile.components

    # Before everything else: it puts other modules in the place of linear layers, and all that follows hangs on them.
    if float8 is not None:
        apply_float8(model, plan.tensor_cuts, mesh, float8)

    # After the exchange, which would bring another output layer. What was to come out of it is made within the loss.
    if training.loss_chunks > 1 and plan.logits_unit is not None:
        return_hidden_states(model, plan.logits_unit)

    # Then the cut: everything later finds the slices of the matrices where the matrices were.
    if mesh.tp.size() > 1:
        apply_tensor_parallel(model, plan.tensor_cuts, mesh.tp, parallelism, loss_chunks=training.loss_chunks)

    # Before recompute and compile, which take the attention that they find into a block.
    if mesh.cp.size() > 1:
        apply_context_parallel(model, plan.attention_units, mesh.cp, parallelism)

    # Inside compile, so that the compiler sees the recomputation and plans memory with it. Around compiled code it
    # would find one operation, to be kept or computed again as a whole.
    apply_activation_checkpoint(
        model,
        plan.recompute_units,
        activation_checkpoint,
        compiled=compiled,
        blocks_before=blocks_before,
        run_folder=run_folder,
    )

    # Inside the cut, so that gathering and freeing parameters happen around the compiled code and not within it, where
    # they would break the graph.
    if compiled:
        apply_compile(model, plan.recompute_units, compile)

    # Outermost: parameters are gathered before a block runs, and again before its backward pass recomputes it.
    apply_data_parallel(
        model,
        plan.shard_units,
        mesh,
        parallelism=parallelism,
        training=training,
        reshard_after_forward=reshard_after_forward,
        collectives=collectives,
    )
