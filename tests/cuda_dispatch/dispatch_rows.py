"""The layouts and modes whose dispatch on CUDA is rehearsed: 8B's width, few layers, 8,192 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from estimating import RECOMPUTE, keys

BASE = (
    *("--model.flavor=8B", "--model.hf_assets_path=builtin:bytes", "--training.dataset=builtin", "--model.n_layers=2"),
    *("--training.seq_len=8192", "--training.local_batch_size=1", "--metrics.no_enable_tensorboard"),
    *("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
)
BF16 = ("--training.mixed_precision_param=bfloat16", "--training.mixed_precision_reduce=float32")
F32 = ("--training.mixed_precision_param=float32", "--training.mixed_precision_reduce=float32")
HALF = ("--training.dtype=bfloat16", "--training.mixed_precision_reduce=bfloat16")
MOMENTS = ("--optimizer.state_dtype=bfloat16",)
FLOAT8 = ("--model.converters=quantize.linear.float8", "--quantize.linear.float8.filter_fqns=output")
TENSORWISE = (*FLOAT8, "--quantize.linear.float8.recipe_name=tensorwise")
ROWWISE = (*FLOAT8, "--quantize.linear.float8.recipe_name=rowwise")
GATHERED = ("--quantize.linear.float8.enable_fsdp_float8_all_gather",)
FOUR_LAYERS = ("--model.n_layers=4", "--training.local_batch_size=4")

# The attention kernels of torch, by the names of their operations; those that a row may take.
CUDNN, FLASH, EFFICIENT = "cudnn", "flash", "efficient"
HALVES = (CUDNN,)  # torch's own choice in bfloat16 on this device
TOLERANCE = 0.01  # relative, of the estimate


@dataclass(frozen=True)
class Row:
    """`kernels`: attention takes one of them, and no other. `rank`: the one that is rehearsed.

    `known`: relative errors of the estimate that are known to exceed `TOLERANCE`, of `memory`, and of the `bytes` and
    `calls` of the kind of collective that differs most. The row fails when an error is gone or another one, so that
    the entry is removed or corrected.
    """

    ranks: int
    keys: tuple[str, ...]
    kernels: tuple[str, ...] = HALVES
    rank: int = 0
    known: Mapping[str, float] = field(default_factory=dict)


def cp(method: str, dtype: tuple[str, ...], *more: str) -> Row:
    """Context parallelism takes torch's choice in bfloat16, and never cuDNN's with deterministic algorithms."""
    halves = (FLASH,) if "--debug.deterministic" in more else HALVES
    return Row(4, (*dtype, *keys(cp=2, method=method), *more), halves if dtype == BF16 else (EFFICIENT,))


def pp(schedule: str, rank: int = 0, *more: str) -> Row:
    return Row(2, (*BF16, *FOUR_LAYERS, *keys(pp=2, schedule=schedule), *more), rank=rank)


ROWS = {
    "1 GPU, bfloat16": Row(1, BF16),
    "1 GPU, float32": Row(1, F32, (EFFICIENT,)),
    "1 GPU, all in bfloat16": Row(1, (*BF16, *HALF)),
    "1 GPU, no recompute": Row(1, (*BF16, *RECOMPUTE["none"])),
    "1 GPU, full recompute": Row(1, (*BF16, *RECOMPUTE["full"])),
    "1 GPU, every second block": Row(1, (*BF16, *RECOMPUTE["2"])),
    "1 GPU, loss in 8 chunks": Row(
        1,
        (*BF16, "--training.loss_chunks=8"),
        known={"memory": 0.0433},  # the estimate counts a copy of the embedding's gradient, which one GPU does not make
    ),
    "1 GPU, bfloat16 moments": Row(1, (*BF16, *MOMENTS)),
    "1 GPU, all in bfloat16, float32 moments": Row(1, (*BF16, *HALF, "--optimizer.state_dtype=float32")),
    "1 GPU, all in bfloat16, rounded stochastically": Row(
        1, (*BF16, *HALF, *MOMENTS, "--optimizer.stochastic_rounding")
    ),
    "1 GPU, debug.deterministic": Row(1, (*BF16, "--debug.deterministic"), (FLASH,)),
    "FSDP 4": Row(4, BF16),
    "FSDP 4, float32": Row(4, F32, (EFFICIENT,)),
    "FSDP 4, never resharded": Row(4, (*BF16, *keys(reshard="never"))),
    "FSDP 4, loss in 8 chunks, bfloat16 moments": Row(4, (*BF16, "--training.loss_chunks=8", *MOMENTS)),
    "HSDP 2 x 2": Row(4, (*BF16, *keys(rep=2))),
    "DDP 4": Row(4, (*BF16, *keys(rep=4, shard=1))),
    "TP 2": Row(2, (*BF16, *keys(tp=2))),
    "FSDP 2, TP 2": Row(4, (*BF16, *keys(tp=2))),
    "FSDP 2, TP 2, no sequence parallelism": Row(4, (*BF16, *keys(tp=2, sp=False))),
    "FSDP 2, TP 2, whole logits": Row(4, (*BF16, *keys(tp=2, whole_logits=True))),
    "FSDP 2, CP 2, all-gather": cp("allgather", BF16),
    "FSDP 2, CP 2, all-gather, float32": cp("allgather", F32),
    "FSDP 2, CP 2, all-gather, debug.deterministic": cp("allgather", BF16, "--debug.deterministic"),
    "FSDP 2, CP 2, ring, debug.deterministic": cp("ring", BF16, "--debug.deterministic"),
    "FSDP 2, CP 2, ring": cp("ring", BF16),
    "FSDP 2, CP 2, ring, float32": cp("ring", F32),
    "FSDP 2, CP 2, ulysses": cp("ulysses", BF16),
    "FSDP 2, CP 2, ulysses, float32": cp("ulysses", F32),
    "PP 2, 1F1B": pp("1F1B"),
    "PP 2, 1F1B, last": pp("1F1B", 1),
    "PP 2, GPipe": pp("GPipe"),
    "PP 2, interleaved": pp("Interleaved1F1B"),
    "PP 2, ZBV": pp("ZBVZeroBubble"),
    "PP 2, FSDP 2, TP 2, 1F1B": Row(
        8,
        (*BF16, *FOUR_LAYERS, *keys(pp=2, tp=2, schedule="1F1B")),
        known={"memory": -0.1115},  # the accumulated gradient of the embedding is whole on each rank of the TP axis
    ),
    "1 GPU, float8 tensorwise": Row(1, (*BF16, *TENSORWISE)),
    "1 GPU, float8 rowwise": Row(1, (*BF16, *ROWWISE)),
    "FSDP 4, float8 tensorwise": Row(4, (*BF16, *TENSORWISE)),
    "FSDP 4, float8 rowwise": Row(4, (*BF16, *ROWWISE)),
    "FSDP 4, float8 tensorwise, gathered in float8": Row(4, (*BF16, *TENSORWISE, *GATHERED)),
    "FSDP 2, TP 2, float8 tensorwise": Row(
        4,
        (*BF16, *TENSORWISE, *keys(tp=2)),
        known={"calls": -0.8605},  # the estimate does not know the all-reduce of each scale over the TP axis
    ),
}
