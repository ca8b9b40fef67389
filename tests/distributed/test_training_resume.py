"""N + M steps equal N steps, a stop, and M steps: bit for bit on the same layout, closely on another one."""

from __future__ import annotations

import json
import logging
import re
import tomllib

import pytest
from launching import ROOT
from training import TINY, largest_difference, one_rank, train

from quadriga.checkpoint.folder import newest_extra
from quadriga.metrics.jsonl import read_metrics

SAVING = ("--checkpoint.enable", "--lr_scheduler.total_steps=6")
NUMBERS = ("loss", "grad_norm", "lr", "tokens_seen")
LAYOUTS = {
    "one rank": (1, ()),
    "FSDP 2": (2, ()),
    "DDP 2": (2, ("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1")),
}


def numbers(records):
    return [tuple(record[name] for name in NUMBERS) for record in records]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(name, tmp_path):
    ranks, arguments = LAYOUTS[name]
    straight = train(tmp_path / "straight", ranks, *TINY, *SAVING, *arguments, "--training.steps=6")
    train(tmp_path / "stopped", ranks, *TINY, *SAVING, *arguments, "--training.steps=3")
    resumed = train(tmp_path / "stopped", ranks, *TINY, *SAVING, *arguments, "--training.steps=6")
    assert numbers(resumed) == numbers(straight)
    assert [record["attempt"] for record in resumed] == [1, 1, 1, 2, 2, 2]


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    straight = train(tmp_path / "straight", 2, *TINY, *SAVING, "--training.steps=6")
    train(tmp_path / "moved", 4, *TINY, *SAVING, "--training.steps=3")
    moved = train(tmp_path / "moved", 1, *TINY, *SAVING, "--training.steps=6")
    assert largest_difference(moved, straight, "loss") <= 1e-6
    assert [record["tokens_seen"] for record in moved] == [record["tokens_seen"] for record in straight]


def test_steps_after_the_newest_checkpoint_are_replayed_alike(tmp_path):
    """A run that was cut off between two saves: the replayed steps carry a higher attempt and the same numbers."""
    arguments = (*TINY, *SAVING, "--checkpoint.interval=2", "--training.steps=6")
    straight = train(tmp_path, 1, *arguments)
    for step in (4, 6):
        folder = tmp_path / "checkpoint" / f"step-{step}"
        folder.rename(folder.with_name(f"lost-{step}"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "attempt": 1, "lo')  # torn by a kill
    replayed = train(tmp_path, 1, *arguments)
    assert numbers(replayed) == numbers(straight)
    assert [record["attempt"] for record in replayed] == [1, 1, 2, 2, 2, 2]


def test_a_finished_run_says_so_and_how_to_extend_it(tmp_path, caplog, monkeypatch):
    arguments = (*TINY, *SAVING, "--training.steps=3")
    train(tmp_path, 1, *arguments)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(logging.getLogger("quadriga"), "propagate", True)
    with caplog.at_level(logging.INFO, "quadriga"):
        from training import DEBUG_FILE

        code = one_rank(["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(tmp_path), *arguments], log=False)
    assert code == 0
    assert "finished" in caplog.text
    assert "--training.steps 6" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_data_than_the_checkpoint_s_are_refused(tmp_path):
    """A resume on another seed would train on documents that were seen already."""
    from ranks import RankError

    train(tmp_path, 1, *TINY, *SAVING, "--training.steps=2")
    with pytest.raises(RankError, match="seed"):
        train(tmp_path, 1, *TINY, *SAVING, "--training.steps=4", "--debug.seed=7")


def test_a_run_leaves_what_it_should(tmp_path):
    arguments = [argument for argument in TINY if "no_enable" not in argument]
    profiling = ("--profiling.profile_freq=4", "--profiling.profiler_active=2", "--profiling.profiler_warmup=1")
    validation = ("--validation.enable", "--validation.dataset=builtin_validation", "--validation.steps=2")
    validation += ("--validation.freq=3", "--validation.seq_len=32", "--validation.local_batch_size=2")
    records = train(
        tmp_path, 2, *arguments, *profiling, *validation, "--training.steps=4", "--job.save_config_file=all.json"
    )
    assert len(records) == 4
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 and record["tokens_per_second"] > 0 for record in records)
    assert [record["tokens_seen"] for record in records] == [256, 512, 768, 1024]
    validated = read_metrics(tmp_path / "metrics.jsonl", kind="validation")
    assert [record["step"] for record in validated] == [1, 3]
    assert all(record["tokens"] == 2 * 2 * 2 * 32 for record in validated)  # steps x ranks x rows x tokens
    for rank in range(2):
        assert (tmp_path / f"profile_trace/iteration_4/rank{rank}_trace.json.gz").is_file()
    assert list((tmp_path / "tb").glob("events.*"))
    assert (tmp_path / "checkpoint/step-4/train_state.json").is_file()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["backend"] == "gloo"
    assert environment["libraries"]["torch"]
    assert json.loads((tmp_path / "all.json").read_text())["training"]["steps"] == 4
    assert "steps = 4" in (tmp_path / "config.toml").read_text()
    table = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("| in `outputs/debug/` |")[2].partition("\n\n")[0]
    )
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(named) == 8
    assert not [name for name in named if not (tmp_path / name.replace("step-50", "step-4")).exists()]


def test_a_choice_of_the_compiler_is_saved_and_kept(tmp_path):
    """A CPU chooses eager blocks; a run that was started compiled stays so, also on a CPU."""

    def choices(folder, step):
        saved = newest_extra(str(folder / "checkpoint"), step)["config"]["compile"]
        written = tomllib.loads((folder / "config.toml").read_text())["compile"]
        return saved["enable"], written["enable"]

    auto, compiled = "--compile.enable=auto", ("--compile.enable", "--compile.backend=eager")
    train(tmp_path / "auto", 1, *TINY, *SAVING, auto, "--training.steps=1")
    assert choices(tmp_path / "auto", 1) == (False, False)
    train(tmp_path / "compiled", 1, *TINY, *SAVING, *compiled, "--training.steps=1")
    train(tmp_path / "compiled", 1, *TINY, *SAVING, auto, "--compile.backend=eager", "--training.steps=2")
    assert choices(tmp_path / "compiled", 2) == (True, True)
