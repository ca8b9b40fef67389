"""Applies all transformations of a model for training, in the only correct order, with the reason at each line.

First modules are replaced, then the matrices within a block are sharded. The rest is applied from the inside out, as it
encloses a block at run time: gather( compiled( recompute( block ) ) ). All of them change modules in place and take
effect at the first call.
"""

from __future__ import annotations

from torch import Tensor, nn

from quadriga.comm.mesh import Mesh
from quadriga.comm.sharding import ShardCollectives
from quadriga.config.schema import ActivationCheckpoint, Compile, LinearFloat8, Parallelism, Training
from quadriga.models.plan import ParallelPlan
from quadriga.parallel.activation_checkpoint import apply_activation_checkpoint
from quadriga.parallel.attention_documents import apply_document_mask
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
    reshard_ends: bool = False,
    chunked_output: str | None = None,
    float8: LinearFloat8 | None = None,
    collectives: ShardCollectives | None = None,
    blocks_before: int = 0,
    run_folder: str = ".",
) -> None:
    """Shard, checkpoint and compile `model` in place, as `plan` describes it. It may be on meta; names do not change.

    `chunked_output`: name of the output layer if it must return hidden states; `model` may be a stage without it.
    `blocks_before`: number of recompute units in the earlier pipeline stages of this rank. `run_folder`: for the
    figures of the compiler's memory budget.
    """
    compiled = compile.compiles("model")

    # First, because it replaces linear layers, to which all later transformations are attached.
    if float8 is not None:
        apply_float8(model, plan.tensor_cuts, mesh, float8)

    # After float8, which replaces the output layer. The loss then computes the logits.
    for name, module in model.named_modules():
        if name == chunked_output:
            module.forward = _identity  # its hooks still run

    # Then tensor parallelism: all later transformations see only this rank's slices of the matrices.
    if mesh.tp.size() > 1:
        hidden = chunked_output is not None
        apply_tensor_parallel(model, plan.tensor_cuts, mesh.tp, parallelism, returns_hidden_states=hidden)

    # Before recompute and compile, which capture the attention module of the block. Ulysses calls the module before.
    if training.document_mask:
        apply_document_mask(model, plan.attention_units)
    if mesh.cp.size() > 1:
        apply_context_parallel(model, plan.attention_units, mesh.cp, parallelism)

    # Inside compile, so that the compiler sees the recomputation and plans memory with it. Outside, it would see the
    # compiled code as one operation, to be saved or recomputed completely.
    apply_activation_checkpoint(
        model, plan.recompute_units, activation_checkpoint, blocks_before=blocks_before, run_folder=run_folder
    )

    # Inside FSDP, so that parameters are gathered and freed outside of the compiled code, where they break no graph.
    if compiled:
        apply_compile(model, plan.recompute_units, compile)

    # Outermost: parameters are gathered before a block runs, and again before its backward pass recomputes it.
    apply_data_parallel(
        model,
        plan.shard_units,
        mesh,
        training=training,
        reshard_after_forward=reshard_after_forward,
        reshard_ends=reshard_ends,
        prefetch=parallelism.fsdp_prefetch,
        collectives=collectives,
    )


def apply_compile(model: nn.Module, blocks: tuple[str, ...], section: Compile) -> None:
    """Compile each of `blocks` in place; modules and parameters keep their names.

    Equal blocks share one compilation, so the time to the first step does not grow with the depth. A graph break in a
    block is an error, because it would make the run slower.
    """
    for name in blocks:
        model.get_submodule(name).compile(backend=section.backend, fullgraph=True)


def _identity(hidden: Tensor) -> Tensor:
    return hidden
