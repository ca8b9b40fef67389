"""The helper that starts ranks: results by rank, the first failure shown, nothing left alive."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def sum_of_ranks(factor: int) -> float:
    total = torch.tensor(float(dist.get_rank() * factor))
    dist.all_reduce(total)
    return total.item()


def own_tensor() -> torch.Tensor:
    return torch.full((3,), float(dist.get_rank()))


def surroundings() -> tuple[str, str, int, bool]:
    return os.environ["RANK"], os.environ["LOCAL_RANK"], torch.get_num_threads(), dist.is_initialized()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hang_with_child(folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(f"{folder}/{os.getpid()}", "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


def warn() -> None:
    warnings.warn("not to be passed over", stacklevel=1)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_by_rank() -> None:
    assert run_ranks(sum_of_ranks, 4, 10) == [60.0] * 4
    tensors = run_ranks(own_tensor, 2)
    assert [tensor.tolist() for tensor in tensors] == [[0.0] * 3, [1.0] * 3]


def test_ranks_find_their_environment() -> None:
    assert run_ranks(surroundings, 2, backend=None) == [("0", "0", 1, False), ("1", "1", 1, False)]


def test_the_first_failure_is_the_one_that_is_shown() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed(.|\n)*rank one has had enough"):
        run_ranks(fail_on_rank_one, 2)


def test_a_death_is_distinguished_from_an_error() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 died with exit code 7|rank 0 of 2 failed"):
        run_ranks(die_on_rank_one, 2)


def test_warnings_are_errors() -> None:
    with pytest.raises(RankError, match="not to be passed over"):
        run_ranks(warn, 1)


def processes(folder: Path) -> list[int]:
    """The ranks that `hang_with_child` ran on, and their children."""
    return [int(number) for path in folder.iterdir() for number in (path.name, path.read_text() or "0")]


def assert_all_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]


def test_nothing_survives_a_timeout(tmp_path: Path) -> None:
    for seconds in (4, 40):  # a busy machine may not have started all of them in 4 s
        folder = tmp_path / str(seconds)
        folder.mkdir()
        with pytest.raises(RankError, match=f"did not return within {seconds} s"):
            run_ranks(hang_with_child, 2, str(folder), timeout=seconds)
        pids = processes(folder)
        if len(pids) == 4 and 0 not in pids:
            break
    assert len(pids) == 4
    assert 0 not in pids
    assert_all_end(pids)


def test_nothing_survives_a_killed_caller(tmp_path: Path) -> None:
    code = f"import test_ranks, ranks; ranks.run_ranks(test_ranks.hang_with_child, 2, {str(tmp_path)!r}, timeout=300)"
    here = Path(__file__).parent
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parent.parent)))}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environ)
    deadline = time.monotonic() + 60
    while len(processes(tmp_path)) < 4 or 0 in processes(tmp_path):
        assert caller.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = processes(tmp_path)
    caller.kill()
    caller.wait()
    assert_all_end(pids)
