"""Measures the speed of torch's attention on a CPU by sequence length.

    python benchmarks/attention.py                     # one process, half a minute on 2 cores

Claim: the cost of an operation that a causal mask leaves is predicted within 20 %. The prediction is (1 + rows /
length) times the cost of a block (`ATTENTION_BLOCKS` of quadriga/planning/setup.py). `rows` is the number of rows of a
block: 32 below 192 tokens, 64 below 768, else 256 (FlashAttentionKernel.cpp). The estimate of step times on CPUs uses
this, so that rates measured at one length are valid at another.
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

CLAIM = "the cost of an attention operation on a CPU, relative to that at 1,024 tokens, is predicted within 20 %"
TARGET = 0.20
LENGTHS = (64, 128, 256, 384, 512, 640, 768, 1024, 1536, 2048)
TOKENS, HEADS, REPEATS = 2048, 16, 7


def attention_seconds(length: int, width: int) -> float:
    """Seconds of a forward and a backward pass over TOKENS tokens, heads of `width`; the minimum of REPEATS."""
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
    print(text_table(["tokens", "cost of an operation", "predicted", "error"], rows))
    met = max(map(abs, errors.values())) <= TARGET
    print(f"\ntarget: within {TARGET:.0%}: {met_or_missed(met)}")
    figures = {"measured": measured, "foreseen": predicted, "errors": errors, "target": TARGET, "met": met}
    save("attention", figures, command=command_line(), claim=CLAIM)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
