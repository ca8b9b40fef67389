"""Processes that `data_speed.py` starts: a rank that consumes batches, and one that opens 10^12 ids.

    python benchmarks/data_children.py rank DATA ASSETS RANK RANKS SECONDS
    python benchmarks/data_children.py shards FOLDER

Each prints one JSON object. A rank prints `ready` first, and begins when it can read a line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import common  # noqa: F401 (finds the package)

from quadriga.config.schema import Dataloader, TextKeys, TokenKeys
from quadriga.data.loader import Loader
from quadriga.data.stream_loader import build_loader
from quadriga.data.token_loader import TokenLoader, build_token_loader
from quadriga.data.tokenizer import build_tokenizer

SEQ_LEN = 2048
TOKENS_PER_SECOND = 15_000  # of one rank
FAR_STEP, FAR_BATCH = 1_000_000, 256
WINDOWS_READ = 1000


def open_loader(data: str, assets: str, rows: range, global_batch_size: int) -> Loader:
    """Token files if `data` is a path, else the text of that name. `assets`: the folder of the tokenizer of texts."""
    order: dict[str, Any] = {"seed": 42, "seq_len": SEQ_LEN, "global_batch_size": global_batch_size, "rows": rows}
    if os.sep in data:
        keys = TokenKeys("training", data, "raw" if Path(data).is_file() else "llmc", "uint16", None, None)
        return build_token_loader(keys, 1 << 16, dataloader=Dataloader(), **order)
    return build_loader(TextKeys(data), build_tokenizer(assets), dataloader=Dataloader(), **order)


def consume(loader: Loader, seconds: float) -> dict[str, float]:
    """Takes a batch of one row after another, and sleeps as long as training on it takes. The first batch is not
    counted: training waits for it at the start only."""
    loader.next()
    step = SEQ_LEN / TOKENS_PER_SECOND
    time.sleep(step)
    began, waited, steps = time.perf_counter(), 0.0, 0
    while time.perf_counter() - began < seconds:
        before = time.perf_counter()
        loader.next()
        waited += time.perf_counter() - before
        steps += 1
        time.sleep(step)
    return {"waited": waited, "seconds": time.perf_counter() - began, "steps": steps}


def rank(data: str, assets: str, number: int, ranks: int, seconds: float) -> dict[str, float]:
    loader = open_loader(data, assets, range(number, number + 1), ranks)
    try:
        print("ready", flush=True)
        sys.stdin.readline()
        return consume(loader, seconds)
    finally:
        loader.close()


def shards(folder: str) -> dict[str, float]:
    """Opens shards of llm.c, reads windows at random, and goes to a far step. Seconds of the clock, and bytes."""
    before = time.perf_counter()
    loader = open_loader(folder, "", range(1), FAR_BATCH)
    opened = time.perf_counter() - before
    assert isinstance(loader, TokenLoader)
    try:
        before = time.perf_counter()
        loader.load_state_dict({"fingerprint": loader.fingerprint, "lanes": {"0": [FAR_STEP * FAR_BATCH]}})
        loader.next()
        reached = time.perf_counter() - before
        tokens, rng = loader._reader.files, random.Random(1)
        for _ in range(WINDOWS_READ):
            start = rng.randrange(tokens.length - SEQ_LEN)
            tokens.read(start, start + SEQ_LEN + 1)
        mapped = Path("/proc/self/maps").read_text().count(".bin\n")
        memory = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
        held = [os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")]
    finally:
        loader.close()
    files = max(mapped, sum(path.endswith(".bin") for path in held))
    return {"ids": tokens.length, "opened": opened, "reached": reached, "memory": memory, "files": files}


def main() -> int:
    kind, *given = sys.argv[1:]
    if kind == "shards":
        found = shards(given[0])
    else:
        found = rank(given[0], given[1], int(given[2]), int(given[3]), float(given[4]))
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
