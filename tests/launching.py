"""Real launches for tests: started as a user starts them, and never left behind.

A test of the launcher or of the process guards may put a few lines in the place of the training loop (`replace_loop`);
everything around the loop stays the real thing: run_train.sh, launcher, torchrun, ranks, signals, exit records.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_VARIABLES = (
    "NGPU",
    "CONFIG_FILE",
    "COMM_BACKEND",
    "LOG_RANK",
    "MAX_RESTARTS",
    "DRY_RUN",
    "NNODES",
    "NODE_RANK",
    "RDZV_ENDPOINT",
)
RUN_TRAIN = [str(ROOT / "run_train.sh")]
LAUNCH = [sys.executable, "-m", "quadriga.launch"]
TRAIN = [sys.executable, "-m", "quadriga.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

_LOOP_HOOK = """
import importlib.abc, importlib.util, sys

class LoopFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "quadriga.train.loop":
            return importlib.util.spec_from_file_location(name, {loop!r})

sys.meta_path.insert(0, LoopFinder())
"""


def replace_loop(folder: Path, loop: str) -> dict[str, str]:
    """Variables under which every rank runs `loop`, the source of a module with `run(run, environ) -> int`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loop.py").write_text(loop)
    (folder / "sitecustomize.py").write_text(_LOOP_HOOK.format(loop=str(folder / "loop.py")))
    return {"PYTHONPATH": str(folder)}


def launch_environ(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user's shell: no launch variable is set, no GPU is seen, and the project can be imported."""
    environ = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    environ |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **(extra or {})}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), str(ROOT)]))
    return environ


@dataclass(frozen=True)
class LaunchResult:
    code: int
    out: str
    err: str
    seconds: float


def launch(
    command: list[str], environ: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 180
) -> LaunchResult:
    """Run a command to its end. It has `timeout` seconds, after which all that it started is killed."""
    start = time.monotonic()
    running = Running(command, environ, cwd)
    try:
        out, err = running.process.communicate(timeout=timeout)
        return LaunchResult(running.process.returncode, out, err, time.monotonic() - start)
    finally:
        running.kill_all()


class Running:
    """A launch that goes on while the test looks at it; `kill_all` ends whatever is left of it."""

    def __init__(self, command: list[str], environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            env=launch_environ(environ),
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        self.seen: set[int] = {self.process.pid}

    def process_tree(self) -> set[int]:
        """The process and all its descendants that live now."""
        children = _children()
        found, new = set(), {self.process.pid}
        while new:
            found |= new
            new = {child for parent in new for child in children.get(parent, ())} - found
        self.seen |= found
        return found

    def has_started(self, module: str) -> bool:
        """Whether a process of the tree runs a module of this name."""
        return any(module in command_line(pid) for pid in self.process_tree())

    def end(self, timeout: float = 120) -> LaunchResult:
        """Wait for the end of the process, and for what it said."""
        start = time.monotonic()
        out, err = self.process.communicate(timeout=timeout)
        return LaunchResult(self.process.returncode, out, err, time.monotonic() - start)

    def kill_all(self) -> None:
        if self.process.poll() is None:
            self.process_tree()
        for pid in self.seen:
            with suppress(ProcessLookupError):
                if pid != self.process.pid or self.process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def _children() -> dict[int, list[int]]:
    """All processes of this machine by their parent."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    return children


def command_line(pid: int) -> list[str]:
    """Its arguments; none where the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def finished_steps(folder: Path) -> int:
    """Steps of a run that were logged."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not yet collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
