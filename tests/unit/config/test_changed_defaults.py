"""What a run that goes on keeps of what it was started with, where defaults have changed since."""

from __future__ import annotations

import json
import tarfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.config.continuity import resume_problems, run_facts
from quadriga.config.keys import KEYS
from quadriga.config.legacy_keys import OLD_DEFAULTS, started_with
from quadriga.config.rules import config_value
from quadriga.errors import Problem, UserError
from quadriga.models.registry import catalogue
from quadriga.train.resume import config_changes, flatten

FILTER = "quantize.linear.float8.filter_fqns"
VARIANT, DECAY = "lr_scheduler.variant", "optimizer.decay_norms_and_biases"
# No number of the training depends on these.
WITHOUT_NUMBERS = {f"{table}.dataloader.pin_memory" for table in ("training", "validation")}
WITHOUT_NUMBERS |= {f"validation.{name}" for name in ("local_batch_size", "seq_len", "steps")}
PLACES = {"job.config_file", "job.dump_folder", "training.dataset_path"}  # of that run
OLD: dict[str, Any] = {"config": {"lr_scheduler": {"warmup_steps": 1}, "optimizer": {"decay_norms_and_biases": False}}}
NEW: dict[str, Any] = {
    "config": {"lr_scheduler": {"variant": "torchtitan"}, "optimizer": {"decay_norms_and_biases": True}}
}


def going_on(*arguments: str, **checkpoints: Mapping[str, Any]) -> Run:
    """Read a configuration; `checkpoints`: what the newest in each folder says."""
    argv = ["--model.hf_assets_path=builtin:bytes", "--training.dataset=builtin", *arguments]

    def saved(folder: str, step: int) -> Mapping[str, Any] | None:
        name = folder.replace("/", "_")
        return checkpoints.get(name if step == -1 else f"{name}_{step}")

    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=True, saved=saved)


def as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def kept(run: Run) -> tuple[Any, Any]:
    return config_value(run.config, VARIANT), config_value(run.config, DECAY)


def kept_by_notice(run: Run) -> list[str]:
    """The keys of which a notice says that they were kept."""
    return [notice.split()[0] for notice in run.spec.notices if " stays " in notice]


ON = ("--checkpoint.enable", "--job.dump_folder=run")
ELSEWHERE = (*ON, "--checkpoint.initial_load_path=other", "--checkpoint.no_initial_load_model_only")


def test_the_table_names_keys_whose_default_is_another_now() -> None:
    for key, old in OLD_DEFAULTS.items():
        assert KEYS[key].default != old
        section = KEYS[key].section.model_validate({key.rpartition(".")[2]: old})
        assert getattr(section, key.rpartition(".")[2]) == old


@pytest.mark.parametrize(("converters", "filters"), [(["quantize.linear.float8"], ()), ([], ("output",))])
def test_a_run_in_float8_keeps_the_layers_that_it_converts(converters: list[str], filters: tuple[str, ...]) -> None:
    """Without float8 in the older run, nothing is kept, and no notice is printed."""
    config = {**NEW["config"], "model": {"converters": converters}, "quantize": {"linear": {"float8": {}}}}
    float8 = (f"--model.converters={name}" for name in converters)
    run = going_on(*ON, "--quantize.linear.float8.emulate", *float8, run_checkpoint={"config": config})
    assert run.config.quantize.linear.float8.filter_fqns == filters
    assert run.config.quantize.linear.float8.emulate
    assert kept_by_notice(run) == [FILTER] * len(converters)
    assert resume_problems({**run_facts(run), "config": config}, run) == []


def test_every_default_that_has_changed_is_in_the_table(root: Path) -> None:
    """An older checkpoint holds all defaults of its time; what its TOML file set is left out."""
    folder = root / "tests/distributed/older"
    with tarfile.open(folder / "step-2.tar.gz") as archive:
        manifest = archive.extractfile("step-2/train_state.json")
        assert manifest is not None
        saved = dict(flatten(json.load(manifest)["extra"]["config"]))
    set_by_the_file = {*dict(flatten(tomllib.loads((folder / "tiny.toml").read_text()))), *PLACES}
    assert len(saved) > 100
    for key, old in saved.items():
        if key not in set_by_the_file | WITHOUT_NUMBERS and key in KEYS:
            today = KEYS[key].default
            kept_default = OLD_DEFAULTS.get(key)
            assert old in (as_json(today), as_json(kept_default)), key


def test_a_new_run_has_the_defaults_of_today() -> None:
    for run in (going_on(*ON), going_on(*ON, run_checkpoint=NEW)):
        assert kept(run) == ("torchtitan", True)
        assert kept_by_notice(run) == []


def test_an_older_run_keeps_what_it_was_started_with_and_one_notice_a_key_says_so() -> None:
    run = going_on(*ON, run_checkpoint=OLD)
    assert kept(run) == ("early_decay", False)
    assert kept_by_notice(run) == [VARIANT, DECAY]
    assert (
        f'{VARIANT} stays "early_decay", the value that the run in run/checkpoint was started with '
        '(the default is now "torchtitan"; set the key to change it)'
    ) in run.spec.notices
    assert run.origin[VARIANT] == "the checkpoints in run/checkpoint"


def test_the_seed_of_a_run_that_goes_on_is_no_news() -> None:
    def notices(run: Run) -> int:
        return sum("debug.seed is 42 by default" in notice for notice in run.spec.notices)

    assert notices(going_on(*ON)) == 1
    assert notices(going_on(*ON, run_checkpoint={**NEW, "seed": 42})) == 0
    other = going_on(*ON, run_checkpoint={**NEW, "seed": 7})
    assert (notices(other), other.spec.seed) == (1, 42)  # it is refused when the ranks compare
    assert "debug.seed" in [problem.where for problem in resume_problems({**run_facts(other), **NEW, "seed": 7}, other)]


def test_a_key_that_did_not_exist_is_a_change_only_if_it_is_no_default() -> None:
    """What an older checkpoint lacks is not listed; where a run lies neither."""
    run = going_on(*ON, "--training.dataloader.no_shuffle", "--optimizer.lr=1e-3")
    here = run_facts(run)["config"]
    saved = {
        "job": {"config_file": "there.toml", "dump_folder": "there"},
        "checkpoint": {"enable": True},
        "optimizer": {"lr": 2e-3, "gone": 1},
    }
    assert config_changes(saved, here, started_with({"config": saved})) == [
        ("lr_scheduler.variant", "early_decay", "torchtitan"),
        ("optimizer.decay_norms_and_biases", False, True),
        ("optimizer.gone", 1, None),
        ("optimizer.lr", 2e-3, 1e-3),
        ("training.dataloader.shuffle", True, False),
    ]


def test_what_the_user_says_wins() -> None:
    run = going_on(*ON, f"--{VARIANT}=torchtitan", run_checkpoint=OLD)
    assert kept(run) == ("torchtitan", False)
    assert kept_by_notice(run) == [DECAY]
    assert resume_problems({**run_facts(run), **OLD}, run) == []


def test_the_checkpoint_that_is_asked_for_says_it() -> None:
    assert kept(going_on(*ON, "--checkpoint.load_step=3", run_checkpoint=OLD, run_checkpoint_3=NEW)) == (
        "torchtitan",
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (ELSEWHERE, ("early_decay", False)),
        ((*ON, "--checkpoint.initial_load_path=other"), ("torchtitan", True)),  # weights alone: a new run
        ((*ELSEWHERE, "--checkpoint.create_seed_checkpoint"), ("torchtitan", True)),  # loads nothing
        (("--job.dump_folder=run",), ("torchtitan", True)),  # checkpoints are off
    ],
)
def test_a_run_that_goes_on_from_another_folder(arguments: tuple[str, ...], expected: tuple[str, bool]) -> None:
    assert kept(going_on(*arguments, other=OLD)) == expected


def test_the_own_folder_comes_before_another() -> None:
    assert kept(going_on(*ELSEWHERE, other=OLD, run_checkpoint=NEW)) == ("torchtitan", True)


@pytest.mark.parametrize("config", [None, 3, []])
def test_a_checkpoint_without_a_configuration_says_nothing(config: Any) -> None:
    assert started_with({"config": config}) == {}
    assert kept(going_on(*ON, run_checkpoint={"config": config})) == ("torchtitan", True)


@pytest.mark.parametrize("section", [3, None, {"variant": "cubic"}, {"variant": ["torchtitan"]}])
def test_a_value_that_cannot_be_is_not_taken_and_refused_when_compared(section: Any) -> None:
    manifest = {"config": {**NEW["config"], "lr_scheduler": section}}
    run = going_on(*ON, run_checkpoint=manifest)
    assert config_value(run.config, VARIANT) in ("torchtitan", "early_decay")
    if isinstance(section, dict):
        assert [problem.where for problem in resume_problems({**run_facts(run), **manifest}, run)] == [VARIANT]


def test_another_checkpoint_than_the_one_that_was_read_is_refused() -> None:
    """The newest is damaged, and an older one of other settings is loaded: the ranks must not guess."""
    run = going_on(*ON, run_checkpoint=NEW)
    problems = resume_problems({**run_facts(run), **OLD}, run)
    assert [problem.where for problem in problems] == [VARIANT, DECAY]
    assert problems[0].what == "was early_decay when the checkpoint was saved"
    assert (problems[0].fix or "").startswith(f"set {VARIANT} to early_decay")


def test_a_folder_that_cannot_be_read_is_one_problem_among_others() -> None:
    def saved(folder: str, step: int) -> None:
        raise UserError(Problem(folder, "cannot be listed: Input/output error"))

    with pytest.raises(UserError) as caught:
        read(
            ["--checkpoint.enable", "--training.stepz=3", "--model.hf_assets_path=builtin:bytes"],
            {},
            catalogue=catalogue(),
            backends=BACKENDS,
            world_size=1,
            training=True,
            saved=saved,
        )
    assert {"cannot be listed: Input/output error"} < {problem.what for problem in caught.value.problems}


def test_the_batch_of_a_run_elsewhere_is_kept_too() -> None:
    run = going_on(*ELSEWHERE, "--training.global_batch_size=-1", other={**OLD, "global_batch_size": 24})
    assert run.spec.global_batch_size == 24
