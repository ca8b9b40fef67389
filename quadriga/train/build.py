"""The composition root: builds the parts of a run from the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from quadriga.checkpoint.manager import CheckpointManager
from quadriga.comm import collectives, process_group, trace_notes
from quadriga.comm.backend import BACKENDS, choose_backend
from quadriga.comm.mesh import Mesh, build_mesh
from quadriga.comm.sharding import ShardCollectives
from quadriga.config import Run
from quadriga.config.schema import LinearFloat8
from quadriga.data.loader import Loader
from quadriga.log import logger
from quadriga.metrics.documents import DocumentLog
from quadriga.metrics.events import EventLog
from quadriga.metrics.guarded import Logger, WriteFailures
from quadriga.metrics.jsonl import Record
from quadriga.metrics.loggers import build_loggers
from quadriga.metrics.meter import Meter
from quadriga.metrics.profiler import Profiler
from quadriga.models import registry
from quadriga.models.plan import ParallelPlan, ParameterPlan, split_stages
from quadriga.optim.optimizer import build_optimizer
from quadriga.optim.schedule import build_schedule
from quadriga.parallel.context_parallel import local_positions
from quadriga.parallel.float8 import TABLE as FLOAT8
from quadriga.parallel.float8 import precompute_scales
from quadriga.parallel.materialize import materialize
from quadriga.parallel.parallelize import parallelize
from quadriga.parallel.pipeline_parallel import Pipeline, StageShapes, remove_modules, stages_of_rank
from quadriga.parallel.tensor_parallel import loss_context
from quadriga.resilience.bad_steps import BadSteps
from quadriga.resilience.compiler import set_compile_cache
from quadriga.resilience.health import HealthMonitor
from quadriga.resilience.replica_checks import ReplicaCheck
from quadriga.resilience.stop_requests import StopRequests
from quadriga.resilience.watchdog import Watchdog
from quadriga.train.backends import collectives_for_shards, machine_for
from quadriga.train.checks import BadRecords, Checks
from quadriga.train.data import training_loader, validation_loaders
from quadriga.train.feed import Feed
from quadriga.train.loss import Divisor, build_loss, chunked_output
from quadriga.train.numerics import bfloat16_peak, peak_flops, set_numerics
from quadriga.train.resume import resume
from quadriga.train.run_files import open_event_log, write_config_and_environment, write_estimate
from quadriga.train.state import TrainState
from quadriga.train.step import (
    ForwardBackward,
    LocalShard,
    PipelineForwardBackward,
    StepConfig,
    WholeForwardBackward,
)
from quadriga.train.validate import ValidationCost, Validator, held_out_sets

Fill = Callable[[nn.Module, tuple[ParameterPlan, ...], int, torch.device], None]


@dataclass
class TrainerParts:
    """The parts that the loop uses. Everything that changes from step to step is in `state`, except `last_record`."""

    run: Run
    backend: str
    shard_collectives: ShardCollectives | None  # used by `fully_shard` instead of torch's collectives
    device: torch.device
    mesh: Mesh
    state: TrainState
    step_config: StepConfig
    meter: Meter
    loggers: list[Logger]
    failures: WriteFailures
    profiler: Profiler
    checkpoints: CheckpointManager
    events: EventLog
    checks: Checks
    stop_requests: StopRequests
    watchdog: Watchdog
    validator: Validator | None
    validation_cost: ValidationCost
    last_record: Record | None = None  # of a training step

    def close(self) -> None:
        """Wait for pending writes, and end the threads."""
        self.state.loader.close()
        if self.validator is not None:
            self.validator.close()
        self.checkpoints.close()
        self.checks.close()
        for writer in self.loggers:
            writer.close()
        if self.shard_collectives is not None:
            self.shard_collectives.close()


def build_trainer(run: Run, environ: Mapping[str, str], watchdog: Watchdog) -> TrainerParts:
    """Build all parts in the order of their dependencies, and resume from the newest checkpoint, if there is one."""
    config, spec, progress = run.config, run.spec, watchdog.progress
    set_numerics(run)
    progress.enter_phase("rendezvous")
    if spec.world_size > 1:
        logger.info("connecting %d ranks", spec.world_size)
    backend = choose_backend(config.comm.backend, machine_for(config.comm.backend, int(environ.get("LOCAL_RANK", "0"))))
    run = run.on_device(BACKENDS[backend].device_type)
    config = run.config
    if config.compile.enable:
        set_compile_cache(os.environ)
    device = process_group.start(config.comm, backend, spec.folders.comm_traces, environ)
    mesh = build_mesh(spec.degrees, BACKENDS[backend].device_type)
    process_group.set_start_timeouts(config.comm)
    shard_collectives = collectives_for_shards(run, backend, mesh, device)
    events = watchdog.events = open_event_log(spec, backend)
    failures = WriteFailures(config.metrics.on_write_failure == "stop")
    if collectives.rank() == 0:
        write_config_and_environment(Path(spec.folders.dump), config, backend, spec.degrees, device, failures)
        write_estimate(Path(spec.folders.dump), run, device, events.attempt, failures)

    progress.enter_phase("data")
    rows = range(mesh.batch_rank * spec.rows_per_rank, (mesh.batch_rank + 1) * spec.rows_per_rank)
    loader = training_loader(run, rows, device)

    progress.enter_phase("weights")
    logger.info("building the model")
    parts = build_parts(run, mesh, device, shard_collectives=shard_collectives)
    state = build_state(run, parts, loader, device, events.attempt)
    state.progress = progress
    state.health = HealthMonitor(config.health, device)
    step_config = build_step_config(run, mesh, device, parts)
    watchdog.store_barrier("built")  # without a time limit, unlike the collectives that follow
    patience = config.checkpoint.timeout_seconds
    checkpoints = CheckpointManager(
        config.checkpoint, spec.folders.checkpoint, process_group.host_group(patience), log_event=events.log_event
    )
    if not config.checkpoint.create_seed_checkpoint:
        resume(run, state, checkpoints)
    between_steps = process_group.host_group(patience)
    state.feed = Feed(between_steps, copies=spec.world_size // mesh.batch_degree)
    return TrainerParts(
        run=run,
        backend=backend,
        shard_collectives=shard_collectives,
        device=device,
        mesh=mesh,
        state=state,
        step_config=step_config,
        meter=Meter(
            config.metrics,
            steps=spec.steps,
            first_step=state.step + 1,
            tokens_seen=state.tokens_seen,
            attempt=events.attempt,
            devices=spec.world_size,
            flops_per_token=registry.flops_per_token(spec.model, spec.seq_len),
            peak_flops=peak_flops(device, config.training),
            bfloat16_peak=bfloat16_peak(device, config.training),
            row_tokens=spec.tokens_per_step if config.training.packing == "pad" else None,
            flops_of_documents=(registry.flops_per_token(spec.model, 0), registry.flops_per_pair(spec.model)),
            device=device,
        ),
        loggers=build_loggers(
            config.metrics,
            spec.folders,
            rank=collectives.rank(),
            steps=spec.steps,
            first_step=state.step + 1,
            title=config.job.description,
            config=config.model_dump(mode="json"),
            failures=failures,
        ),
        failures=failures,
        profiler=Profiler(
            config.profiling,
            spec.folders,
            rank=collectives.rank(),
            device=device,
            first_step=state.step + 1,
            steps=spec.steps,
            notes=partial(trace_notes.notes, mesh, events.attempt),
            failures=failures,
        ),
        checkpoints=checkpoints,
        events=events,
        checks=build_checks(run, mesh, state, events, rows, failures),
        stop_requests=StopRequests(
            spec.folders.dump,
            environ,
            between_steps,
            saves=config.checkpoint.enable and not config.checkpoint.load_only,
        ),
        watchdog=watchdog,
        validator=build_validator(run, mesh, device, parts, loader, state.feed),
        validation_cost=ValidationCost(),
    )


def build_parts(
    run: Run,
    mesh: Mesh,
    device: torch.device,
    fill: Fill = materialize,
    shard_collectives: ShardCollectives | None = None,
) -> tuple[nn.Module, ...]:
    """The whole model, or this rank's pipeline stages of it, in ascending order."""
    plan = registry.parallel_plan(run.spec.model)
    if mesh.pp.size() == 1:
        return (build_part(run, mesh, device, plan, fill, shard_collectives),)
    parallelism, ranks = run.config.parallelism, run.spec.stage_ranks
    stages = parallelism.module_fqns_per_model_part or split_stages(
        plan,
        len(ranks),
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )
    parts: list[nn.Module] = []
    blocks = 0
    for stage in stages_of_rank(ranks, mesh.pp.get_local_rank()):
        own = plan.of_stage(stages[stage])
        parts.append(build_part(run, mesh, device, own, fill, shard_collectives, blocks_before=blocks))
        blocks += len(own.recompute_units)
    return tuple(parts)


def build_part(
    run: Run,
    mesh: Mesh,
    device: torch.device,
    plan: ParallelPlan,
    fill: Fill,
    shard_collectives: ShardCollectives | None,
    blocks_before: int = 0,
) -> nn.Module:
    """Build on the meta device, shard, then allocate: a rank allocates only its shards. `plan`: of this part."""
    config, spec = run.config, run.spec
    with torch.device("meta"):
        model = registry.build_model(spec.model).to(getattr(torch, config.training.dtype))
    units = registry.parallel_plan(spec.model).stage_units
    remove_modules(model, [unit for unit in units if unit not in plan.stage_units])
    parallelize(
        model,
        plan,
        mesh,
        parallelism=config.parallelism,
        training=config.training,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        reshard_after_forward=spec.reshard_after_forward,
        reshard_ends=spec.reshard_ends,
        chunked_output=chunked_output(run),
        float8=float8_of(run),
        collectives=shard_collectives,
        blocks_before=blocks_before,
        run_folder=spec.folders.dump,
    )
    if config.model.converters and config.model.print_after_conversion:
        logger.info("%s", model)
    held_on = torch.device("cpu") if config.training.enable_cpu_offload else device
    fill(model, plan.parameters, spec.seed, held_on)
    return model


def build_state(
    run: Run, parts: tuple[nn.Module, ...], loader: Loader, device: torch.device, attempt: int = 1
) -> TrainState:
    """The training state before the first step."""
    named = [pair for part in parts for pair in part.named_parameters()]
    optimizer = build_optimizer(named, run.config.optimizer, run.spec.seed)
    precompute_scales(optimizer, parts, float8_of(run))
    schedule = build_schedule(optimizer, run.config.lr_scheduler, run.spec.steps)
    return TrainState(parts, optimizer, schedule, loader, device, attempt=attempt)


def float8_of(run: Run) -> LinearFloat8 | None:
    """The float8 settings of linear layers; None if no converter requests float8."""
    return run.config.quantize.linear.float8 if FLOAT8 in run.config.model.converters else None


def build_step_config(run: Run, mesh: Mesh, device: torch.device, parts: tuple[nn.Module, ...]) -> StepConfig:
    spec, divisor = run.spec, Divisor(run.spec.tokens_per_step)
    return StepConfig(
        forward_backward=build_forward_backward(
            run, mesh, device, parts, spec.local_batch_size, spec.seq_len, divisor=divisor
        ),
        device=device,
        micro_batch_rows=spec.local_batch_size,
        tokens_per_step=spec.tokens_per_step,
        max_norm=run.config.training.max_norm,
        reduce_gradients=spec.reduce_gradients,
        divisor=divisor,
    )


def build_forward_backward(
    run: Run,
    mesh: Mesh,
    device: torch.device,
    parts: tuple[nn.Module, ...],
    rows: int,
    seq_len: int,
    divisor: Divisor | None = None,
) -> ForwardBackward:
    """Forward and backward for `rows` sequences of `seq_len` tokens; losses are divided by `divisor` (1)."""
    parallelism = run.config.parallelism
    loss = build_loss(run, device, parts, divisor or Divisor(1))
    positions = local_positions(
        seq_len, mesh.cp.get_local_rank(), mesh.cp.size(), parallelism.context_parallel_load_balancer
    )
    shard = LocalShard(device, positions.to(device), seq_len)
    context = loss_context(mesh.tp, parallelism)
    if mesh.pp.size() == 1:
        return WholeForwardBackward(parts[0], loss, context, shard)
    micro_batch = parallelism.pipeline_parallel_microbatch_size
    cut = mesh.tp.size() if parallelism.enable_sequence_parallel else 1
    pipeline = Pipeline(
        dict(zip(stages_of_rank(run.spec.stage_ranks, mesh.pp.get_local_rank()), parts, strict=True)),
        stage_ranks=run.spec.stage_ranks,
        mesh=mesh.pp,
        device=device,
        stage_shapes=StageShapes(
            (micro_batch, len(positions) // cut, run.spec.model.dim),
            getattr(torch, run.config.training.mixed_precision_param),
            len(positions),
        ),
        micro_batches=rows // micro_batch,
        parallelism=parallelism,
        loss=loss,
        recomputes=run.config.activation_checkpoint.recomputes,
    )
    return PipelineForwardBackward(pipeline, context, shard)


def build_validator(
    run: Run, mesh: Mesh, device: torch.device, parts: tuple[nn.Module, ...], training: Loader, feed: Feed
) -> Validator | None:
    section, what = run.config.validation, run.spec.validation
    if what is None:
        return None
    loaders = validation_loaders(run, mesh, device, training)
    sets = held_out_sets([(each.label, each.table) for each in section.read_sets], loaders)
    forward = build_forward_backward(run, mesh, device, parts, what.local_batch_size, what.seq_len)
    asked = section.steps is not None or "validation.windows" in run.origin
    return Validator(sets, feed, forward, device, section.freq, what.windows, asked)


def build_checks(
    run: Run, mesh: Mesh, state: TrainState, events: EventLog, rows: range, failures: WriteFailures
) -> Checks:
    folder = run.spec.folders.dump
    first_row = rows.start if mesh.reads_rows else None
    documents = None
    if run.config.metrics.log_documents and first_row is not None:
        documents = DocumentLog(
            folder, rank=events.rank, attempt=events.attempt, first_row=first_row, failures=failures
        )
    return Checks(
        documents,
        BadSteps(state.health, state.parts, events, folder, first_row),
        ReplicaCheck(run.config.health.replica_check_interval, state.parts, mesh),
        BadRecords(state.loader, events) if mesh.reads_rows else None,
    )
