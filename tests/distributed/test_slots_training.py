"""FSDP over slots in host memory trains as FSDP over gloo does, and sends what the estimate says.

Tolerances are those that docs/numerics.md publishes. The tiny model sums gradients in float32, so that the order of the
sum shows; in float64 nothing of it is left.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from estimating import run_of
from host_slots_backend import FACTS
from ranks import run_ranks
from training import DEBUG_FILE, TINY, largest_difference, one_rank, train

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run
from quadriga.metrics.jsonl import read_metrics

LOSS, NORM = 1e-5, 1e-4
STEPS = 4
FLOAT32, FLOAT64 = (f"--training.mixed_precision_reduce={dtype}" for dtype in ("float32", "float64"))
RUN = (*TINY, f"--training.steps={STEPS}", "--checkpoint.no_enable")
LAYOUTS = {
    "2 ranks, freed after the forward pass, accumulated": (2, ("--parallelism.fsdp_reshard_after_forward=always",)),
    "4 ranks, kept until the backward pass": (4, ("--parallelism.fsdp_reshard_after_forward=never",)),
    "4 ranks, reduced after every micro-batch": (4, ("--parallelism.reduce_gradients=every_micro_batch",)),
    "HSDP 2 x 2": (4, ("--parallelism.data_parallel_replicate_degree=2",)),
    "FSDP 2 x TP 2": (4, ("--parallelism.tensor_parallel_degree=2",)),
    "FSDP 2 x PP 2": (4, ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4")),
    "FSDP 2 x CP 2": (4, ("--parallelism.context_parallel_degree=2",)),
    "2 ranks, validation, loss chunks": (
        2,
        (
            "--training.loss_chunks=2",
            "--validation.enable",
            "--validation.dataset=builtin_validation",
            "--validation.freq=2",
            "--validation.steps=2",
        ),
    ),
}
GLOO = "over gloo"
EXACT, EXACT_GLOO = "sums in float64", "sums in float64, over gloo"
QUICK = (*tuple(LAYOUTS)[:2], "HSDP 2 x 2", EXACT)
Records = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _known_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, FACTS.name, FACTS)


def arguments_of(name: str, ranks: int) -> tuple[int, tuple[str, ...]]:
    """Ranks and arguments of a named run. `ranks` counts for those that stand for all layouts."""
    if name in (EXACT, EXACT_GLOO):
        return 4, (*RUN, FLOAT64, f"--comm.backend={'gloo' if name == EXACT_GLOO else 'host-slots'}")
    if name == GLOO:
        return ranks, (*RUN, FLOAT32, "--comm.backend=gloo")
    return LAYOUTS[name][0], (*RUN, FLOAT32, *LAYOUTS[name][1], "--comm.backend=host-slots")


def train_all(argvs: list[list[str]]) -> list[int]:
    """One run after the other on the same ranks, which import everything but once."""
    codes = []
    for number, argv in enumerate(argvs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # a corner of its own in the store
        codes.append(one_rank(argv, log=number == 0))
    return codes


def records_of(folder: Path, ranks: int, names: list[str]) -> dict[str, Records]:
    folders = {name: folder / f"{ranks} {name}" for name in names}
    argvs = [
        ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(folders[name]), *arguments_of(name, ranks)[1]]
        for name in names
    ]
    assert run_ranks(train_all, ranks, argvs, timeout=240.0, backend=None) == [[0] * len(names)] * ranks
    return {name: read_metrics(place / "metrics.jsonl") for name, place in folders.items()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Records]:
    """The quick runs by name and ranks, and FSDP over gloo beside them."""
    found = {}
    for ranks in (2, 4):
        names = [name for name in QUICK if arguments_of(name, ranks)[0] == ranks]
        names += [GLOO, *([EXACT_GLOO] if EXACT in names else [])]
        for name, records in records_of(tmp_path_factory.mktemp("runs"), ranks, names).items():
            found[name, ranks] = records
    return found


@pytest.mark.parametrize("name", QUICK)
def test_losses_are_those_over_gloo(name: str, quick: dict[tuple[str, int], Records]) -> None:
    ranks, _ = arguments_of(name, 0)
    exact = name == EXACT
    alike(quick[name, ranks], quick[EXACT_GLOO if exact else GLOO, ranks], 0 if exact else LOSS, 0 if exact else NORM)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in QUICK])
def test_losses_of_other_layouts_are_those_over_gloo(name: str, tmp_path: Path) -> None:
    ranks, _ = arguments_of(name, 0)
    found = records_of(tmp_path, ranks, [name, GLOO])
    alike(found[name], found[GLOO], LOSS, NORM)


@pytest.mark.slow
def test_in_bfloat16_within_the_tolerance_of_bfloat16(tmp_path: Path) -> None:
    keys = ("--training.mixed_precision_param=bfloat16", "--training.mixed_precision_reduce=bfloat16")
    slots = train(tmp_path / "slots", 4, *RUN, *keys, "--comm.backend=host-slots")
    gloo = train(tmp_path / "gloo", 4, *RUN, *keys, "--comm.backend=gloo")
    alike(slots, gloo, 1e-2, 5e-2)


def alike(slots: Records, gloo: Records, loss: float, norm: float) -> None:
    assert len(slots) == STEPS
    assert largest_difference(slots, gloo, "loss") <= loss
    assert largest_difference(slots, gloo, "grad_norm") <= norm
    assert slots[0]["loss"] != slots[-1]["loss"]


def test_what_a_run_leaves_says_which_backend_serves_which_axis(tmp_path: Path) -> None:
    replicas = "--parallelism.data_parallel_replicate_degree=2"
    train(tmp_path, 4, *RUN, replicas, "--comm.backend=host-slots")
    served = {"shard": "host-slots", "dp_replicate": "gloo", "norms": "gloo", "host": "gloo"}
    assert json.loads((tmp_path / "environment.json").read_text())["backends"] == served
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["kind"], first["backend"], first["backends"]) == ("backends", "host-slots", served)
    end = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert set(end["carried"]) == {"all_gather", "reduce_scatter"}
    assert min(end["carried"].values()) > 0


# --- what is sent -----------------------------------------------------------------------------------------------------


def read_run(*arguments: str) -> Run:
    model = ("--model.dim=32", "--model.n_layers=3", "--model.n_heads=4", "--model.n_kv_heads=2", "--model.ffn_dim=96")
    rest = ("--model.vocab_size=322", "--training.seq_len=32", "--training.local_batch_size=2")
    data = ("--model.hf_assets_path=builtin:bytes", "--training.dataset=builtin")
    flavor = ("--model.flavor=debugmodel", "--comm.backend=host-slots", *data)
    return run_of(*flavor, *model, *rest, *arguments, ranks=4, base=())


def a_step(run: Run) -> tuple[Counter[str], list[tuple[str, int]], tuple[int, int]]:
    """Of one step: bytes by kind of call as the collectives counted them, the annotations that torch.profiler saw, and
    the heap that was made."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from quadriga.comm.backend import register_backend
    from quadriga.comm.mesh import build_mesh
    from quadriga.rehearsal.rehearse import empty_loader
    from quadriga.train.backends import collectives_for_shards
    from quadriga.train.build import build_parts, build_state, build_step_config
    from quadriga.train.step import train_step

    register_backend(FACTS)
    cpu = torch.device("cpu")
    mesh = build_mesh(run.spec.degrees, "cpu")
    sharding = collectives_for_shards(run, "host-slots", mesh, cpu)
    assert sharding is not None
    parts = build_parts(run, mesh, cpu, shard_collectives=sharding)
    state = build_state(run, parts, empty_loader(run), torch.device("cpu"))
    step_config = build_step_config(run, mesh, cpu, parts)
    train_step(state, step_config, mesh)
    sharding.bytes_by_collective.clear()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        train_step(state, step_config, mesh)
    names = [event.name for event in found.events() if event.name.startswith("quadriga:collective ")]
    seen = []
    for name in names:
        facts = dict(pair.split("=") for pair in name.split(" ")[1:])
        assert (facts["axis"], facts["backend"], facts["ranks"]) == ("shard", "host-slots", str(mesh.fsdp.size(-1)))
        assert facts["dtype"] == ("bfloat16" if facts["kind"] == "all_gather" else "float32")
        seen.append((facts["kind"], int(facts["bytes"])))
    heap = sharding.all_gather._heap
    sharding.close()
    return sharding.bytes_by_collective, seen, (heap.gather, heap.scatter)


@pytest.mark.parametrize(
    "layout",
    [(), pytest.param(("--parallelism.tensor_parallel_degree=2",), marks=pytest.mark.slow)],
    ids=["FSDP 4", "FSDP 2, TP 2"],
)
def test_bytes_are_those_of_the_estimate_and_the_largest_call_fills_the_heap(layout: tuple[str, ...]) -> None:
    from quadriga.planning.communication import collective_calls
    from quadriga.planning.setup import Setup

    run = read_run(FLOAT32, *layout)
    expected: Counter[str] = Counter()
    for call in collective_calls(Setup(run, "cpu"), 0):
        if call.axis == "shard" and call.when != "norm":
            expected[call.kind] += round(call.bytes)
    for carried, seen, (gather, scatter) in run_ranks(a_step, 4, run):
        assert carried == expected
        annotated: Counter[str] = Counter()
        for kind, size in seen:
            annotated[kind] += size
        assert annotated == expected
        assert max(size for kind, size in seen if kind == "all_gather") == gather
        assert max(size for kind, size in seen if kind == "reduce_scatter") == scatter
