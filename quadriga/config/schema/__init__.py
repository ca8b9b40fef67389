"""The schema of the configuration: one frozen model for each TOML table. `JobConfig` contains all of them.

Only a few modules may use `JobConfig` (`tests/architecture/test_root.py`). Builders take single sections.
"""

from __future__ import annotations

from quadriga.config.schema.checkpoint import Checkpoint
from quadriga.config.schema.health import Health
from quadriga.config.schema.job import Experimental, Job
from quadriga.config.schema.memory import ActivationCheckpoint, Compile, EstimateAssumptions, MemoryEstimation
from quadriga.config.schema.model import GroupedFloat8, GroupedMX, LinearFloat8, LinearMX, Model, Quantize
from quadriga.config.schema.observe import Debug, Metrics, Profiling
from quadriga.config.schema.optim import UPDATE_BUCKET, LrScheduler, Optimizer
from quadriga.config.schema.parallelism import Comm, FaultTolerance, Parallelism
from quadriga.config.schema.section import Section
from quadriga.config.schema.sources import (
    TEXT_FIELD,
    TOKENS,
    DataSource,
    MixtureStage,
    TextKeys,
    TokenKeys,
    TrainingSource,
)
from quadriga.config.schema.training import Dataloader, Fetching, HeldOut, Training, Validation, ValidationSet

__all__ = [
    "TEXT_FIELD",
    "TOKENS",
    "UPDATE_BUCKET",
    "ActivationCheckpoint",
    "Checkpoint",
    "Comm",
    "Compile",
    "DataSource",
    "Dataloader",
    "Debug",
    "EstimateAssumptions",
    "Experimental",
    "FaultTolerance",
    "Fetching",
    "GroupedFloat8",
    "GroupedMX",
    "Health",
    "HeldOut",
    "Job",
    "JobConfig",
    "LinearFloat8",
    "LinearMX",
    "LrScheduler",
    "MemoryEstimation",
    "Metrics",
    "MixtureStage",
    "Model",
    "Optimizer",
    "Parallelism",
    "Profiling",
    "Quantize",
    "Section",
    "TextKeys",
    "TokenKeys",
    "Training",
    "TrainingSource",
    "Validation",
    "ValidationSet",
]


class JobConfig(Section):
    """The whole configuration: the user's keys, and the defaults of all others."""

    job: Job = Job()
    model: Model = Model()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LrScheduler = LrScheduler()
    parallelism: Parallelism = Parallelism()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    compile: Compile = Compile()
    quantize: Quantize = Quantize()
    comm: Comm = Comm()
    checkpoint: Checkpoint = Checkpoint()
    health: Health = Health()
    validation: Validation = Validation()
    metrics: Metrics = Metrics()
    profiling: Profiling = Profiling()
    debug: Debug = Debug()
    estimate: EstimateAssumptions = EstimateAssumptions()
    memory_estimation: MemoryEstimation = MemoryEstimation()
    fault_tolerance: FaultTolerance = FaultTolerance()
    experimental: Experimental = Experimental()

    @property
    def only_rehearses(self) -> bool:
        """Whether a launch only builds the run without memory and takes one step, and does not train."""
        return self.memory_estimation.enable or self.comm.mode == "fake_backend"
