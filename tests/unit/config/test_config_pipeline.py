"""The configuration checks of a pipeline: stages, schedules and CSV files that cannot be are reported with reasons."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quadriga.config import pipeline_csv
from quadriga.config.pipeline_order import PipelineOrder

KEY = "--parallelism."
PP = f"{KEY}pipeline_parallel_"
PIPELINE = ("--model.n_layers=4", f"{PP}degree=2", "--training.local_batch_size=4")
WEIGHTLESS = (f"{PP}first_stage_less_layers=0", f"{PP}last_stage_less_layers=0")


def stages(*parts: str) -> str:
    """`a b` is a stage of two modules; layers are written as their numbers."""
    listed = [[f"layers.{name}" if name.isdigit() else name for name in part.split()] for part in parts]
    return f"{KEY}module_fqns_per_model_part=" + str(listed).replace("'", '"')


def report_of(problems) -> str:
    return "\n\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ((), (0, 1)),
        ((f"{PP}schedule=Interleaved1F1B",), (0, 1, 0, 1)),
        ((f"{PP}schedule=ZBVZeroBubble",), (0, 1, 1, 0)),
        ((f"{PP}schedule=DualPipeV",), (0, 1, 1, 0)),
        ((f"{PP}schedule=LoopedBFS", f"{PP}layers_per_stage=1", *WEIGHTLESS), (0, 1, 0, 1)),
        ((f"{PP}layers_per_stage=3",), (0, 1)),
        ((stages("tok_embeddings 0 1 2 3 norm", "output"),), (0, 1)),
    ],
)
def test_which_rank_holds_which_stage(arguments, ranks, read_config):
    assert read_config(*PIPELINE, *arguments, ranks=2).spec.stage_ranks == ranks


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((stages("tok_embeddings 0 1", "2 3 norm outputt"),), ("no module `outputt`", "did you mean: output")),
        ((stages("tok_embeddings 0 1", "3 norm output"),), ("no stage holds layers.2",)),
        ((stages("tok_embeddings 0 1", "1 2 3 norm output"),), ("listed more than once: layers.1",)),
        ((stages("tok_embeddings 1 0", "2 3 norm output"),), ("`layers.1` is before `layers.0`",)),
        ((stages("2 3 norm output", "tok_embeddings 0 1"),), ("`output` is before `tok_embeddings`",)),
        ((stages("tok_embeddings 0 1 2 3 norm output", ""),), ("a stage without a module",)),
        ((stages("tok_embeddings 0", "1 2", "3 norm", "output"),), ("1F1B needs one stage per rank",)),
        ((f"{PP}first_stage_less_layers=9",), ("the first stage has 7 layers", "weighs 9")),
        ((f"{PP}last_stage_less_layers=9",), ("the last stage has 7 layers", "weighs 9")),
        (("--model.tie_embeddings",), ("they would be on different ranks of the pipeline",)),
        ((f"{KEY}fsdp_prefetch=2",), ("a pipeline gathers whole stages ahead, not single blocks",)),
        (
            (f"{PP}schedule=ZBVZeroBubble", f"{KEY}fsdp_reshard_after_forward=always"),
            ("needs gathered parameters in the backward pass",),
        ),
        ((f"{PP}schedule=DualPipeV", f"{PP}microbatch_size=2"), ("needs at least 4 micro-batches, and there are 2",)),
        (
            (f"{PP}microbatch_size=2", "--validation.enable", "--validation.local_batch_size=3"),
            ("must also divide the validation batch",),
        ),
    ],
)
def test_what_cannot_be_a_pipeline(arguments, says, refusal):
    report = report_of(refusal(*PIPELINE, *arguments, ranks=2))
    assert all(text in report for text in says), report


FORWARD = ",".join(f"0F{i}" for i in range(4))
GOOD = [f"{FORWARD},0B0,0B1,0B2,0B3", "1F0,1B0,1F1,1B1,1F2,1I2,1W2,1F3,1B3"]


def test_a_csv_file_says_which_rank_holds_what(write, read_config):
    path = write("\n".join(GOOD), "two.csv")
    assert read_config(*PIPELINE, f"{PP}schedule_csv={path}", ranks=2).spec.stage_ranks == (0, 1)
    path = write(
        f"{FORWARD},(2F0)OVERLAP_F_B,,2B0,2F1,2B1,2F2,2B2,2F3,2B3,0B0,0B1,0B2,0B3\n1F0,1F1,1F2,1F3,1B0,1B1,1B2,1B3\n",
        "three.csv",
    )
    assert read_config(*PIPELINE, f"{PP}schedule_csv={path}", ranks=2).spec.stage_ranks == (0, 1, 0)


ONE_F_ONE_B = ["0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3", "1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3"]
GPIPE = [f"{FORWARD},0B0,0B1,0B2,0B3", f"{FORWARD},0B0,0B1,0B2,0B3".replace("0F", "1F").replace("0B", "1B")]
WEIGHTS_LAST = ["0F0,0F1,0I0,0W0,0I1,0W1", "1F0,1I0,1F1,1I1,1W0,1W1"]


@pytest.mark.parametrize(
    ("lines", "micro_batches", "at_once", "idle"),
    [
        (ONE_F_ONE_B, 4, (2, 1), 1 / 4),  # (ranks - 1) / micro-batches: arXiv 1811.06965
        (GPIPE, 4, (4, 4), 1 / 4),
        (WEIGHTS_LAST, 2, (2, 2), 1 / 6),  # rank 1 begins when rank 0 has done one pass of 6, and never waits again
    ],
)
def test_what_a_csv_file_holds_and_how_long_it_waits(lines, micro_batches, at_once, idle):
    schedule = pipeline_csv.parse("\n".join(lines), 2, micro_batches)
    assert isinstance(schedule, PipelineOrder)
    assert schedule.in_flight == at_once
    times = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    seconds = {(stage, kind): time for stage in (0, 1) for kind, time in times.items()}
    assert min(schedule.idle_shares(seconds)) == pytest.approx(idle)


@pytest.mark.parametrize(
    ("lines", "where", "says"),
    [
        (GOOD[:1], "s.csv", "there are 1 lines and 2 ranks"),
        ([GOOD[0], GOOD[1] + ",1X3"], "s.csv, line 2", "`1X3` is not an action"),
        ([GOOD[0], GOOD[1] + ",0F3"], "s.csv, line 2", "stage 0 is computed by line 1 already"),
        ([GOOD[0], ""], "s.csv, line 2", "this rank computes nothing"),
        ([GOOD[0], GOOD[1].replace("1", "2")], "s.csv", "no line computes stage 1"),
        ([GOOD[0], GOOD[1] + ",1F4"], "s.csv, line 2", "1F4: there are only 4 micro-batches"),
        ([GOOD[0], GOOD[1] + ",1B3"], "s.csv, line 2", "1B3: it is done already"),
        ([GOOD[0], "1B0," + GOOD[1]], "s.csv, line 2", "1B0: its forward pass is not before it"),
        ([GOOD[0], GOOD[1].replace("1I2,1W2", "1W2,1I2")], "s.csv, line 2", "1W2: its I is not before it"),
        (
            [GOOD[0], GOOD[1].removesuffix(",1B3")],
            "s.csv, line 2",
            "not finish the backward pass of micro-batch 3",
        ),
        (
            [GOOD[0].replace("0F3,0B0", "0B0,0F3"), "1F3,1B3,1F0,1B0,1F1,1B1,1F2,1B2"],
            "s.csv",
            "wait for each other: 0B0 in line 1, 1F3 in line 2",
        ),
    ],
)
def test_what_is_no_schedule(lines, where, says, write, refusal):
    path = write("\n".join([*lines, ""]) if lines[-1] else lines[0] + "\n\n", "s.csv")
    problems = refusal(*PIPELINE, f"{PP}schedule_csv={path}", ranks=2)
    assert (where, True) in [(problem.where, says in problem.what) for problem in problems], report_of(problems)


def test_a_csv_file_that_is_not_there(refusal):
    (problem,) = refusal(*PIPELINE, f"{PP}schedule_csv=gone.csv", ranks=2)
    assert (problem.where, problem.value) == ("parallelism.pipeline_parallel_schedule_csv", "gone.csv")
    assert "No such file" in problem.what


def test_a_csv_file_that_splits_the_backward_pass_cannot_be_compiled(write, refusal):
    path = write("\n".join(GOOD), "s.csv")
    problems = refusal(*PIPELINE, f"{PP}schedule_csv={path}", "--compile.enable", ranks=2)
    assert "the schedule of the CSV file splits the backward pass" in report_of(problems)


SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_check_accepts_the_numbers_of_micro_batches_that_torch_can_schedule(schedule, ranks, read_config, refusal):
    for count in range(1, 14):
        arguments = (f"{PP}schedule={schedule}", f"{PP}degree={ranks}", f"--training.local_batch_size={count}")
        arguments = ("--model.n_layers=8", *arguments)
        if torch_can(schedule, ranks, count):
            read_config(*arguments, ranks=ranks)
        else:
            assert "micro-batches" in report_of(refusal(*arguments, ranks=ranks))


def torch_can(schedule: str, ranks: int, count: int) -> bool:
    """Whether torch makes a schedule of it: its constructor also orders all messages, or says that it cannot."""
    from torch.distributed.pipelining.schedules import get_schedule_class  # the other tests of this file need no torch

    each = 1 if schedule in ("GPipe", "1F1B") else 2
    stage = SimpleNamespace(num_stages=ranks * each, group_size=ranks, group_rank=0, stage_index=0, submod=None)
    stage.is_first, stage.is_last = True, False
    try:
        get_schedule_class(schedule)(stage if each == 1 else [stage] * each, count, lambda *_: None)
    except (ValueError, AssertionError):
        return False
    return True


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('0F0,"0B0\n"\n1F0,x', 1, "the end of a line"),
        ("0F0,0B0\n1F0,x\u2028y", 2, "is not an action"),
        ("0F0,0B0\n" + "1" * 200_000, 2, "field larger"),
    ],
)
def test_a_problem_of_a_schedule_has_its_line(text, line, what):
    found = pipeline_csv.parse(text, 2, 1)
    assert [(problem.line, what in problem.what) for problem in found] == [(line, True)]
