"""Measures the cross-entropy on a CPU: Quadriga's forward and backward pass compared with torch's `F.cross_entropy`.

    python benchmarks/loss_speed.py

Claim: at each vocabulary it takes at most as long as torch's. Both are timed in turn, in one process with all cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from common import command_line, met_or_missed, save, text_table
from paired import estimate_median

TOKENS = 1024
VOCABULARIES = (2_048, 32_000, 128_256)  # of the debug model, of Llama 2, of Llama 3.1
TARGET = 1.0
CLAIM = "the cross-entropy of a CPU takes at most as long as torch's, forward and backward"


def measure(vocabulary: int, pairs: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from quadriga.train.loss import summed_cross_entropy

    logits, labels = torch.randn(1, TOKENS, vocabulary), torch.randint(vocabulary, (1, TOKENS))

    def of_torch(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def seconds(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        leaf = logits.detach().requires_grad_()
        start = time.perf_counter()
        (loss(leaf, labels) / TOKENS).backward()
        return time.perf_counter() - start

    ratios = []
    for pair in range(pairs + 1):
        order = (summed_cross_entropy, of_torch) if pair % 2 else (of_torch, summed_cross_entropy)
        taken = {loss: seconds(loss) for loss in order}
        if pair:  # the first one warms up
            ratios.append(taken[of_torch] / taken[summed_cross_entropy])
    ratio = estimate_median(ratios)
    return {"vocabulary": vocabulary, "tokens": TOKENS, "ratio": asdict(ratio), "met": ratio.median >= TARGET}


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of turns for each vocabulary")
    chosen = parser.parse_args()
    results = [measure(vocabulary, chosen.pairs) for vocabulary in VOCABULARIES]
    rows = [
        [
            f"{figures['vocabulary']:,}",
            f"{figures['ratio']['median']:.2f}",
            f"{figures['ratio']['low']:.2f} to {figures['ratio']['high']:.2f}",
            met_or_missed(figures["met"]),
        ]
        for figures in results
    ]
    print(text_table(["vocabulary", "speed against torch", "95 % of median", f">= {TARGET}"], rows))
    print(f"\nwritten: {save('loss_speed', results, command=command_line(), claim=CLAIM)}")
    return 0 if all(figures["met"] for figures in results) else 1


if __name__ == "__main__":
    sys.exit(main())
