"""How many micro-batches a pipeline rank holds at once, and how long it idles, by schedule. Pure arithmetic.

| schedule                 | passes whose activations one rank holds           | idle share of the ideal |
|--------------------------|---------------------------------------------------|-------------------------|
| GPipe, LoopedBFS         | all: m a stage                                    | (p - 1) / (v m)         |
| 1F1B                     | min(m, p - rank)                                  | (p - 1) / m             |
| Interleaved1F1B          | (v - 1) p + 2 (p - 1 - rank) + 1, at most v m     | (p - 1) / (v m)         |
| InterleavedZeroBubble    | the same                                          | about a third of that   |
| ZBVZeroBubble, DualPipeV | at most 2 p passes through half as long stages    | about a third of that   |

(p ranks, v stages a rank, m micro-batches. arXiv 1811.06965, 2104.04473, 2401.10241.)
"""

from __future__ import annotations

ZERO_BUBBLE = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def in_flight(schedule: str, rank: int, ranks: int, stages_a_rank: int, micro_batches: int) -> int:
    """Passes through one of its stages whose activations rank `rank` of the pipeline holds at most at once."""
    most = stages_a_rank * micro_batches
    if schedule == "1F1B":
        return min(micro_batches, ranks - rank)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return min(most, (stages_a_rank - 1) * ranks + 2 * (ranks - 1 - rank) + 1)
    if schedule in ("ZBVZeroBubble", "DualPipeV"):
        return min(most, 2 * ranks)
    return most


def bubble(schedule: str, ranks: int, stages_a_rank: int, micro_batches: int) -> float:
    """Idle time of a rank as a share of the time that it computes."""
    share = (ranks - 1) / (stages_a_rank * micro_batches)
    return share / 3 if schedule in ZERO_BUBBLE else share
