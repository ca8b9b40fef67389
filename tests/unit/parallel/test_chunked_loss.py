"""The loss in chunks: the same loss and gradients, no more work, and no logits of all tokens at any time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from quadriga.config.model_spec import ModelSpec
from quadriga.data.loader import IGNORE
from quadriga.models.registry import build_model, parallel_plan
from quadriga.train.loss import chunked_loss, summed_cross_entropy

ROWS, SEQ_LEN = 4, 16
TOKENS = ROWS * SEQ_LEN
SPEC = ModelSpec(
    "llama3", "tiny", dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32, vocab_size=1000, rope_theta=1e4
)
TIED = replace(SPEC, tie_embeddings=True)
Step = Callable[[], Tensor]


def make(spec: ModelSpec, loss_chunks: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Step]:
    """A model, and what computes the loss of a fixed batch."""
    torch.manual_seed(3)
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.fill_(1.0)
    model = model.to(dtype)
    tokens = torch.randint(0, spec.vocab_size, (ROWS, SEQ_LEN + 1))
    labels = tokens[:, 1:].clone()
    labels[1, 3:9] = IGNORE

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return summed_cross_entropy(logits, labels) / TOKENS

    used = loss
    if loss_chunks > 1:
        output = parallel_plan(spec).logits_unit
        assert output is not None
        model.get_submodule(output).forward = lambda hidden: hidden  # as `parallelize` does
        used = chunked_loss(loss, [model], output, loss_chunks=loss_chunks)
    return model, lambda: used(model(tokens[:, :-1]), labels)


def gradients(
    spec: ModelSpec, loss_chunks: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    model, step = make(spec, loss_chunks, dtype)
    loss = step()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss_chunks", [2, 7, 8, 500], ids=lambda loss_chunks: f"{loss_chunks} chunks")
@pytest.mark.parametrize("spec", [SPEC, TIED], ids=["output", "tied"])
def test_loss_and_gradients_are_those_of_the_whole(spec: ModelSpec, loss_chunks: int) -> None:
    """Also in chunks that are not equally long, and with more chunks than tokens."""
    whole, whole_gradients = gradients(spec, 1)
    loss, own_gradients = gradients(spec, loss_chunks)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(whole), rel=1e-6)
    assert list(own_gradients) == list(whole_gradients)
    for name, gradient in own_gradients.items():
        expected = whole_gradients[name]
        assert (gradient - expected).norm() <= 1e-6 * expected.norm(), name


def test_the_sum_over_loss_chunks_is_rounded_once() -> None:
    """In bfloat16 the gradient of the matrix is as near to the exact one as that of all tokens at once."""
    exact = gradients(SPEC, 1)[1]["output.weight"]
    whole, chunked = (gradients(SPEC, count, torch.bfloat16)[1]["output.weight"] for count in (1, 32))
    assert chunked.dtype == torch.bfloat16
    assert (chunked.float() - exact).norm() <= 1.05 * (whole.float() - exact).norm()


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was computed"))
    model, step = make(SPEC, 7)
    _, whole = make(SPEC, 1)
    with torch.no_grad():
        assert float(step()) == pytest.approx(float(whole()), rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_backward_pass_multiplies_and_may_be_repeated() -> None:
    """A pipeline that splits its backward pass goes through the function twice."""
    expected = gradients(SPEC, 5)[1]
    model, step = make(SPEC, 5)
    loss = 3 * step()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, again, one in zip(first, second, expected.values(), strict=True):
        torch.testing.assert_close(gradient, 3 * one)
        assert torch.equal(gradient, again)


class Alive(TorchDispatchMode):
    """Bytes of the memory that operations made and that is still held: of the largest chunk, and of all at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._hold(made.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or place in self._seen:
            return
        self._seen.add(place)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._let_go, place, size)

    def _let_go(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def memory(loss_chunks: int) -> Alive:
    _, step = make(SPEC, loss_chunks)
    with Alive() as alive:
        step().backward()
    return alive


def test_logits_exist_for_one_loss_chunk_at_a_time() -> None:
    """Of 64 tokens and 1000 words: 256 kB, and in 8 chunks 32 kB. The gradient of the matrix has 64 kB."""
    logits, matrix = 4 * TOKENS * SPEC.vocab_size, 4 * SPEC.dim * SPEC.vocab_size
    whole, chunked = memory(1), memory(8)
    assert whole.largest == logits
    assert whole.peak >= 2 * logits
    assert chunked.largest == matrix
    # Logits, logarithms and their gradients of one chunk; the sum of the matrix's gradients and one of them.
    assert chunked.peak <= 5 * logits / 8 + 2 * matrix + whole.peak / 15


def test_validation_holds_the_logits_of_one_loss_chunk() -> None:
    _, step = make(SPEC, 8)
    with torch.no_grad(), Alive() as alive:
        step()
    assert alive.peak <= 5 * (4 * TOKENS * SPEC.vocab_size / 8)


def test_nothing_is_computed_twice() -> None:
    def products(loss_chunks: int) -> int:
        _, step = make(SPEC, loss_chunks)
        with FlopCounterMode(display=False) as counter:
            step().backward()
        return counter.get_total_flops()

    assert products(8) == products(1)
