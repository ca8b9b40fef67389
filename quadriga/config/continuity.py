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
# Fields of a model that names and shapes of tensors depend on. Those of HEADS do if their ratio changes.
SHAPES, HEADS = {"dim", "n_layers", "ffn_dim", "vocab_size", "tie_embeddings"}, {"n_heads", "n_kv_heads"}
OTHER_SHAPES = "restore the old value, or start another run (--job.dump_folder)"
FIX = "restore the old value, start another run (--job.dump_folder), or resume anyway: --checkpoint.allow_change"
MOST = 1 << 53  # of a count in a checkpoint: tokens, positions, bytes of a file
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
        "document_mask": run.config.training.document_mask,
        "world_size": run.spec.world_size,
        "layout": asdict(run.spec.degrees),
    }


def training_changes(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Change]:
    """The differences that make it another training: of model, sequence length, seed, global batch and mask."""
    model = saved.get("model")
    for name in sorted(here["model"].keys() - NOT_COMPARED):
        was, now = model.get(name) if isinstance(model, Mapping) else None, here["model"][name]
        if was != now:
            yield f"model.{name}", was, now
    for name, key in (("seq_len", "training.seq_len"), ("seed", "debug.seed"), ("global_batch_size", BATCH)):
        if saved.get(name) != here[name]:
            yield key, saved.get(name), here[name]
    if (was := saved.get("document_mask", False)) != here["document_mask"]:  # older checkpoints have no masks
        yield "training.document_mask", was, here["document_mask"]


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
    others = _shape_keys(saved, run)
    return [
        Problem(
            key,
            f"was {was} when the checkpoint was saved",
            value=str(now),
            fix=_restore_hint(key, was, run, OTHER_SHAPES if key in others else FIX),
        )
        for key, was, now in [*training_changes(saved, run_facts(run)), *default_changes(saved, run)]
    ]


def model_problems(saved: Mapping[str, Any], run: Run) -> list[Problem]:
    """The part of `resume_problems` about the model, for a start from weights alone: heads, rotary frequencies and the
    epsilon of the norms change what the weights compute, and no shape shows them."""
    if not isinstance(saved.get("model"), Mapping):
        return []
    return [problem for problem in resume_problems(saved, run) if problem.where.startswith("model.")]


def shape_problems(saved: Mapping[str, Any], run: Run) -> list[Problem]:
    """The part of `resume_problems` that `checkpoint.allow_change` cannot allow: the tensors would not fit."""
    others = _shape_keys(saved, run)
    return [problem for problem in resume_problems(saved, run) if problem.where in others]


def _shape_keys(saved: Mapping[str, Any], run: Run) -> set[str]:
    """The keys whose change gives other names or shapes to the tensors that the run would load."""
    model, here = saved.get("model"), run.spec.model
    if not isinstance(model, Mapping) or {"model", "optimizer"} <= set(run.config.checkpoint.exclude_from_loading):
        return set()
    heads, kv_heads = model.get("n_heads"), model.get("n_kv_heads")
    names = SHAPES | HEADS
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads * here.n_kv_heads == kv_heads * here.n_heads:
        names = SHAPES  # keys and values have the same width
    return {f"model.{name}" for name in names if name in model}


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


def _restore_hint(key: str, was: Any, run: Run, fix: str = FIX) -> str:
    """How to restore the old value, if one or two keys do."""
    if key == BATCH and isinstance(was, int) and 0 < was <= COUNT:
        ranks, rows = run.spec.degrees.batch, run.spec.local_batch_size
        if was % ranks:
            return f"start on a number of data-parallel ranks that divides {was}, or: {FIX}"
        if (was // ranks) % rows:
            rows = max(size for size in divisors(was // ranks) if size <= rows)
            return f"set {key} to {was} and training.local_batch_size to {rows}; or: {FIX}"
    if was is not None and not isinstance(was, dict | list) and key != "model.head_dim":
        return f"set {key} to {was if isinstance(was, str) else format_toml(was)}; or: {fix}"
    return fix


def check_extra(extra: Mapping[str, Any], step: int) -> None:
    """Refuse what no run saves and a resume would take over: a manifest has no secret, so its values may be anything.

    Args:
        extra: of a checkpoint of `step`, without the parts in `checkpoint.exclude_from_loading`. What older versions
            did not save may be absent.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: see `checkpoint.messages.convert_extra_errors`.
    """
    counts = {key: extra[key] for key in ("max_positions", "seq_len") if key in extra}
    counts["world_size"] = extra["world_size"]
    if "train_state" in extra:
        state = extra["train_state"]
        counts |= {f"train_state.{key}": state[key] for key in ("step", "tokens_seen")}
        if "health" in state:
            health = state["health"]
            counts |= {"health.skipped": health["skipped"], "health.recent.count": health["recent"]["count"]}
            if any(type(loss) not in (int, float) for loss in health["recent"]["losses"]):
                raise TypeError("health.recent.losses are not all numbers")
        if state["step"] != step:
            raise ValueError(f"its train_state is of step {shortened(state['step'])}, the checkpoint of step {step}")
    if "lr_scheduler" in extra:
        counts["lr_scheduler.done"] = extra["lr_scheduler"]["done"]
    for lane, cursor in extra["dataloader"]["lanes"].items() if "dataloader" in extra else ():
        counts |= {f"dataloader.lanes.{lane}[{place}]": value for place, value in enumerate(cursor)}
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value <= MOST:
            raise ValueError(f"{name} is {shortened(value)}, which is not a count")
