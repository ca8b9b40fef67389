"""The quantities of a run that the estimates share: sizes of dtypes, tokens per rank, saved and gathered tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from quadriga.config import Run
from quadriga.config.model_spec import ModelSpec
from quadriga.config.pipeline_order import PipelineOrder
from quadriga.config.rules_pipeline import SINGLE_STAGE
from quadriga.config.schema import UPDATE_BUCKET
from quadriga.models.operations import Cut, Kernels, Trace
from quadriga.models.registry import block_trace, head_trace
from quadriga.planning.activations import Activations, LocalSizes, activations_of
from quadriga.planning.parameters import Stage, Unit, Weight, build_stages, even_split
from quadriga.planning.schedule import Load, gather_counts, loads_of, order_of
from quadriga.units import DTYPE_BYTES

FLOAT8_CONVERTER = "quantize.linear.float8"
# Temporary copies of all parameters of a rank during an update.
OPTIMIZER_COPIES = {"fused": 0.0, "for-loop": 0.0, "foreach": 1.0}


# Blocks of torch's attention kernel for CPUs: (shortest sequence, rows of a block, cost of an operation relative to one
# in the largest block). From FlashAttentionKernel.cpp; measured by benchmarks/attention.py.
ATTENTION_BLOCKS = ((768, 256, 1.0), (192, 64, 1.6), (0, 32, 2.0))


def causal_attention_cost(length: int) -> float:
    """Relative cost on a CPU of an attention operation that a causal mask leaves, for sequences of `length` tokens.

    The kernel computes blocks on the diagonal in full, and small blocks more slowly.
    """
    rows, each = next((rows, each) for start, rows, each in ATTENTION_BLOCKS if length >= start)
    return each * (1 + rows / length)


class Setup:
    """A run on a device type, `cpu` or `cuda`.

    `float8`: recipe of products in float8, a key of `rates.FITTED`; None without them. `float8_scales_once`: the scales
    of gathered weights are reduced once per step. `shards`: ranks over which `fully_shard` shards each parameter.
    `uses_fsdp`: whether it wraps the model. `itemsize`: bytes per element in the compute dtype.
    `keeps_unsharded_grads`: unsharded gradients of several micro-batches are accumulated in the reduce dtype before
    reduction. `micro_batches_per_call`: of one pass of local_batch_size rows through a pipeline. `rows`, `tokens`,
    `logits` (elements): of a micro-batch on one rank.
    """

    def __init__(self, run: Run, device_type: str = "cuda") -> None:
        self.run, self.device_type = run, device_type
        spec, training, parallelism = run.spec, run.config.training, run.config.parallelism
        degrees = self.degrees = spec.degrees
        self.shards = degrees.dp_shard * degrees.cp
        self.offload = training.enable_cpu_offload
        self.recompute = run.config.activation_checkpoint
        self.compiled = run.config.compile.compiles("model")
        self.uses_fsdp = training.uses_fsdp(self.shards * degrees.dp_replicate * degrees.tp)
        self.reshards = spec.reshard_after_forward and self.uses_fsdp
        self.prefetch = parallelism.fsdp_prefetch or 1
        self.parameter_bytes = DTYPE_BYTES[training.dtype]
        self.itemsize = DTYPE_BYTES[training.mixed_precision_param] if self.uses_fsdp else self.parameter_bytes
        self.reduce_bytes = DTYPE_BYTES[training.mixed_precision_reduce]
        self.moment_bytes = DTYPE_BYTES[run.config.optimizer.state_dtype or training.dtype]
        self.micro_batches = spec.micro_batches
        self.micro_batches_per_call = spec.micro_batches // spec.accumulation_steps
        self.reduces_once = self.micro_batches == 1 or spec.reduce_gradients == "once"
        self.keeps_unsharded_grads = self.uses_fsdp and self.micro_batches > 1 and spec.reduce_gradients == "once"
        self.rows = parallelism.pipeline_parallel_microbatch_size if degrees.pp > 1 else spec.local_batch_size
        self.tokens = self.rows * spec.seq_len // degrees.cp
        self.sequence_parallel = degrees.tp > 1 and parallelism.enable_sequence_parallel
        self.parallel_loss = degrees.tp > 1 and not parallelism.disable_loss_parallel
        self.async_tp = parallelism.enable_async_tensor_parallel and self.compiled
        float8, converts = run.config.quantize.linear.float8, FLOAT8_CONVERTER in run.config.model.converters
        by_rows = (float8.recipe_name or "tensorwise") != "tensorwise"
        self.float8 = ("float8_rowwise" if by_rows else "float8") if converts else None
        self.gathers_float8 = converts and float8.enable_fsdp_float8_all_gather
        self.float8_scales_once = self.gathers_float8 and float8.precompute_float8_dynamic_scale_for_fsdp
        self.logits = self.tokens * spec.model.vocab_size / (degrees.tp if self.parallel_loss else 1)

    def update_bytes(self, held: int, largest: int) -> float:
        """Temporary bytes of an update of `held` elements, if the largest parameter has `largest`."""
        section, wide = self.run.config.optimizer, DTYPE_BYTES["float32"]
        copies = OPTIMIZER_COPIES[section.implementation]
        if section.state_dtype is None:
            return copies * held * self.parameter_bytes
        narrow = 2 * (self.moment_bytes < wide) + 2 * (self.parameter_bytes < wide)  # moments; weights and gradients
        return (narrow + copies) * min(max(UPDATE_BUCKET, largest), held) * wide

    @cached_property
    def table_bytes(self) -> float:
        """Bytes of the rotary tables, tokens and labels."""
        length = self.run.spec.seq_len // self.degrees.cp
        rows = self.run.spec.local_batch_size
        return 2 * length * self.run.spec.model.head_dim * self.itemsize + 2 * 8 * rows * length

    @cached_property
    def block(self) -> Activations:
        return self._activations(block_trace)

    @cached_property
    def head(self) -> Activations:
        return self._activations(head_trace)

    def _activations(self, trace: Callable[[ModelSpec, Cut, Kernels], Trace]) -> Activations:
        degrees, parallelism = self.degrees, self.run.config.parallelism
        method = parallelism.context_parallel_method if degrees.cp > 1 else None
        kernels = Kernels.of(self.device_type, "float32" if self.itemsize == DTYPE_BYTES["float32"] else "bfloat16")
        sizes = LocalSizes(self.tokens, self.itemsize, degrees.tp, degrees.cp, parallelism.enable_sequence_parallel)
        cut = Cut(degrees.tp > 1, self.sequence_parallel, method)
        return activations_of(trace, self.run.spec.model, cut, kernels, sizes)

    def modes_of_blocks(self, number: int) -> tuple[str, ...]:
        """Recompute mode of each block of stage `number`: `none`, `op` or `full`."""
        own = self.stage_numbers(self.run.spec.stage_ranks[number])
        first = 1 + sum(self.stages[stage].blocks for stage in own if stage < number)
        mode = "op" if self.recompute.per_operation else "full"
        blocks = range(first, first + self.stages[number].blocks)
        return tuple(mode if self.recompute.recomputes_block(block) else "none" for block in blocks)

    def kept(self, mode: str) -> frozenset[str]:
        """Names of the values that a block saves."""
        return self.block.kept(mode, self.compiled, self._forced)

    @cached_property
    def _forced(self) -> frozenset[tuple[int, int]]:
        patterns = self.recompute.per_op_sac_force_recompute_mm_shapes_by_fqns
        products = [(each.matrix, each.module) for each in self.block.trace.operations if each.matrix is not None]
        return frozenset(matrix for matrix, module in products if any(pattern in module for pattern in patterns))

    @cached_property
    def state_bytes(self) -> float:
        """Bytes of parameters, gradients and moments on the pipeline rank with most. Recompute does not change them."""
        if self.offload:
            return 0.0
        return max(map(self.held, range(self.degrees.pp))) * (2 * self.parameter_bytes + 2 * self.moment_bytes)

    def held(self, rank: int) -> int:
        """Elements of the parameters on the ranks of pipeline rank `rank`."""
        return sum(stage.held(self.degrees.tp, self.shards) for stage in self.stages_of(rank))

    def stages_of(self, number: int) -> tuple[Stage, ...]:
        """The stages of pipeline rank `number`."""
        return tuple(self.stages[stage] for stage in self.stage_numbers(number))

    def stage_numbers(self, number: int) -> tuple[int, ...]:
        """The numbers of the stages of pipeline rank `number`."""
        return tuple(stage for stage, rank in enumerate(self.run.spec.stage_ranks) if rank == number)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        model, parallelism = self.run.spec.model, self.run.config.parallelism
        if self.degrees.pp == 1:
            return build_stages(model, None)
        split = parallelism.module_fqns_per_model_part or even_split(
            model,
            len(self.run.spec.stage_ranks),
            parallelism.pipeline_parallel_first_stage_less_layers,
            parallelism.pipeline_parallel_last_stage_less_layers,
        )
        return build_stages(model, tuple(map(tuple, split)))

    def neighbours(self, number: int) -> tuple[int, int]:
        """How many stages of pipeline rank `number` have their next, and their previous, stage on another rank."""
        ranks = self.run.spec.stage_ranks
        own = [stage for stage, rank in enumerate(ranks) if rank == number]
        ahead = sum(stage + 1 < len(ranks) and ranks[stage + 1] != number for stage in own)
        return ahead, sum(stage > 0 and ranks[stage - 1] != number for stage in own)

    @cached_property
    def order(self) -> PipelineOrder:
        """The order of one pass of local_batch_size rows; without a pipeline, a forward and a backward pass."""
        spec, pp = self.run.spec, self.degrees.pp
        order = spec.custom_schedule
        if order is None:
            schedule = self.run.config.parallelism.pipeline_parallel_schedule if pp > 1 else "1F1B"
            order = order_of(schedule, pp, len(spec.stage_ranks) // pp, self.micro_batches_per_call)
        # As in `parallel.pipeline_parallel`: with recompute, the backward pass is not split.
        return order.merged_backward if self.recompute.recomputes else order

    def loads(self, rank: int) -> tuple[Load, ...]:
        """The loads besides the passes of pipeline rank `rank`."""
        return loads_of(self.order, rank, accumulates=self.run.spec.accumulation_steps > 1)

    def gather_counts(self, rank: int) -> Mapping[int, int]:
        """How often per step pipeline rank `rank` gathers the parameters of each of its stages. torch's schedules with
        one stage per rank do it once, the others in each pass of local_batch_size rows."""
        schedule, spec = self.run.config.parallelism.pipeline_parallel_schedule, self.run.spec
        if schedule in SINGLE_STAGE and spec.custom_schedule is None:
            return dict.fromkeys(self.stage_numbers(rank), 1)
        once = gather_counts(self.order, rank)
        return {stage: times * spec.accumulation_steps for stage, times in once.items()}

    def gathered(self, unit: Unit) -> float:
        """Bytes of a unit's gathered parameters; 0 without `fully_shard`."""
        return self.gather_bytes(unit) if self.uses_fsdp else 0.0

    def gather_bytes(self, unit: Unit) -> int:
        """Bytes of the all-gather of a unit's parameters: in the compute dtype, and converted layers in float8."""
        tp, shards = self.degrees.tp, self.shards
        whole = self.itemsize * unit.gathered(tp, shards)
        if not self.gathers_float8:
            return whole
        return whole - (self.itemsize - 1) * sum(each.gathered(tp, shards) for each in self.float8_weights(unit))

    def float8_weights(self, unit: Unit) -> list[Weight]:
        """The parameters of a unit that are gathered in float8."""
        if not self.gathers_float8:
            return []
        return [each for each in unit.weights if each.module.endswith(self.float8_modules)]

    @cached_property
    def float8_modules(self) -> tuple[str, ...]:
        """The linear layers that compute in float8, by the ends of their names. Filters by size are not modelled."""
        if not self.float8:
            return ()
        named = self.run.config.quantize.linear.float8.filter_fqns
        operations = (*self.block.trace.operations, *self.head.trace.operations)
        linear = [each.module for each in operations if each.matrix is not None]
        return tuple(module for module in linear if not any(part in module for part in named))
