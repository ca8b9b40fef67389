"""[parallelism], [comm] and [fault_tolerance]: the degrees of parallelism, and communication between ranks."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import AllOrDegree, Amount, Count, Degree, Name, Names, Seconds, Section

Schedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]


class Parallelism(Section):
    """The parallelism of the run. The product of all degrees is the number of ranks."""

    data_parallel_replicate_degree: Degree = 1
    """Replicas of the model that read different data (DDP; with sharding: the outer degree of HSDP)."""

    data_parallel_shard_degree: AllOrDegree = -1
    """Ranks that share one copy of parameters, gradients and optimizer state (FSDP); -1 takes all that remain."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after the forward pass; `default` does so without a pipeline."""

    fsdp_prefetch: Count | None = None
    """Blocks whose parameters FSDP gathers ahead, in both passes; more of them use more memory; none: one."""

    reduce_gradients: Literal["auto", "once", "every_micro_batch"] = "auto"
    """With gradient accumulation: reduce gradients once per step (faster, more memory) or after each micro-batch."""

    tensor_parallel_degree: Degree = 1
    """Ranks that share each matrix product (tensor parallelism with sequence parallelism)."""

    enable_sequence_parallel: bool = True
    """With tensor parallelism: shard hidden states along the sequence where they are not sharded along the features."""

    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits instead of computing the loss on slices of the vocabulary."""

    enable_async_tensor_parallel: bool = False
    """Overlap the communication of tensor parallelism with its matrix products; needs `compile` of the model."""

    pipeline_parallel_degree: Degree = 1
    """Ranks that hold different layers."""

    module_fqns_per_model_part: tuple[Names, ...] | None = None
    """The modules of each pipeline stage, by name; none: a balanced split."""

    pipeline_parallel_first_stage_less_layers: Amount = 1
    """Weight of the embedding when layers are balanced over stages, in layers."""

    pipeline_parallel_last_stage_less_layers: Amount = 1
    """Weight of the last norm and the output layer when layers are balanced over stages, in layers."""

    pipeline_parallel_layers_per_stage: Count | None = None
    """Layers per stage; none: one stage per rank for single-stage schedules, two for the others."""

    pipeline_parallel_schedule: Schedule = "1F1B"
    """Pipeline schedule."""

    pipeline_parallel_schedule_csv: str | None = None
    """A CSV file with your own schedule."""

    pipeline_parallel_microbatch_size: Count = 1
    """Sequences in one pipeline micro-batch; must divide `training.local_batch_size`."""

    pipeline_parallel_expert_parallel_overlap: bool = True
    """Overlap the communication of experts in DualPipeV; without effect on models without experts."""

    context_parallel_degree: Degree = 1
    """Ranks that share one sequence."""

    context_parallel_method: Literal["allgather", "ring", "ulysses"] = "allgather"
    """How attention gets the whole sequence: gather keys and values, send them around a ring, or exchange heads."""

    context_parallel_load_balancer: Literal["headtail", "ptrr"] | None = "headtail"
    """How a sequence is sharded: `headtail` gives each rank an early and a late piece, none one piece."""

    expert_parallel_degree: Degree = 1
    """Ranks that hold different experts; mixture-of-experts models only."""

    expert_tensor_parallel_degree: Degree = 1
    """Ranks that share each expert; mixture-of-experts models only."""

    expert_parallel_comm_backend: Literal["standard", "deepep"] = "standard"
    """Communication of expert parallelism; without effect on models without experts."""


class Comm(Section):
    """Communication between ranks."""

    backend: Name | None = None
    """`gloo`, `nccl`, `nccl-symm`, `nvshmem` (docs/communication.md); none: nccl with CUDA, else gloo."""

    init_timeout_seconds: Seconds = 300
    """Timeout of the rendezvous and of collectives in step 1; until then, 70 % of it without progress end the run."""

    train_timeout_seconds: Seconds = 100
    """Timeout of collectives after the first step."""

    trace_buf_size: Amount = 20000
    """Entries of the flight recorder, which records the last collectives; 0 switches it off."""

    save_traces_folder: Name = "comm_traces"
    """Folder of the flight recorder's dumps, inside the run folder."""

    save_traces_file_prefix: str = "rank_"
    """Prefix of the dumps' file names."""

    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """`default` trains; `fake_backend` only rehearses, like `DRY_RUN=1 ... --rehearse`, and starts no ranks."""


class FaultTolerance(Section):
    """Replica groups that can join and leave (TorchFT)."""

    enable: bool = False
    """Train with replica groups that can fail independently."""

    process_group: Literal["gloo", "nccl"] = "gloo"
    """Backend between replica groups."""

    process_group_timeout_ms: Count = 10000
    """Timeout of collectives between replica groups, in milliseconds."""

    replica_id: Amount = 0
    """Number of this replica group."""

    group_size: Amount = 0
    """Number of replica groups."""

    min_replica_size: Count = 1
    """Replica groups that a step needs at least."""

    semi_sync_method: Literal["local_sgd", "diloco"] | None = None
    """Method that synchronizes replica groups less often than every step."""
