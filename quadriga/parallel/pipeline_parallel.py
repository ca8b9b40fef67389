"""Pipeline parallelism: each rank holds some stages of the model, and micro-batches pass through them.

`torch.distributed.pipelining` brings the schedules:

| schedule                | stages per rank | example: 4 on 2 ranks  | backward pass | paper                          |
|-------------------------|-----------------|------------------------|---------------|--------------------------------|
| `GPipe`                 | 1               |                        | whole         | arXiv 1811.06965               |
| `1F1B`                  | 1               |                        | whole         | arXiv 1806.03377               |
| `Interleaved1F1B`       | 2 or more       | 0 2, 1 3 (loop)        | whole         | arXiv 2104.04473               |
| `LoopedBFS`             | 2 or more       | loop                   | whole         | arXiv 2211.05953               |
| `InterleavedZeroBubble` | 2 or more       | loop                   | in two parts  | arXiv 2401.10241               |
| `ZBVZeroBubble`         | 2               | 0 3, 1 2 (V)           | in two parts  | arXiv 2401.10241               |
| `DualPipeV`             | 2               | V                      | in two parts  | arXiv 2412.19437, cut in half  |
| a CSV file              | from the file   | from the file          | from the file |                                |

This module adds to torch: shapes are known in advance, so that ranks send only activations and their gradients; every
stage gets the positions; and the trainer controls when gradients are reduced (see `_Stage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _Action,
    _add_send_recv,
    _add_unshard_reshard,
    _ComputationType,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from quadriga.config.schema import Parallelism
from quadriga.parallel.data_parallel import set_gradient_sync

Loss = Callable[[Tensor, Tensor], Tensor]


class LocalBatch(NamedTuple):
    """A rank's part of every sequence, on its device. `tokens` and `labels`: int64, (rows, local tokens). `positions`:
    int64, (local tokens,); with `borders` (rows, local tokens). `borders`: int32, (rows, n), of the whole sequences, as
    `attention_documents` has them; None: a row is one document."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    borders: Tensor | None = None


def remove_modules(model: nn.Module, modules: Sequence[str]) -> None:
    """Remove `modules` (full names) from `model`, in place: layers by their key, others by None. Other names stay."""
    for name in modules:
        above, _, last = name.rpartition(".")
        owner = model.get_submodule(above)
        if isinstance(owner, nn.ModuleDict):
            del owner[last]
        else:
            setattr(owner, last, None)


def stages_of_rank(stage_ranks: Sequence[int], rank: int) -> tuple[int, ...]:
    """The stages of the pipeline's rank `rank`; `stage_ranks` has the rank of each stage."""
    return tuple(stage for stage, holder in enumerate(stage_ranks) if holder == rank)


@dataclass(frozen=True)
class StageShapes:
    """The tensors between stages for one micro-batch.

    `shape`: of hidden states (rows, tokens, dim) on one rank; with sequence parallelism its part of the tokens.
    `dtype`: the compute dtype. `seq_len`: token ids per row in the input of the first stage, which shards them itself.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    seq_len: int

    def hidden_states(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=True)

    def tokens(self) -> Tensor:
        return torch.empty((self.shape[0], self.seq_len), dtype=torch.int64, device="meta")


@dataclass(eq=False)
class Pipeline:
    """Runs the stages of this rank in the schedule. All ranks of the pipeline call the same method.

    Args:
        parts: this rank's stages, by their index in the whole model, ascending.
        stage_ranks: the rank in `mesh` of each stage of the model.
        mesh: the one-dimensional mesh of the pipeline's ranks.
        micro_batches: number of micro-batches into which the rows of one call are split, along the first dimension.
        loss: maps (logits, labels) of one micro-batch to its part of the loss; the parts add up.
        recomputes: whether blocks recompute activations. Schedules with a split backward pass then run both parts at
            once. Otherwise torch, which computes weight gradients parameter by parameter, would recompute and keep a
            block again for each of them.
    """

    parts: Mapping[int, nn.Module]
    stage_ranks: Sequence[int]
    mesh: DeviceMesh
    device: torch.device
    stage_shapes: StageShapes
    micro_batches: int
    parallelism: Parallelism
    loss: Loss
    recomputes: bool

    def train(self, inputs: LocalBatch, *, reduce: bool, last: bool) -> Tensor:
        """Forward and backward through all stages; gradients are accumulated.

        Args:
            inputs: tokens are used on the rank of the first stage, and labels on that of the last one.
            reduce: reduce gradients over the shard ranks after each micro-batch of the pipeline; otherwise once, in
                the call with `last`.
            last: this is the step's last call. Only then are replicas (HSDP, DDP) all-reduced.

        Returns:
            The sum of the losses of the micro-batches on the rank of the last stage, 0 elsewhere; detached, shape ().
        """
        return self._run(inputs, reduce, last, backward=True)

    def evaluate(self, inputs: LocalBatch) -> Tensor:
        """Forward only. Argument and result are those of `train`."""
        return self._run(inputs, reduce=False, last=False, backward=False)

    def _run(self, inputs: LocalBatch, reduce: bool, last: bool, backward: bool) -> Tensor:
        self.reduce, self.last = reduce, last  # the stages read them during the call
        tokens = (inputs.tokens,) if 0 in self.parts else ()
        given: dict[str, Any] = {"target": inputs.labels} if len(self.stage_ranks) - 1 in self.parts else {}
        self.positions = inputs.positions
        if inputs.borders is not None:  # each row has its own, so the schedule splits them into micro-batches
            given |= {"positions": inputs.positions, "borders": inputs.borders}
        losses: list[Tensor] = []
        with _stage_error():
            call = self._training.step if backward else self._forward_only.eval
            call(*tokens, **given, losses=losses, return_outputs=False)
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros((), device=self.device)

    @cached_property
    def _training(self) -> _PipelineSchedule:
        stages, parallelism = self._stages(), self.parallelism
        options: dict[str, Any] = {"n_microbatches": self.micro_batches, "loss_fn": self.loss, "scale_grads": False}
        if parallelism.pipeline_parallel_schedule_csv is not None:
            custom = _PipelineScheduleRuntime(stages, **options)
            custom._load_csv(parallelism.pipeline_parallel_schedule_csv)
            return custom
        schedule = get_schedule_class(parallelism.pipeline_parallel_schedule)
        return schedule(stages[0] if issubclass(schedule, PipelineScheduleSingle) else stages, **options)

    @cached_property
    def _forward_only(self) -> _PipelineSchedule:
        """A schedule that runs stage by stage, each with all micro-batches, for any number and assignment of stages.

        Torch's own `eval` of a schedule also runs empty backward passes, and fails with a V assignment.
        """
        stages = self._stages()
        schedule = _PipelineScheduleRuntime(stages, n_microbatches=self.micro_batches, loss_fn=self.loss)
        schedule.stage_index_to_group_rank = stages[0].stage_index_to_group_rank
        order = {
            rank: _add_unshard_reshard(
                [
                    _Action(stage, _ComputationType.FORWARD, micro_batch)
                    for stage in stages_of_rank(self.stage_ranks, rank)
                    for micro_batch in range(self.micro_batches)
                ]
            )
            for rank in range(self.mesh.size())
        }
        schedule.pipeline_order_with_comms = _add_send_recv(
            order, stage_to_rank=self.stage_ranks.__getitem__, num_stages=len(self.stage_ranks)
        )
        for stage in stages:  # the schedule has assigned stages in a loop; restore the real assignment
            stage.stage_index_to_group_rank = dict(enumerate(self.stage_ranks))
        return schedule

    def _stages(self) -> list[_Stage]:
        """New stages over the same modules for each schedule, because a stage holds the buffers of its messages."""
        return [_Stage(self, part, index) for index, part in self.parts.items()]


class _Stage(PipelineStage):
    """A stage with known message shapes and all positions, in which the caller controls the reduction of gradients.

    Positions that all rows share do not go through the schedule, because it splits every tensor into micro-batches.

    Torch's stage never lets `fully_shard` reduce by its hooks, because autograd does not call them if the backward pass
    is split; it reduces at the end of every call. Here the hooks of `fully_shard` reduce if the backward pass is whole,
    in each micro-batch or in the step's last one. If it is split, `_reduce_gradients` calls the reduction.
    """

    def __init__(self, pipeline: Pipeline, part: nn.Module, index: int) -> None:
        shapes = pipeline.stage_shapes
        super().__init__(
            *(part, index, len(pipeline.stage_ranks), pipeline.device),
            input_args=shapes.tokens() if index == 0 else shapes.hidden_states(),
            output_args=shapes.hidden_states(),  # the last stage sends nothing, so its shape does not matter
            group=pipeline.mesh.get_group(),
            dw_builder=_no_weight_grads if pipeline.recomputes else None,
        )
        self.pipeline, self._backward_count = pipeline, 0

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.submod(*args, **{"positions": self.pipeline.positions, **kwargs})
        return output if self.is_last else output.contiguous()

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]] | None]:
        """`last_backward` is ignored, because torch does not set it for input gradients, which may be the only ones."""
        if backward_type == "input":
            gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
            return _sendable(gradients), groups
        self._backward_count += 1
        last = self._backward_count == self.pipeline.micro_batches
        if backward_type == "full":
            # Torch reduces nothing until the end; here each unit reduces by its hook, as without a pipeline.
            self._set_gradient_sync(self.pipeline.reduce, last and self.pipeline.last)
            return _sendable(stage_backward(**bwd_kwargs)), None
        gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if not last:
            self._reduce_gradients(reduce=self.pipeline.reduce, last=False)
        return _sendable(gradients), groups

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Called by the schedule at the end of the stage's part in a call."""
        assert grad_scale_factor == 1, "losses are sums, so gradients are not divided"
        self._backward_count = 0
        self._reduce_gradients(self.pipeline.reduce or self.pipeline.last, self.pipeline.last)

    def _set_gradient_sync(self, reduce: bool, last: bool) -> None:
        """Set the reduction. Parameters that stay gathered after a forward pass do so until the last call of a step."""
        if isinstance(self.submod, FSDPModule):
            set_gradient_sync(self.submod, reduce, last)
            reshards = self.pipeline.parallelism.fsdp_reshard_after_forward == "always"
            self.submod.set_reshard_after_backward(last or reshards)
            self.submod.set_is_last_backward(True)  # wait for the reductions, and free their buffers

    def _reduce_gradients(self, reduce: bool, last: bool) -> None:
        """Reduce the gradients; without `reduce`, accumulate them in the reduce dtype."""
        if isinstance(self.submod, FSDPModule):
            self._set_gradient_sync(reduce, last)
            # Autograd's final callback handles every unit whose own hook was not called. Torch's own pipelining calls
            # it too. (Torch sets `state` on the function at import time, which a type checker does not see.)
            fully_shard.state(self.submod)._root_post_backward_final_callback()  # type: ignore[attr-defined]

    # Torch 2.11 and 2.13 would send messages to find out shapes that the constructor has. These methods avoid it.

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        return []

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Any = None) -> Any:
        return _VotedYes()

    def _warmup_backward_result(self, received_result: Any = None) -> Any:
        return _VotedYes()

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Torch 2.11 compares every output with the given shape; no shape is given for the logits of the last stage."""
        if not self.is_last:
            super()._validate_fwd_outputs(outputs)  # type: ignore[misc]  # removed in torch 2.13


def _no_weight_grads() -> Callable[[], None]:
    """The second part of a backward pass if the first part computed all gradients: it does nothing."""
    return lambda: None


class _VotedYes:
    """The result of a vote, as torch reads it. It is not a tensor, because tensors have no values in a rehearsal."""

    def item(self) -> int:
        return 1


def _sendable(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Contiguous gradients, because gloo sends no others."""
    return tuple(None if gradient is None else gradient.contiguous() for gradient in gradients)


@contextmanager
def _stage_error() -> Iterator[None]:
    """Raise the error of a stage itself instead of torch's report about it.

    The report lists arguments and hides the type of the error, which decides the exit code.
    """
    cause: BaseException | None = None
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        cause = error.__cause__
    if cause is not None:  # raised outside of the handler, so that torch's report is not its context
        raise cause
