"""The real trainer on real ranks, forked: what tests of training have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import host_slots_backend
from ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
DEBUG_FILE = str(ROOT / "configs/debug/debug.toml")

# A model that takes milliseconds a step, for tests in which size does not matter.
TINY = (
    *("--model.dim=32", "--model.n_layers=2", "--model.n_heads=4", "--model.n_kv_heads=2"),
    *("--model.ffn_dim=64", "--model.vocab_size=320", "--training.seq_len=32", "--training.local_batch_size=1"),
    *("--training.global_batch_size=8", "--lr_scheduler.warmup_steps=2", "--metrics.log_freq=1"),
    *("--profiling.no_enable_profiling", "--metrics.no_enable_tensorboard"),
)


def train(
    folder: Path, ranks: int, *arguments: str, file: str | None = DEBUG_FILE, timeout: float = 120.0
) -> list[dict[str, Any]]:
    """Train in `folder` as `python -m quadriga.train` does, on forked ranks; the training records by step."""
    from quadriga.metrics.jsonl import read_metrics

    given = ["--job.config_file", file] if file else []
    argv = [*given, "--job.dump_folder", str(folder), *arguments]
    codes = run_ranks(one_rank, ranks, argv, timeout=timeout, backend=None)
    assert codes == [0] * ranks
    metrics = folder / "metrics.jsonl"
    return read_metrics(metrics) if metrics.exists() else []  # of a run that only saved its seed there are none


def one_rank(argv: list[str], log: bool = True) -> int:
    from quadriga.checkpoint.folder import newest_extra
    from quadriga.comm.backend import BACKENDS
    from quadriga.config import read
    from quadriga.log import start_logging
    from quadriga.models.registry import catalogue
    from quadriga.train.loop import run

    if "--comm.backend=host-slots" in argv:  # a rank of other tests may be this process itself
        host_slots_backend.register()
    if log:
        start_logging()
    world_size = int(os.environ["WORLD_SIZE"])
    return run(
        read(
            argv,
            os.environ,
            catalogue=catalogue(),
            backends=BACKENDS,
            world_size=world_size,
            training=True,
            saved=newest_extra,
        ),
        os.environ,
    )


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    """The largest relative difference of a figure over all steps; both must have logged the same ones."""
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True))
