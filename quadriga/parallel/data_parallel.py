"""Data parallelism: FSDP, HSDP and DDP, all three by FSDP2's `fully_shard` over a mesh of another shape.

| layout | mesh      | parameters, gradients, optimizer state | gradients travel by                |
|--------|-----------|-----------------------------------------|------------------------------------|
| FSDP   | (S,)      | cut S ways                              | reduce-scatter                     |
| HSDP   | (R, S)    | cut S ways, R copies                    | reduce-scatter, then all-reduce    |
| DDP    | (N, 1)    | whole on every rank                     | all-reduce                         |

So one mechanism carries the dtype policy, the names of parameters (unchanged) and checkpoints on every layout.

**Gradients are summed over ranks, not averaged.** Each rank back-propagates its own part of the loss of the global
batch (the sum over its tokens divided by the tokens of the whole step), and the parts add up. That holds for uneven
token counts and for any number of ranks, and spares a pass of divisions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from quadriga.comm.mesh import Mesh
from quadriga.comm.sharding import ShardCollectives
from quadriga.config.schema import Parallelism, Training
from quadriga.models.plan import ShardUnit


def apply_data_parallel(
    model: nn.Module,
    units: tuple[ShardUnit, ...],
    mesh: Mesh,
    *,
    parallelism: Parallelism,
    training: Training,
    reshard_after_forward: bool,
    collectives: ShardCollectives | None = None,
) -> None:
    """Cut the parameters of `model` over `mesh.fsdp`, in place. `collectives` take the place of torch's own.

    One rank whose parameters, compute and gradients share one dtype and stay on the device is left alone; any other
    single rank is wrapped over a mesh of one, so that dtypes are the same as on many ranks. So are ranks that tensor
    parallelism alone has cut.
    """
    if not is_needed(mesh, training):
        return
    for unit in units:
        modules = [model.get_submodule(name) for name in unit.modules] or [model]
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh.fsdp,
            reshard_after_forward=reshard_after_forward and (unit.reshard or _always(parallelism, training)),
            mp_policy=_dtype_policy(training),
            offload_policy=_offload_policy(training, mesh),
        )
        if not unit.weights_in_backward:
            fsdp = modules[0]
            assert isinstance(fsdp, FSDPModule)
            fsdp.set_unshard_in_backward(False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)
            if collectives is not None:  # after the choice of sums: symmetric memory depends on it
                collectives.install(module)


def is_needed(mesh: Mesh, training: Training) -> bool:
    """Whether anything is cut, converted or moved at all."""
    dtypes = {training.dtype, training.mixed_precision_param, training.mixed_precision_reduce}
    # Under tensor parallelism also over a mesh of one: `fully_shard` makes the sum over its ranks that gradients of
    # norms still are (`Partial`), once a step where gradients are accumulated.
    cut = mesh.fsdp.size() > 1 or mesh.tp.size() > 1
    return cut or len(dtypes) > 1 or training.enable_cpu_offload


def set_gradient_sync(model: nn.Module, reduce: bool, last: bool) -> None:
    """Say what the coming backward pass does with gradients. Call before each micro-batch; at one plain rank a no-op.

    Args:
        reduce: reduce the gradients over the shard ranks (always so at the last micro-batch). Where not, they are
            added up whole, in the reduce dtype.
        last: this is the step's last micro-batch. Copies (HSDP, DDP) are reconciled then only: their sums of one step
            are the same early or late.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce or last)
        model.set_requires_all_reduce(last)
        # `set_is_last_backward` stays at its default: with False, torch fetches the last unit of the forward pass once
        # more at the end of every following micro-batch, and drops it.


def free_gathered_parameters(model: nn.Module) -> None:
    """Free what units with `reshard=False` gathered in a forward pass that no backward pass follows.

    Until then `model.parameters()` are the gathered ones, which are not those that the optimizer knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _always(parallelism: Parallelism, training: Training) -> bool:
    """`always` frees even the units that the plan would keep, the first ones that the backward pass needs.

    But not where the loss is made in chunks: it needs the output layer's weights once the forward pass is through.
    """
    return parallelism.fsdp_reshard_after_forward == "always" and training.loss_chunks == 1


def _dtype_policy(training: Training) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, training.mixed_precision_param),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
    )


def _offload_policy(training: Training, mesh: Mesh) -> OffloadPolicy:
    if not training.enable_cpu_offload:
        return OffloadPolicy()
    # Pinned memory belongs to an accelerator; without one torch refuses it.
    return CPUOffloadPolicy(pin_memory=mesh.fsdp.device_type != "cpu")


def _sum_gradients(module: FSDPModule) -> None:
    module.set_force_sum_reduction_for_comms(True)  # no PREMUL_SUM, which gloo does not have
    module.set_gradient_divide_factor(1.0)
