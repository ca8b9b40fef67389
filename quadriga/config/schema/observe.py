"""[profiling], [metrics] and [debug]: traces, logs, seeds and determinism."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import Amount, Count, Name, Section, Seed


class Profiling(Section):
    """Traces of the PyTorch profiler and snapshots of the CUDA allocator."""

    enable_profiling: bool = False
    """Record traces with the PyTorch profiler."""

    save_traces_folder: Name = "profile_trace"
    """Folder of the traces, inside the run folder."""

    profile_freq: Count = 10
    """Length of one profiling cycle in steps; at least `profiler_warmup` + `profiler_active`."""

    profiler_active: Count = 5
    """Recorded steps per cycle."""

    profiler_warmup: Amount = 3
    """Steps before the recorded ones in which the profiler runs and discards its records."""

    enable_memory_snapshot: bool = False
    """Record the history of the CUDA allocator, and write it in each cycle and after an out-of-memory error."""

    save_memory_snapshot_folder: Name = "memory_snapshot"
    """Folder of the memory snapshots, inside the run folder."""


class Metrics(Section):
    """Logs: what is written, how often, and where."""

    log_freq: Count = 10
    """Steps between two logged lines."""

    on_write_failure: Literal["go_on", "stop"] = "go_on"
    """If metrics, curves or traces cannot be written (for example a full disk): continue training, or save and stop."""

    log_documents: bool = False
    """Write the documents of each step to `documents/rankN.jsonl` in the run folder, for each rank that reads rows."""

    enable_tensorboard: bool = False
    """Write TensorBoard curves."""

    disable_color_printing: bool = False
    """Print without colours, also on a terminal."""

    save_tb_folder: Name = "tb"
    """Folder of the TensorBoard files, inside the run folder."""

    save_for_all_ranks: bool = False
    """Write TensorBoard and Weights & Biases on every rank, not only on rank 0."""

    enable_wandb: bool = False
    """Write to Weights & Biases (package `wandb`, configured by its variables WANDB_PROJECT, WANDB_MODE, ...)."""


class Debug(Section):
    """Reproducibility."""

    seed: Seed = 42
    """Seed of the initial weights and of the order of the data."""

    deterministic: bool = False
    """Use only deterministic kernels, which are slower."""

    deterministic_warn_only: bool = False
    """With `deterministic`: warn about operations without a deterministic kernel instead of stopping."""

    moe_force_load_balance: bool = False
    """Distribute tokens evenly over experts; without effect on models without experts."""
