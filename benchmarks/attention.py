"""How fast torch's attention works on a CPU, by the length of the sequences.

    python benchmarks/attention.py                     # one process, half a minute on 2 cores

Claim: within 20 % the kernel takes (1 + rows / length) times as long for an operation as a causal mask leaves, where
`rows` is the height of the blocks that it works in (32 below 192 tokens, 64 below 768, 256 from there on: its source,
FlashAttentionKernel.cpp), times what such a block costs (`BLOCKS` of quadriga/planning/setup.py). The estimate of step
times on CPUs rests on it, so that rates measured at one length hold at another.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from common import command_line, met_or_missed, save, text_table
from torch.nn.functional import scaled_dot_product_attention

from quadriga.planning.setup import causal_attention_cost

CLAIM = "the cost of an operation of attention on a CPU, relative to that at 1,024 tokens, is known within 20 %"
TARGET = 0.20
LENGTHS = (64, 128, 256, 384, 512, 640, 768, 1024, 1536, 2048)
TOKENS, HEADS, REPEATS = 2048, 16, 7


def attention_seconds(length: int, width: int) -> float:
    """Of a forward and a backward pass over TOKENS tokens; the best of TURNS."""
    shape = (TOKENS // length, HEADS, length, width)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    costs = {
        length: statistics.mean(
            attention_seconds(length, width) / length / (TOKENS // length * length) for width in (16, 64)
        )
        for length in LENGTHS
    }
    measured = {length: cost / costs[1024] for length, cost in costs.items()}
    predicted = {length: causal_attention_cost(length) / causal_attention_cost(1024) for length in LENGTHS}
    errors = {length: predicted[length] / measured[length] - 1 for length in LENGTHS}
    rows = [
        [length, f"{measured[length]:.2f}", f"{predicted[length]:.2f}", f"{errors[length]:+.0%}"] for length in LENGTHS
    ]
    print(text_table(["tokens", "cost of an operation", "foreseen", "error"], rows))
    met = max(map(abs, errors.values())) <= TARGET
    print(f"\ntarget: within {TARGET:.0%}: {met_or_missed(met)}")
    figures = {"measured": measured, "foreseen": predicted, "errors": errors, "target": TARGET, "met": met}
    save("attention", figures, command=command_line(), claim=CLAIM)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
