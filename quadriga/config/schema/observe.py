"""[profiling], [metrics] and [debug]: what a run shows of itself, and how repeatable it is."""

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
    """Recorded steps of each cycle."""

    profiler_warmup: Amount = 3
    """Steps before the recorded ones in which the profiler runs but nothing is kept."""

    enable_memory_snapshot: bool = False
    """Record the history of the CUDA allocator and write it at each cycle and on running out of memory."""

    save_memory_snapshot_folder: Name = "memory_snapshot"
    """Folder of the memory snapshots, inside the run folder."""


class Metrics(Section):
    """What is logged, how often and where."""

    log_freq: Count = 10
    """Steps between two logged lines."""

    on_write_failure: Literal["go_on", "stop"] = "go_on"
    """When metrics, curves, traces and the like cannot be written (a full disk): train on, or save and stop."""

    log_documents: bool = False
    """Write which documents each step read: `documents/rankN.jsonl` in the run folder, of ranks that read rows."""

    enable_tensorboard: bool = False
    """Write TensorBoard curves."""

    disable_color_printing: bool = False
    """Plain console lines, also on a terminal."""

    save_tb_folder: Name = "tb"
    """Folder of the TensorBoard files, inside the run folder."""

    save_for_all_ranks: bool = False
    """Let every rank write TensorBoard and Weights & Biases, not only rank 0."""

    enable_wandb: bool = False
    """Write to Weights & Biases (the package `wandb`; WANDB_PROJECT, WANDB_MODE and so on are its own variables)."""


class Debug(Section):
    """Repeatability."""

    seed: Seed = 42
    """Seed of the initial weights and of the order of the data."""

    deterministic: bool = False
    """Use deterministic kernels only, at some cost in speed."""

    deterministic_warn_only: bool = False
    """With `deterministic`: warn about an operation that has no deterministic kernel instead of stopping."""

    moe_force_load_balance: bool = False
    """Spread tokens evenly over experts; without effect on models that have none."""
