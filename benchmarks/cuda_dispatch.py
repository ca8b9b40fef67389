"""Records what each layout and mode calls on the CUDA dispatch of one release of torch, without a GPU.

    make test-cuda-dispatch TORCH=2.14.1 RECORD=1        # a minute; adds to the releases in results/cuda_dispatch.json

Claim: the attention kernel is the wanted one, no step reads a value of the device on the host, and collectives and
active memory equal the estimate within 1 %, except for differences that are known. The rows and the stand-in for the
CUDA driver are in tests/cuda_dispatch, whose tests check the same.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import RESULTS, ROOT, command_line, save, text_table

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/cuda_dispatch")]

import torch  # noqa: E402
from dispatch_rows import ROWS  # noqa: E402
from dispatch_run import dispatched, faults, figures, in_a_process  # noqa: E402

CLAIM = "on CUDA's dispatch, kernels are the wanted ones, steps read nothing, and the estimate is within 1 %"
NAME = "cuda_dispatch"


def main() -> int:
    path = RESULTS / f"{NAME}.json"
    by_release: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}
    rows, table, wrong = {}, [], []
    for name, row in ROWS.items():
        found = in_a_process(dispatched, row)
        rows[name] = {**figures(found), "ranks": row.ranks, "known": dict(row.known), "faults": faults(row, found)}
        wrong += [f"{name}: {fault}" for fault in rows[name]["faults"]]
        calls = sum(count for count, _ in found.calls.values())
        errors = (f"{error:+.1%}" for error in (found.calls_error, found.bytes_error, found.memory_error))
        table.append([name, ", ".join(found.kernels), sum(found.host_reads.values()), calls, *errors])
    print(text_table(["row", "attention", "host reads", "calls", "calls", "bytes", "memory"], table))
    print("\n".join(wrong))
    by_release[torch.__version__.partition("+")[0]] = rows
    print(f"written: {save(NAME, dict(sorted(by_release.items())), command=command_line(), claim=CLAIM)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
