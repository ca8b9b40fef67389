"""A run on one machine listens on the loopback alone; hostile clients on its ports neither run code nor stop it."""

from __future__ import annotations

import base64
import os
import pickle
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, RUN_TRAIN, TRAIN, Running, command_line, replace_loop, wait_until
from sockets import HostileClient, Listener, listeners
from training import DEBUG_FILE, TINY, train

from quadriga.metrics.jsonl import read_metrics

STEPS = (*TINY, "--training.steps=6", "--lr_scheduler.total_steps=6", "--comm.train_timeout_seconds=150")
SAVING = ("--checkpoint.enable", "--checkpoint.interval=2")

# The real loop, whose first rank stops before step 4 (after a restart: 5) until the test lets it go on. With DIE, rank
# 1 of the first start kills itself before step 6.
GATED = f"""
import importlib.util, os, pathlib, signal, time
specification = importlib.util.spec_from_file_location(
    "quadriga.train.real_loop", {str(ROOT / "quadriga" / "train" / "loop.py")!r}
)
loop = importlib.util.module_from_spec(specification)
specification.loader.exec_module(loop)
run, take_step = loop.run, loop.train_step
start, rank = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("RANK", "0")
gate = pathlib.Path(os.environ["GATE"])

def train_step(state, *further):
    step = state.step + 1
    if rank == "0" and step == (4 if start == "0" else 5):
        (gate / f"{{start}}.there").touch()
        while not (gate / f"{{start}}.go").exists():
            time.sleep(0.02)
    if rank == "1" and start == "0" and step == 6 and "DIE" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(state, *further)

loop.train_step = train_step
"""


class Canary:
    """What runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


class RunUnderAttack:
    """A run whose every port is attacked as soon as it is seen, and whose store is written to while it trains."""

    def __init__(self, folder: Path, command: list[str], environ: dict[str, str]) -> None:
        folder.mkdir()
        self.folder, self.canary = folder, folder / "canary"
        self.seen: set[Listener] = set()
        self.stores: set[int] = set()  # the ports of the agent
        self.starts: set[str] = set()
        self._client = HostileClient()
        environ = {"NGPU": "2", "GATE": str(folder), **replace_loop(folder / "hook", GATED), **environ}
        self.running = Running([*command, "--job.dump_folder", str(folder / "run")], environ)

    def attack_new_ports(self) -> bool:
        """Attack what is new; whether the run has ended."""
        for listener in listeners(self.running.process_tree()) - self.seen:
            self.seen.add(listener)
            if "quadriga.launch.agent" in command_line(listener.pid):
                self.stores.add(listener.port)
            if listener.is_loopback:
                self._client.attack(listener.port)
        for gate in self.folder.glob("*.there"):
            if gate.stem not in self.starts:
                self.starts.add(gate.stem)
                for listener in listeners(self.running.process_tree()):
                    if listener.port in self.stores:
                        write_into_store(listener.port, gate.stem, self.canary)
                gate.with_suffix(".go").touch()
        return self.running.process.poll() is not None

    def end(self) -> str:
        """What it said."""
        try:
            assert wait_until(self.attack_new_ports, 240)
            ended = self.running.end(30)
        finally:
            self.running.kill_all()
            self._client.close()
        assert ended.code == 0, ended.err
        assert not self.canary.exists()
        assert {str(one) for one in self.seen if not one.is_loopback} == set()
        return ended.err

    @property
    def numbers(self) -> list[tuple[object, ...]]:
        return numbers(read_metrics(self.folder / "run" / "metrics.jsonl"))


def write_into_store(port: int, start: str, canary: Path) -> None:
    """Pickles under the names that torchrun's c10d rendezvous reads, and in place of what ranks say of themselves."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
    code = pickle.dumps(Canary(canary))
    known = store.list_keys() if hasattr(store, "list_keys") else []
    names = {name.lstrip("/") for name in known if "rendezvous" in name or "quadriga/watch" in name}
    names |= {"torch.rendezvous.quadriga", "torch.rendezvous.none"}
    names |= {f"quadriga/watch/{start}/{name}" for name in ("0", "1", "alarm", "leader", "stack")}
    for name in sorted(names):
        store.set(name, base64.b64encode(code) if "rendezvous" in name else code)
    key = f"quadriga/watch/{start}/alarm"
    assert wait_until(lambda: store.get(key) == b"-", 100), "no rank has taken back what is no alarm"


def numbers(records: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def test_what_listens_on_all_interfaces_is_found() -> None:
    """Without this the other tests could not fail."""
    with socket.create_server(("0.0.0.0", 0)) as four, socket.socket(socket.AF_INET6) as six:
        six.bind(("::", 0))
        six.listen()
        ports = {four.getsockname()[1]: False, six.getsockname()[1]: False}
        with socket.create_server(("127.0.0.1", 0)) as inner, socket.socket(socket.AF_INET6) as mapped:
            mapped.bind(("::ffff:127.0.0.1", 0))
            mapped.listen()
            ports |= {inner.getsockname()[1]: True, mapped.getsockname()[1]: True}
            found = {listener.port: listener.is_loopback for listener in listeners({os.getpid()})}
    assert {port: found[port] for port in ports} == ports


def test_all_ports_of_a_run_are_of_the_loopback_and_strangers_do_not_change_it(tmp_path: Path) -> None:
    run = RunUnderAttack(tmp_path / "run", [*RUN_TRAIN, *STEPS], {})
    output = run.end()
    assert run.starts == {"0"}
    assert "was not written by a rank" in output  # the pickle in place of an alarm was seen, and not taken
    by_pid = {listener.pid for listener in run.seen}
    assert len(by_pid) == 3, run.seen  # the agent's store and both ranks' gloo
    assert run.numbers == numbers(train(tmp_path / "straight", 2, *STEPS))


@pytest.mark.more
def test_so_are_those_of_two_runs_at_once_and_of_ranks_that_start_again(tmp_path: Path) -> None:
    again = RunUnderAttack(tmp_path / "again", [*RUN_TRAIN, *STEPS, *SAVING], {"MAX_RESTARTS": "1", "DIE": "1"})
    other = RunUnderAttack(tmp_path / "other", [*RUN_TRAIN, *STEPS], {})
    try:
        assert wait_until(lambda: all([again.attack_new_ports(), other.attack_new_ports()]), 300)
    finally:
        again.running.kill_all()
        other.running.kill_all()
    again.end()
    other.end()
    assert (again.starts, other.starts) == ({"0", "1"}, {"0"})
    assert (len(again.stores), len(other.stores)) == (2, 1)  # each start has a store of its own
    assert again.numbers == other.numbers == numbers(train(tmp_path / "straight", 2, *STEPS))


@pytest.mark.more
def test_so_is_that_of_one_process_without_torchrun(tmp_path: Path) -> None:
    run = RunUnderAttack(tmp_path / "run", [*TRAIN, "--job.config_file", DEBUG_FILE, *STEPS], {"OMP_NUM_THREADS": "1"})
    run.end()
    assert run.starts == {"0"}
    assert run.numbers == numbers(train(tmp_path / "straight", 1, *STEPS))


CLI = [sys.executable, "-m", "quadriga.cli"]


@pytest.mark.more
@pytest.mark.parametrize("name", ["bench", "equivalence"])
def test_so_are_those_of_the_runs_that_a_command_starts(tmp_path: Path, name: str) -> None:
    varied = ["--vary", "activation_checkpoint.mode=none,full", "--repeat", "1", "--ngpu", "2", "--steps", "17"]
    command = {
        "bench": [*CLI, "bench", DEBUG_FILE, *varied, "--out", str(tmp_path / "out"), *TINY],
        "equivalence": [*CLI, "equivalence", "--layout", "dp_shard=2"],
    }[name]
    running = Running(command, {"OMP_NUM_THREADS": "1"}, cwd=ROOT)
    seen: set[Listener] = set()

    def ended() -> bool:
        seen.update(listeners(running.process_tree()))
        return running.process.poll() is not None

    try:
        assert wait_until(ended, 240)
        result = running.end(30)
    finally:
        running.kill_all()
    assert result.code == 0, result.err
    assert len({one.pid for one in seen}) >= 3, seen  # a store, and two ranks' gloo
    assert {str(one) for one in seen if not one.is_loopback} == set()


NAMED = """
set -e
mount --bind "$HOSTS" /etc/hosts
echo "$NAME" > /proc/sys/kernel/hostname
exec "$@"
"""


@pytest.mark.more
@pytest.mark.parametrize("name", ["elsewhere", "nowhere.invalid"])
def test_names_that_resolve_elsewhere_or_not_at_all_change_nothing(tmp_path: Path, name: str) -> None:
    """With a hosts file of its own, in which this machine and `localhost` are another machine, or are not."""
    alone = ["unshare", *(["--map-root-user"] if os.geteuid() else []), "--mount", "--uts", "--propagation", "private"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("this machine gives nobody a host name and a hosts file of their own (unshare --mount --uts)")
    hosts = tmp_path / "hosts"
    hosts.write_text("203.0.113.7 elsewhere localhost\n" if name == "elsewhere" else "127.0.0.1 nobody\n")
    command = [*alone, "sh", "-c", NAMED, "sh", *RUN_TRAIN, *STEPS]
    run = RunUnderAttack(tmp_path / "run", command, {"HOSTS": str(hosts), "NAME": name})
    run.end()
    assert run.starts == {"0"}
    assert run.numbers == numbers(train(tmp_path / "straight", 2, *STEPS))
