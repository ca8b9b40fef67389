"""FSDP, HSDP and DDP train the model that one process trains."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import FLOAT32, SPEC, Case, TrainingTrace, batch, make_model, to_whole, train_all
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils._python_dispatch import TorchDispatchMode

from quadriga.comm.mesh import build_mesh
from quadriga.config.run_spec import Degrees
from quadriga.config.schema import Parallelism, Training
from quadriga.train.loss import summed_cross_entropy

BF16 = Training(mixed_precision_param="bfloat16")
OFFLOAD = Training(mixed_precision_param="float32", enable_cpu_offload=True)
TIED = replace(SPEC, tie_embeddings=True)
ALONE = [Case(), Case(training=BF16), Case(spec=TIED), Case(training=OFFLOAD)]


@pytest.fixture(scope="module")
def alone() -> list[TrainingTrace]:
    """The cases of `ALONE` on one rank; the first is a plain model, wrapped by nothing."""
    return run_ranks(train_all, 1, ALONE)[0]


def assert_same_training(traces: list[TrainingTrace], reference: TrainingTrace, tolerance: float = 2e-6) -> None:
    for trace in traces:
        assert trace.losses == pytest.approx(reference.losses, rel=tolerance)
        assert trace.norms == pytest.approx(reference.norms, rel=tolerance)
        assert list(trace.weights) == list(reference.weights)  # the same names in the same order
        assert trace.losses == traces[0].losses  # all ranks report the same numbers


def test_two_ranks(alone: list[TrainingTrace]) -> None:
    fsdp, ddp = Degrees(dp_shard=2), Degrees(dp_replicate=2)
    cases = [
        Case(fsdp),
        Case(fsdp, reduce="every_micro_batch"),
        Case(fsdp, reshard=False),
        Case(fsdp, parallelism=Parallelism(fsdp_reshard_after_forward="always")),
        Case(fsdp, training=OFFLOAD),
        Case(ddp),
        Case(ddp, reduce="every_micro_batch"),
    ]
    by_case = list(zip(*run_ranks(train_all, 2, cases), strict=True))
    for traces in by_case:
        assert_same_training(traces, alone[0])
    tied, bf16 = zip(*run_ranks(train_all, 2, [Case(fsdp, spec=TIED), Case(fsdp, training=BF16)]), strict=True)
    assert_same_training(tied, alone[2])
    assert_same_training(bf16, alone[1], tolerance=2e-4)


@pytest.mark.slow
def test_four_ranks(alone: list[TrainingTrace]) -> None:
    hsdp = Degrees(dp_replicate=2, dp_shard=2)
    cases = [
        Case(Degrees(dp_shard=4)),
        Case(hsdp),
        Case(hsdp, reduce="every_micro_batch"),
        Case(hsdp, training=OFFLOAD),
        Case(Degrees(dp_replicate=4)),
    ]
    *float32, bf16 = zip(*run_ranks(train_all, 4, [*cases, Case(hsdp, training=BF16)]), strict=True)
    for traces in float32:
        assert_same_training(traces, alone[0])
    assert_same_training(bf16, alone[1], tolerance=2e-4)


def test_one_rank_follows_the_same_dtype_policy(alone: list[TrainingTrace]) -> None:
    plain, bf16, _, offload = alone
    assert bf16.losses != plain.losses
    assert bf16.losses == pytest.approx(plain.losses, rel=1e-2)
    assert bf16.dtypes == {(torch.float32, torch.float32)}  # held and summed in float32
    assert offload.losses == plain.losses
    assert all(torch.equal(offload.weights[name], plain.weights[name]) for name in plain.weights)


def test_weights_agree_after_training(alone: list[TrainingTrace]) -> None:
    """Looser than the losses: Adam turns a gradient near zero into a step whose sign is a matter of rounding."""
    for trace in run_ranks(train_all, 2, [Case(Degrees(dp_shard=2), FLOAT32)])[0]:
        for name, weight in alone[0].weights.items():
            torch.testing.assert_close(trace.weights[name], weight, rtol=1e-3, atol=1e-4)


class Divisions(TorchDispatchMode):
    """The sizes of the tensors that are divided by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor) and args[1] == 1.0:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def gradients_and_divisions(degrees: Degrees) -> tuple[list[int], float]:
    """What one backward pass divides by 1, and the largest gradient, if every rank has the same batch."""
    mesh = build_mesh(degrees, "cpu")
    model = make_model(Case(degrees, training=BF16), mesh)
    tokens, labels = batch(0, SPEC.vocab_size)
    with Divisions() as divisions:
        summed_cross_entropy(model(tokens, torch.arange(tokens.shape[1])), labels).backward()
    return divisions.sizes, max(to_whole(each.grad).abs().max().item() for each in model.parameters())


def test_gradients_of_one_device_are_not_copied_once_more() -> None:
    """Unset, torch's factor would be the number of ranks: right for one, and an average for the (2, 1) mesh of DDP."""
    sizes, alone = run_ranks(gradients_and_divisions, 1, Degrees())[0]
    assert sizes == []
    for _, largest in run_ranks(gradients_and_divisions, 2, Degrees(dp_replicate=2)):
        assert largest == pytest.approx(2 * alone, rel=1e-6)


def buffers_held() -> list[bool]:
    """Of each buffer that was all-reduced in a dtype of its own, whether torch holds it until the last unit reduces."""
    training = Training(mixed_precision_param="bfloat16", mixed_precision_reduce="bfloat16")
    model = make_model(Case(training=training), build_mesh(Degrees(dp_replicate=2), "cpu"))
    reduced: list[weakref.ref[torch.Tensor]] = []
    held: list[bool] = []
    reduce = _fsdp_param_group.foreach_reduce

    def noted(*arguments: Any, **options: Any) -> Any:
        held[:] = [buffer() is not None for buffer in reduced]
        result = reduce(*arguments, **options)
        all_reduced = result[-3]
        assert all_reduced.dtype == torch.bfloat16
        reduced.append(weakref.ref(all_reduced))
        return result

    tokens, labels = batch(0, SPEC.vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fsdp_param_group, "foreach_reduce", noted)
        summed_cross_entropy(model(tokens, torch.arange(tokens.shape[1])), labels).backward()
    return held


def test_torch_holds_what_copies_reduce_until_the_backward_pass_ends() -> None:
    """If it did not, a later unit would get the memory while the all-reduce of an earlier one still uses it, and their
    gradients would alias (pytorch/pytorch#180889). Quadriga relies on this for every reduce dtype."""
    for held in run_ranks(buffers_held, 2):
        assert len(held) >= SPEC.n_layers
        assert all(held)
