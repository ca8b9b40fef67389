"""Measures time and memory of `quadriga trace` for a set of 300 MB. Claim: under 60 s and 2 GB.

    python benchmarks/trace_speed.py [--megabytes 300] [--ranks 4]

The script generates the set: traces as torch.profiler writes them for a GPU run, with operations, launches, kernels,
copies and collectives of five steps. It measures plain and compressed files; the larger figures count.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, child_environment, command_line, describe_machine, met_or_missed, save, text_table

SECONDS, BYTES = 60.0, 2e9
STEPS, COLLECTIVE_EVERY = 5, 60  # one collective per so many kernels, about as with FSDP x TP
OPERATION = {"Input Dims": [[4096, 4096], [4096, 4096]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
KERNEL = {
    "device": 0,
    "context": 1,
    "stream": 7,
    "grid": [128, 1, 1],
    "block": [256, 1, 1],
    "est. achieved occupancy %": 50,
}


def events(rank: int, size: int) -> Iterator[dict[str, Any]]:
    """About `size` bytes of events. Each operation has an outer and an inner event, a launch and a kernel."""
    each = 975  # bytes of one operation with its other events, as JSON
    count = size // each
    per_step = count // STEPS
    for number in range(count):
        at = 30.0 * number + rank
        if number % per_step == 0:
            yield complete_event("user_annotation", f"ProfilerStep#{number // per_step}", at, 30.0 * per_step, {})
        collective = number % COLLECTIVE_EVERY == 0
        name = "c10d::_allgather_base_" if collective else "aten::linear"
        yield complete_event("cpu_op", name, at + 1, 25, OPERATION)
        inner = record(number) if collective else OPERATION
        yield complete_event("cpu_op", "record_param_comms" if collective else "aten::addmm", at + 2, 22, inner)
        yield complete_event("cuda_runtime", "cudaLaunchKernel", at + 10, 3, {"correlation": number + 1, "cbid": 211})
        kernel = "ncclDevKernel_AllGather_RING_LL" if collective else f"ampere_bf16_s16816gemm_bf16_{number % 97}x128"
        args = {**KERNEL, "correlation": number + 1}
        yield {**complete_event("kernel", kernel, at + 20, 26, args), "pid": 0, "tid": 7}


def complete_event(category: str, name: str, start: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 4242,
        "tid": 4242,
        "ts": 4575754941083.954 + start,
        "dur": seconds,
        "args": {"External id": int(start), **args},
    }


def record(number: int) -> dict[str, Any]:
    return {
        "Collective name": "_allgather_base",
        "dtype": "BFloat16",
        "In msg nelems": 2**20,
        "Out msg nelems": 2**23,
        "Group size": 8,
        "Process Group Name": "9",
        "Process Group Description": "mesh_dp_shard",
        "Seq": number,
    }


def write(folder: Path, rank: int, size: int) -> int:
    path = folder / f"rank{rank}_trace.json"
    metadata = {"distributedInfo": {"backend": "nccl", "rank": rank, "world_size": 8}, "host_name": "one"}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**metadata, "baseTimeNanoseconds": 10**18})[:-1] + ', "traceEvents": [\n')
        for number, event in enumerate(events(rank, size)):
            file.write((",\n" if number else "") + json.dumps(event))
        file.write("\n]}\n")
    return path.stat().st_size


def pack(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as plain, gzip.open(target / f"{path.name}.gz", "wb", compresslevel=3) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)


MEASURE = """
import resource, sys
from quadriga.cli.main import main
if __name__ == "__main__":
    code = main(["trace", sys.argv[1]])
    own, most = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(own * 1024, most * 1024, file=sys.stderr)
    sys.exit(code)
"""


def measure(folder: Path, processes: int) -> dict[str, float]:
    """Elapsed seconds, and peak bytes: of the first process plus `processes` times its largest child."""
    script = folder.parent / "measure.py"
    script.write_text(MEASURE)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=child_environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    own, most = map(int, done.stderr.split()[-2:])
    return {"seconds": round(seconds, 1), "peak_bytes": own + processes * most}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    processes = min(describe_machine()["cores"], options.ranks)
    with tempfile.TemporaryDirectory() as place:
        plain, packed = Path(place, "plain"), Path(place, "packed")
        plain.mkdir()
        share = options.megabytes * 10**6 // options.ranks
        size = sum(write(plain, rank, share) for rank in range(options.ranks))
        pack(plain, packed)
        figures = {
            "bytes": size,
            "ranks": options.ranks,
            "plain": measure(plain, processes),
            "packed": measure(packed, processes),
        }
    met = all(figures[way]["seconds"] < SECONDS and figures[way]["peak_bytes"] < BYTES for way in ("plain", "packed"))
    rows = [(way, figures[way]["seconds"], round(figures[way]["peak_bytes"] / 1e9, 2)) for way in ("plain", "packed")]
    print(f"{size / 1e6:.0f} MB in {options.ranks} files, {processes} processes")
    print(text_table(("files", "seconds", "GB"), rows))
    claim = f"a set of 300 MB is analysed in under {SECONDS:.0f} s and {BYTES / 1e9:.0f} GB on 2 cores"
    print(f"{claim}: {met_or_missed(met)}")
    save("trace_speed", {**figures, "met": met}, command=command_line(), claim=claim)


if __name__ == "__main__":
    main()
