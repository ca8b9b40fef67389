"""Rehearsals as a user asks for them: the real build and one step, without a GPU, data or memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import ROOT, RUN_TRAIN, TRAIN, LaunchResult, launch

CONFIGS = ROOT / "configs"
LAYOUTS_OF_8B = {
    "FSDP": (),
    "HSDP": ("--parallelism.data_parallel_replicate_degree=2",),
    "DDP": ("--parallelism.data_parallel_replicate_degree=8", "--parallelism.data_parallel_shard_degree=1"),
    "TP 8": ("--parallelism.tensor_parallel_degree=8",),
    "FSDP x TP 2": ("--parallelism.tensor_parallel_degree=2",),
    "FSDP x CP 2": ("--parallelism.context_parallel_degree=2",),
    "CP 8, ring": ("--parallelism.context_parallel_degree=8", "--parallelism.context_parallel_method=ring"),
    "CP 4, ulysses": ("--parallelism.context_parallel_degree=4", "--parallelism.context_parallel_method=ulysses"),
    "FSDP x PP 2": ("--parallelism.pipeline_parallel_degree=2",),
    "PP 2 x CP 2 x TP 2": (
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.context_parallel_degree=2",
        "--parallelism.tensor_parallel_degree=2",
    ),
    "PP 4, ZBV": (
        "--parallelism.pipeline_parallel_degree=4",
        "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
        "--training.local_batch_size=8",
        "--activation_checkpoint.mode=full",
    ),
}


def rehearse(file: Path, ranks: int, *keys: str, timeout: float = 200) -> LaunchResult:
    environ = {"DRY_RUN": "1", "NGPU": str(ranks), "CONFIG_FILE": str(file)}
    ended = launch([*RUN_TRAIN, "--rehearse", *keys], environ, timeout=timeout)
    assert ended.code == 0, ended.out + ended.err
    return ended


def seconds(ended: LaunchResult) -> list[float]:
    """Building and the step, together, of each rank that was rehearsed."""
    durations = re.findall(r"built in ([\d.]+) s, one step in ([\d.]+) s", ended.out)
    return [float(build) + float(step) for build, step in durations]


def memory_gib(ended: LaunchResult) -> float:
    amounts = re.findall(r"rehearsal itself took ([\d.]+) (MiB|GiB)", ended.out)
    return max(float(amount) / (1024 if unit == "MiB" else 1) for amount, unit in amounts)


@pytest.mark.slow
def test_first_and_last_rank_of_a_pipeline_are_rehearsed(tmp_path: Path) -> None:
    cuts = ("--parallelism.pipeline_parallel_degree=2", "--parallelism.tensor_parallel_degree=2")
    others = ("--job.dump_folder", str(tmp_path / "run"), "--compile.enable", "--model.n_layers=4")
    others += ("--parallelism.enable_async_tensor_parallel", "--model.converters=quantize.linear.float8")
    ended = rehearse(CONFIGS / "debug/debug.toml", 8, *cuts, *others)
    for text in (
        "rank 0 of 8",
        "rank 7 of 8",
        "send           over pp",
        "without compile",
        "without accumulation",
        "without conv",
        "without async",
    ):
        assert text in ended.out
    assert memory_gib(ended) < 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_only_pretends_to_communicate_is_rehearsed(tmp_path: Path) -> None:
    """As `comm.mode` of the vocabulary means it: no ranks, no GPU, nothing left behind."""
    keys = (
        "--comm.mode=fake_backend",
        "--training.global_batch_size=-1",
        "--job.dump_folder",
        str(tmp_path / "run"),
        "--model.n_layers=1",
    )
    ended = launch([*RUN_TRAIN, *keys], {"NGPU": "64"})
    assert ended.code == 0, ended.err
    assert "rank 0 of 64" in ended.out
    assert "communication  as estimated" in ended.out
    assert not (tmp_path / "run").exists()
    ranks_that_were_started = launch([*TRAIN, "--job.config_file", str(CONFIGS / "debug/debug.toml"), *keys])
    assert ranks_that_were_started.code == 2
    assert "comm.mode" in ranks_that_were_started.err
    assert "run_train.sh" in ranks_that_were_started.err


def test_a_rehearsal_without_a_dry_run_is_refused(tmp_path: Path) -> None:
    ended = launch([*RUN_TRAIN, "--rehearse"], cwd=tmp_path)
    assert ended.code == 2
    assert "set DRY_RUN=1" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS_OF_8B)
def test_8b_on_eight_ranks_takes_half_a_minute_and_a_gigabyte(layout: str) -> None:
    ended = rehearse(CONFIGS / "llama3_8b/llama3_8b.toml", 8, *LAYOUTS_OF_8B[layout], timeout=200)
    assert max(seconds(ended)) < 30
    assert memory_gib(ended) < 1


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("--parallelism.tensor_parallel_degree=8",)], ids=["FSDP", "FSDP x TP 8"])
def test_405b_on_512_ranks_takes_two_minutes_and_a_gigabyte(keys: tuple[str, ...]) -> None:
    ended = rehearse(CONFIGS / "llama3_405b/llama3_405b.toml", 512, *keys, timeout=400)
    assert max(seconds(ended)) < 120
    assert memory_gib(ended) < 1
