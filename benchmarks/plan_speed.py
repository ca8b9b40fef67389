"""Measures time and memory of reading the plan of a checkpoint: 1 M chunks, as `plan.json` and as `.metadata`.

    python benchmarks/plan_speed.py                 # a few minutes, mostly to create the plans
    python benchmarks/plan_speed.py --chunks 100000

The plan is that of a model on 1,024 ranks: each tensor has 1,024 chunks. Each file is read in a separate process, which
validates every value and, for `plan.json`, builds the objects that torch.distributed.checkpoint plans with. Memory is
the peak resident set of that process, with PyTorch (0.3 GB before the file is read).
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import child_environment, command_line, met_or_missed, save, text_table

RANKS = 1024
MAX_SECONDS, MAX_BYTES = 15.0, 2e9
FORMS = ("plan.json", ".metadata")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--read", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(measure(options.read, Path(options.folder))))
        return
    if options.make:
        write_plans(Path(options.folder), options.chunks)
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a child process, because the peak resident set of a process includes that of its parent at the fork.
        run_child("--make", "--chunks", str(options.chunks), "--folder", folder)
        figures = {form: dict(json.loads(run_child("--read", form, "--folder", folder))) for form in FORMS}
    rows = []
    for form, one in figures.items():
        one["met"] = one["seconds"] <= MAX_SECONDS and one["peak_bytes"] <= MAX_BYTES
        seconds, memory = f"{one['seconds']:.1f} s", f"{one['peak_bytes'] / 1e9:.2f} GB"
        rows.append((form, f"{one['chunks']:,}", seconds, memory, met_or_missed(one["met"])))
    print(text_table(("form", "chunks", "read and checked", "memory", "<= 15 s, <= 2 GB"), rows))
    claim = f"a plan of {options.chunks:,} chunks is read and checked within 15 s and 2 GB"
    print(save("plan_speed", figures, command=command_line(), claim=claim))
    sys.exit(not all(one["met"] for one in figures.values()))


def run_child(*arguments: str) -> str:
    """Run this script in a child process, and return the last line of its output."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def measure(form: str, folder: Path) -> dict[str, Any]:
    from quadriga.checkpoint import plan, stored

    start, busy = time.perf_counter(), time.process_time()
    content = (folder / form).read_bytes()
    read = plan.parse_plan(content) if form == "plan.json" else plan.parse_metadata(content)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    start = time.perf_counter()
    if form == "plan.json":
        stored.dcp_metadata(read, read.tensors)
    return {
        "chunks": sum(len(one.chunks) for one in read.tensors.values()),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "build_seconds": round(time.perf_counter() - start, 2) if form == "plan.json" else None,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "file_bytes": len(content),
    }


def write_plans(folder: Path, chunks: int) -> None:
    """Write both forms of the plan of 2-D tensors whose rows are sharded over the ranks."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    from quadriga.checkpoint import tensors

    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    rows, width = 16, 4096
    for number in range(-(-chunks // RANKS)):
        name, parts = f"optimizer.layers.{number}.attention.wq.weight.exp_avg", []
        for rank in range(min(RANKS, chunks - number * RANKS)):
            offsets = torch.Size((rank * rows, 0))
            parts.append(ChunkStorageMetadata(offsets, torch.Size((rows, width))))
            length = rows * width * 4 + 1500
            storage[MetadataIndex(name, offsets, rank)] = _StorageInfo(f"__{rank}_0.distcp", number * length, length)
        shape = torch.Size((rows * len(parts), width))
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, parts)
    metadata = Metadata(entries, {name: (name,) for name in entries}, storage, StorageMeta("benchmark"), "1.0.0")
    (folder / "plan.json").write_bytes(tensors.plan_text(metadata))
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


if __name__ == "__main__":
    main()
