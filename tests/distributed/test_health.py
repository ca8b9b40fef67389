"""Losses and gradients that are no numbers, or jump: weights left alone on every layout, the culprit named, the run
stopped or gone on with as `[health]` says. Real ranks; the numbers go wrong in the real backward pass."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from fault_injection import InjectedFault, inject
from pipelines import make_state, pipeline, read_run
from ranks import run_ranks
from training import DEBUG_FILE, TINY, one_rank, train

from quadriga.comm.mesh import build_mesh
from quadriga.config.schema import Health as HealthSection
from quadriga.errors import EXIT_NOT_FINITE, Fault
from quadriga.metrics.documents import read_documents
from quadriga.metrics.events import read_events
from quadriga.metrics.jsonl import read_metrics

NAN = float("nan")
FSDP2 = ("--parallelism.data_parallel_shard_degree=2",)
TP2 = ("--parallelism.tensor_parallel_degree=2",)
CP2 = ("--parallelism.context_parallel_degree=2",)
LAYOUTS = {
    "HSDP 2x2": ("--parallelism.data_parallel_replicate_degree=2",),
    "FSDP 2, CP 2": CP2,
    "PP 2, TP 2": (*pipeline(2), *TP2),
}
NUMBERS = ("loss", "grad_norm", "max_loss", "skipped_steps", "tokens_seen", "lr")


@dataclass
class Outcome:
    kinds: list[int]  # the verdict on each step
    moved: list[bool]  # whether the step changed any weight of this rank, or any number of its optimizer's
    skipped: int
    losses: list[
        tuple[float, float, float]
    ]  # at each step: this rank's part, the mean over all, the greatest of a rank
    weights: list[torch.Tensor]


def steps_with_fault(
    arguments: tuple[str, ...], section: HealthSection, waits: bool, injected: InjectedFault, steps: int = 3
) -> Outcome:
    import torch.distributed as dist

    from quadriga.resilience.health import HealthMonitor
    from quadriga.train import loss, step
    from quadriga.train.build import build_step_config

    genuine = loss.summed_cross_entropy, step.train_step
    inject(injected)
    run = read_run((*arguments, "--training.local_batch_size=2", "--model.n_layers=2"), dist.get_world_size())
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = make_state(run, mesh)
    state.health = HealthMonitor(section, waits=waits)
    step_config = build_step_config(run, mesh, torch.device("cpu"), state.parts)
    kinds, moved, losses = [], [], []
    for _ in range(steps):
        before = held(state)
        metrics = step.train_step(state, step_config, mesh)
        kinds.append(int(metrics.verdict[0]))
        losses.append((metrics.verdict[1].item(), metrics.loss.item(), metrics.max_loss.item()))
        after = held(state)
        moved.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
    loss.summed_cross_entropy, step.train_step = genuine
    return Outcome(kinds, moved, int(state.health.skipped), losses, held(state))


def held(state) -> list[torch.Tensor]:
    """Copies of the weights and of everything in the optimizer that is not 0, of this rank."""
    from torch.distributed.tensor import DTensor

    tensors = [*state.parameters(), *(value for one in state.optimizer.state.values() for value in one.values())]
    local = [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone() for tensor in tensors]
    return [tensor for tensor in local if tensor.any()]


def cases_with_faults(cases: list[tuple]) -> list[Outcome]:
    return [steps_with_fault(*case) for case in cases]


@pytest.fixture(scope="module")
def on_layouts() -> dict[tuple[str, bool], list[Outcome]]:
    """By layout and whether the host waits for each verdict: of every rank."""
    wanted = [(name, False) for name in LAYOUTS] + [("PP 2, TP 2", True)]
    last = {"PP 2, TP 2": 3}  # losses are made on the ranks of the last stage
    skip = HealthSection(non_finite="skip_step")
    cases = [(LAYOUTS[name], skip, waits, InjectedFault(2, rank=last.get(name, 1), loss=NAN)) for name, waits in wanted]
    by_rank = run_ranks(cases_with_faults, 4, cases, timeout=240)
    return {case: [outcomes[number] for outcomes in by_rank] for number, case in enumerate(wanted)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_rank_s_bad_loss_leaves_all_ranks_where_they_are(name, on_layouts):
    for outcome in on_layouts[name, False]:
        assert outcome.kinds == [0, 1, 0]
        assert outcome.moved == [True, False, True]
        assert outcome.skipped == 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_knows_the_same_mean_and_greatest_loss(name, on_layouts):
    """The batch is cut into 4 parts, or not at all where there is a pipeline, whose first stage has no loss."""
    outcomes = on_layouts[name, False]
    parts = 1 if "PP" in name else 4
    for step in (0, 2):
        own, means, greatest = zip(*(outcome.losses[step] for outcome in outcomes), strict=True)
        assert len(set(means)) == len(set(greatest)) == 1
        assert greatest[0] == max(own) * parts
        assert means[0] == sum(own) / (2 if "TP" in name else 1)  # ranks along tp know the same
        assert greatest[0] > means[0] or parts == 1


def test_deciding_on_the_device_comes_to_the_same_weights(on_layouts):
    for on_device, waiting in zip(on_layouts["PP 2, TP 2", False], on_layouts["PP 2, TP 2", True], strict=True):
        assert (waiting.kinds, waiting.moved) == (on_device.kinds, on_device.moved)
        assert all(map(torch.equal, waiting.weights, on_device.weights))
        assert len(waiting.weights) == len(on_device.weights) > 0


def test_every_implementation_leaves_the_first_step_out():
    """Where the optimizer has no state yet, and the loss is fine but its gradient is not."""
    skip = HealthSection(non_finite="skip_step")
    names = ("fused", "foreach", "for-loop")
    infinite = InjectedFault(1, gradient=math.inf)
    cases = [((f"--optimizer.implementation={name}",), skip, waits, infinite) for name in names for waits in (1, 0)]
    for outcome in run_ranks(cases_with_faults, 1, cases)[0]:
        assert outcome.kinds == [1, 0, 0]
        assert outcome.moved == [False, True, True]


def test_ignored_numbers_do_as_they_always_did():
    ignore = HealthSection(non_finite="ignore")
    (outcome,) = run_ranks(cases_with_faults, 1, [((), ignore, True, InjectedFault(2, loss=NAN))])[0]
    assert outcome.kinds == [0, 0, 0]
    assert outcome.moved == [True, True, True]
    assert all(tensor.isnan().any() for tensor in outcome.weights if tensor.dim())


# --- whole runs ---


def rank_with_faults(argv: list[str], faults: list[InjectedFault]) -> tuple[int, str]:
    """The exit code, and the message of a fault."""
    inject(*faults)
    try:
        return one_rank(argv), ""
    except Fault as fault:
        return fault.exit_code, str(fault)


def train_with_faults(folder, ranks: int, *arguments: str, faults: list[InjectedFault]) -> list[tuple[int, str]]:
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(folder), *TINY, *arguments]
    return run_ranks(rank_with_faults, ranks, argv, faults, timeout=120, backend=None)


def numbers(records) -> list[tuple]:
    return [tuple(record[name] for name in NUMBERS) for record in records]


def test_a_bad_step_stops_the_run_by_name_and_the_next_start_goes_on_as_if_nothing_had_been(tmp_path):
    arguments = ("--training.steps=5", "--checkpoint.interval=2", "--metrics.log_documents")
    ended = train_with_faults(tmp_path / "bad", 2, *arguments, faults=[InjectedFault(4, rank=1, loss=NAN)])
    assert [code for code, _ in ended] == [EXIT_NOT_FINITE] * 2
    assert ended[0] == ended[1]
    message = ended[0][1]
    assert "step 4: the loss is nan" in message
    assert "not finite: the loss of rank 1\n" in message
    assert "gradients held by ranks 0, 1; on rank 0 the first is tok_embeddings.weight" in message
    assert "--health.non_finite skip_step" in message
    assert sorted(path.name for path in (tmp_path / "bad/checkpoint").glob("step-*")) == ["step-2"]

    records = [json.loads(line) for line in (tmp_path / "bad/bad_batches.jsonl").read_text().splitlines()]
    assert sorted((line["step"], line["rank"]) for line in records) == [(4, 0), (4, 1)]
    rows = {int(row): names for line in records for row, names in line["rows"].items()}
    assert dict(sorted(rows.items())) == read_documents(tmp_path / "bad")[4]
    faults = [event for event in read_events(tmp_path / "bad") if event["event"] == "fault"]
    assert [(event["step"], event["rank"]) for event in faults] == [(4, 0)]
    assert faults[0]["error"].startswith("step 4: the loss is nan")

    again = train(tmp_path / "bad", 2, *TINY, *arguments)
    straight = train(tmp_path / "straight", 2, *TINY, *arguments)
    assert numbers(again) == numbers(straight)
    assert read_documents(tmp_path / "bad") == read_documents(tmp_path / "straight")


def test_a_skipped_step_is_counted_and_reported_and_training_continues(tmp_path):
    faults = [InjectedFault(2, rank=0, gradient=math.inf), InjectedFault(4, rank=1, loss=NAN)]
    arguments = ("--training.steps=6", "--checkpoint.no_enable", "--health.non_finite=skip_step")
    assert train_with_faults(tmp_path, 2, *arguments, faults=faults) == [(0, "")] * 2
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 2, 2, 2]
    assert [math.isfinite(record["loss"]) for record in records] == [True, True, True, False, True, True]
    assert not math.isfinite(records[1]["grad_norm"])
    assert [record["tokens_seen"] for record in records] == [256 * step for step in range(1, 7)]
    skips = [event for event in read_events(tmp_path) if event["event"] == "skip"]
    assert [(event["step"], event["reason"], event["rank"]) for event in skips] == [
        (2, "non_finite", 0),
        (4, "non_finite", 0),
    ]


SPIKES = ("--health.spike=skip_step", "--health.spike_window=6", "--checkpoint.interval=7")


def test_a_spike_is_skipped_and_what_it_is_measured_against_outlives_a_resume(tmp_path):
    faults = [
        InjectedFault(9, loss=40.0),
        InjectedFault(11, loss=0.01),
    ]  # a loss far below is no spike, but counts from then on
    arguments = (*SPIKES, "--training.steps=14")
    assert train_with_faults(tmp_path / "straight", 1, *arguments, faults=faults) == [(0, "")]
    assert (
        train_with_faults(tmp_path / "stopped", 1, *arguments, faults=[*faults, InjectedFault(10, loss=NAN)])[0][0] == 5
    )
    assert train_with_faults(tmp_path / "stopped", 1, *arguments, faults=faults) == [(0, "")]
    straight, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "stopped"))
    assert numbers(resumed) == numbers(straight)
    assert [record["skipped_steps"] for record in straight] == [0] * 8 + [1] * 6
    states = [
        json.loads((tmp_path / name / "checkpoint/step-14/train_state.json").read_text())
        for name in ("straight", "stopped")
    ]
    healths = [find(state, "health") for state in states]
    assert healths[0] == healths[1]
    assert healths[0]["recent"]["count"] == 13
    assert straight[8]["loss"] not in healths[0]["recent"]["losses"]


def find(tree, key):
    """The value of `key`, wherever in nested dictionaries it is."""
    if isinstance(tree, dict):
        found = [tree[key]] if key in tree else [find(value, key) for value in tree.values()]
        return next((value for value in found if value is not None), None)
    return None


def test_a_spike_can_stop_the_run(tmp_path):
    arguments = ("--health.spike=raise", "--health.spike_window=4", "--training.steps=6", "--checkpoint.no_enable")
    ((code, message),) = train_with_faults(tmp_path, 1, *arguments, faults=[InjectedFault(5, loss=40.0)])
    assert code == EXIT_NOT_FINITE
    assert "step 5: the loss is " in message
    assert "standard deviations" in message
    assert "--health.spike skip_step" in message


def totals_of_a_rank_without_a_loss() -> tuple[bool, float]:
    import torch.distributed as dist

    from quadriga.config.run_spec import Degrees
    from quadriga.train.loss import all_reduce_loss

    mesh = build_mesh(Degrees(dp_shard=2), "cpu")
    own_loss = torch.tensor(NAN if dist.get_rank() == 1 else 0.5, dtype=torch.float64)
    totals = all_reduce_loss(own_loss, torch.tensor(1.0), mesh)
    return bool(totals.finite), totals.grad_norm.item()


def test_every_rank_sees_that_another_rank_has_no_finite_loss():
    assert run_ranks(totals_of_a_rank_without_a_loss, 2) == [(False, 1.0)] * 2
