"""Checkpoint folders on disk: their names, which of them are whole, how one is published and which are deleted.

A save is written under a hidden name that no reader takes (`.step-N.saving`), flushed, given its `train_state.json`
as the last file, and renamed to `step-N`. So a folder with that name and that file is whole, at whatever byte a kill
fell. Deleting goes the other way: first renamed to `.step-N.deleting`, then emptied.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quadriga.units import show_bytes

STATE_FILE = "train_state.json"
FORMAT = "quadriga-1"
PUBLISHED = re.compile(r"step-(0|[1-9]\d*)")
SAVING = re.compile(r"\.step-(\d+)\.saving")
DELETING = re.compile(r"\.step-(\d+)\.deleting")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read: what happened, what is safe, what next."""


class NotWhole(Exception):
    """A folder that is no whole checkpoint of ours; the message says why."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint. `extra` is what the trainer gave to `save`; `resume` is False where only its weights are
    to be taken (`checkpoint.initial_load_model_only`)."""

    step: int
    path: str
    contents: tuple[str, ...]  # "model", "optimizer"
    extra: dict[str, Any] = field(default_factory=dict)
    resume: bool = True


def hidden(folder: Path, step: int) -> Path:
    """Where step N is written until it is whole."""
    return folder / f".step-{step}.saving"


def published(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def prepare(folder: Path, step: int) -> None:
    """Make an empty hidden folder for step N."""
    place = hidden(folder, step)
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)


def publish(folder: Path, step: int, contents: tuple[str, ...], extra: Mapping[str, Any]) -> Path:
    """Write `train_state.json` into the hidden folder of step N and give the folder its name, durably.

    A folder that already has the name (of a run that was resumed from further back) is replaced.
    """
    place, name = hidden(folder, step), published(folder, step)
    state = {
        "format": FORMAT,
        "step": step,
        "contents": list(contents),
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {file.name: file.stat().st_size for file in sorted(place.iterdir())},
        "extra": dict(extra),
    }
    # Text is made before the file is opened: what cannot be JSON must not leave half a file.
    text = json.dumps(state, indent=1)
    _flush_names(place)
    with (place / STATE_FILE).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    _flush_names(place)
    outdated = _set_aside(name) if name.exists() else None
    place.rename(name)
    _flush_names(folder)
    if outdated is not None:
        shutil.rmtree(outdated)
    return name


def read(path: Path) -> Found:
    """The checkpoint that a folder is. Raises NotWhole where a file is missing or does not have its size."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise NotWhole(f"{path / STATE_FILE} has format {state['format']!r}, this version reads {FORMAT!r}")
        found = Found(int(state["step"]), str(path), tuple(state["contents"]), dict(state["extra"]))
        files = dict(state["files"])
    except OSError as error:
        raise NotWhole(f"{path / STATE_FILE} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NotWhole(f"{path / STATE_FILE} is damaged ({error})") from error
    for name, amount in files.items():
        if not (path / name).is_file():
            raise NotWhole(f"{path / name} is missing")
        if (path / name).stat().st_size != amount:
            raise NotWhole(f"{path / name} has {(path / name).stat().st_size} bytes instead of {amount}")
    return found


def whole_in(folder: Path) -> list[Found]:
    """The whole checkpoints in a folder, by step."""
    return _sorted_out(folder)[0]


def damaged_in(folder: Path) -> list[str]:
    """Why each folder that is called `step-N` and is not whole is none. Such folders are passed over, never deleted."""
    return _sorted_out(folder)[1]


def find(folder: Path, step: int = -1) -> Found | None:
    """The whole checkpoint of that step, -1: the newest; None where there is none."""
    candidates = [found for found in whole_in(folder) if step in (-1, found.step)]
    return candidates[-1] if candidates else None


def delete_old(folder: Path, keep: int) -> list[int]:
    """Keep the newest `keep` whole checkpoints (0: all), delete the other whole ones; the steps that went."""
    outdated = [found.step for found in whole_in(folder)[:-keep]] if keep > 0 else []
    for step in outdated:
        shutil.rmtree(_set_aside(published(folder, step)))
    return outdated


def clean_up(folder: Path) -> list[str]:
    """Remove what a killed run left under hidden names; what was done, in words. Call while no run writes here.

    A save that was whole and lacked its new name only, since it was replacing an older one, gets it now.
    """
    done = []
    for step, path in _named(folder, SAVING):
        name = published(folder, step)
        if not name.exists() and (path / STATE_FILE).exists() and _is_whole(path):
            path.rename(name)
            done.append(f"{name.name}: finished")
        else:
            shutil.rmtree(path)
            done.append(f"{path.name}: removed")
    for _, path in _named(folder, DELETING):
        shutil.rmtree(path)
        done.append(f"{path.name}: removed")
    return done


def describe(folder: str | os.PathLike[str]) -> str:
    """A line for each checkpoint in a folder, or about the one that the folder is."""
    place = Path(folder)
    whole = [read(place)] if (place / STATE_FILE).exists() and _is_whole(place) else whole_in(place)
    lines = [f"{one.path}: {' and '.join(one.contents)}, {show_bytes(_size(Path(one.path)))}" for one in whole]
    lines += [f"{reason}: passed over" for reason in damaged_in(place)]
    return "\n".join(lines) or f"{place}: no checkpoint"


def _sorted_out(folder: Path) -> tuple[list[Found], list[str]]:
    whole, damaged = [], []
    for _, path in _named(folder, PUBLISHED):
        try:
            whole.append(read(path))
        except NotWhole as reason:
            damaged.append(str(reason))
    return whole, damaged


def _is_whole(path: Path) -> bool:
    try:
        read(path)
    except NotWhole:
        return False
    return True


def _named(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f".{path.name}.deleting")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    return aside


def _flush_names(folder: Path) -> None:
    """Make the names in a folder durable; `fsync` of a file covers its contents only."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
