"""Every value of COMM_BACKEND on a machine without a GPU: the right run, or the right refusal before a rank starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from host_slots_backend import environ_with_host_slots
from launching import LAUNCH, RUN_TRAIN, TRAIN, launch
from training import DEBUG_FILE, TINY

RUN = [*TINY, "--job.config_file", DEBUG_FILE, "--training.steps=1", "--checkpoint.no_enable"]
NO_GPU = "moves tensors between CUDA devices, and none is visible here"


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("nccl", NO_GPU),
        ("nccl-symm", NO_GPU),
        ("nvshmem", NO_GPU),
        ("nvhsmem", "did you mean: nvshmem"),
        ("mpi", "allowed: gloo, nccl, nccl-symm, nvshmem"),
    ],
)
def test_a_backend_that_cannot_be_had_is_refused_before_anything_starts(
    backend: str, expected: str, tmp_path: Path
) -> None:
    ended = launch([*RUN_TRAIN], {"COMM_BACKEND": backend, "NGPU": "2"}, cwd=tmp_path)
    assert ended.code == 2
    assert expected in ended.err
    assert f"comm.backend = {backend}" in ended.err.replace('"', "")
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("backend", "served"),
    [
        ("gloo", "gloo"),
        pytest.param("", "gloo", marks=pytest.mark.slow),
        pytest.param("host-slots", "host-slots", marks=pytest.mark.slow),
    ],
)
def test_a_backend_that_can_be_had_carries_the_run(backend: str, served: str, tmp_path: Path) -> None:
    environ = {"COMM_BACKEND": backend, "NGPU": "2", **environ_with_host_slots(tmp_path / "hook")}
    ended = launch([*LAUNCH, *RUN, "--job.dump_folder=run"], environ, cwd=tmp_path)
    assert ended.code == 0, ended.err
    beside = "gloo: shard, norms, host (" if served == "gloo" else "host-slots: shard ("
    assert f"backends   {beside}" in ended.err
    if served == "host-slots":
        assert " %); gloo: norms, host (" in ended.err
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["backends", "train"]
    assert records[0]["backends"] == {"shard": served, "norms": "gloo", "host": "gloo"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nccl-symm", "nvshmem"])
def test_the_ranks_refuse_it_too(backend: str, tmp_path: Path) -> None:
    """Without the launcher: the ranks ask the machine themselves, before the process group stands."""
    environ = {"COMM_BACKEND": backend, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ended = launch([*TRAIN, *RUN], environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, cwd=tmp_path)
    assert ended.code == 2
    assert NO_GPU in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "ranks", "expected"),
    [
        ([], 1, "shards none"),
        (
            ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"],
            2,
            "choose nccl, which would carry all bytes of this run",
        ),
        (
            [
                *("--parallelism.tensor_parallel_degree=2", "--parallelism.enable_async_tensor_parallel"),
                "--compile.enable",
            ],
            4,
            "this backend cannot overlap communication with matrix products",
        ),
    ],
    ids=["one rank", "DDP", "asynchronous tensor parallelism"],
)
@pytest.mark.parametrize("backend", ["nvshmem", "nccl-symm"])
def test_a_run_with_no_use_for_it_is_refused(
    backend: str, arguments: list[str], ranks: int, expected: str, tmp_path: Path
) -> None:
    environ = {"COMM_BACKEND": backend, "NGPU": str(ranks), "DRY_RUN": "1"}
    ended = launch([*LAUNCH, *RUN, *arguments], environ, cwd=tmp_path)
    assert ended.code == 2
    assert expected in ended.err


def test_a_dry_run_names_the_backend_of_each_axis_and_the_heap(tmp_path: Path) -> None:
    environ = {"COMM_BACKEND": "nvshmem", "NGPU": "4", "DRY_RUN": "1"}
    tp = "--parallelism.tensor_parallel_degree=2"
    ended = launch([*LAUNCH, *RUN, tp], environ, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert re.search(r"nvshmem: shard \([^)]+ %\); nccl: tp, norms \([^)]+ %\); gloo: host", ended.out)
    assert "heap needed" in ended.out
    assert "Ready to train." in ended.out
    small = launch([*LAUNCH, *RUN, tp], environ | {"NVSHMEM_SYMMETRIC_SIZE": "32M"}, cwd=tmp_path)
    assert small.code == 2  # as a start would
    assert "Before it can train:" in small.out
    assert "NVSHMEM_SYMMETRIC_SIZE = 32M" in small.out
    assert "too small: this run needs 65.00 MiB" in small.out
