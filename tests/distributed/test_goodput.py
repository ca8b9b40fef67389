"""The account of a real run that was killed in the middle and started again."""

from __future__ import annotations

import json
import time

import pytest
from fault_injection import InjectedFault, inject
from ranks import RankError, run_ranks
from training import DEBUG_FILE, TINY, one_rank, train

from quadriga.cli.main import main
from quadriga.metrics.events import read_events


def rank_with_faults(argv: list[str], injected: InjectedFault) -> int:
    inject(injected)
    return one_rank(argv)


def test_a_run_that_was_killed_and_started_again(tmp_path, capsys):
    keys = ("--checkpoint.enable", "--checkpoint.interval=3", "--training.steps=8")
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(tmp_path), *TINY, *keys]
    before = time.time()
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(rank_with_faults, 1, argv, InjectedFault(6, kill=True), backend=None)
    killed = time.time()
    train(tmp_path, 1, *TINY, *keys)
    after = time.time()
    capsys.readouterr()

    assert main(["goodput", str(tmp_path), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert sum(output["shares"].values()) == pytest.approx(1)
    assert sum(output["seconds"].values()) == pytest.approx(output["wall_seconds"])
    assert before - 1 < output["from"] < output["to"] < after  # the system counts the starts of processes in 1/100 s
    first, second = output["attempts"]
    assert first["began"] < first["ready"] < first["last"] < killed < second["last"]
    assert (first["first_step"], first["kept_step"], first["last_step"]) == (0, 3, 5)  # killed before its last line
    assert (second["first_step"], second["kept_step"], second["last_step"]) == (3, 8, 8)
    assert (first["ended"], second["ended"]) == ("killed without an event", "finished")
    assert all(output["seconds"][kind] > 0 for kind in ("trained", "saved", "started", "lost", "down"))
    assert output["seconds"]["started"] == pytest.approx(sum(one["ready"] - one["began"] for one in (first, second)))
    assert (output["step"], output["replayed_steps"], output["saves"]) == (8, 2, 3)

    events = [(event["attempt"], event["event"]) for event in read_events(tmp_path)]
    assert [kind for number, kind in events if number == 1] == ["start", "ready", "save_begin", "save_end"]
    assert [kind for number, kind in events if number == 2][:3] == ["start", "resume", "ready"]
    assert events[-1] == (2, "end")
    assert main(["goodput", str(tmp_path)]) == 0
    assert "2 starts" in capsys.readouterr().out


def test_a_start_that_ends_before_its_first_figures_has_a_number_of_its_own(tmp_path):
    """With a line at step 1 and every tenth: killed after step 2, twice."""
    keys = ("--checkpoint.no_enable", "--metrics.log_freq=10", "--training.steps=2")
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(tmp_path), *TINY, *keys]
    for _ in range(2):
        with pytest.raises(RankError, match="exit code -9"):
            run_ranks(rank_with_faults, 1, argv, InjectedFault(1, kill=True), backend=None)
    train(tmp_path, 1, *TINY, *keys)
    starts = [event for event in read_events(tmp_path) if event["event"] == "start"]
    assert [start["attempt"] for start in starts] == [1, 2, 3]
    assert all(start["process_start"] <= start["time"] for start in starts)
    assert starts[0]["layout"] == {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1}
