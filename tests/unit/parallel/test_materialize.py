"""Initial weights: their distribution, and what they depend on."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quadriga.models.plan import ParameterPlan
from quadriga.parallel import materialize as under_test
from quadriga.parallel.materialize import BLOCK_ELEMENTS, draw, materialize

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


class Bag(nn.Module):
    """A model that is nothing but parameters."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
        self.register_buffer("table", torch.empty(3, device="meta"), persistent=False)

    def reset_buffers(self) -> None:
        self.table = torch.arange(3.0, device=self.table.device)


def _filled(
    seed: int = 7,
    std: float = 0.02,
    bound: float = math.inf,
    dtype: torch.dtype = torch.float32,
    **shapes: tuple[int, ...],
) -> Bag:
    bag = Bag(**shapes).to(dtype)
    plan = tuple(ParameterPlan(name, shape, std=std, bound=bound) for name, shape in shapes.items())
    materialize(bag, plan, seed, CPU)
    return bag


def test_a_cut_distribution_is_normal_and_ends_at_its_bound() -> None:
    values = _filled(weight=(1500, 1000), std=0.5, bound=1.5).weight.detach().double() / 0.5
    assert values.abs().max() <= 3.0
    assert values.abs().max() > 2.95
    assert values.mean().abs() < 5 / math.sqrt(values.numel())
    # The standard deviation of a normal distribution cut at 3 is 0.98658; kurtosis tells it from a uniform one.
    assert values.std().item() == pytest.approx(0.98658, abs=3e-3)
    assert (values**4).mean().item() / values.var().item() ** 2 == pytest.approx(2.833, abs=0.02)
    for edge, share in ((1.0, 0.68269), (2.0, 0.95450)):
        inside = (values.abs() < edge).double().mean().item()
        assert inside == pytest.approx(share / 0.99730, abs=2e-3)


@pytest.mark.parametrize(("std", "bound"), [(1.0, math.inf), (0.02, 2.0), (0.0025, 2.0)])
def test_a_distribution_that_is_not_cut_is_normal_to_its_tails(std: float, bound: float) -> None:
    """Shares of a normal distribution beyond 1 to 4 standard deviations, from its tables; within 5 deviations of a
    binomial count."""
    values = _filled(weight=(2000, 1000), std=std, bound=bound).weight.detach().double() / std
    assert values.abs().max() < 5.5
    assert values.mean().abs() < 5 / math.sqrt(values.numel())
    assert values.std().item() == pytest.approx(1.0, abs=2.5e-3)
    assert (values**4).mean().item() == pytest.approx(3.0, abs=0.04)
    for edge, beyond in ((1, 0.3173105), (2, 0.0455003), (3, 0.0026998), (4, 0.0000633)):
        for side in (values > edge, values < -edge):
            expected = values.numel() * beyond / 2
            assert abs(side.sum().item() - expected) < 5 * math.sqrt(expected), edge


@given(st.floats(1e-4, 10), st.floats(0.01, 1000) | st.just(math.inf))
def test_the_ends_of_the_uniform_range_give_finite_numbers(std: float, stds: float) -> None:
    """Where the inverse of the normal distribution is infinite: 0 and 1, of which 0 is drawn, and 1 - 2**-24."""
    ends = torch.tensor([0.0, 2**-24, 0.5 - 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24])
    under_test._to_normal(ends, std, stds * std)
    assert ends.isfinite().all()
    assert (ends.abs() <= min(stds, 5.43) * std * (1 + 1e-6)).all()
    assert (ends.diff() >= -1e-6 * ends.abs().max()).all(), "in order, except for the last bit"
    assert ends[0].item() == pytest.approx(-ends[-1].item(), rel=1e-3 + 1e-2 * (stds > 5)), "symmetric"


def test_a_distribution_that_is_not_cut_has_the_quantiles_of_a_normal_one() -> None:
    """The k-th of 2**24 equal shares is drawn as its middle; expected values from another implementation."""
    steps = [0, 1, 2**8, 2**20, 2**23 - 1, 2**23, 2**24 - 2**8, 2**24 - 1]
    drawn = torch.tensor([step / 2**24 for step in steps])
    under_test._to_normal(drawn, 1.0, math.inf)
    expected = [NormalDist().inv_cdf((step + 0.5) / 2**24) for step in steps]
    assert drawn.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


# Defined to the bit by IEEE 754, or not arithmetic at all. `erfinv`, `log`, `addcmul` and `sqrt` are not: their last
# bit depends on the library (MKL for `sqrt`) and on the CPU that a machine has.
EXACT = {"mul", "add", "sub", "div", "neg", "abs", "copysign", "clamp", "frexp", "gt", "rsub"}
NO_ARITHMETIC = {"nonzero", "squeeze", "index", "index_put", "copy", "_to_copy", "slice", "view", "split", "empty"} | {
    "detach"
}


def test_a_draw_uses_arithmetic_that_is_the_same_on_every_cpu() -> None:
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            used.add(operation.overloadpacket.__name__.rstrip("_"))
            assert "alpha" not in (kwargs or {}), "a scaled sum may be fused"
            return operation(*args, **(kwargs or {}))

    used: set[str] = set()
    with Operations():
        draw(7, "weight", 0, (300, 1000), 0.02, 0.06)
    assert used <= EXACT | NO_ARITHMETIC
    assert {"mul", "div", "frexp"} <= used


def test_a_draw_is_what_arithmetic_of_ieee_754_gives() -> None:
    """The same steps with NumPy's float32 operations, which are rounded correctly; the square root in float64."""
    single = np.float32

    def polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
        result = x * single(coefficients[0])
        for coefficient in coefficients[1:-1]:
            result = (result + single(coefficient)) * x
        return result + single(coefficients[-1])

    uniform = np.random.default_rng(3).random(2**20, dtype=single)
    drawn = torch.from_numpy(uniform.copy())
    under_test._to_normal(drawn, 0.5, 1.5)

    x = (uniform - single(0.5 - 2**-25)) * single(math.erf(3 / math.sqrt(2)))
    r = single(0.180625) - x * x
    expected = polynomial(r, under_test._CENTRAL) / polynomial(r, under_test._CENTRAL_DIVISOR) * x
    mantissa, exponent = np.frexp(single(0.5) - np.abs(x))
    s = (mantissa - single(math.sqrt(0.5))) / (mantissa + single(math.sqrt(0.5)))
    log = polynomial(s * s, under_test._ARTANH) * s * single(2) + single(math.log(math.sqrt(0.5)))
    log = exponent.astype(single) * single(math.log(2)) + log
    tail = np.abs(x) > single(0.425)
    r = np.sqrt(-log[tail].astype(np.float64)).astype(single) - single(1.6)
    far = polynomial(r, under_test._TAIL) / polynomial(r, under_test._TAIL_DIVISOR)
    expected[tail] = np.copysign(far, x[tail])
    assert drawn.numpy().tobytes() == np.clip(expected * single(0.5), -1.5, 1.5).tobytes()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_a_draw_does_not_depend_on_what_the_cpu_can_do(capability: str) -> None:
    code = "from quadriga.parallel.materialize import draw; import hashlib; "
    code += "print(hashlib.sha256(draw(7, 'weight', 3, (300, 1000), 0.5, 1.5).numpy().tobytes()).hexdigest())"
    here = hashlib.sha256(draw(7, "weight", 3, (300, 1000), 0.5, 1.5).numpy().tobytes()).hexdigest()
    environ = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_blocks_neither_repeat_nor_correlate() -> None:
    weight = _filled(weight=(8, BLOCK_ELEMENTS)).weight.detach()
    assert weight.flatten().unique().numel() > 0.85 * weight.numel()  # 24 bits a draw: a few values meet by chance
    correlation = torch.corrcoef(weight) - torch.eye(8)
    assert correlation.abs().max() < 6 / math.sqrt(BLOCK_ELEMENTS)


def test_values_depend_on_seed_and_name_and_on_nothing_else() -> None:
    bag = _filled(a=(30, 40), b=(30, 40))
    assert not torch.equal(bag.a, bag.b)
    assert not torch.equal(bag.a, _filled(seed=8, a=(30, 40)).a)
    torch.manual_seed(99)
    assert torch.equal(bag.b, _filled(b=(30, 40)).b)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_values_do_not_depend_on_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        weight = _filled(weight=(700, 1024)).weight.detach().clone()
    finally:
        torch.set_num_threads(before)
    rows = BLOCK_ELEMENTS // 1024
    blocks = [draw(7, "weight", index, (min(rows, 700 - index * rows), 1024), 0.02) for index in range(3)]
    assert torch.equal(weight, torch.cat(blocks))


hosts: list[LateCopies] = []


class LateCopies(under_test._Host):
    """A GPU that copies as late as it may: when the host waits for the copy."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.on_gpu = True
        self.sizes: list[int] = []
        hosts.append(self)

    def allocated(self, size: int) -> torch.Tensor:
        self.sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def send(self, drawn: torch.Tensor, target: torch.Tensor) -> None:
        assert drawn.data_ptr() in [buffer.data_ptr() for buffer in self.buffers]
        self.copied[0] = SimpleNamespace(synchronize=lambda: target.copy_(drawn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_filled_while_others_are_copied(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a": (700, 64), "b": (3,), "c": (50, 64)}
    monkeypatch.setattr(under_test, "BLOCK_ELEMENTS", 640)
    monkeypatch.setattr(under_test, "BUFFER_BYTES", 10_000)
    expected = _filled(dtype=dtype, **shapes)
    monkeypatch.setattr(under_test, "_Host", LateCopies)
    found = _filled(dtype=dtype, **shapes)
    for copied in hosts[-1].copied:
        copied.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), expected.parameters(), strict=True))
    assert hosts[-1].sizes == [10_000] * 2


def test_other_dtypes_get_the_float32_draw_rounded() -> None:
    exact = _filled(weight=(64, 64)).weight
    assert torch.equal(_filled(weight=(64, 64), dtype=torch.bfloat16).weight, exact.bfloat16())
    assert torch.equal(_filled(weight=(64, 64), dtype=torch.float64).weight, exact.double())


def test_ones_and_buffers() -> None:
    bag = Bag(scale=(5,))
    materialize(bag, (ParameterPlan("scale", (5,), init="ones"),), 0, CPU)
    assert bag.scale.tolist() == [1.0] * 5
    assert bag.table.tolist() == [0.0, 1.0, 2.0]
    assert bag.scale.requires_grad


def test_the_seed_may_be_any_integer() -> None:
    values = [draw(seed, "w", 0, (16,), 1.0) for seed in (0, 5, 5 + 2**32, 2**63, -1)]
    assert len({tuple(value.tolist()) for value in values}) == 5


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((), "weight has no plan"),
        ((ParameterPlan("weight", (2, 3)), ParameterPlan("more", (1,))), "more is planned but not in the model"),
        ((ParameterPlan("weight", (3, 2)),), r"weight is \(2, 3\), planned \(3, 2\)"),
        ((ParameterPlan("weight", (2, 3)),) * 2, "planned twice"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: tuple[ParameterPlan, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        materialize(Bag(weight=(2, 3)), plan, 0, CPU)


@st.composite
def boxes(draw_from: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """A shape of 1 to 3 dimensions, a box within it (offset and size, empty ones too), and a block size."""
    shape = tuple(draw_from(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    offset = tuple(draw_from(st.integers(0, size)) for size in shape)
    size = tuple(draw_from(st.integers(0, whole - begin)) for whole, begin in zip(shape, offset, strict=True))
    return shape, offset, size, draw_from(st.integers(1, 150))


@given(boxes())
def test_any_box_of_a_parameter_is_cut_from_the_same_whole(case) -> None:
    shape, offset, size, elements = case
    plan = ParameterPlan("w", shape, std=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "BLOCK_ELEMENTS", elements)
        whole, part = torch.full(shape, torch.nan), torch.full(size, torch.nan)
        for tensor, start in ((whole, (0,) * len(shape)), (part, offset)):
            held = under_test._Held(tensor, start)
            blocks = list(under_test._blocks(shape, held))
            for block in blocks:
                under_test._fill(held, plan, 3, block)
            rows = max(1, elements // math.prod(shape[1:]))
            assert all(block.stop - block.start <= rows for block in blocks)
            assert len(blocks) <= (tensor.shape[0] + rows - 1) // rows + 1, "only blocks that overlap the box"
    assert not whole.isnan().any()
    cut = tuple(slice(begin, begin + length) for begin, length in zip(offset, size, strict=True))
    assert torch.equal(part, whole[cut])
