"""Data that one rank cannot read in mid-run: all ranks save the last whole step and leave with exit code 2.

In a validation too. And what ends a validation costs no step: the save of the same step comes first.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch
from ranks import RankError, run_ranks
from training import DEBUG_FILE, TINY, largest_difference, one_rank, train

from quadriga.checkpoint.folder import find_complete, find_damage
from quadriga.errors import Problem, UserError
from quadriga.metrics.events import read_events
from quadriga.metrics.jsonl import read_metrics

STEPS, BROKEN = 8, 5  # the windows of row 5, of the second rank, end with the broken document after five steps
SAVING = ("--checkpoint.enable", "--checkpoint.interval=100", f"--training.steps={STEPS}")


def ended(argv: list[str], broken: bool = True) -> tuple[int, str, str]:
    """Exit code, report and log of a rank, one row of whose data cannot be read on in mid-run."""
    from quadriga.data.streams import Streams

    real = Streams.windows

    def windows(self, row, *given):
        for number, window in enumerate(real(self, row, *given)):
            if broken and row == 5 and number == BROKEN:
                raise UserError(Problem("data/15.jsonl, line 2", "not JSON: Expecting ',' delimiter"))
            yield window

    Streams.windows = windows
    log = io.StringIO()
    with contextlib.redirect_stderr(log):
        try:
            return one_rank(argv), "", log.getvalue()
        except UserError as error:
            return error.exit_code, error.report, log.getvalue()


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(folder), *TINY, *SAVING, *more]


DDP = ("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1")
PP = ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4")
OTHERS = [
    *((2, ("--checkpoint.async_mode=async",)), (2, DDP), (2, PP), (1, ())),
    *((2, (f"--parallelism.{axis}_parallel_degree=2",)) for axis in ("tensor", "context")),
]


@pytest.mark.parametrize(("ranks", "more"), [(2, ()), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)])
def test_a_document_that_one_rank_cannot_read_ends_the_run_at_the_last_whole_step(tmp_path, ranks, more):
    ends = run_ranks(ended, ranks, arguments(tmp_path, *more), backend=None, timeout=120)
    assert {code for code, _, _ in ends} == {2}
    (report,) = {report for _, report, _ in ends}
    assert report.splitlines()[2] == "data/15.jsonl, line 2"
    found = find_complete(tmp_path / "checkpoint")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, BROKEN + 1))
    assert found.step == found.extra["train_state"]["step"] == BROKEN
    assert find_damage(found) == []
    log = ends[0][2]
    assert log.rstrip().splitlines()[-1] == (
        f"the data cannot be read; step {BROKEN} is saved in {found.path}: a start resumes from there"
    )
    faults = [event for event in read_events(tmp_path) if event["event"] == "fault"]
    assert [(event["rank"], event["step"]) for event in faults] == [(0, BROKEN)], "told once"


def test_when_the_data_are_mended_the_run_goes_on_as_if_nothing_had_been(tmp_path):
    """No rank took a part of the step that was given up: not of its rows, nor of its gradients."""
    for folder, breaks in (("run", (True, False)), ("straight", (False,))):
        for broken in breaks:
            ends = run_ranks(ended, 2, arguments(tmp_path / folder), broken, backend=None, timeout=120)
            assert {code for code, _, _ in ends} == {2 if broken else 0}
    resumed, straight = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "straight"))
    assert [record["attempt"] for record in resumed] == [1] * BROKEN + [2] * (STEPS - BROKEN)
    for key in ("loss", "grad_norm"):
        assert largest_difference(resumed, straight, key) == 0


def ended_in_a_validation(argv: list[str], batches: int) -> tuple[int, str, str]:
    """Exit code, report and log of a rank; the second one cannot read validation text after so many batches of it."""
    import torch.distributed as dist

    from quadriga.data import stream_loader

    real = stream_loader._assign_rows

    def assign(streams, *given):
        for number, each in enumerate(real(streams, *given)):
            if not streams.endless and number == batches and dist.get_rank() == 1:
                raise UserError(Problem("held_out/3.jsonl, line 7", "not JSON: Expecting ',' delimiter"))
            yield each

    stream_loader._assign_rows = assign
    return ended(argv, broken=False)


@pytest.mark.parametrize(
    ("ranks", "more"),
    [(2, ()), pytest.param(2, PP, marks=pytest.mark.slow), pytest.param(4, (), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("batches", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_validation_text_that_one_rank_cannot_read_ends_the_run_at_its_step(tmp_path, ranks, more, batches):
    argv = arguments(tmp_path, *more, "--validation.enable", "--validation.freq=2", "--validation.seq_len=16")
    argv += ["--validation.dataset=builtin_validation", "--validation.steps=3", "--validation.local_batch_size=4"]
    ends = run_ranks(ended_in_a_validation, ranks, argv, batches, backend=None, timeout=120)
    assert {code for code, _, _ in ends} == {2}
    (report,) = {report for _, report, _ in ends}
    assert report.splitlines()[2] == "held_out/3.jsonl, line 7"
    found = find_complete(tmp_path / "checkpoint")
    assert found.step == 1, "the first validation is at step 1"
    assert find_damage(found) == []


def failing_validation(argv: list[str]) -> int:
    from quadriga.train.validate import SetLoss, Validator

    real = Validator.mean_loss

    def mean_loss(self, *given):
        if self.freq == 2 and torch.is_grad_enabled() and given:
            real(self, *given)
            mean_loss.calls += 1
            if mean_loss.calls == 2:  # at step 2; the first was at step 1
                raise RuntimeError("the validation ended the run")
        return SetLoss(1.0, 1, 1)

    mean_loss.calls = 0
    Validator.mean_loss = mean_loss
    return one_rank(argv)


def test_what_ends_a_validation_leaves_the_save_of_its_step(tmp_path):
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(tmp_path), *TINY, "--checkpoint.enable"]
    argv += ["--checkpoint.interval=2", "--training.steps=4", "--validation.enable", "--validation.freq=2"]
    argv += ["--validation.dataset=builtin_validation", "--validation.steps=1"]
    with pytest.raises(RankError, match="the validation ended the run"):
        run_ranks(failing_validation, 1, argv, backend=None)
    assert find_complete(tmp_path / "checkpoint").step == 2
    assert [record["step"] for record in train(tmp_path, 1, *argv[4:])] == [1, 2, 3, 4]
