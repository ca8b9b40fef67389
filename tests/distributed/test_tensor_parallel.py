"""Tensor parallelism, alone and with data parallelism, trains the model that one plain process trains.

Quick cases have two layers and take two steps; the long matrix is among the slow tests.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from ranks import RankError, run_ranks
from tiny import SPEC, Case, TrainingTrace, make_model, to_full_tensor, train
from torch.distributed.tensor import DTensor
from training import TINY

from quadriga.comm.mesh import build_mesh
from quadriga.config.run_spec import Degrees
from quadriga.config.schema import ActivationCheckpoint, Compile, Parallelism, Training
from quadriga.models.registry import parallel_plan
from quadriga.parallel import tensor_parallel

# Under FSDP 2 x TP 2 no matrix is cut evenly; under TP 4 each rank has two heads that share one key and value head.
ODD = replace(SPEC, n_layers=2, ffn_dim=54, vocab_size=98)
GQA = replace(SPEC, n_layers=2, n_heads=8, n_kv_heads=4, ffn_dim=52, vocab_size=100)
TIED = replace(ODD, tie_embeddings=True)
SPECS = {"odd": ODD, "gqa": GQA, "tied": TIED, "one layer": replace(ODD, n_layers=1)}

WHOLE = Parallelism(enable_sequence_parallel=False)
GATHERED = Parallelism(disable_loss_parallel=True)
NEITHER = Parallelism(enable_sequence_parallel=False, disable_loss_parallel=True)
BY_OPERATION = ActivationCheckpoint(selective_ac_option="op")
COMPILED = Compile(enable=True, backend="aot_eager", components=("model",))
BF16 = Training(mixed_precision_param="bfloat16")

TP2, TP4 = Degrees(tp=2), Degrees(tp=4)
FSDP_TP, DDP_TP = Degrees(dp_shard=2, tp=2), Degrees(dp_replicate=2, tp=2)


def case(degrees: Degrees, spec: str = "odd", **changes: Any) -> Case:
    return Case(degrees, spec=SPECS[spec], rows=4, **changes)


def train_all(cases: list[Case]) -> list[TrainingTrace]:
    return [train(each, steps=2) for each in cases]


@pytest.fixture(scope="module")
def alone() -> dict[str, TrainingTrace]:
    """One process for each model, cut by nothing, and one that computes in bfloat16."""
    names = ("odd", "gqa", "tied")
    cases = [*(case(Degrees(), name) for name in names), case(Degrees(), training=BF16)]
    return dict(zip((*names, "bf16"), run_ranks(train_all, 1, cases)[0], strict=True))


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative, of all weights together: Adam turns a gradient near zero into a step that is a matter of rounding."""
    mine, other = (torch.cat([weights[name].flatten() for name in theirs]) for weights in (ours, theirs))
    return float((mine - other).norm() / other.norm())


def assert_same_training(traces: tuple[TrainingTrace, ...], reference: TrainingTrace) -> None:
    for trace in traces:
        assert trace.losses == pytest.approx(reference.losses, rel=1e-6)
        assert trace.norms == pytest.approx(reference.norms, rel=1e-6)
        assert list(trace.weights) == list(reference.weights)
        assert distance(trace.weights, reference.weights) <= 1e-5
        assert (trace.losses, trace.norms) == (traces[0].losses, traces[0].norms)  # all ranks report the same


def compare(cases: dict[str, list[Case]], ranks: int, alone: dict[str, TrainingTrace], timeout: float = 60.0) -> None:
    """Train the cases, by the model that they are of, on the same ranks, and hold each to one plain process."""
    by_case = zip(*run_ranks(train_all, ranks, list(itertools.chain(*cases.values())), timeout=timeout), strict=True)
    for spec, group in cases.items():
        for _ in group:
            assert_same_training(next(by_case), alone[spec])


def test_two_ranks(alone: dict[str, TrainingTrace]) -> None:
    cases = {
        "odd": [case(TP2), case(TP2, parallelism=WHOLE), case(TP2, parallelism=GATHERED)],
        "tied": [case(TP2, "tied"), case(TP2, "tied", parallelism=NEITHER)],
    }
    compare(cases, 2, alone)


def test_bfloat16_is_about_as_near_to_float32_as_on_one_rank(alone: dict[str, TrainingTrace]) -> None:
    two = run_ranks(train_all, 2, [case(TP2, training=BF16)])[0][0]
    assert two.dtypes == alone["bf16"].dtypes == {(torch.float32, torch.float32)}
    for cut, uncut, exact in zip(two.losses, alone["bf16"].losses, alone["odd"].losses, strict=True):
        assert abs(cut - exact) <= max(3 * abs(uncut - exact), 1e-3 * exact)


@pytest.mark.slow
def test_four_ranks(alone: dict[str, TrainingTrace]) -> None:
    cases = {
        "odd": [
            case(FSDP_TP, recompute=BY_OPERATION),
            case(DDP_TP, parallelism=WHOLE, reduce="every_micro_batch"),
        ],
        "gqa": [case(TP4, "gqa")],
        "tied": [case(FSDP_TP, "tied", parallelism=GATHERED)],
    }
    compare(cases, 4, alone)


@pytest.mark.slow
def test_every_layout_with_every_switch(alone: dict[str, TrainingTrace]) -> None:
    switches: list[dict[str, Any]] = [
        {"reduce": "every_micro_batch"},
        {"recompute": ActivationCheckpoint(mode="full")},
        {"recompute": ActivationCheckpoint(selective_ac_option="2")},
        {"recompute": BY_OPERATION},
        {"compile": COMPILED},
        {"compile": COMPILED, "recompute": BY_OPERATION},
        {"compile": Compile(enable=True, backend="inductor", components=("model",))},
        {"reshard": False},
        {"training": Training(mixed_precision_param="float32", enable_cpu_offload=True)},
    ]
    ways = [Parallelism(), WHOLE, GATHERED, NEITHER]
    for ranks, layouts in ((2, [TP2]), (4, [FSDP_TP, DDP_TP])):
        for layout in layouts:
            cases = [case(layout, parallelism=way, **switch) for way in ways[:2] for switch in switches]
            cases += [case(layout, parallelism=way) for way in ways]
            tied = [case(layout, "tied", parallelism=way) for way in ways]
            compare({"odd": cases, "tied": tied}, ranks, alone, timeout=900)
    compare({"gqa": [case(TP4, "gqa", parallelism=way) for way in ways]}, 4, alone, timeout=300)


def losses_with_and_without_waiting(cases: list[Case]) -> list[list[float] | str]:
    """Of eager blocks, of compiled ones, and of compiled ones that are handed an output that is still on its way."""
    eager, compiled = (train(each, steps=2).losses for each in cases)
    tensor_parallel.plain_output = lambda module, inputs, output: output
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    try:
        unguarded: list[float] | str = train(cases[1], steps=2).losses
    except Exception as error:  # noqa: BLE001 - whatever it is, it is not right
        unguarded = repr(error)
    return [eager, compiled, unguarded]


@pytest.mark.parametrize("degrees", [TP2, pytest.param(FSDP_TP, marks=pytest.mark.slow)], ids=["TP", "FSDP x TP"])
def test_a_compiled_block_is_given_what_has_arrived(degrees: Degrees) -> None:
    """Without the guard nothing fails, and the second loss is off by a hundredth: the first gradients were wrong.

    torch 2.11 was seen to get it right without the guard too.
    """
    cases = [case(degrees, "one layer"), case(degrees, "one layer", compile=COMPILED)]
    eager, compiled, unguarded = run_ranks(losses_with_and_without_waiting, degrees.world_size, cases)[0]
    assert compiled == pytest.approx(eager, rel=1e-6)
    if not torch.__version__.startswith("2.11"):
        assert isinstance(unguarded, str) or unguarded != pytest.approx(eager, rel=1e-4)


def norm_as_torch_takes_it(with_plain_norms: bool) -> tuple[set[str], float]:
    """The meshes that parameters lie on, and the norm of gradients of ones by torch's own function."""
    if with_plain_norms:
        tensor_parallel.distribute_module = lambda module, *_, **__: module
    parameters = list(make_model(case(TP2, parallelism=WHOLE), build_mesh(TP2, "cpu")).parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    meshes = {str(parameter.device_mesh.mesh_dim_names) for parameter in parameters if isinstance(parameter, DTensor)}
    return meshes, to_full_tensor(torch.nn.utils.clip_grad_norm_(parameters, 1.0)).item()


def test_norms_lie_on_the_mesh_of_the_matrices_where_the_sequence_is_whole() -> None:
    """Else an operation over all parameters, such as torch's own norm of all gradients, fails."""
    elements = sum(math.prod(parameter.shape) for parameter in parallel_plan(ODD).parameters)
    for meshes, norm in run_ranks(norm_as_torch_takes_it, 2, False):
        assert meshes == {"('dp_shard', 'tp')"}
        assert norm == pytest.approx(elements**0.5, rel=1e-6)
    with pytest.raises(RankError, match="mesh"):
        run_ranks(norm_as_torch_takes_it, 2, True)


def initial_weights(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    result = []
    for each in cases:
        model = make_model(each, build_mesh(each.degrees, "cpu"))
        result.append({name: to_full_tensor(parameter) for name, parameter in model.named_parameters()})
    return result


def test_initial_weights_are_the_same_bits_on_every_layout() -> None:
    specs = ("odd", "tied", "gqa")
    alone = run_ranks(initial_weights, 1, [case(Degrees(), spec) for spec in specs])[0]
    layouts = [FSDP_TP, FSDP_TP, TP4, DDP_TP]
    cut = run_ranks(initial_weights, 4, [case(d, s) for d, s in zip(layouts, (*specs, "odd"), strict=True)])
    for on_rank in cut:
        for weights, expected in zip(on_rank, (*alone, alone[0]), strict=True):
            assert list(weights) == list(expected)
            assert all(torch.equal(weights[name], expected[name]) for name in expected)


TRAINER = (*TINY, "--training.mixed_precision_param=float32", "--training.local_batch_size=4", "--model.n_layers=1")
IN_TWO = "--parallelism.tensor_parallel_degree=2"


def test_a_checkpoint_of_four_ranks_goes_on_on_one(tmp_path: Path) -> None:
    """Through the real trainer, with validation."""
    tiny = (*TRAINER, "--checkpoint.enable", "--checkpoint.interval=2", "--validation.enable")
    tiny += ("--validation.dataset=builtin_validation", "--validation.seq_len=32", "--validation.steps=1")
    tiny += ("--validation.local_batch_size=1",)
    one = training.train(tmp_path / "one", 1, *tiny, "--training.steps=3")
    four = training.train(tmp_path / "four", 4, *tiny, IN_TWO, "--training.steps=2")
    assert training.largest_difference(four, one[:2], "loss") <= 1e-6
    assert training.largest_difference(four, one[:2], "grad_norm") <= 1e-6
    gone_on = training.train(tmp_path / "four", 1, *tiny, "--training.steps=3")
    assert training.largest_difference(gone_on, one, "loss") <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("gathered", [(), ("--parallelism.disable_loss_parallel",)], ids=["cut", "gathered"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_loss(backend: str, gathered: tuple[str, ...], tmp_path: Path) -> None:
    compiled = ("--compile.enable", f"--compile.backend={backend}", "--compile.components=loss", "--training.steps=3")
    one = training.train(tmp_path / "one", 1, *TRAINER, "--training.steps=3")
    two = training.train(tmp_path / "two", 2, *TRAINER, *compiled, IN_TWO, *gathered, timeout=300)
    assert training.largest_difference(two, one, "loss") <= 1e-6
