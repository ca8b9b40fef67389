"""Activation checkpointing: drop activations in the forward pass, recompute them in the backward (arXiv 1604.06174).

| mode            | what a block keeps for the backward pass                                         |
|-----------------|----------------------------------------------------------------------------------|
| `none`          | everything                                                                       |
| `selective` `N` | every Nth block of a rank keeps only its input, the others everything; 0 means 1 |
| `selective` `op`| results of attention, of every second matrix product and of communication        |
| `full`          | its input                                                                        |
| `memory_budget` | what the compiler selects within a share of the memory (needs `compile`)         |

A block's `forward` is replaced by a call that recomputes it. No module is wrapped, so parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from quadriga.config.schema import ActivationCheckpoint
from quadriga.parallel import attention_allgather, attention_documents, attention_ring  # noqa: F401 - see below

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

MATRIX_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default})
# Expensive to recompute: attention in each of its kernels (the CPU's has its own name), under context parallelism and
# by document (the imported modules define these operations), and communication. All-gathered tensors are not saved:
# they are as many times larger than the local shard as the group has ranks. `max` is for float8: the maximum is one
# number, and recomputing it is a pass over a whole matrix.
SAVED_OPERATIONS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_attention_math.default,
        torch.ops.quadriga.document_attention.default,
        torch.ops.quadriga.chunk_attention.default,
        torch.ops.quadriga.ring_attention.default,
        c10d.reduce_scatter_tensor.default,
        c10d.all_to_all_single.default,
        aten.max.default,
    }
)

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def apply_activation_checkpoint(
    model: nn.Module,
    blocks: tuple[str, ...],
    section: ActivationCheckpoint,
    *,
    blocks_before: int = 0,
    run_folder: str = ".",
) -> None:
    """Apply `section` to `blocks` (module names, in the order of the forward pass), in place.

    `memory_budget` sets `torch._functorch.config.activation_memory_budget` for the whole process, because torch's
    partitioner has no other interface.

    Args:
        blocks_before: number of blocks in the earlier pipeline stages of this rank; every Nth is counted over all.
        run_folder: `visualize_memory_budget_pareto` draws into its folder `memory_budget_pareto`.
    """
    if section.mode == "memory_budget":
        _set_memory_budget(section, run_folder)
        return
    for number, name in enumerate(blocks, start=blocks_before + 1):
        if not section.recomputes_block(number):
            continue
        block = model.get_submodule(name)
        options: dict[str, Any] = {
            "use_reentrant": False,
            "preserve_rng_state": section.preserve_rng_state,
            "determinism_check": section.determinism_check,
            "early_stop": section.early_stop,
            "debug": section.debug,
        }
        if section.per_operation:
            shapes = forced_shapes(block, name, section.per_op_sac_force_recompute_mm_shapes_by_fqns)
            options["context_fn"] = partial(_per_operation_contexts, shapes)
        block.forward = _recomputed(block.forward, options)


def forced_shapes(block: nn.Module, block_name: str, patterns: tuple[str, ...]) -> frozenset[tuple[int, int]]:
    """The shapes (in, out) of the linear layers whose full names contain one of `patterns`."""
    return frozenset(
        (module.in_features, module.out_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and any(pattern in f"{block_name}.{name}" for pattern in patterns)
    )


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def forward_with_recompute(*args: Any, **kwargs: Any) -> Any:  # the compiler cannot trace a partial
        return checkpoint(forward, *args, **options, **kwargs)

    return forward_with_recompute


def _set_memory_budget(section: ActivationCheckpoint, run_folder: str) -> None:
    """Takes effect if the blocks are compiled, which the configuration rules require."""
    torch._functorch.config.activation_memory_budget = section.memory_budget
    torch._functorch.config.visualize_memory_budget_pareto = section.visualize_memory_budget_pareto
    if section.visualize_memory_budget_pareto:
        folder = Path(run_folder) / "memory_budget_pareto"
        folder.mkdir(parents=True, exist_ok=True)
        torch._functorch.config.memory_budget_pareto_dir = str(folder)


def _per_operation_contexts(forced: frozenset[tuple[int, int]]) -> Contexts:
    """New contexts for each forward pass, because the policy counts matrix products."""
    contexts: Contexts = create_selective_checkpoint_contexts(_per_operation_policy(forced))
    return contexts


def _per_operation_policy(forced: frozenset[tuple[int, int]]) -> Callable[..., CheckpointPolicy]:
    """Save attention, communication and every second matrix product; recompute everything else.

    This saves about half of the memory of matrix products for half of their time. The forward pass and the
    recomputation have separate counters, so they decide the same.
    """
    counts = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in SAVED_OPERATIONS:
            return CheckpointPolicy.MUST_SAVE
        if operation not in MATRIX_PRODUCTS or tuple(args[-1].shape) in forced:
            return CheckpointPolicy.PREFER_RECOMPUTE
        counts[context.is_recompute] += 1
        keep = counts[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
