"""Recompute: which blocks, what they keep, and that gradients and names stay what they were."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from quadriga.config.model_spec import ModelSpec
from quadriga.config.schema import ActivationCheckpoint
from quadriga.models.registry import build_model, parallel_plan
from quadriga.parallel import activation_checkpoint
from quadriga.parallel.activation_checkpoint import apply_activation_checkpoint
from quadriga.parallel.materialize import materialize

SPEC = ModelSpec("llama3", "tiny", dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=56, vocab_size=99)
PLAN = parallel_plan(SPEC)
NONE = ActivationCheckpoint(mode="none")
FULL = ActivationCheckpoint(mode="full")
OP = ActivationCheckpoint(mode="selective", selective_ac_option="op")


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def model_with(section: ActivationCheckpoint) -> nn.Module:
    with torch.device("meta"):
        model = build_model(SPEC)
    apply_activation_checkpoint(model, PLAN.recompute_units, section)
    materialize(model, PLAN.parameters, 3, torch.device("cpu"))
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    tokens = torch.arange(34).view(2, 17) % SPEC.vocab_size
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def operations(section: ActivationCheckpoint) -> Counter[str]:
    """How often each operation runs in one forward and backward pass."""
    model = model_with(section)
    with CountOperations() as counted:
        gradients(model)
    return counted.counts


@pytest.mark.parametrize(
    "section",
    [
        FULL,
        OP,
        ActivationCheckpoint(mode="selective", selective_ac_option="2"),
        ActivationCheckpoint(mode="full", early_stop=True, preserve_rng_state=False, determinism_check="none"),
    ],
    ids=["full", "op", "every second", "full with early stop"],
)
def test_gradients_are_the_same_to_the_bit_and_names_stay(section: ActivationCheckpoint) -> None:
    plain, recomputed = gradients(model_with(NONE)), gradients(model_with(section))
    assert list(plain) == list(recomputed) == [parameter.name for parameter in PLAN.parameters]
    assert list(model_with(section).state_dict()) == list(plain)
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_full_recompute_runs_each_block_twice() -> None:
    plain, full = operations(NONE), operations(FULL)
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert (plain[attention], full[attention]) == (SPEC.n_layers, 2 * SPEC.n_layers)
    assert full["mm"] - plain["mm"] == 7 * SPEC.n_layers  # seven products in the forward pass of a block


def test_per_operation_recompute_keeps_attention_and_every_second_product() -> None:
    plain, chosen = operations(NONE), operations(OP)
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert chosen[attention] == plain[attention]
    assert chosen["mm"] - plain["mm"] == 3 * SPEC.n_layers  # of seven the 2nd, 4th and 6th are computed again
    assert chosen["silu"] == 2 * plain["silu"]


def test_named_layers_are_always_recomputed() -> None:
    section = OP.model_copy(update={"per_op_sac_force_recompute_mm_shapes_by_fqns": ("feed_forward.w2",)})
    plain, forced = operations(NONE), operations(section)
    # w2 alone has the shape (56, 32): computed again, and not counted; of the other six the 2nd, 4th and 6th are too.
    assert forced["mm"] - plain["mm"] == (1 + 3) * SPEC.n_layers


def blocks_that_recompute(
    blocks: tuple[str, ...], section: ActivationCheckpoint, blocks_before: int = 0
) -> tuple[str, ...]:
    model = nn.ModuleDict({name: nn.Identity() for name in blocks})
    apply_activation_checkpoint(model, blocks, section, blocks_before=blocks_before)
    return tuple(name for name, block in model.items() if "forward" in vars(block))  # it replaces that of the class


def test_every_nth_block() -> None:
    blocks = ("a", "b", "c", "d", "e")
    every = {n: ActivationCheckpoint(mode="selective", selective_ac_option=str(n)) for n in (1, 2, 3, 6)}
    assert blocks_that_recompute(blocks, every[1]) == blocks
    assert blocks_that_recompute(blocks, every[2]) == ("b", "d")
    assert blocks_that_recompute(blocks, every[3]) == ("c",)
    assert blocks_that_recompute(blocks, every[6]) == ()
    assert blocks_that_recompute(blocks, NONE) == ()
    assert blocks_that_recompute(blocks, FULL) == blocks_that_recompute(blocks, OP) == blocks
    assert blocks_that_recompute(blocks, ActivationCheckpoint(selective_ac_option="0")) == blocks


def test_every_nth_block_is_counted_over_the_stages_of_a_rank() -> None:
    """As v0.2.2 does: a rank whose stages hold one block each recomputes every second of them, and not none."""
    section = ActivationCheckpoint(selective_ac_option="2")
    stages = (("a",), ("b",), ("c", "d", "e"), ("f",))
    chosen = [blocks_that_recompute(own, section, sum(map(len, stages[:n]))) for n, own in enumerate(stages)]
    assert chosen == [(), ("b",), ("d",), ("f",)]


@given(st.integers(1, 40), st.integers(0, 40))
def test_every_nth_of_any_number_of_blocks(every: int, count: int) -> None:
    blocks = tuple(map(str, range(count)))
    chosen = blocks_that_recompute(blocks, ActivationCheckpoint(selective_ac_option=str(every)))
    assert chosen == tuple(block for number, block in enumerate(blocks, start=1) if number % every == 0)


def test_fewer_bytes_are_kept() -> None:
    def kept(section: ActivationCheckpoint) -> int:
        total: Counter[int] = Counter()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        model = model_with(section)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(4, 64, dtype=torch.int64)).sum()
        return total.total()

    none, second, full = kept(NONE), kept(ActivationCheckpoint(selective_ac_option="2")), kept(FULL)
    assert full < second < none


def test_the_largest_value_that_float8_scales_by_is_kept() -> None:
    policy = activation_checkpoint._per_operation_policy(frozenset())
    assert policy(None, torch.ops.aten.max.default, torch.ones(2)) == CheckpointPolicy.MUST_SAVE
    assert policy(None, torch.ops.aten.abs.default, torch.ones(2)) == CheckpointPolicy.PREFER_RECOMPUTE


def test_the_pareto_figures_of_a_memory_budget_go_into_the_run_folder(tmp_path: Path) -> None:
    section = ActivationCheckpoint(mode="memory_budget", memory_budget=0.25, visualize_memory_budget_pareto=True)
    with torch.device("meta"):
        model = build_model(SPEC)
    set_by_it = ("activation_memory_budget", "visualize_memory_budget_pareto", "memory_budget_pareto_dir")
    # Not by monkeypatch: it would delete torch's settings where it is to restore them.
    with functorch.patch({name: getattr(functorch, name) for name in set_by_it}):
        apply_activation_checkpoint(model, PLAN.recompute_units, section, run_folder=str(tmp_path))
        assert functorch.activation_memory_budget == 0.25
        assert functorch.memory_budget_pareto_dir == str(tmp_path / "memory_budget_pareto")
        assert Path(functorch.memory_budget_pareto_dir).is_dir()
    assert functorch.activation_memory_budget == 1.0
