"""Searches the best layouts of the shipped sizes on GPUs with 80 GB, and measures the time of the search.

    python benchmarks/search.py                        # no GPU, about a minute

Claim: a search tries 10,000 candidates in less than 20 seconds of one core (processor time). The script prints the best
layouts with the reason why the first is faster than the second, or is preferred to it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from common import command_line, met_or_missed, save, text_table

from quadriga.cli.arguments import run_from_file
from quadriga.cli.search import candidate_dict, explain_winner
from quadriga.hardware import device_named
from quadriga.planning.search import search

CLAIM = "a search tries 10,000 candidates in less than 20 seconds"
TARGET = 500  # candidates per second
DEVICE = "h100-80gb"
SEARCHES = {
    "8B": ("configs/llama3_8b/llama3_8b.toml", 8),
    "70B": ("configs/llama3_70b/llama3_70b.toml", 64),
    "405B": ("configs/llama3_405b/llama3_405b.toml", 512),
}


def timed_search(file: str, ranks: int) -> dict[str, Any]:
    run, device = run_from_file(file, ranks, ()), device_named(DEVICE, "")
    start = time.process_time()
    found = search(run, device)
    seconds = time.process_time() - start
    return {
        "devices": ranks,
        "candidates": found.tried,
        "fitting": found.fitting,
        "seconds": seconds,
        "best": [candidate_dict(each) for each in found.best[:5]],
        "why": explain_winner(found.best),
    }


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    figures = {name: timed_search(*arguments) for name, arguments in SEARCHES.items()}
    rows = []
    for name, each in figures.items():
        first, second = each["best"][:2]
        rows.append([name, f"{each['candidates']:,} in {each['seconds']:.1f} s", first["name"], second["name"]])
    print(text_table(["file", "candidates", "first", "second"], rows))
    print("\n" + "\n".join(f"{name}: {each['why']}" for name, each in figures.items()))
    rate = sum(each["candidates"] for each in figures.values()) / sum(each["seconds"] for each in figures.values())
    met = rate >= TARGET
    print(f"\n{rate:,.0f} candidates per second; target: {TARGET:,}: {met_or_missed(met)}")
    all_figures = {"device": DEVICE, "searches": figures, "candidates_a_second": rate, "target": TARGET, "met": met}
    save("search", all_figures, command=command_line(), claim=CLAIM)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
