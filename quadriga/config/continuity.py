"""Compares a run with the checkpoint that it resumes from: whether it is the same training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from quadriga.config.keys import KEYS, format_toml
from quadriga.config.legacy_keys import started_with, value_in
from quadriga.config.read import Run
from quadriga.config.rules import config_value
from quadriga.config.rules_layout import FROM_CHECKPOINT, divisors
from quadriga.errors import Problem, shortened
from quadriga.limits import COUNT

# Fields of a model that may differ: names, and what only the initial weights depend on (the checkpoint replaces them).
NOT_COMPARED = {"name", "flavor", "depth_init"}
FIX = "restore the old value, start another run (--job.dump_folder), or resume anyway: --checkpoint.allow_change"
BATCH = "training.global_batch_size"
ORDER = ("training.dataloader.shuffle", "training.dataloader.window_overlap")
Change = tuple[str, Any, Any]  # the key, its old value, its new value


def run_facts(run: Run) -> dict[str, Any]:
    """The part of the configuration that a checkpoint contains, for comparison at a resume."""
    return {
        "config": run.config.model_dump(mode="json"),
        "model": asdict(run.spec.model),
        "seq_len": run.spec.seq_len,
        "seed": run.spec.seed,
        "global_batch_size": run.spec.global_batch_size,
        "world_size": run.spec.world_size,
        "layout": asdict(run.spec.degrees),
    }


def training_changes(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Change]:
    """The differences that make it another training: of model, sequence length, seed and global batch."""
    model = saved.get("model")
    for name in sorted(here["model"].keys() - NOT_COMPARED):
        was, now = model.get(name) if isinstance(model, Mapping) else None, here["model"][name]
        if was != now:
            yield f"model.{name}", was, now
    for name, key in (("seq_len", "training.seq_len"), ("seed", "debug.seed"), ("global_batch_size", BATCH)):
        if saved.get(name) != here[name]:
            yield key, saved.get(name), here[name]


def default_changes(saved: Mapping[str, Any], run: Run) -> Iterator[Change]:
    """Keys whose default has changed, that the user does not set, and whose value is not that of the saved run.

    `read` takes them from the newest checkpoint. So they differ only if that checkpoint is damaged and another one is
    loaded, or if the run was read without its checkpoints.
    """
    for key, was in started_with(saved).items():
        now = config_value(run.config, key)
        if was != now and run.origin.get(key, FROM_CHECKPOINT).startswith(FROM_CHECKPOINT):
            yield key, was, now


def resume_problems(saved: Mapping[str, Any], run: Run) -> list[Problem]:
    """A problem for each difference that makes it another training, with the remedy."""
    return [
        Problem(key, f"was {was} when the checkpoint was saved", value=str(now), fix=_restore_hint(key, was, run))
        for key, was, now in [*training_changes(saved, run_facts(run)), *default_changes(saved, run)]
    ]


def data_order_problems(saved: Mapping[str, Any], run: Run) -> list[Problem]:
    """A problem for each key that changes the order of the data. A checkpoint from before a key existed has its
    default. The ranks also compare the data itself."""
    before = {key: value_in(saved.get("config"), key, KEYS[key].default) for key in ORDER}
    return [
        Problem(
            key,
            f"was {shortened(format_toml(was))} when the checkpoint was saved",
            format_toml(now),
            fix=_restore_hint(key, was, run),
        )
        for key, was in before.items()
        if (now := config_value(run.config, key)) != was
    ]


def _restore_hint(key: str, was: Any, run: Run) -> str:
    """How to restore the old value, if one or two keys do."""
    if key == BATCH and isinstance(was, int) and 0 < was <= COUNT:
        ranks, rows = run.spec.degrees.batch, run.spec.local_batch_size
        if was % ranks:
            return f"start on a number of data-parallel ranks that divides {was}, or: {FIX}"
        if (was // ranks) % rows:
            rows = max(size for size in divisors(was // ranks) if size <= rows)
            return f"set {key} to {was} and training.local_batch_size to {rows}; or: {FIX}"
    if was is not None and not isinstance(was, dict | list) and key != "model.head_dim":
        return f"set {key} to {was if isinstance(was, str) else format_toml(was)}; or: {FIX}"
    return FIX
