"""A launch as a child process, for commands that start many runs one after the other.

Run as a module, this is the launcher (`python -m quadriga.launch`), except that it exits with the process that started
it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from quadriga.launch.supervisor import main, python_path
from quadriga.resilience.processes import die_with_parent, signal_handlers

STARTER_PID = "QUADRIGA_STARTER_PID"
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_launch(argv: Sequence[str], environ: Mapping[str, str], log: Path) -> tuple[int, int | None]:
    """Start the launcher with `argv`, write its output to `log`, and wait for its end.

    Returns its exit code, and the first signal that this process received meanwhile, or None. Signals are forwarded to
    the launcher. It exits with this process.
    """
    command = [sys.executable, "-m", "quadriga.launch.child", *argv]
    received: list[int] = []
    with log.open("wb") as file, forward_signals(received) as attach:
        child = subprocess.Popen(
            command,
            env={**environ, STARTER_PID: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C reaches only this process, which forwards it once
        )
        attach(child)
        code = child.wait()
    return code, received[0] if received else None


@contextmanager
def forward_signals(received: list[int]) -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Forward signals to a child, and append them to `received`. Signals before `attach(child)` are sent then."""
    children: list[subprocess.Popen[bytes]] = []

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    def attach(child: subprocess.Popen[bytes]) -> None:
        for number in received:
            child.send_signal(number)
        children.append(child)

    with signal_handlers(receive, FORWARDED_SIGNALS):
        yield attach


def launch_environment(environ: Mapping[str, str], ranks: int | None) -> dict[str, str]:
    """The environment of a launch from this process, as run_train.sh sets it.

    CONFIG_FILE, DRY_RUN and MAX_RESTARTS are left out, because they would change the run. `ranks`: of this machine;
    None leaves NGPU as it is.
    """
    kept = {name: value for name, value in environ.items() if name not in ("CONFIG_FILE", "DRY_RUN", "MAX_RESTARTS")}
    return {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        **kept,
        **({} if ranks is None else {"NGPU": str(ranks)}),
        "PYTHONPATH": python_path(environ),
        "PYTHONSAFEPATH": "1",  # a file in the current directory must not replace a module
    }


if __name__ == "__main__":
    die_with_parent(int(os.environ.pop(STARTER_PID)))
    sys.exit(main(sys.argv[1:], os.environ))
