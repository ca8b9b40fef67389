"""Data parallelism: FSDP, HSDP and DDP, all by FSDP2's `fully_shard`, over meshes of different shapes.

| layout | mesh      | parameters, gradients, optimizer state | gradients are reduced by           |
|--------|-----------|-----------------------------------------|------------------------------------|
| FSDP   | (S,)      | sharded S ways                          | reduce-scatter                     |
| HSDP   | (R, S)    | sharded S ways, R copies                | reduce-scatter, then all-reduce    |
| DDP    | (N, 1)    | whole on every rank                     | all-reduce                         |

So the dtype policy, the names of parameters (unchanged) and checkpoints work the same way on every layout.

**Gradients are summed over ranks, not averaged.** Each rank back-propagates its own part of the loss of the global
batch: the sum over its tokens divided by the tokens of the whole step. The parts add up. This is correct for uneven
token counts and any number of ranks, and needs no pass of divisions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from quadriga.comm.mesh import Mesh
from quadriga.comm.sharding import ShardCollectives
from quadriga.config.schema import Training
from quadriga.models.plan import ShardUnit


def apply_data_parallel(
    model: nn.Module,
    units: tuple[ShardUnit, ...],
    mesh: Mesh,
    *,
    training: Training,
    reshard_after_forward: bool,
    reshard_ends: bool = False,
    prefetch: int | None = None,
    collectives: ShardCollectives | None = None,
) -> None:
    """Shard the parameters of `model` over `mesh.fsdp`, in place. `collectives` replace torch's own.

    `reshard_ends`: free also the units that the plan keeps because the backward pass needs them first. `prefetch`: the
    number of units that are gathered ahead; None leaves it to torch.

    A single rank is unchanged if parameters, compute and gradients have one dtype and stay on the device. Otherwise it
    uses `fully_shard` over a mesh of one rank, so that dtypes are the same as on many ranks. The same holds for ranks
    with tensor parallelism only.
    """
    if not training.uses_fsdp(mesh.fsdp.size() * mesh.tp.size()):
        return
    in_order = list[tuple[ShardUnit, FSDPModule]]()
    for unit in units:
        modules = [model.get_submodule(name) for name in unit.modules] or [model]
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh.fsdp,
            reshard_after_forward=reshard_after_forward and (unit.reshard or reshard_ends),
            mp_policy=_dtype_policy(training),
            offload_policy=_offload_policy(training, mesh),
        )
        fsdp = modules[0]
        assert isinstance(fsdp, FSDPModule)
        if not unit.weights_in_backward:
            fsdp.set_unshard_in_backward(False)
        if unit.modules:  # the root is gathered from the start
            in_order.append((unit, fsdp))
    if prefetch is not None:
        _prefetch(in_order, prefetch)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module, mesh.fsdp.size())
            if collectives is not None:  # after `_sum_gradients`, because symmetric memory depends on it
                collectives.install(module)


def set_gradient_sync(model: nn.Module, reduce: bool, last: bool) -> None:
    """Set the gradient reduction of the next backward pass. Call before each micro-batch; without FSDP it does nothing.

    Args:
        reduce: reduce the gradients over the shard ranks; the last micro-batch always does. Otherwise unsharded
            gradients are accumulated in the reduce dtype.
        last: this is the step's last micro-batch. Only then are replicas (HSDP, DDP) all-reduced, because the sum of
            the step is the same early or late.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce or last)
        model.set_requires_all_reduce(last)
        # `set_is_last_backward` keeps its default. With False, torch gathers the last unit of the forward pass once
        # more at the end of each following micro-batch, without use.


def free_gathered_parameters(model: nn.Module) -> None:
    """Free the gathered parameters of units with `reshard=False`, after a forward pass without a backward pass.

    Until then `model.parameters()` returns the gathered ones, which are not the optimizer's.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _prefetch(units: list[tuple[ShardUnit, FSDPModule]], ahead: int) -> None:
    """Gather the parameters of the next `ahead` of the units, which are in the order of the forward pass.

    torch's own choice gathers the next unit of the backward pass. In the forward pass it starts a gather when the unit
    itself starts, which overlaps with the kernels of the unit before it.
    """
    modules = [module for _, module in units]
    gathered_again = [module if unit.weights_in_backward else None for unit, module in units]
    for index, module in enumerate(modules):
        before = reversed(gathered_again[max(0, index - ahead) : index])
        module.set_modules_to_forward_prefetch(modules[index + 1 : index + 1 + ahead])
        module.set_modules_to_backward_prefetch([each for each in before if each is not None])


def _dtype_policy(training: Training) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, training.mixed_precision_param),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
    )


def _offload_policy(training: Training, mesh: Mesh) -> OffloadPolicy:
    if not training.enable_cpu_offload:
        return OffloadPolicy()
    # Without an accelerator, torch refuses pinned memory.
    return CPUOffloadPolicy(pin_memory=mesh.fsdp.device_type != "cpu")


def _sum_gradients(module: FSDPModule, ranks: int) -> None:
    module.set_force_sum_reduction_for_comms(True)  # no PREMUL_SUM, which gloo does not have
    if ranks > 1:  # one rank divides by 1 anyway, and a factor makes torch copy all its gradients once more
        module.set_gradient_divide_factor(1.0)
