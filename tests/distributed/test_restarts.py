"""torchrun's restarts: the ranks go on from the newest checkpoint by themselves, and not where that is of no use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ROOT, RUN_TRAIN, TORCHRUN, Running, launch, replace_loop
from ranks import run_ranks
from sockets import free_port
from training import DEBUG_FILE, TINY, one_rank, train

from quadriga.metrics.jsonl import read_metrics

STEPS = (*TINY, "--training.steps=7", "--lr_scheduler.total_steps=7", "--checkpoint.enable", "--checkpoint.interval=2")

# The real loop, in which rank 1 does something of its own before it takes a step: EVENTS is {start: {step: what}}.
LOOP = str(ROOT / "quadriga" / "train" / "loop.py")
EVENTFUL = f"""
import importlib.util, json, os, signal
specification = importlib.util.spec_from_file_location("quadriga.train.real_loop", {LOOP!r})
loop = importlib.util.module_from_spec(specification)
specification.loader.exec_module(loop)
run, take_step = loop.run, loop.train_step
events = json.loads(os.environ["EVENTS"]).get(os.environ["TORCHELASTIC_RESTART_COUNT"], {{}})

def train_step(state, step_config, mesh):
    event = events.get(str(state.step + 1))
    if event == "raise" and os.environ["RANK"] == "1":
        raise ValueError("broken on purpose")
    if event and os.environ["RANK"] == "1":
        os.kill(os.getpid(), getattr(signal, event))
    return take_step(state, step_config, mesh)

loop.train_step = train_step
"""


def eventful(folder: Path, events: dict[int, dict[int, str]]) -> dict[str, str]:
    return {"NGPU": "2", "EVENTS": json.dumps(events), **replace_loop(folder, EVENTFUL)}


def numbers(records: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def test_a_killed_rank_is_started_again_and_the_run_is_the_straight_one(tmp_path: Path) -> None:
    environ = {"MAX_RESTARTS": "2", **eventful(tmp_path / "hook", {0: {5: "SIGKILL"}})}
    ended = launch([*RUN_TRAIN, *STEPS, "--job.dump_folder", str(tmp_path / "run")], environ, timeout=240)
    assert ended.code == 0, ended.err
    assert "restart 1 of 2, since " in ended.err
    assert "resumed: step 4 of 7" in ended.err
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["attempt"] for record in records] == [1, 1, 1, 1, 2, 2, 2]
    straight = train(tmp_path / "straight", 2, *STEPS)
    assert numbers(records) == numbers(straight)


MISTAKEN = """
import os, pathlib
from quadriga.errors import Problem, UserError

def run(run, environ):
    with open(environ["STARTS"], "a") as file:
        file.write(environ["RANK"] + "\\n")
    if environ["RANK"] == "1":
        raise UserError(Problem("data.jsonl, line 3", "is not JSON"))
    import time
    time.sleep(60)
"""


def test_what_no_restart_can_mend_is_not_tried_again(tmp_path: Path) -> None:
    environ = {"NGPU": "2", "MAX_RESTARTS": "1", "STARTS": str(tmp_path / "starts"), **replace_loop(tmp_path, MISTAKEN)}
    ended = launch([*RUN_TRAIN, "--job.dump_folder", str(tmp_path / "run")], environ)
    assert ended.code == 2
    assert ended.err.count("is not JSON") == 1
    assert (tmp_path / "starts").read_text().count("1\n") == 1


@pytest.mark.slow
def test_restarts_that_are_used_up_end_with_the_last_error(tmp_path: Path) -> None:
    """The second start fails at a later step; what the first one left does not decide."""
    environ = {"MAX_RESTARTS": "1", **eventful(tmp_path / "hook", {0: {3: "SIGKILL"}, 1: {5: "raise"}})}
    ended = launch([*RUN_TRAIN, *STEPS, "--job.dump_folder", str(tmp_path / "run")], environ, timeout=240)
    assert ended.code == 1
    assert ended.err.rstrip().splitlines()[-1] == "ValueError: broken on purpose"
    assert "SIGKILL" not in ended.err


@pytest.mark.slow
def test_all_machines_start_again_when_one_loses_a_rank(tmp_path: Path) -> None:
    """Two launchers on this machine, one rank each."""
    port = free_port()
    common = eventful(tmp_path / "hook", {0: {5: "SIGKILL"}}) | {"NGPU": "1", "NNODES": "2", "MAX_RESTARTS": "1"}
    common |= {"RDZV_ENDPOINT": f"127.0.0.1:{port}", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*RUN_TRAIN, *STEPS, "--job.dump_folder", str(tmp_path / "run")]
    machines = [Running(command, {**common, "NODE_RANK": node}) for node in ("0", "1")]
    try:
        ends = [machine.end(240) for machine in machines]
    finally:
        for machine in machines:
            machine.kill_all()
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["attempt"] for record in records] == [1, 1, 1, 1, 2, 2, 2]


@pytest.mark.slow
def test_a_bare_torchrun_restarts_and_does_not_go_on_when_asked_to_leave(tmp_path: Path) -> None:
    """The first start fails, the second goes on and is asked to leave; the third leaves at once."""
    environ = eventful(tmp_path / "hook", {0: {4: "raise"}, 1: {4: "SIGUSR1"}}) | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [*TORCHRUN, "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=2"]
    command += [str(ROOT / "torchtitan/train.py"), *STEPS, "--job.dump_folder", str(tmp_path / "run")]
    running = Running(command, environ)
    try:
        ended = running.end(150)
    finally:
        running.kill_all()
    assert ended.code == 1  # torchrun's own, for ranks that left with 75
    assert "exitcode  : 75" in ended.err
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(record["step"], record["attempt"]) for record in records] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert (tmp_path / "run/checkpoint/step-5").is_dir()


def timeouts(folder: str, steps: int) -> dict[str, list[int]]:
    """How long the collectives of training were allowed to wait, in ms, before the first step's end and after."""
    from quadriga.train import loop

    tighten, marks = loop.process_group.tighten_timeouts, []

    def tightened(comm):
        tighten(comm)
        marks.append(len(recorded()))

    loop.process_group.tighten_timeouts = tightened
    argv = ["--comm.init_timeout_seconds=50", "--comm.train_timeout_seconds=20", f"--training.steps={steps}"]
    assert one_rank(["--job.config_file", DEBUG_FILE, "--job.dump_folder", folder, *STEPS, *argv]) == 0
    entries = [entry for entry in recorded() if entry["process_group"][1] != "host"]
    cut = len([entry for entry in recorded()[: marks[0]] if entry["process_group"][1] != "host"])
    return {
        "before": sorted({entry["timeout_ms"] for entry in entries[:cut]}),
        "after": sorted({entry["timeout_ms"] for entry in entries[cut:]}),
        "host": sorted({e["timeout_ms"] for e in recorded() if e["process_group"][1] == "host"}),
    }


def recorded() -> list[dict[str, object]]:
    from torch._C._distributed_c10d import _dump_fr_trace_json

    return json.loads(_dump_fr_trace_json())["entries"]


def test_timeouts_are_short_after_the_first_step_also_of_a_resumed_run(tmp_path: Path) -> None:
    for steps in (3, 6):
        for known in run_ranks(timeouts, 2, str(tmp_path), steps, backend=None):
            assert known == {"before": [50_000], "after": [20_000], "host": [1_800_000]}
