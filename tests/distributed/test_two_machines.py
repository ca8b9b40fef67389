"""Two launchers with one rendezvous, as two machines run them, train as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import LAUNCH, Running
from sockets import free_port
from training import DEBUG_FILE, TINY, largest_difference, train

from quadriga.metrics.jsonl import read_metrics

KEYS = (*TINY, "--training.steps=4", "--checkpoint.no_enable")


@pytest.mark.slow
def test_two_machines_train_as_one(tmp_path: Path) -> None:
    """FSDP across the machines, tensor parallelism within each."""
    port = free_port()
    shared = {"NGPU": "2", "NNODES": "2", "RDZV_ENDPOINT": f"127.0.0.1:{port}", "GLOO_SOCKET_IFNAME": "lo"}
    cut = "--parallelism.tensor_parallel_degree=2"
    command = [*LAUNCH, "--job.config_file", DEBUG_FILE, *KEYS, cut, "--job.dump_folder", str(tmp_path / "two")]
    machines = [Running(command, {**shared, "NODE_RANK": str(number)}) for number in range(2)]
    try:
        for ended in [machine.end(timeout=120) for machine in machines]:
            assert ended.code == 0, ended.err
    finally:
        for machine in machines:
            machine.kill_all()
    alone = train(tmp_path / "one", 1, *KEYS)
    assert largest_difference(read_metrics(tmp_path / "two" / "metrics.jsonl"), alone, "loss") <= 1e-6
