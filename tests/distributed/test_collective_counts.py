"""What a step sends is what theory says: calls by kind and axis, on real ranks, layout by layout.

The formulas stand in `expected`. Float32, nothing recomputed, gradients reduced once a step, parameters freed after the
forward pass (not in a pipeline), sequence parallelism and the vocabulary-parallel loss on.
"""

from __future__ import annotations

from collections import Counter

import pytest
from estimating import by_group, one_name_a_group, run_of
from ranks import run_ranks

from quadriga.config import Run
from quadriga.config.run_spec import Degrees

LAYERS = 4
MODEL = (
    *(
        "--model.flavor=debugmodel",
        "--model.hf_assets_path=builtin:bytes",
        "--model.dim=32",
        f"--model.n_layers={LAYERS}",
    ),
    *("--model.n_heads=4", "--model.n_kv_heads=4", "--model.ffn_dim=64", "--model.vocab_size=320"),
    *("--training.dataset=builtin", "--training.seq_len=32", "--training.local_batch_size=4"),
    *("--activation_checkpoint.mode=none", "--parallelism.reduce_gradients=once"),
)
LAYOUTS = {
    "FSDP 4": Degrees(dp_shard=4),
    "HSDP 2x2": Degrees(dp_replicate=2, dp_shard=2),
    "DDP 4": Degrees(dp_replicate=4),
    "TP 4": Degrees(tp=4),
    "CP 4": Degrees(cp=4),
    "PP 4": Degrees(pp=4),
    "FSDP 2, TP 2": Degrees(dp_shard=2, tp=2),
    "DDP 2, TP 2": Degrees(dp_replicate=2, tp=2),
    "FSDP 2, CP 2": Degrees(dp_shard=2, cp=2),
    "TP 2, CP 2": Degrees(tp=2, cp=2),
    "FSDP 2, PP 2": Degrees(dp_shard=2, pp=2),
    "PP 2, TP 2": Degrees(pp=2, tp=2),
    "PP 2, CP 2": Degrees(pp=2, cp=2),
}


def expected(degrees: Degrees, rank: int) -> Counter[tuple[str, str]]:
    """Calls of one step by (kind, axis) on `rank`. `shard` is dp_shard and cp as one axis."""
    calls: Counter[tuple[str, str]] = Counter()
    shard, pp = degrees.dp_shard * degrees.cp, degrees.pp
    stage = rank // (degrees.world_size // pp)
    first, last = stage == 0, stage == pp - 1
    layers, passes = LAYERS // pp, 4 if pp > 1 else 1  # a pipeline sends each of the 4 rows on its own
    units = layers + first + last

    if shard > 1:
        # Every unit is gathered before its forward pass and its gradients are scattered once. The layers were freed in
        # between, unless there is a pipeline; the embedding's backward pass and the last unit do not need to be
        # gathered again.
        calls["all_gather", "shard"] += units + (layers if pp == 1 else 0)
        calls["reduce_scatter", "shard"] += units
    if degrees.dp_replicate > 1:
        calls["all_reduce", "dp_replicate"] += units

    if degrees.tp > 1:
        # Each half of a layer gathers its input and scatters its output, and the other way round in the backward pass;
        # the embedding scatters, the output gathers.
        calls["all_gather", "tp"] += passes * (4 * layers + first + last)
        calls["reduce_scatter", "tp"] += passes * (4 * layers + first + last)
        # The loss over a cut vocabulary: the greatest logit, the sum of exponentials, the label's logit.
        calls["all_reduce", "tp"] += passes * 3 * last
        # Norms see a part of the sequence each, so that their gradients are sums over tp.
        calls["all_reduce", "tp"] += 2 * layers + last
    if degrees.cp > 1:
        # Keys and values gathered; their gradients scattered.
        calls["all_gather", "cp"] += passes * layers
        calls["reduce_scatter", "cp"] += passes * layers
    if pp > 1:
        calls["send", "pp"] += passes * ((not last) + (not first))  # hidden states on, their gradients back
        calls["recv", "pp"] += passes * ((not last) + (not first))
        calls["all_reduce", "pp"] += 1  # of the squared norm

    # The squared norm: parameters cut along tp and those whole along it are summed apart.
    kinds = 2 if degrees.tp > 1 else 1
    if shard > 1:
        calls["all_reduce", "shard"] += kinds
    if degrees.tp > 1:
        calls["all_reduce", "tp"] += 1
    if degrees.world_size > 1:
        calls["all_reduce", "world"] += 1  # every rank's loss and norm
    return +_by_group(calls, degrees)


def _by_group(calls: Counter[tuple[str, str]], degrees: Degrees) -> Counter[tuple[str, str]]:
    same = one_name_a_group(degrees)
    merged: Counter[tuple[str, str]] = Counter()
    for (kind, axis), count in calls.items():
        merged[kind, same.get(axis, axis)] += count
    return merged


def read_run(degrees: Degrees, *more: str) -> Run:
    from quadriga.rehearsal.equivalence.rows import DEGREE_KEYS

    cuts = [f"--{key}={getattr(degrees, axis)}" for axis, key in DEGREE_KEYS.items()]
    return run_of(*cuts, *more, ranks=degrees.world_size, base=MODEL)


def recorded(degrees: Degrees, *more: str) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Calls and bytes of one step, the second."""
    import torch

    from quadriga.comm.call_recorder import CallRecorder, axis_by_ranks
    from quadriga.comm.mesh import build_mesh
    from quadriga.rehearsal.rehearse import empty_loader
    from quadriga.train.build import build_parts, build_state, build_step_config
    from quadriga.train.step import train_step

    run = read_run(degrees, *more)
    mesh, cpu = build_mesh(degrees, "cpu"), torch.device("cpu")
    parts = build_parts(run, mesh, cpu)
    state = build_state(run, parts, empty_loader(run), torch.device("cpu"))
    step_config = build_step_config(run, mesh, cpu, parts)
    train_step(state, step_config, mesh)
    with CallRecorder(axis_by_ranks(mesh)) as recorder:
        train_step(state, step_config, mesh)
    return recorder.counts(), recorder.bytes()


QUICK = ("FSDP 4", "TP 2, CP 2", "FSDP 2, PP 2")  # the others in `make test-all`, and on fake ranks
MARKED = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]


@pytest.mark.parametrize("name", MARKED)
def test_a_step_sends_what_theory_and_the_estimate_say(name: str) -> None:
    degrees = LAYOUTS[name]
    run = read_run(degrees)
    for rank, found in enumerate(run_ranks(recorded, 4, degrees, timeout=200)):
        assert dict(found[0]) == dict(expected(degrees, rank)), f"rank {rank}"
        assert found == by_group(run, rank), f"rank {rank}"


@pytest.mark.parametrize(("reduce", "scatters"), [("once", 1), ("every_micro_batch", 4)])
def test_copies_are_reconciled_once_a_step(reduce: str, scatters: int) -> None:
    """HSDP with 4 micro-batches: gradients are all-reduced over the copies at the last one only, whatever
    `reduce_gradients` says of the reduction over shards."""
    accumulation = ("--training.local_batch_size=1", "--training.global_batch_size=16")
    degrees = LAYOUTS["HSDP 2x2"]
    for calls, _ in run_ranks(recorded, 4, degrees, *accumulation, f"--parallelism.reduce_gradients={reduce}"):
        assert calls["all_reduce", "dp_replicate"] == LAYERS + 2
        assert calls["reduce_scatter", "shard"] == scatters * (LAYERS + 2)
