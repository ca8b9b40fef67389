"""Which product files a journey through the code enters: a profiler over a real run and over a real launch.

A leg of a journey is two functions, named as `train/feed.py:Feed.next`. From the call of the first to the return of the
second, every product file whose code is entered belongs to the journey, on this thread and on threads that start
meanwhile. So do the product files on the stack at the call of the first. Code that runs while a module is imported does
not count.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = f"{ROOT / 'quadriga'}{os.sep}"

# The first and the last function of each leg, which may be the same one.
TRAINING: Mapping[str, Sequence[tuple[str, str]]] = {
    "document": [("train/feed.py:Feed.next", "train/feed.py:Feed.next")],
    "weight": [
        ("models/registry.py:build_model", "models/registry.py:build_model"),
        ("parallel/materialize.py:materialize", "parallel/materialize.py:materialize"),
        ("checkpoint/tensors.py:ModelState.state_dict", "checkpoint/tensors.py:ModelState.state_dict"),
        ("checkpoint/tensors.py:save_tensors", "checkpoint/tensors.py:save_tensors"),
        ("models/llama/names.py:LlamaTensorNames.hf_name", "models/llama/names.py:LlamaTensorNames.hf_name"),
        ("checkpoint/hf_export.py:write_weights", "checkpoint/hf_export.py:write_weights"),
    ],
    "loss": [
        ("train/loss.py:build_loss.<locals>.loss", "train/loss.py:build_loss.<locals>.loss"),
        ("train/loss.py:all_reduce_loss", "train/loss.py:all_reduce_loss"),
        ("metrics/meter.py:Meter.record", "metrics/loggers.py:Console.write"),
    ],
}
LAUNCH = {
    "launch": [
        ("launch/environment.py:read_launch_request", "launch/environment.py:read_launch_request"),
        ("launch/environment.py:rank_environment", "launch/environment.py:rank_environment"),
        ("launch/supervisor.py:supervise", "launch/supervisor.py:SignalHandler.attach"),
        ("launch/agent.py:main", "launch/agent.py:main"),
        ("resilience/processes.py:die_with_torchrun", "resilience/processes.py:die_with_torchrun"),
        ("resilience/processes.py:lock_run_folder", "resilience/processes.py:lock_run_folder"),
        ("resilience/processes.py:exit_code_after_restart", "resilience/processes.py:exit_code_after_restart"),
        ("resilience/processes.py:record_exit", "resilience/processes.py:record_exit"),
    ],
}


class Trace:
    """Appends a line `journey file` to `log` at the first entry of each file; several processes may share the log."""

    def __init__(self, journeys: Mapping[str, Sequence[tuple[str, str]]], log: Path) -> None:
        self._firsts: dict[str, list[tuple[str, str]]] = {}
        for journey, legs in journeys.items():
            for first, last in legs:
                self._firsts.setdefault(first, []).append((journey, last))
        self._log, self._found = log, set[tuple[str, str]]()
        self._open: list[tuple[str, str]] = []  # the journeys inside a leg, each with the leg's last function
        self._names: dict[CodeType, str] = {}

    def start(self) -> None:
        sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and (name := self._name(frame)):
            for leg in self._firsts.get(name, ()):
                self._open.append(leg)
                threading.setprofile(self._record)
                for below in reversed(_stack(frame)):
                    self._add(leg[0], self._name(below))
            self._record(frame, event, None)
        elif event == "return" and self._open and (name := self._name(frame)):
            self._open = [leg for leg in self._open if leg[1] != name]

    def _record(self, frame: FrameType, event: str, _argument: object) -> None:
        if self._open and event == "call" and (name := self._name(frame)) and not _imports(frame):
            for journey, _ in self._open:
                self._add(journey, name)

    def _name(self, frame: FrameType) -> str:
        """`train/feed.py:Feed.next`; empty for code that is not the product's. The file is that of the globals, because
        the code of a dataclass's `__init__` has no file."""
        code = frame.f_code
        if code not in self._names:
            file = str(frame.f_globals.get("__file__") or "")
            self._names[code] = f"{file.removeprefix(PACKAGE)}:{code.co_qualname}" if file.startswith(PACKAGE) else ""
        return self._names[code]

    def _add(self, journey: str, name: str) -> None:
        found = journey, name.partition(":")[0]
        if found[1] and found not in self._found:
            self._found.add(found)
            with self._log.open("a") as log:
                log.write(f"{journey} quadriga/{found[1]}\n")


def _stack(frame: FrameType) -> list[FrameType]:
    frames: list[FrameType] = []
    below = frame.f_back
    while below is not None:
        frames.append(below)
        below = below.f_back
    return frames


def _imports(frame: FrameType) -> bool:
    """Whether a module is being imported. The module that `python -m` runs is not imported."""
    modules = [each for each in (frame, *_stack(frame)) if each.f_code.co_name == "<module>"]
    return any(module.f_globals.get("__name__") != "__main__" for module in modules)
