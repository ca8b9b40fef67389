"""Splitting a sequence, and attention to parts of it, on one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from quadriga.models.llama.model import causal_attention
from quadriga.parallel import attention_kernels
from quadriga.parallel.attention_allgather import chunk_attention
from quadriga.parallel.context_parallel import local_positions
from quadriga.parallel.sequence_cut import SequenceCut

DEGREES, BALANCERS = st.integers(1, 9), st.sampled_from(["headtail", None])


@given(DEGREES, st.integers(1, 5), BALANCERS)
def test_positions_are_a_partition(degree: int, length: int, balancer: str | None) -> None:
    seq_len = 2 * degree * length
    parts = [local_positions(seq_len, rank, degree, balancer) for rank in range(degree)]
    assert all(len(part) == seq_len // degree and part.dtype == torch.int64 for part in parts)
    assert all(torch.equal(part, part.sort().values) for part in parts)  # so a rank's own attention is plainly causal
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(seq_len))


@given(DEGREES, st.integers(1, 5))
def test_headtail_gives_all_ranks_equally_much_to_look_at(degree: int, length: int) -> None:
    seq_len = 2 * degree * length
    seen = {int((local_positions(seq_len, rank, degree, "headtail") + 1).sum()) for rank in range(degree)}
    assert len(seen) == 1


@given(DEGREES, st.integers(1, 5), st.sampled_from([1, 2]))
def test_a_sequence_that_was_split_is_joined_again(degree: int, length: int, parts: int) -> None:
    cuts = [SequenceCut(rank, degree, parts) for rank in range(degree)]
    whole = torch.arange(2 * degree * length)
    by_rank = torch.cat([cut.positions(2 * length) for cut in cuts])
    assert torch.equal(cuts[0].to_rank_order(whole), by_rank)
    assert torch.equal(cuts[0].to_sequence_order(by_rank), whole)


def test_a_sequence_that_does_not_divide_and_an_unknown_balancer_are_refused() -> None:
    with pytest.raises(ValueError, match="18 tokens do not divide into 4 equal pieces"):
        local_positions(18, 0, 2, "headtail")
    with pytest.raises(ValueError, match="ptrr"):
        local_positions(16, 0, 2, "ptrr")


DEVICES = [
    ("cpu", torch.float32, 1e-6),
    *(pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in ((torch.float32, 5e-5), (torch.bfloat16, 2e-2))),
]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_of_parts_is_attention(device: str, dtype: torch.dtype, tolerance: float, kv_heads: int) -> None:
    """On CUDA this is the check of the kernels' causal corner, of their statistics and of their backward passes."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    seq, head_dim = 128, 16
    generator = torch.Generator().manual_seed(3)
    q, k, v, grad = (torch.randn(2, heads, seq, head_dim, generator=generator) for heads in (4, kv_heads, kv_heads, 4))
    q, k, v, grad = (x.to(device, dtype) for x in (q, k, v, grad))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = causal_attention(*whole)
    expected.backward(grad)
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    for rank in range(4):
        cut = SequenceCut(rank, 4, 2)
        here = cut.positions(seq // 4).to(device)
        out, _ = chunk_attention(mine[0][:, :, here], mine[1], mine[2], None, cut.starts(seq // 4))
        out.backward(grad[:, :, here])
        assert out.dtype == dtype
        assert error(out, expected[:, :, here]) <= tolerance
    for ours, theirs in zip(mine, whole, strict=True):
        assert error(ours.grad, theirs.grad) <= tolerance


@dataclass(frozen=True)
class OnCuda:
    """What the choice reads of a tensor. A build of torch for CPUs cannot slice a fake tensor of CUDA."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: ClassVar = torch.device("cuda")

    def __getitem__(self, index: tuple[slice, slice, slice]) -> OnCuda:
        length = len(range(*index[2].indices(self.shape[2])))
        return replace(self, shape=(*self.shape[:2], length, self.shape[3]))


@pytest.mark.parametrize(
    ("backend", "dtype", "deterministic", "kernel"),
    [
        (SDPBackend.CUDNN_ATTENTION, torch.bfloat16, False, "cudnn"),
        (SDPBackend.CUDNN_ATTENTION, torch.bfloat16, True, "flash"),
        (SDPBackend.CUDNN_ATTENTION, torch.float32, False, "efficient"),
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16, False, "flash"),
        (SDPBackend.MATH, torch.float16, False, "flash"),
    ],
)
def test_the_kernel_is_torchs_choice(
    backend: SDPBackend, dtype: torch.dtype, deterministic: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch is asked about as many keys as queries where the mask is causal, because it refuses others."""
    asked: list[tuple[int, bool, bool]] = []

    def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, enable_gqa: bool) -> int:
        asked.append((k.shape[2], is_causal, enable_gqa))
        return backend.value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q, k = (OnCuda((1, heads, length, 64), dtype) for heads, length in ((4, 32), (2, 96)))
    found = {attention_kernels.chosen_kernel(q, k, k, causal) for causal in (True, False)}
    assert found == {kernel}
    assert asked in ([], [(32, True, True), (96, False, True)])
    assert bool(asked) == (dtype.itemsize < 4 and not deterministic)
    assert attention_kernels.chosen_kernel(*(torch.empty(1, 2, 4, 8) for _ in "qkv"), True) == "cpu"


def cudnn_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU's kernel stand in for cuDNN's: its layout of the statistics, its causal corner at the top left."""
    cpu, operations = torch.ops.aten, SimpleNamespace()

    def forward(q: Any, k: Any, v: Any, bias: None, with_lse: bool, dropout: float, causal: bool) -> tuple[Any, ...]:
        assert with_lse
        assert not causal or q.shape[2] == k.shape[2]
        out, lse = cpu._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal)
        return out, lse.unsqueeze(-1), None, None

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> tuple[Any, ...]:
        lengths, dropout, causal = rest[5:7], *rest[7:]
        assert lse.shape == (*q.shape[:3], 1)
        assert lengths == (q.shape[2], k.shape[2])
        given = (grad, q, k, v, out, lse.squeeze(-1), dropout, causal)
        return cpu._scaled_dot_product_flash_attention_for_cpu_backward(*given)

    operations._scaled_dot_product_cudnn_attention = forward
    operations._scaled_dot_product_cudnn_attention_backward = backward
    monkeypatch.setattr(attention_kernels, "aten", operations)
    monkeypatch.setattr(attention_kernels, "chosen_kernel", lambda *_: "cudnn")


def test_cudnns_statistics_and_corner_are_those_of_whole_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn_on_cpu(monkeypatch)
    test_attention_of_parts_is_attention("cpu", torch.float32, 1e-6, 2)


def test_cudnns_operations_take_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "chosen_kernel", lambda *_: "cudnn")
    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, 32, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        for causal in (True, False):
            out, lse = attention_kernels.attend(q, k, v, causal)
            assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
            found = attention_kernels.attend_backward(out, q, k, v, out, lse, causal)
            assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest over largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, from 2.14 on
# torch 2.14's own check reads the gradient of a tensor that has none, and warns about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_operations_keep_torchs_rules(dynamic: bool) -> None:
    """Schema, autograd, kernels without numbers, and tracing with fixed and with open sizes."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, length, 8, generator=generator) for heads, length in ((4, 8), (2, 16), (2, 16)))
    arguments = tuple(x.requires_grad_() for x in (q, k, v))
    check = "test_aot_dispatch_dynamic" if dynamic else "test_aot_dispatch_static"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", check)
    torch.library.opcheck(chunk_attention, (*arguments, None, [0, 12]), test_utils=checks)
