"""Which layers compute in float8, and what is refused. Training with them: tests/distributed/test_float8.py."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import SPEC

from quadriga.config.schema import LinearFloat8
from quadriga.errors import UserError
from quadriga.models.registry import build_model, parallel_plan
from quadriga.parallel import float8

WIDE = replace(SPEC, n_layers=1, dim=64, ffn_dim=96, vocab_size=99)  # 99 is no multiple of 16, and half of 96 is


def mesh(tp: int = 1) -> Any:
    return SimpleNamespace(tp=SimpleNamespace(size=lambda: tp), device_mesh=SimpleNamespace(device_type="cpu"))


def left(tp: int = 1, spec: Any = WIDE, **keys: Any) -> dict[str, str]:
    with torch.device("meta"):
        model = build_model(spec)
    section = LinearFloat8(emulate=True, **keys)
    return dict(float8._unconverted_layers(model, parallel_plan(spec).tensor_cuts, tp, section))


def test_layers_are_left_by_width_by_name_and_by_size() -> None:
    assert left() == {"output": "named by filter_fqns"}
    assert left(filter_fqns=()) == {"output": "not a multiple of 16 wide"}
    named = left(filter_fqns=("attention.w", "output"))
    assert set(named) == {"layers.0.attention.wq", "layers.0.attention.wk", "layers.0.attention.wv", "output"} | {
        "layers.0.attention.wo"
    }
    assert set(named.values()) == {"named by filter_fqns"}


def test_thresholds_are_those_of_torchao() -> None:
    pytest.importorskip("torchao.float8")
    assert "too small to gain" in left(filter_fqns=("auto_filter_small_kn",)).values()


def test_the_width_that_counts_is_that_of_a_rank() -> None:
    """Of 4 ranks each has 24 columns of the feed-forward layers, and 16 of attention's queries."""
    names = left(tp=4)
    assert {"layers.0.feed_forward.w1", "layers.0.feed_forward.w2", "layers.0.feed_forward.w3"} < set(names)
    assert "layers.0.attention.wq" not in names


def test_what_is_converted_and_left_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    linear = pytest.importorskip("torchao.float8.float8_linear")
    with torch.device("meta"):
        model = build_model(WIDE)
    names = list(model.state_dict())
    with caplog.at_level(logging.INFO, "quadriga"):
        float8.apply_float8(model, (), mesh(), LinearFloat8(emulate=True, recipe_name="rowwise", filter_fqns=()))
    assert "float8: 7 linear layers (emulated" in caplog.text
    assert "1 not converted, not a multiple of 16 wide: output" in caplog.text
    assert isinstance(model.layers["0"].attention.wq, linear.Float8Linear)
    assert model.layers["0"].attention.wq.config.emulate
    assert list(model.state_dict()) == names


def test_a_device_without_float8_is_refused() -> None:
    pytest.importorskip("torchao.float8")
    with pytest.raises(UserError, match=r"this device \(cpu\) does not support float8"):
        float8.apply_float8(torch.nn.Module(), (), mesh(), LinearFloat8())


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install torchao=="):
        float8.apply_float8(torch.nn.Module(), (), mesh(), LinearFloat8(emulate=True))


def test_the_version_is_the_one_that_is_tested(root: Any) -> None:
    assert f"torchao=={float8.TORCHAO}\n" in (root / "requirements-dev.txt").read_text()


def test_scales_are_not_computed_ahead_without_the_gather_that_takes_them() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    for gathered in (False, True):
        optimizer = torch.optim.SGD([weight], lr=0.1)
        section = LinearFloat8(precompute_float8_dynamic_scale_for_fsdp=True, enable_fsdp_float8_all_gather=gathered)
        float8.precompute_scales(optimizer, (), section)
        assert bool(optimizer._optimizer_step_post_hooks) is gathered
