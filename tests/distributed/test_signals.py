"""What is asked of a run from outside: it finishes its step, saves and exits with 75, and goes on from there."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from launching import ROOT, RUN_TRAIN, TORCHRUN, Running, finished_steps, is_alive, replace_loop, wait_until
from ranks import RankError, run_ranks
from sockets import free_port
from training import DEBUG_FILE, TINY, one_rank

from quadriga.metrics.events import read_events
from quadriga.metrics.jsonl import read_metrics

ENDLESS = (*TINY, "--training.steps=100000", "--lr_scheduler.total_steps=100")
SAVING = ("--checkpoint.enable",)


@pytest.fixture(autouse=True)
def _take_interrupts() -> None:
    """What is started from here handles Ctrl-C, also where these tests run in the background of a shell."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def saved_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoint").glob("step-*"))


def launched(folder: Path, *arguments: str, **environ: str) -> Running:
    return Running([*RUN_TRAIN, *ENDLESS, *arguments, "--job.dump_folder", str(folder)], {"NGPU": "2", **environ})


@pytest.mark.parametrize(
    ("number", "everybody"),
    [
        pytest.param(signal.SIGUSR1, False, id="SIGUSR1"),
        pytest.param(signal.SIGTERM, True, id="SIGTERM-to-all", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, id="SIGINT-to-all", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, False, id="SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_launcher_saves_and_leaves_with_75(number: int, everybody: bool, tmp_path: Path) -> None:
    """`everybody`: as schedulers do that signal every process of a job. Save requests that come before there is
    anything to save do no harm."""
    running = launched(tmp_path, *SAVING)
    try:
        assert wait_until(lambda: running.has_started("quadriga.launch.agent"), 150)
        running.process.send_signal(signal.SIGUSR2)
        assert wait_until(lambda: finished_steps(tmp_path) >= 3, 150)
        for pid in running.process_tree() if everybody else [running.process.pid]:
            os.kill(pid, number)
        ended = running.end(120)
        assert ended.code == 75, ended.err
        assert not [pid for pid in running.seen if Path(f"/proc/{pid}").exists()], "a process or a zombie is left"
    finally:
        running.kill_all()
    step = finished_steps(tmp_path)
    assert saved_in(tmp_path)[-1] == step
    last = ended.err.rstrip().splitlines()[-1]
    assert last == (
        f"{signal.Signals(number).name}: stopped after step {step} of 100000; "
        f"saved in {tmp_path}/checkpoint/step-{step}; the same command resumes from there (exit code 75)"
    )
    assert [event["name"] for event in read_events(tmp_path) if event["event"] == "signal"] == [
        signal.Signals(number).name
    ]


def save_and_stop_requests(folder: str) -> tuple[int, list[int]]:
    """Rank 1 is told to save; then the files are dropped. The exit code, and what was saved before the last file."""
    place, saved = Path(folder), []

    def send_requests() -> None:
        wait_until(lambda: finished_steps(place) >= 3, 90)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR2)
        wait_until(lambda: len(saved_in(place)) == 1, 90)
        if os.environ["RANK"] == "0":
            (place / "SAVE").touch()
        wait_until(lambda: len(saved_in(place)) == 2 and not (place / "SAVE").exists(), 90)
        at = finished_steps(place)
        wait_until(lambda: finished_steps(place) >= at + 10, 90)  # one request is one save
        saved.extend(saved_in(place))
        if os.environ["RANK"] == "0":
            (place / "STOP").touch()

    thread = threading.Thread(target=send_requests)
    thread.start()
    code = one_rank(["--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *ENDLESS, *SAVING])
    thread.join()
    return code, saved


def test_files_and_a_signal_to_any_rank_save_once_and_leave(tmp_path: Path) -> None:
    ends = run_ranks(save_and_stop_requests, 2, str(tmp_path), backend=None, timeout=400)
    for code, saved in ends:
        assert code == 75
        assert len(saved) == 2
    assert saved_in(tmp_path)[-1] == finished_steps(tmp_path)
    assert not (tmp_path / "STOP").exists()
    assert [event["name"] for event in read_events(tmp_path) if event["event"] == "signal"] == ["the file STOP"]


def run_with_interrupts(folder: str, times: int, arguments: tuple[str, ...]) -> int:
    """Ctrl-C in the second step, so many times, on every rank."""
    from quadriga.train import loop

    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell may ignore it
    take_step = loop.train_step

    def train_step(state, step_config, mesh):
        for _ in range(times if state.step == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(state, step_config, mesh)

    loop.train_step = train_step
    code = one_rank(["--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *ENDLESS, *arguments])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are restored"
    return code


def test_without_checkpoints_the_step_is_finished_and_nothing_saved(tmp_path: Path) -> None:
    assert run_ranks(run_with_interrupts, 2, str(tmp_path), 1, ("--checkpoint.no_enable",), backend=None) == [130, 130]
    assert finished_steps(tmp_path) == 3  # the request is agreed on after the step that follows it
    assert saved_in(tmp_path) == []


def test_one_rank_leaves_after_the_very_step(tmp_path: Path) -> None:
    assert run_ranks(run_with_interrupts, 1, str(tmp_path), 1, SAVING, backend=None) == [75]
    assert saved_in(tmp_path) == [2]
    assert finished_steps(tmp_path) == 2


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exit code 130"):
        run_ranks(run_with_interrupts, 1, str(tmp_path), 2, SAVING, backend=None)
    assert (finished_steps(tmp_path), saved_in(tmp_path)) == (1, [])


def finishing(folder: str) -> int:
    """A signal in the last step."""
    from quadriga.train import loop

    take_step = loop.train_step

    def train_step(state, step_config, mesh):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(state, step_config, mesh)

    loop.train_step = train_step
    return one_rank(
        ["--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *TINY, *SAVING, "--training.steps=3"]
    )


def test_a_run_that_is_done_anyway_ends_with_0(tmp_path: Path) -> None:
    assert run_ranks(finishing, 1, str(tmp_path), backend=None) == [0]
    assert saved_in(tmp_path) == [3]


def minutes(folder: str) -> int:
    return one_rank(
        [
            *("--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *TINY, *SAVING, "--training.steps=12"),
            *("--checkpoint.interval_minutes=0.000001", "--checkpoint.keep_latest_k=0"),
        ]
    )


def test_minutes_are_those_of_the_first_rank_and_do_not_add_up(tmp_path: Path) -> None:
    """Always due: agreed on after one step, saved after the next, and what was agreed meanwhile is answered by it."""
    assert run_ranks(minutes, 2, str(tmp_path), backend=None) == [0, 0]
    assert saved_in(tmp_path) == [2, 4, 6, 8, 10, 12]


LOOP = str(ROOT / "quadriga" / "train" / "loop.py")
SLOW_STEP = f"""
import importlib.util, os, pathlib, signal, time
specification = importlib.util.spec_from_file_location("quadriga.train.real_loop", {LOOP!r})
loop = importlib.util.module_from_spec(specification)
specification.loader.exec_module(loop)
run, take_step = loop.run, loop.train_step

def train_step(state, step_config, mesh):
    if state.step == 1:
        handled = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda *received: (pathlib.Path(os.environ["SEEN"]).touch(), handled(*received)))
        pathlib.Path(os.environ["SEEN"] + "-there-" + os.environ["RANK"]).touch()
        time.sleep(600)
    return take_step(state, step_config, mesh)

loop.train_step = train_step
"""


@pytest.mark.slow
def test_ranks_that_take_too_long_are_killed(tmp_path: Path) -> None:
    environ = replace_loop(tmp_path / "hook", SLOW_STEP) | {"SEEN": str(tmp_path / "seen")}
    running = launched(tmp_path / "run", *SAVING, "--checkpoint.timeout_seconds=2", **environ)
    try:
        assert wait_until(lambda: finished_steps(tmp_path / "run") == 1, 150)
        start = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        ended = running.end(100)
        assert time.monotonic() - start >= 2
        assert ended.code == 143
        assert "the ranks did not finish within 2 s (checkpoint.timeout_seconds): killed" in ended.err
        assert not [pid for pid in running.seen if is_alive(pid)]
    finally:
        running.kill_all()


@pytest.mark.slow
def test_a_second_interrupt_of_the_launcher_ends_all_at_once(tmp_path: Path) -> None:
    environ = replace_loop(tmp_path / "hook", SLOW_STEP) | {"SEEN": str(tmp_path / "seen")}
    running = launched(tmp_path / "run", *SAVING, **environ)
    try:
        assert wait_until((tmp_path / "seen-there-0").exists, 150)
        running.process.send_signal(signal.SIGINT)
        assert wait_until((tmp_path / "seen").exists, 60)  # the launcher has handled it, and a rank has
        running.process.send_signal(signal.SIGINT)
        assert running.end(100).code == 130
        assert not [pid for pid in running.seen if is_alive(pid)]
    finally:
        running.kill_all()


@pytest.mark.slow
def test_ranks_of_a_bare_torchrun_leave_with_75_themselves(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    command += [str(ROOT / "torchtitan/train.py"), *ENDLESS, *SAVING, "--job.dump_folder", str(tmp_path)]
    running = Running(command, {"GLOO_SOCKET_IFNAME": "lo"})
    try:
        assert wait_until(lambda: finished_steps(tmp_path) >= 3, 150)
        rank = int((tmp_path / ".lock").read_text().split()[1])
        os.kill(rank, signal.SIGUSR1)
        ended = running.end(120)
    finally:
        running.kill_all()
    assert ended.code == 1  # torchrun's own
    assert "exitcode  : 75" in ended.err
    step = finished_steps(tmp_path)
    assert saved_in(tmp_path)[-1] == step
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))


@pytest.mark.slow
def test_a_signal_to_one_machine_ends_the_run_on_all(tmp_path: Path) -> None:
    """Two launchers on this machine, one rank each."""
    port = free_port()
    common = {"NGPU": "1", "NNODES": "2", "RDZV_ENDPOINT": f"127.0.0.1:{port}", "GLOO_SOCKET_IFNAME": "lo"}
    machines = [launched(tmp_path, *SAVING, **common, NODE_RANK=node) for node in ("0", "1")]
    try:
        assert wait_until(lambda: finished_steps(tmp_path) >= 3, 150)
        machines[1].process.send_signal(signal.SIGTERM)
        ends = [machine.end(150) for machine in machines]
    finally:
        for machine in machines:
            machine.kill_all()
    assert [end.code for end in ends] == [75, 75], ends[0].err + ends[1].err
    assert saved_in(tmp_path)[-1] == finished_steps(tmp_path)
