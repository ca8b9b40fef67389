"""Tests the backend `nvshmem` as far as one GPU can. Needs a CUDA device and a PyTorch with NVSHMEM.

    python benchmarks/nvshmem_one_gpu.py

Claim: NVSHMEM starts through PyTorch's symmetric memory. The collectives for `fully_shard` are correct on one process,
which puts and signals to itself. If the driver lets several processes share a GPU, they pass the conformance test of
all backends (tests/distributed/conformance_backend.py) on two processes. The speed between GPUs is not measured.

Each check runs in separate processes with a timeout, so that a hang or a crash is a result too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, child_environment, command_line, save, text_table

CLAIM = "NVSHMEM starts through PyTorch, and Quadriga's collectives are correct on one process and on two on one GPU"
TIMEOUT = 180.0  # seconds per check
LARGEST = 1 << 28  # bytes of the largest call
CALLS = 50


def check_nvshmem() -> dict[str, Any]:
    """NVSHMEM starts, allocates memory, and puts data with a signal from a process to itself."""
    import torch

    transport = build_transport(1 << 20)
    with torch.cuda.stream(torch.cuda.Stream()):
        transport.memory.zero_()
        transport.memory[:8].fill_(7)
        transport.put(0, 8, 0, 0, 41)
        transport.wait(0, 0, 41)
        found = transport.memory[:8].tolist()
    torch.cuda.synchronize()
    transport.close()
    return {"right": found == [7] * 8, "device": torch.cuda.get_device_name()}


def one_process() -> dict[str, Any]:
    """The conformance checks on a group of one process, and the time of a call that sends nothing."""
    import torch

    conformance = import_conformance_checks()
    pair = conformance.nvshmem()
    for question in conformance.CHECKS:
        question(pair)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        conformance.run_all_gather(pair, 0, 1000, torch.bfloat16)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    pair.close()
    return {"right": True, "questions": len(conformance.CHECKS), "microseconds_a_gather": 1e6 * seconds / CALLS}


def two_processes() -> dict[str, Any]:
    """The conformance checks on two processes of one GPU."""
    conformance = import_conformance_checks()
    answered = conformance.run_checks(conformance.nvshmem, *conformance.CHECKS)
    return {"right": len(answered) == len(conformance.CHECKS), "questions": len(answered)}


QUESTIONS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "NVSHMEM starts": (check_nvshmem, 1),
    "conformance on one process": (one_process, 1),
    "conformance on two processes of one GPU": (two_processes, 2),
}


def build_transport(size: int) -> Any:
    import torch
    import torch.distributed as dist

    from quadriga.comm.nvshmem import NvshmemTransport

    assert dist.group.WORLD is not None
    return NvshmemTransport(dist.group.WORLD, size, torch.device("cuda", 0), 60.0)


def import_conformance_checks() -> Any:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/distributed")]
    import conformance_backend

    return conformance_backend


def run_process(name: str, rank: int, ranks: int, store: str, out: Path) -> None:
    """One process of a check. The group uses gloo, because NCCL refuses two ranks on one GPU."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = QUESTIONS[name][0]()
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # without NVSHMEM's cleanup at exit, which is not tested here


def run_question(name: str, folder: Path) -> dict[str, Any]:
    ranks, out, store = QUESTIONS[name][1], folder / "answer.json", folder / "store"
    for left in (out, store):
        left.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--answer", name, "--store", str(store), "--out", str(out)]
    environ = child_environment(NVSHMEM_SYMMETRIC_SIZE=str(2 * LARGEST))
    children = [
        subprocess.Popen([*command, "--rank", str(rank)], env=environ, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    deadline, errors = time.monotonic() + TIMEOUT, []
    for child in children:
        try:
            errors.append(child.communicate(timeout=max(deadline - time.monotonic(), 1))[1])
        except subprocess.TimeoutExpired:
            child.kill()
            errors.append(f"{child.communicate()[1]}\nno result within {TIMEOUT:g} s")
    if out.exists():
        return {"right": False, **json.loads(out.read_text())}
    return {"right": False, "why": [text.strip().splitlines()[-5:] for text in errors]}


def main() -> int:
    parser = argparse.ArgumentParser(description="Test the backend nvshmem as far as one GPU can.")
    parser.add_argument("--answer", choices=QUESTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.answer:
        run_process(chosen.answer, chosen.rank, QUESTIONS[chosen.answer][1], chosen.store, chosen.out)
    import torch

    from quadriga.comm.nvshmem import is_offered

    if not torch.cuda.is_available():
        print("not measured: no CUDA device is visible")
        return 2
    if not is_offered():
        print(f"not measured: PyTorch {torch.__version__} does not offer NVSHMEM")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: run_question(name, Path(folder)) for name in QUESTIONS}
    path = save("nvshmem_one_gpu", figures, command=command_line(), claim=CLAIM)
    rows = [
        [name, "right" if found["right"] else f"NOT: {found.get('why', 'wrong values')}"]
        for name, found in figures.items()
    ]
    print(text_table(["check", "result"], rows))
    print(f"written: {path.name}")
    return 0 if all(found["right"] for found in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
