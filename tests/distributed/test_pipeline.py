"""A pipeline trains the model that one process trains, with every schedule and beside every data parallelism."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import training
from launching import RUN_TRAIN, Running, is_alive, replace_loop, wait_until
from pipelines import CPU, Arguments, FixedBatches, PipelineTrace, make_state, pipeline, read_run, train_all
from ranks import RankError, run_ranks
from torch import nn
from torch.distributed.pipelining.schedules import _check_torch_compile_compatibility

from quadriga.comm.call_recorder import CallRecorder, axis_by_ranks
from quadriga.comm.mesh import build_mesh
from quadriga.train.build import build_forward_backward, build_step_config
from quadriga.train.loss import Divisor
from quadriga.train.step import PipelineForwardBackward, train_step

SINGLE, LOOP = ("GPipe", "1F1B"), ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
SCHEDULES = (*SINGLE, *LOOP, "ZBVZeroBubble", "DualPipeV")
KEY = "--parallelism."
ACCUMULATE = ("--training.global_batch_size=16",)
ONCE, EVERY = (*ACCUMULATE, f"{KEY}reduce_gradients=once"), (*ACCUMULATE, f"{KEY}reduce_gradients=every_micro_batch")
DDP = (f"{KEY}data_parallel_replicate_degree=2", f"{KEY}data_parallel_shard_degree=1")
HSDP = (f"{KEY}data_parallel_replicate_degree=2", f"{KEY}data_parallel_shard_degree=2")
ALWAYS = (f"{KEY}fsdp_reshard_after_forward=always",)
BF16 = ("--training.mixed_precision_param=bfloat16",)
FULL = ("--activation_checkpoint.mode=full",)
PER_OPERATION = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
FIVE = ("--model.n_layers=5",)
COMPILED = ("--compile.enable", "--compile.backend=aot_eager")
LAYERS = '"layers.0", "layers.1", "layers.2"'


def alone(*cases: Arguments) -> list[PipelineTrace]:
    """One process, wrapped by nothing in float32."""
    return run_ranks(train_all, 1, list(cases))[0]


@pytest.fixture(scope="module")
def plain() -> PipelineTrace:
    return alone(())[0]


@pytest.fixture(scope="module")
def accumulated() -> PipelineTrace:
    return alone(ACCUMULATE)[0]


def assert_same_training(ranks: list[PipelineTrace], reference: PipelineTrace, tolerance: float = 1e-6) -> None:
    for trace in ranks:
        assert trace.losses == pytest.approx(reference.losses, rel=tolerance)
        assert trace.norms == pytest.approx(reference.norms, rel=tolerance)
        assert trace.losses == ranks[0].losses  # all ranks report the same numbers
        assert trace.validation == pytest.approx(reference.validation, rel=tolerance)
        assert not trace.left_unsharded
        for name, weight in trace.weights.items():
            assert torch.equal(trace.initial_weights[name], reference.initial_weights[name]), name
            # Looser than the losses: Adam turns a gradient near zero into a step whose sign is a matter of rounding.
            torch.testing.assert_close(weight, reference.weights[name], rtol=1e-3, atol=2e-4)
    assert {name for trace in ranks for name in trace.weights} == set(reference.weights)


def by_case(ranks: int, cases: list[Arguments]) -> list[list[PipelineTrace]]:
    return [list(traces) for traces in zip(*run_ranks(train_all, ranks, cases, timeout=120), strict=True)]


def test_every_schedule_on_two_ranks(plain: PipelineTrace) -> None:
    for traces in by_case(2, [pipeline(2, schedule) for schedule in SCHEDULES]):
        assert_same_training(traces, plain)
        held = [set(trace.weights) for trace in traces]
        assert not held[0] & held[1]


@pytest.mark.slow
def test_four_ranks(accumulated: PipelineTrace) -> None:
    cases = [
        (*pipeline(2), *ONCE),
        (*pipeline(2), *EVERY),
        (*pipeline(2, "ZBVZeroBubble"), *EVERY),
        (*pipeline(2, "Interleaved1F1B"), *DDP, *EVERY),
        (*pipeline(4), *ACCUMULATE),
    ]
    for traces in by_case(4, cases):
        assert_same_training(traces, accumulated)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), DDP], ids=["FSDP 2", "DDP 2"])
def test_every_schedule_beside_data_parallelism(layout: Arguments, accumulated: PipelineTrace) -> None:
    cases = [(*pipeline(2, schedule), *layout, *reduce) for schedule in SCHEDULES for reduce in (ONCE, EVERY)]
    cases += [(*pipeline(2, schedule), *layout, *ALWAYS, *EVERY) for schedule in ("1F1B", "Interleaved1F1B")]
    for traces in by_case(4, cases):
        assert_same_training(traces, accumulated)


@pytest.mark.slow
def test_every_schedule_on_four_stages_and_hybrid_sharding(accumulated: PipelineTrace) -> None:
    eight = ("--model.n_layers=8", "--training.local_batch_size=8", "--training.global_batch_size=16")
    # One row at a time, as in the pipeline: eight at once round otherwise, by 1.3e-6 of the norm in the third step.
    reference = alone((*eight, "--training.local_batch_size=1"))[0]
    for traces in by_case(4, [(*pipeline(4, schedule), *eight) for schedule in SCHEDULES]):
        assert_same_training(traces, reference)
    hybrid = [(*pipeline(2, "DualPipeV"), *HSDP, *reduce) for reduce in (ONCE, EVERY, (*EVERY, *FULL))]
    for traces in by_case(8, hybrid):
        assert_same_training(traces, accumulated)


def test_other_stages_and_micro_batches(plain: PipelineTrace) -> None:
    apart = f'[["tok_embeddings", {LAYERS}, "layers.3", "norm"], ["output"]]'
    four = f'[["tok_embeddings"], [{LAYERS}], ["layers.3", "norm"], ["output"]]'
    cases = [
        (*pipeline(2), f"{KEY}module_fqns_per_model_part={apart}"),
        (*pipeline(2, "Interleaved1F1B"), f"{KEY}module_fqns_per_model_part={four}"),
        (*pipeline(2), f"{KEY}pipeline_parallel_microbatch_size=2"),
        (*pipeline(2, "ZBVZeroBubble"), *FULL),
        (*pipeline(2, "InterleavedZeroBubble"), *PER_OPERATION),
    ]
    for traces in by_case(2, cases):
        assert_same_training(traces, plain)
    bare, two = pipeline(2, "Interleaved1F1B"), ("--model.n_layers=2",)  # stages of the ends alone
    for traces in by_case(2, [(*bare, *two)]):
        assert_same_training(traces, alone(two)[0])
    (uneven,) = alone(FIVE)
    for traces in by_case(2, [(*pipeline(2), *FIVE), (*pipeline(2, "ZBVZeroBubble"), *FIVE)]):
        assert_same_training(traces, uneven)


def test_half_precision() -> None:
    """Compared with one process that takes the same rows at a time: other shapes round otherwise."""
    (reference,) = alone((*BF16, "--training.local_batch_size=1"))
    for traces in by_case(2, [(*pipeline(2), *BF16), (*pipeline(2, "InterleavedZeroBubble"), *BF16)]):
        assert_same_training(traces, reference)


TWO_STAGES = """\
0F0,0F1,,0F2,0F3,0B0,0B1,0B2,0B3
1F0,1B0,1F1,1B1,1F2,1B2,1F3,1I3,1W3
"""
THREE_STAGES = """\
0F0,0F1,0F2,0F3,2F0,2I0,2W0,2F1,2B1,2F2,2B2,2F3,2B3,0B0,0I1,0W1,0B2,0B3
1F0,1F1,1F2,1F3,1B0,1I1,1W1,1B2,1B3
"""


def test_a_schedule_of_ones_own(plain: PipelineTrace, tmp_path: Path) -> None:
    cases = []
    for name, text in {"two": TWO_STAGES, "three": THREE_STAGES}.items():
        (tmp_path / name).write_text(text)
        cases.append((*pipeline(2), f"{KEY}pipeline_parallel_schedule_csv={tmp_path / name}"))
    two, three = by_case(2, cases)
    assert_same_training(two, plain)
    assert_same_training(three, plain)
    assert "output.weight" in three[0].weights  # the first rank holds the first and the last stage


def step_at(arguments: Arguments, positions: torch.Tensor) -> float:
    """The loss of one batch whose tokens stand at `positions`."""
    run = read_run(arguments, dist.get_world_size())
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = make_state(run, mesh)
    with torch.no_grad():  # initial queries and keys are so small that positions hardly matter to the loss
        for part in state.parts:
            for name, parameter in part.named_parameters():
                parameter.mul_(10 if ".attention." in name else 1)
    divisor = Divisor(4 * run.spec.seq_len)
    forward = build_forward_backward(run, mesh, CPU, state.parts, 4, run.spec.seq_len, divisor=divisor)
    object.__setattr__(forward.shard, "positions", positions)
    batch = FixedBatches(run, 0).next()
    four = type(batch)(batch.tokens[:4], batch.labels[:4])
    return float(mesh.reduce_sum(forward.train(four, reduce=False, last=True)))


def cut_positions() -> list[tuple[int, ...]]:
    """What the stages of this rank see of positions that are handed to torch's schedule: the trap."""
    run = read_run(pipeline(2), 2)
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = make_state(run, mesh)
    forward = build_forward_backward(run, mesh, CPU, state.parts, 4, run.spec.seq_len)
    assert isinstance(forward, PipelineForwardBackward)
    _, keywords = forward.pipeline._training._split_inputs((), {"positions": torch.arange(16)})
    return [tuple(each["positions"].shape) for each in keywords]


def test_every_stage_sees_all_positions() -> None:
    """torch's schedules cut whatever tensor they are given into micro-batches, positions too."""
    far = torch.arange(16) * 3 + 5
    (expected,) = run_ranks(step_at, 1, (), far)
    (usual,) = run_ranks(step_at, 1, (), torch.arange(16))
    assert expected != pytest.approx(usual, rel=1e-5)
    for schedule in ("1F1B", "ZBVZeroBubble"):
        assert run_ranks(step_at, 2, pipeline(2, schedule), far) == pytest.approx([expected] * 2, rel=5e-7)
    assert run_ranks(cut_positions, 2) == [[(4,)] * 4] * 2


def messages(arguments: Arguments) -> list[Counter[tuple[str, int]]]:
    """What this rank sends and receives in its first pass through the pipeline and in its second: (kind, bytes)."""
    run = read_run(arguments, 2)
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = make_state(run, mesh)
    step_config = build_step_config(run, mesh, CPU, state.parts)
    batch = FixedBatches(run, 0).next()
    half = type(batch)(batch.tokens[:4], batch.labels[:4])
    seen = []
    for _ in range(2):
        with CallRecorder(axis_by_ranks(mesh)) as recorder:
            step_config.forward_backward.train(half, reduce=False, last=False)
        seen.append(Counter((call.kind, call.size) for call in recorder.calls))
    return seen


def messages_of_each(cases: list[Arguments]) -> list[list[Counter[tuple[str, int]]]]:
    return [messages(case) for case in cases]


def test_only_activations_and_gradients_travel() -> None:
    """One each way for every micro-batch and every border between ranks; no shapes, no votes, also the first time."""
    borders = {"1F1B": 1, "Interleaved1F1B": 3, "ZBVZeroBubble": 2}
    size = 1 * 16 * 32 * 4  # rows, tokens, width, bytes of a number
    for rank in run_ranks(messages_of_each, 2, [pipeline(2, schedule) for schedule in borders]):
        for passes, count in zip(rank, borders.values(), strict=True):
            assert passes == [{("send", size): 4 * count, ("recv", size): 4 * count}] * 2


def test_a_checkpoint_moves_between_a_pipeline_and_one_rank(tmp_path: Path) -> None:
    arguments = (*training.TINY, "--model.n_layers=4", "--training.local_batch_size=4", "--checkpoint.enable")
    arguments += ("--lr_scheduler.total_steps=6",)
    straight = training.train(tmp_path / "straight", 1, *arguments, "--training.steps=6")
    moved = tmp_path / "moved"
    training.train(moved, 2, *arguments, *pipeline(2, "ZBVZeroBubble"), "--training.steps=2")
    training.train(moved, 1, *arguments, "--training.steps=4")
    records = training.train(moved, 2, *arguments, *pipeline(2), "--training.steps=6")
    assert training.largest_difference(records, straight, "loss") <= 1e-6
    assert training.largest_difference(records, straight, "grad_norm") <= 1e-6


@pytest.mark.slow
def test_compiled_blocks(plain: PipelineTrace) -> None:
    for traces in by_case(2, [(*pipeline(2), *COMPILED), (*pipeline(2, "Interleaved1F1B"), *COMPILED)]):
        assert_same_training(traces, plain)


def free_without_the_check(arguments: Arguments) -> None:
    """A step that frees parameters after the forward pass where the configuration check refuses it."""
    run = read_run(arguments, dist.get_world_size())
    object.__setattr__(run.config.parallelism, "fsdp_reshard_after_forward", "always")
    object.__setattr__(run.spec, "reshard_after_forward", True)
    object.__setattr__(run.spec, "reshard_ends", True)
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = make_state(run, mesh)
    train_step(state, build_step_config(run, mesh, CPU, state.parts), mesh)


@pytest.mark.slow
def test_what_the_configuration_checks_refuse() -> None:
    """The trap behind a rule. Where this no longer fails, the rule can go."""
    with pytest.raises(RankError, match="KeyError"):
        run_ranks(free_without_the_check, 4, (*pipeline(2, "ZBVZeroBubble"), *ACCUMULATE))


def test_torch_does_not_see_what_was_compiled_in_place() -> None:
    """It refuses compiled modules where a schedule splits the backward pass, and finds only wrapped ones: the check
    must do it. (Small models come out right all the same.)
    """
    wrapped, in_place = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")), nn.Sequential(nn.Linear(2, 2))
    in_place[0].compile(backend="eager")
    _check_torch_compile_compatibility([SimpleNamespace(submod=in_place)], "ZBVZeroBubble")
    with pytest.raises(RuntimeError, match="not supported"):
        _check_torch_compile_compatibility([SimpleNamespace(submod=wrapped)], "ZBVZeroBubble")


BREAKING = """
import importlib.util
from pathlib import Path
import quadriga.train
from quadriga.models.llama import model

spec = importlib.util.spec_from_file_location("real_loop", Path(quadriga.train.__file__).with_name("loop.py"))
real = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)
calls = []

def forward(self, x):
    calls.append(1)
    if len(calls) == 40:
        raise ValueError("this stage broke")
    return whole(self, x)

def run(run, environ):
    global whole
    if environ["RANK"] == environ["BROKEN"]:
        whole, model.FeedForward.forward = model.FeedForward.forward, forward
    return real.run(run, environ)
"""


@pytest.mark.parametrize("broken", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_stage_that_fails_ends_the_run_with_its_own_error(broken: str, tmp_path: Path) -> None:
    """Its neighbours wait for a message that never comes: nobody may wait for the timeout of 100 seconds."""
    environ = replace_loop(tmp_path / "stand_in", BREAKING) | {"NGPU": "2", "BROKEN": broken, "OMP_NUM_THREADS": "1"}
    arguments = (*training.TINY, "--model.n_layers=4", "--training.local_batch_size=4", "--checkpoint.no_enable")
    command = [*RUN_TRAIN, "--job.config_file", training.DEBUG_FILE, "--job.dump_folder", str(tmp_path / "run")]
    running = Running([*command, *arguments, *pipeline(2), "--training.steps=1000"], environ)
    try:
        assert wait_until(lambda: running.process.poll() is not None or not running.process_tree(), 150)
        ended = running.end()
    finally:
        running.kill_all()
    assert ended.code == 1
    assert ended.err.rstrip().splitlines()[-1].endswith("ValueError: this stage broke"), ended.err
    assert wait_until(lambda: not any(is_alive(pid) for pid in running.seen - {os.getpid()}), 30)
