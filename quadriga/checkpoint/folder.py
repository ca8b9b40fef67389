"""Checkpoint folders: their names, which of them are whole, how one is published and which are deleted.

A save is written where no reader looks, flushed and hashed file by file, and given its `train_state.json` as the last
file: what was saved, the size and SHA-256 of every other file, and a SHA-256 of itself.

- On a file system it is written under `.step-N.saving` and renamed to `step-N`. Deleting goes the other way: first
  renamed to `.step-N.deleting`, then emptied.
- On an object store, which cannot rename, its files go to `step-N/TOKEN/`, and `step-N/train_state.json`, which names
  that token, publishes them; a save of the same step takes another token, and takes over when its own is written.

So whatever has the published name is whole, at whatever byte a kill fell; and what a disk did to it later is seen.

On a file system only folders count: a link called `step-N` may lead anywhere, is never followed, and makes way for a
save of that step.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from quadriga.checkpoint import foreign
from quadriga.checkpoint import manifest as manifests
from quadriga.checkpoint.files import Files, Location, files_at, is_url
from quadriga.checkpoint.manifest import FORMAT, STATE_FILE, FileFacts, InvalidCheckpoint, format_manifest
from quadriga.errors import Fault, Problem, UserError

__all__ = ["FORMAT", "STATE_FILE", "FileFacts", "InvalidCheckpoint", "format_manifest"]  # of the manifest

NUMBER = "(0|[1-9][0-9]*)"  # as a step is written: no sign, no leading zeros, no other digits
PUBLISHED = re.compile(rf"step-{NUMBER}")
SAVING = re.compile(rf"\.step-{NUMBER}\.saving")
DELETING = re.compile(rf"\.step-{NUMBER}\.deleting")
CHUNK = 1 << 22  # bytes hashed at a time


class CheckpointError(Fault):
    """A checkpoint could not be written or read: what happened, what is safe, what next."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A whole checkpoint. `extra` is what the trainer gave to `save`; `resume` is False where only its weights are
    to be taken (`checkpoint.initial_load_model_only`). `location` holds its files, `path` is its name."""

    step: int
    path: str
    contents: tuple[str, ...]  # "model", "optimizer", "random"
    extra: dict[str, Any] = field(default_factory=dict)
    resume: bool = True
    location: str = ""
    files: Mapping[str, FileFacts] = field(default_factory=dict)  # empty: not one of ours, and not to be verified
    trainer: str = ""  # whose it is, where that is known and it is not ours: see `titan`


def published_path(folder: Location, step: int) -> str:
    return join(folder, f"step-{step}")


def staging_path(folder: Location, step: int) -> str:
    """Where step N is written on a file system until it is whole."""
    return join(folder, f".step-{step}.saving")


def join(folder: Location, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def prepare(folder: Location, step: int) -> str:
    """An empty place for the files of step N, where no reader looks."""
    files = files_at(folder)
    if not files.renames:
        return join(published_path(folder, step), uuid.uuid4().hex)
    location = staging_path(folder, step)
    if files.exists(location):
        files.remove(location)
    files.make(location)
    return location


def publish(
    folder: Location,
    step: int,
    contents: Iterable[str],
    extra: Mapping[str, Any],
    location: Location | None = None,
    hashes: Mapping[str, str] | None = None,
) -> str:
    """Write the manifest of step N behind its files and give it its name, durably; the name.

    `location`: what `prepare` gave. `hashes`: SHA-256 by name of files that were hashed as they were written; others
    are read. A checkpoint that already has the name (of a run that went on from further back) is replaced.
    """
    files, name, location = files_at(folder), published_path(folder, step), str(location or staging_path(folder, step))
    known = hashes or {}
    facts = {
        file: {"size": files.size(path), "sha256": known.get(file) or sha256(files, path)}
        for file, path in ((each, join(location, each)) for each in files.names(location))
    }
    token = "." if files.renames else location.rpartition("/")[2]
    state = {
        "format": FORMAT,
        "step": step,
        "contents": list(contents),
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": token,
        "files": facts,
        "extra": dict(extra),
    }
    manifest = format_manifest(state).encode()  # before a file is opened: what cannot be JSON must not leave half
    if not files.renames:
        files.write(join(name, STATE_FILE), manifest)
        with suppress(OSError):  # it is published; what is left goes at the next start
            foreign.remove_saves(files, name, keep=token)
        return name
    files.write(join(location, STATE_FILE), manifest)  # flushes the names of all files of the place, too
    outdated = _set_aside(files, folder, step) if files.exists(name) else None
    try:
        files.rename(location, name)
    except OSError:
        if outdated is not None:  # the older one is whole: it gets its name back
            files.rename(outdated, name)
        raise
    files.flush_names(folder)
    if outdated is not None:
        foreign.remove_unless_foreign(files, outdated)
    return name


def remove_failed_save(folder: Location, step: int, location: Location) -> None:
    """Remove what a failed save wrote, unless it was published all the same. Raises OSError where that fails."""
    files = files_at(folder)
    if not files.renames:
        try:
            manifest = join(published_path(folder, step), STATE_FILE)
            if manifests.parse_manifest(files.read(manifest), manifest).folder == str(location).rpartition("/")[2]:
                return  # the request that failed was heard
        except (FileNotFoundError, InvalidCheckpoint):
            pass
    files.remove(location)


def read_checkpoint(path: Location) -> CheckpointInfo:
    """The checkpoint that a folder is. Raises InvalidCheckpoint: a file is missing, not listed, or has another size.

    This is quick: contents are compared by `find_damage`."""
    files, manifest = files_at(path), join(path, STATE_FILE)
    parsed = _manifest(path)
    try:
        location = str(path) if parsed.folder == "." else join(path, parsed.folder)
        if not files.is_folder(location) and parsed.folder != ".":
            raise InvalidCheckpoint(f"{location} is no folder")
        there = set(files.names(location))
    except OSError as error:
        raise InvalidCheckpoint(f"{manifest} cannot be read ({error.strerror or error})") from error
    if (step := step_in_name(path)) not in (None, parsed.step):
        raise InvalidCheckpoint(f"{manifest} is of step {parsed.step}, but its folder is called that of step {step}")
    for name, fact in parsed.files.items():
        file = join(location, name)
        if name not in there:
            raise InvalidCheckpoint(f"{file} is missing")
        try:
            size = files.size(file)
        except OSError as error:  # a link that leads nowhere, a disk or a server that does not answer
            raise InvalidCheckpoint(f"{file} cannot be read ({error.strerror or error})") from error
        if size != fact.size:
            raise InvalidCheckpoint(f"{file} has {size} bytes instead of {fact.size}")
    if more := manifests.unlisted_files(parsed, there):
        raise InvalidCheckpoint(f"{join(location, more[0])} is not listed in {STATE_FILE}")
    return CheckpointInfo(parsed.step, str(path), parsed.contents, parsed.extra, location=location, files=parsed.files)


def step_in_name(path: Location) -> int | None:
    """The step that a folder's name says, if any."""
    name = str(path).rstrip("/").rpartition("/")[2]
    matches = (pattern.fullmatch(name) for pattern in (PUBLISHED, SAVING, DELETING))
    return next((int(match[1]) for match in matches if match), None)


def find_damage(found: CheckpointInfo, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the contents of a checkpoint's files (all, or those named): one sentence for each."""
    files, wrong = files_at(found.location), []
    for name in found.files if names is None else names:
        path = join(found.location, name)
        try:
            same = files.retried(partial(sha256, files, path)) == found.files[name].sha256
        except OSError as error:
            wrong.append(f"{path} cannot be read ({error.strerror or error})")
            continue
        if not same:
            wrong.append(f"{path} is damaged (its hash differs from the one in {STATE_FILE})")
    return wrong


def sha256(files: Files, path: Location) -> str:
    digest = hashlib.sha256()
    with files.open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def whole_in(folder: Location) -> list[CheckpointInfo]:
    """The checkpoints in a folder that are whole by name and size, by step."""
    return list_checkpoints(folder)[0]


def damaged_in(folder: Location) -> list[str]:
    """Why each folder that is called `step-N` and is not whole is none. Such folders are passed over, never deleted."""
    return [reason for _, reason in list_checkpoints(folder)[1]]


def unpublished_in(folder: Location) -> list[str]:
    """What lies there of saves that were never published."""
    files = files_at(folder)
    if files.renames:
        return [name for _, name in _matching(folder, SAVING)]
    return _without_manifest(files, folder, foreign_weights=False)


def foreign_steps_in(folder: Location) -> list[str]:
    """On an object store: the steps that another trainer saved, from which nothing here can go on."""
    files = files_at(folder)
    return [] if files.renames else _without_manifest(files, folder, foreign_weights=True)


def _without_manifest(files: Files, folder: Location, foreign_weights: bool) -> list[str]:
    named = [name for _, name in _matching(folder, PUBLISHED, with_manifest=False)]
    return [name for name in named if foreign.has_foreign_weights(files, join(folder, name)) == foreign_weights]


def find_complete(folder: Location, step: int = -1) -> CheckpointInfo | None:
    """The checkpoint of that step that is whole by name and size, -1: the newest; None where there is none."""
    for number, name in reversed(_matching(folder, PUBLISHED)):  # the newest first: each look costs a request a file
        if step in (-1, number):
            with suppress(InvalidCheckpoint):
                return read_checkpoint(join(folder, name))
    return None


def newest_extra(folder: Location, step: int = -1) -> dict[str, Any] | None:
    """What the newest checkpoint says beside its tensors, or that of `step`; None where there is none.

    `folder` holds checkpoints, or is one. Every rank asks, so the manifest alone is read. None where the newest is
    another trainer's: older ones of ours say nothing of that run. UserError: the folder cannot be listed."""
    named = [join(folder, name) for number, name in reversed(_matching(folder, PUBLISHED)) if step in (-1, number)]
    for path in (*named, str(folder)):
        with suppress(InvalidCheckpoint):
            return _manifest(path).extra
        if foreign.has_foreign_plan_on_disk(path):
            break
    return None


def _manifest(path: Location) -> manifests.Manifest:
    """What the manifest in a folder says. Raises InvalidCheckpoint where it cannot be read."""
    manifest = join(path, STATE_FILE)
    try:
        return manifests.parse_manifest(files_at(path).read(manifest), manifest)
    except OSError as error:
        raise InvalidCheckpoint(f"{manifest} cannot be read ({error.strerror or error})") from error


def delete_old(
    folder: Location, keep: int, every: int = 0, refused: Iterable[int] = (), saved: int | None = None
) -> list[int]:
    """Keep the newest `keep` whole checkpoints (0: all) and each whose step `every` divides (0: none), delete the other
    whole ones; the steps that went. Those in `refused` are known to be damaged: they count for nothing and stay.

    `saved`: the step that was just saved. It is the newest whatever the names say, and stays."""
    whole = [found.step for found in whole_in(folder) if found.step not in set(refused)]
    outdated = [step for step in whole[:-keep] if not (every and step % every == 0)] if keep > 0 else []
    files, gone = files_at(folder), []
    for step in outdated:
        if step == saved:
            continue
        if files.renames:
            files.remove(_set_aside(files, folder, step))
        else:
            foreign.remove_step(files, published_path(folder, step))
        gone.append(step)
    return gone


def non_folders_in(folder: Location) -> list[str]:
    """Why what is called `step-N` and is no folder counts for nothing: one sentence for each."""
    files, reasons = files_at(folder), []
    for _, name in _match_names(folder, PUBLISHED):
        path = join(folder, name)
        with suppress(OSError):
            if not files.is_folder(path):
                kind = "a link, which is not followed" if os.path.islink(path) else "no folder"
                reasons.append(f"{path} is {kind}: it is passed over")
    return reasons


def clean_up(folder: Location) -> list[str]:
    """Remove what a killed run left of unpublished saves; what was done, in words. Call while no run writes here.

    A save that was whole and lacked its new name only, since it was replacing an older one, gets it now.
    """
    files, done = files_at(folder), []
    if not files.renames:
        for name in unpublished_in(folder):
            files.remove(join(folder, name))
            done.append(f"{name} (never published): removed")
        for found in whole_in(folder):
            foreign.remove_saves(files, found.path, keep=found.location.rpartition("/")[2])
        return done
    for step, hidden_name in [*_matching(folder, SAVING), *_matching(folder, DELETING)]:
        try:
            done.append(_finish_or_remove(files, folder, step, hidden_name))
        except OSError as error:  # no reason not to start
            done.append(f"{hidden_name}: could not be removed ({error.strerror or error})")
    return done


def _finish_or_remove(files: Files, folder: Location, step: int, hidden_name: str) -> str:
    name, path = published_path(folder, step), join(folder, hidden_name)
    if SAVING.fullmatch(hidden_name) and files.is_folder(path) and _is_whole(path):
        if not files.exists(name):
            files.rename(path, name)
            return f"step-{step}: finished"
        outdated = _set_aside(files, folder, step)  # as `publish` was about to; it may be damaged, or no folder
        files.rename(path, name)
        foreign.remove_unless_foreign(files, outdated)
        return f"step-{step}: finished, in the place of an older one"
    files.remove(path)
    return f"{hidden_name}: removed"


def checkpoint_bytes(found: CheckpointInfo) -> int:
    """Bytes of all files but the manifest."""
    return sum(fact.size for fact in found.files.values())


def list_checkpoints(folder: Location) -> tuple[list[CheckpointInfo], list[tuple[int, str]]]:
    """The published checkpoints that are whole by name and size, and the others: (step, why); each by step."""
    whole, damaged = [], []
    for step, name in _matching(folder, PUBLISHED, with_manifest=None if files_at(folder).renames else True):
        try:
            whole.append(read_checkpoint(join(folder, name)))
        except InvalidCheckpoint as reason:
            if files_at(folder).exists(join(folder, name)):  # else a run has deleted it meanwhile
                damaged.append((step, str(reason)))
    return whole, damaged


def _is_whole(path: Location) -> bool:
    with suppress(InvalidCheckpoint):
        return bool(read_checkpoint(path))
    return False


def _matching(folder: Location, pattern: re.Pattern[str], with_manifest: bool | None = None) -> list[tuple[int, str]]:
    """Step and name of each match, by step; of published ones only folders. Raises UserError where it cannot look."""
    files, found = files_at(folder), _match_names(folder, pattern)
    if pattern is PUBLISHED:
        found = [one for one in found if _may_be_folder(files, join(folder, one[1]))]
    if with_manifest is None:
        return found
    return [one for one in found if files.exists(join(join(folder, one[1]), STATE_FILE)) == with_manifest]


def _match_names(folder: Location, pattern: re.Pattern[str]) -> list[tuple[int, str]]:
    try:
        names = files_at(folder).names(folder)
    except OSError as error:
        fix = "mend the folder or its permissions; nothing was changed"
        raise UserError(Problem(str(folder), f"cannot be listed: {error.strerror or error}", fix=fix)) from error
    return sorted((int(match[1]), name) for name in names if (match := pattern.fullmatch(name)))


def _may_be_folder(files: Files, path: Location) -> bool:
    try:
        return files.is_folder(path)
    except FileNotFoundError:
        return False
    except OSError:  # named when it is read
        return True


def _set_aside(files: Files, folder: Location, step: int) -> str:
    """Take its name from step N; the name that it has now. What another trainer left is never removed."""
    if foreign.has_foreign_weights(files, published_path(folder, step)):
        aside = foreign.backup_path(files, str(folder), step)
    else:
        aside = join(folder, f".step-{step}.deleting")
    if files.exists(aside):
        files.remove(aside)
    files.rename(published_path(folder, step), aside)
    return aside
