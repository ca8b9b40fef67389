"""A run folder that is removed or replaced in mid-run: all ranks stop, say so, and write into nothing else."""

from __future__ import annotations

import os
import shutil

import pytest
from ranks import RankError, run_ranks
from training import DEBUG_FILE, TINY, one_rank

from quadriga.errors import EXIT_FAULT, Fault


def train_and_lose(argv: list[str], folder: str, replaced: bool) -> tuple[int, str]:
    """After step 3 the folder is gone, or another one has its name."""
    from quadriga.resilience import stop_requests
    from quadriga.train import loop

    stop_requests.POLL_SECONDS = 0.0
    real = loop.train_step

    def train_step(state, *given):
        metrics = real(state, *given)
        if state.step == 3 and os.environ["RANK"] == "0":
            os.rename(folder, f"{folder}.was")
            shutil.rmtree(f"{folder}.was")
            if replaced:
                os.mkdir(folder)
        return metrics

    loop.train_step = train_step
    try:
        return one_rank(argv), ""
    except Fault as error:
        return error.exit_code, str(error)


@pytest.mark.parametrize("replaced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lost_run_folder_stops_the_run(tmp_path, replaced):
    folder = tmp_path / "run"
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(folder), *TINY, "--training.steps=50"]
    argv += ["--checkpoint.enable", "--checkpoint.interval=100", "--metrics.log_documents"]
    ends = run_ranks(train_and_lose, 2, argv, str(folder), replaced, backend=None, timeout=120)
    assert [code for code, _ in ends] == [EXIT_FAULT] * 2
    assert ends[0][1] == ends[1][1]
    assert f"the run folder {folder} was removed or replaced during the run: stopped after step 4" in ends[0][1]
    assert (os.listdir(folder) if replaced else folder.exists()) in ([], False)


def test_a_folder_for_traces_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "comm_traces").write_text("a file")
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(tmp_path), *TINY, "--training.steps=1"]
    with pytest.raises(RankError, match=r"comm\.save_traces_folder = .*comm_traces"):
        run_ranks(one_rank, 1, argv, backend=None)
