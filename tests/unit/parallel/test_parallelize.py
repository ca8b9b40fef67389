"""The legal order, told from what the parts do, and compiling with recompute. One rank; more: tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from quadriga.config.schema import ActivationCheckpoint, Compile, Parallelism, Training
from quadriga.models.plan import ParallelPlan
from quadriga.parallel import parallelize

BF16 = Training(mixed_precision_param="bfloat16")


def losses(cases: list[dict]) -> list[list[float]]:
    from tiny import Case, train

    return [train(Case(**case)).losses for case in cases]


def order_of_events() -> list[str]:
    """Run one compiled, recomputed, cut block, and write down what happens when."""
    from tiny import SPEC, Case, batch, make_model

    from quadriga.comm.mesh import build_mesh
    from quadriga.config.run_spec import Degrees

    events: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        operations = [str(node.target) for node in graph.graph.nodes]
        inside = "recompute" if any("checkpoint" in operation for operation in operations) else "plain"
        gathered = any("all_gather" in operation or "fsdp" in operation for operation in operations)
        shapes = {tuple(tensor.shape) for tensor in inputs if isinstance(tensor, torch.nn.Parameter)}
        events.append(f"{inside}, {'gathers inside' if gathered else 'gathered before'}, {(32, 32) in shapes}")
        return graph

    torch._dynamo.reset()
    torch._dynamo.backends.registry.register_backend(backend, name="written_down")
    case = Case(
        training=BF16,
        recompute=ActivationCheckpoint(mode="full"),
        compile=Compile(enable=True, backend="written_down", components=("model",)),
    )
    model = make_model(case, build_mesh(Degrees(), "cpu"))
    tokens, _ = batch(0, SPEC.vocab_size)
    model(tokens).float().sum().backward()
    return events


def test_the_parts_are_applied_from_the_inside_out(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    appliers = ("tensor_parallel", "context_parallel", "activation_checkpoint", "compile", "data_parallel")
    for applier in (f"apply_{name}" for name in reversed(appliers)):
        monkeypatch.setattr(parallelize, applier, lambda *_, name=applier, **__: order.append(name))
    two = SimpleNamespace(size=lambda: 2)
    parallelize.parallelize(
        torch.nn.Module(),
        ParallelPlan((), (), ()),
        SimpleNamespace(tp=two, cp=two),
        parallelism=Parallelism(),
        training=BF16,
        activation_checkpoint=ActivationCheckpoint(),
        compile=Compile(enable=True),
        reshard_after_forward=True,
    )
    assert order == [f"apply_{name}" for name in appliers]


def test_parameters_are_gathered_around_compiled_code_that_recomputes() -> None:
    """The compiled graph contains the recomputation, and receives whole parameters gathered before it."""
    events = run_ranks(order_of_events, 1, timeout=120)[0]
    assert set(events) == {"recompute, gathered before, True"}


def test_compiled_with_recompute_is_the_same_training() -> None:
    """All other modes, and inductor: tests/distributed/test_parallel_compile.py, among the slow ones."""
    compiled = Compile(enable=True, backend="aot_eager", components=("model",))
    cases = [{}, {"compile": compiled, "recompute": ActivationCheckpoint(selective_ac_option="op")}]
    eager, both = run_ranks(losses, 1, cases, timeout=200)[0]
    assert both == pytest.approx(eager, rel=1e-6)
