"""What a checkpoint says of its run: values that no run saves, and changes that cannot be allowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.config.continuity import check_extra, resume_problems, run_facts, shape_problems
from quadriga.models.registry import catalogue

SAVED: dict[str, Any] = {
    "train_state": {"step": 2, "tokens_seen": 64, "health": {"skipped": 0, "recent": {"count": 1, "losses": [5.5]}}},
    "lr_scheduler": {"done": 2},
    "dataloader": {"fingerprint": "text", "lanes": {"0": [0, 0, 0, 32]}},
    "seq_len": 16,
    "max_positions": 16,
    "world_size": 2,
}
CANNOT_BE = [
    ("max_positions", "x"),
    ("max_positions", None),
    ("world_size", "x"),
    ("world_size", True),
    ("train_state.step", 3),
    ("train_state.step", 2.0),
    ("train_state.tokens_seen", "x"),
    ("train_state.tokens_seen", 1 << 60),
    ("train_state.health", None),
    ("train_state.health.skipped", None),
    ("train_state.health.recent.count", -1),
    ("train_state.health.recent.losses", ["x"]),
    ("lr_scheduler.done", float("inf")),
    ("lr_scheduler.done", float("nan")),
    ("lr_scheduler", None),
    ("dataloader.lanes.0", None),
    ("dataloader.lanes.0", [0, 0, "x", 0]),
    ("dataloader.lanes.0", [0, 0, 0.5, 0]),
    ("dataloader.lanes", []),
]


def test_what_a_run_saves_is_taken_also_without_what_older_versions_lacked() -> None:
    check_extra(SAVED, 2)
    check_extra({"train_state": {"step": 2, "tokens_seen": 64}, "world_size": 1}, 2)


@pytest.mark.parametrize(("key", "value"), CANNOT_BE)
def test_a_value_that_no_run_saves_is_refused(key: str, value: Any) -> None:
    extra = copy.deepcopy(SAVED)
    *tables, name = key.split(".")
    table = extra
    for each in tables:
        table = table[each]
    table[name] = value
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
        check_extra(extra, 2)


def resumed(*arguments: str) -> Run:
    argv = ["--model.flavor=debugmodel", "--model.hf_assets_path=builtin:bytes", "--training.dataset=builtin"]
    argv += ["--checkpoint.enable", *arguments]
    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=True)


@pytest.mark.parametrize(
    ("name", "was", "refused"),
    [
        ("dim", 8, ["model.dim"]),
        ("vocab_size", 300, ["model.vocab_size"]),
        ("tie_embeddings", True, ["model.tie_embeddings"]),
        ("n_kv_heads", 1, ["model.n_kv_heads"]),
        ("rope_theta", 1e4, []),
        ("depth_init", None, []),
    ],
)
def test_no_one_is_told_to_allow_another_shape(name: str, was: Any, refused: list[str]) -> None:
    run = resumed()
    facts = run_facts(run)
    saved = {**facts, "model": {**facts["model"], name: was}}
    assert [problem.where for problem in shape_problems(saved, run)] == refused
    for problem in resume_problems(saved, run):
        assert ("allow_change" in (problem.fix or "")) != (problem.where in refused)


def test_heads_that_are_scaled_together_keep_all_shapes() -> None:
    run = resumed()
    facts = run_facts(run)
    heads = {name: 2 * facts["model"][name] for name in ("n_heads", "n_kv_heads")}
    saved = {**facts, "model": {**facts["model"], **heads}}
    assert len(resume_problems(saved, run)) == 2
    assert shape_problems(saved, run) == []


def test_shapes_of_tensors_that_are_not_loaded_may_change() -> None:
    run = resumed('--checkpoint.exclude_from_loading=["model", "optimizer"]')
    facts = run_facts(run)
    assert shape_problems({**facts, "model": {**facts["model"], "dim": 8}}, run) == []
    assert shape_problems({**facts, "model": None}, resumed()) == []
