"""Launches as a user makes them: one report for what is wrong, the first error last, documented exit codes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from launching import LAUNCH, ROOT, RUN_TRAIN, TORCHRUN, TRAIN, LaunchResult, Running, launch, replace_loop, wait_until
from sockets import free_port

WRONG = ["--training.stepps", "10", "--training.seq_len", "abc"]
WORDS = "two  words, 'single', \"double\", $HOME, * and a \\ backslash"
BARE_TORCHRUN = [
    *TORCHRUN,
    "--standalone",
    "--local-addr=127.0.0.1",
    "--nproc-per-node=2",
    str(ROOT / "torchtitan/train.py"),
]


def assert_one_report(ended: LaunchResult) -> None:
    assert ended.err.count("quadriga: 2 problems") == 1
    assert "did you mean: training.steps" in ended.err
    assert ended.err.count("training.seq_len = abc") == 1
    assert ended.out == ""


@pytest.mark.parametrize("command", [RUN_TRAIN, LAUNCH, TRAIN], ids=["run_train.sh", "launch", "train"])
def test_a_wrong_configuration_is_one_report_and_exit_2(command: list[str], tmp_path: Path) -> None:
    ended = launch([*command, *WRONG], cwd=tmp_path)
    assert ended.code == 2
    assert_one_report(ended)
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []  # nothing was started, so nothing is left


def test_wrong_variables_stand_in_the_same_report(tmp_path: Path) -> None:
    ended = launch([*RUN_TRAIN, "--training.stepps", "10"], {"NGPU": "many", "LOG_RANK": "x"}, cwd=tmp_path)
    assert ended.code == 2
    assert "quadriga: 3 problems" in ended.err
    for where in ("NGPU = many", "LOG_RANK = x", "training.stepps"):
        assert where in ended.err


def test_under_bare_torchrun_the_report_appears_once(tmp_path: Path) -> None:
    ended = launch([*BARE_TORCHRUN, *WRONG], cwd=tmp_path)
    assert ended.code != 0
    assert_one_report(ended)


def test_config_file_is_relative_to_the_callers_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[job]\ndescription = "found beside the caller"\n')
    ended = launch(RUN_TRAIN, {"CONFIG_FILE": "mine.toml", "DRY_RUN": "1"}, cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert "found beside the caller" in ended.out
    missing = launch(RUN_TRAIN, {"CONFIG_FILE": "other.toml", "DRY_RUN": "1"}, cwd=tmp_path)
    assert missing.code == 2
    assert "other.toml" in missing.err


REPORTER = """
import json, os, pathlib, signal, time

def run(run, environ):
    stopped = []
    signal.signal(signal.SIGUSR1, lambda number, frame: stopped.append(number))
    seen = {name: environ.get(name) for name in ("COMM_BACKEND", "PYTORCH_ALLOC_CONF", "RANK", "WORLD_SIZE")}
    here = {"description": run.config.job.description, "cwd": os.getcwd(), "seen": seen}
    report = pathlib.Path(environ["REPORTS"], "rank" + environ["RANK"])
    report.with_suffix(".draft").write_text(json.dumps(here))
    report.with_suffix(".draft").rename(report)
    while environ["WAIT"] == "1" and not stopped:
        time.sleep(0.05)
    return 0
"""


def test_what_ranks_are_given_and_how_a_signal_reaches_them(tmp_path: Path) -> None:
    """Quoting, working folder and variables survive from the shell to every rank; a rank may save on SIGUSR1."""
    (tmp_path / "json.py").write_text("raise RuntimeError('a file of the caller stands in for a module of Python')")
    environ = replace_loop(tmp_path / "stand_in", REPORTER) | {"NGPU": "2", "REPORTS": str(tmp_path), "WAIT": "1"}
    command = [*RUN_TRAIN, "--job.description", WORDS, f"--job.dump_folder={tmp_path}/a b"]
    reports = [tmp_path / "rank0", tmp_path / "rank1"]
    running = Running(command, environ, cwd=tmp_path)
    try:
        assert wait_until(lambda: all(report.exists() for report in reports), 150)
        running.process.send_signal(signal.SIGUSR1)
        ended = running.end()
    finally:
        running.kill_all()
    assert ended.code == 0, ended.err
    assert "2 ranks over gloo (no CUDA device is visible)" in ended.err
    for rank, path in enumerate(reports):
        report = json.loads(path.read_text())
        assert report["description"] == WORDS
        assert report["cwd"] == str(tmp_path)
        assert report["seen"] == {
            "COMM_BACKEND": "gloo",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "RANK": str(rank),
            "WORLD_SIZE": "2",
        }
    assert (tmp_path / "a b" / ".lock").exists()


FAILING = """
import os, time
from quadriga.errors import Problem, UserError

def run(run, environ):
    rank, case = int(environ["RANK"]), environ["CASE"]
    if rank == 1 and case == "fault":
        raise ValueError("the first error")
    if rank == 1 and case == "user":
        raise UserError(Problem("data.jsonl, line 3", "is not JSON"))
    if rank == 1 and case == "killed":
        os.kill(os.getpid(), 9)
    if case == "all":
        import torch.distributed
        raise UserError(Problem("data.jsonl, line 3", "is not JSON"))
    while case == "fault" and not os.path.exists(os.environ["QUADRIGA_EXIT_RECORDS"] + "/0/rank1.json"):
        time.sleep(0.01)
    time.sleep(0 if case == "fault" else 60)
    raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234")
"""
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "code", "last"),
    [
        pytest.param("fault", 1, "ValueError: the first error", id="fault"),
        pytest.param("user", 2, "    is not JSON", id="user", marks=slow),
        pytest.param("killed", 1, "(see `dmesg`). A scheduler may, too.", id="killed", marks=slow),
    ],
)
def test_the_first_error_of_a_failed_rank_comes_last(case: str, code: int, last: str, tmp_path: Path) -> None:
    environ = replace_loop(tmp_path / "stand_in", FAILING) | {"NGPU": "2", "CASE": case}
    ended = launch([*RUN_TRAIN, "--job.dump_folder", str(tmp_path / "run")], environ)
    assert ended.code == code, ended.err
    assert ended.err.rstrip().splitlines()[-1].endswith(last)
    assert "ChildFailedError" not in ended.err
    assert ended.err.count("    is not JSON") == (1 if case == "user" else 0)


@slow
def test_a_report_of_every_rank_of_a_bare_torchrun_appears_once(tmp_path: Path) -> None:
    """What is found wrong only in training, by all ranks at the same time."""
    environ = replace_loop(tmp_path / "stand_in", FAILING) | {"CASE": "all"}
    ended = launch([*BARE_TORCHRUN, "--job.dump_folder", str(tmp_path / "run")], environ)
    assert ended.code != 0
    assert ended.err.count("    is not JSON") == 1


@slow
def test_sigterm_ends_ranks_that_do_not_mind_it(tmp_path: Path) -> None:
    environ = replace_loop(tmp_path / "stand_in", REPORTER) | {"NGPU": "2", "REPORTS": str(tmp_path), "WAIT": "1"}
    running = Running([*RUN_TRAIN, "--job.dump_folder", str(tmp_path / "run")], environ)
    try:
        assert wait_until(lambda: (tmp_path / "rank0").exists() and (tmp_path / "rank1").exists(), 150)
        running.process.send_signal(signal.SIGTERM)
        ended = running.end()
    finally:
        running.kill_all()
    assert ended.code == 143
    assert ended.err.rstrip().splitlines()[-1] == "stopped by SIGTERM"


@slow
def test_two_machines(tmp_path: Path) -> None:
    """Two launchers on this machine, each with one rank, meet at RDZV_ENDPOINT."""
    port = free_port()
    common = replace_loop(tmp_path / "stand_in", REPORTER) | {"REPORTS": str(tmp_path), "WAIT": "0"}
    common |= {"NGPU": "1", "NNODES": "2", "RDZV_ENDPOINT": f"127.0.0.1:{port}"}
    command = [*RUN_TRAIN, "--job.dump_folder", str(tmp_path / "run")]
    machines = [Running(command, {**common, "NODE_RANK": node}) for node in ("1", "0")]
    try:
        ends = [machine.end(150) for machine in machines]
    finally:
        for machine in machines:
            machine.kill_all()
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert [json.loads((tmp_path / f"rank{rank}").read_text())["seen"]["WORLD_SIZE"] for rank in "01"] == ["2", "2"]
