"""Checkpoint folders: their names, how they are published, verified and deleted.

A save is written to a place that no reader uses. Its files are flushed and hashed one by one. `train_state.json` is
written last: what was saved, the size and SHA-256 of every other file, and a SHA-256 of itself.

- On a file system, a save is written to `.step-N.saving` and renamed to `step-N`. A deletion is the reverse: first
  renamed to `.step-N.deleting`, then removed.
- An object store cannot rename. There the files go to `step-N/TOKEN/`, and `step-N/train_state.json`, which names the
  token, publishes them. A later save of the same step has another token, and replaces the first with its manifest.

So a published name is complete, at whatever byte a run was killed, and later damage is detected.

On a file system only folders count: a link called `step-N` could lead anywhere, is never followed, and is replaced by a
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
from quadriga.checkpoint.files import Files, Location, files_at, join
from quadriga.checkpoint.manifest import FORMAT, STATE_FILE, FileFacts, InvalidCheckpoint, format_manifest
from quadriga.checkpoint.plan_format import LINK
from quadriga.errors import Fault, Problem, UserError

__all__ = ["FORMAT", "STATE_FILE", "FileFacts", "InvalidCheckpoint", "format_manifest"]  # reexported

NUMBER = "(0|[1-9][0-9]*)"  # a step: no sign, no leading zeros, only ASCII digits
PUBLISHED = re.compile(rf"step-{NUMBER}")
SAVING = re.compile(rf"\.step-{NUMBER}\.saving")
DELETING = re.compile(rf"\.step-{NUMBER}\.deleting")
CHUNK = 1 << 22  # bytes hashed at a time


class CheckpointError(Fault):
    """A checkpoint could not be written or read. The message says what happened, what is safe, and what to do."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint. `extra`: what the trainer passed to `save`. `resume`: False if only the weights are to be
    loaded (`checkpoint.initial_load_model_only`). `path`: its name. `location`: the folder of its files."""

    step: int
    path: str
    contents: tuple[str, ...]  # "model", "optimizer", "random"
    extra: dict[str, Any] = field(default_factory=dict)
    resume: bool = True
    location: str = ""
    files: Mapping[str, FileFacts] = field(default_factory=dict)  # empty: not saved by Quadriga, so not verified
    trainer: str = ""  # the program that saved it, if known and not Quadriga: see `titan`


def published_path(folder: Location, step: int) -> str:
    return join(folder, f"step-{step}")


def staging_path(folder: Location, step: int) -> str:
    """Where step N is written on a file system until it is complete."""
    return join(folder, f".step-{step}.saving")


def prepare(folder: Location, step: int) -> str:
    """An empty place for the files of step N, which no reader uses. Raises OSError."""
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
    """Writes the manifest of step N after its files and publishes it, durably. Returns its name.

    `location`: from `prepare`. `hashes`: SHA-256 by name, of files that were hashed while written; others are read. A
    checkpoint that already has the name (of a run that resumed from an earlier step) is replaced.
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
    manifest = format_manifest(state).encode()  # first: a value that is not JSON must not leave a partial file
    if not files.renames:
        files.write(join(name, STATE_FILE), manifest)
        with suppress(OSError):  # it is published; the next start removes the rest
            foreign.remove_saves(files, name, keep=token)
        return name
    files.write(join(location, STATE_FILE), manifest)  # flushes the names of all files of the place, too
    outdated = _set_aside(files, folder, step) if files.exists(name) else None
    try:
        files.rename(location, name)
    except OSError:
        if outdated is not None:  # restores the older one, which is complete
            files.rename(outdated, name)
        raise
    files.flush_names(folder)
    if outdated is not None:
        foreign.remove_unless_foreign(files, outdated)
    return name


def remove_failed_save(folder: Location, step: int, location: Location) -> None:
    """Removes the files of a failed save, unless it was published nevertheless. Raises OSError if this fails."""
    files = files_at(folder)
    if not files.renames:
        try:
            manifest = join(published_path(folder, step), STATE_FILE)
            if manifests.parse_manifest(files.read(manifest), manifest).folder == str(location).rpartition("/")[2]:
                return  # the failed request was executed
        except (FileNotFoundError, InvalidCheckpoint):
            pass
    files.remove(location)


def read_checkpoint(path: Location) -> CheckpointInfo:
    """The checkpoint in a folder. Raises InvalidCheckpoint: a file is missing, not listed, or has another size.

    This is fast: only `find_damage` compares contents."""
    files, manifest = files_at(path), join(path, STATE_FILE)
    parsed = _manifest(path)
    try:
        location = str(path) if parsed.folder == "." else join(path, parsed.folder)
        if not files.is_folder(location) and parsed.folder != ".":
            raise InvalidCheckpoint(f"{location} is not a folder")
        there = set(files.names(location))
    except OSError as error:
        raise InvalidCheckpoint(f"{manifest} cannot be read ({error.strerror or error})") from error
    if (step := step_in_name(path)) not in (None, parsed.step):
        raise InvalidCheckpoint(f"{manifest} is of step {parsed.step}, but the name of its folder is of step {step}")
    for name, fact in parsed.files.items():
        file = join(location, name)
        if name not in there:
            raise InvalidCheckpoint(f"{file} is missing")
        if files.is_link(file):
            raise InvalidCheckpoint(f"{file} {LINK}")
        try:
            size = files.size(file)
        except OSError as error:  # a link without target, a disk or a server that does not answer
            raise InvalidCheckpoint(f"{file} cannot be read ({error.strerror or error})") from error
        if size != fact.size:
            raise InvalidCheckpoint(f"{file} has {size} bytes instead of {fact.size}")
    if more := manifests.unlisted_files(parsed, there):
        raise InvalidCheckpoint(f"{join(location, more[0])} is not listed in {STATE_FILE}")
    return CheckpointInfo(parsed.step, str(path), parsed.contents, parsed.extra, location=location, files=parsed.files)


def step_in_name(path: Location) -> int | None:
    """The step in a folder's name; None if there is none."""
    name = str(path).rstrip("/").rpartition("/")[2]
    matches = (pattern.fullmatch(name) for pattern in (PUBLISHED, SAVING, DELETING))
    return next((int(match[1]) for match in matches if match), None)


def find_damage(found: CheckpointInfo, names: Iterable[str] | None = None) -> list[str]:
    """The files of a checkpoint (all, or `names`) whose content is damaged or unreadable: one sentence per file."""
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
    """The checkpoints in a folder that are complete by name and size, sorted by step."""
    return list_checkpoints(folder)[0]


def damaged_in(folder: Location) -> list[str]:
    """Why each incomplete folder called `step-N` is not a checkpoint. Such folders are skipped, never deleted."""
    return [reason for _, reason in list_checkpoints(folder)[1]]


def unpublished_in(folder: Location) -> list[str]:
    """The names of saves that were never published."""
    files = files_at(folder)
    if files.renames:
        return [name for _, name in _matching(folder, SAVING)]
    return _without_manifest(files, folder, foreign_weights=False)


def foreign_steps_in(folder: Location) -> list[str]:
    """On an object store: the steps that another trainer saved, which Quadriga does not read there."""
    files = files_at(folder)
    return [] if files.renames else _without_manifest(files, folder, foreign_weights=True)


def _without_manifest(files: Files, folder: Location, foreign_weights: bool) -> list[str]:
    named = [name for _, name in _matching(folder, PUBLISHED, with_manifest=False)]
    return [name for name in named if foreign.has_foreign_weights(files, join(folder, name)) == foreign_weights]


def find_complete(folder: Location, step: int = -1) -> CheckpointInfo | None:
    """The checkpoint of this step that is complete by name and size; -1: the newest. None if there is none."""
    for number, name in reversed(_matching(folder, PUBLISHED)):  # newest first: each takes one request per file
        if step in (-1, number):
            with suppress(InvalidCheckpoint):
                return read_checkpoint(join(folder, name))
    return None


def newest_extra(folder: Location, step: int = -1) -> dict[str, Any] | None:
    """`extra` of the newest checkpoint, or of that of `step`; None if there is none.

    `folder` has checkpoints, or is one. Only the manifest is read, because every rank calls this. None if the newest
    one is another trainer's, because older ones are not of that run. Raises UserError: the folder cannot be listed."""
    named = [join(folder, name) for number, name in reversed(_matching(folder, PUBLISHED)) if step in (-1, number)]
    for path in (*named, str(folder)):
        with suppress(InvalidCheckpoint):
            return _manifest(path).extra
        if foreign.has_foreign_plan_on_disk(path):
            break
    return None


def _manifest(path: Location) -> manifests.Manifest:
    """The manifest in a folder. Raises InvalidCheckpoint if it cannot be read."""
    files, manifest = files_at(path), join(path, STATE_FILE)
    if files.is_link(manifest):
        raise InvalidCheckpoint(f"{manifest} {LINK}")
    try:
        return manifests.parse_manifest(files.read(manifest), manifest)
    except OSError as error:
        raise InvalidCheckpoint(f"{manifest} cannot be read ({error.strerror or error})") from error


def delete_old(
    folder: Location, keep: int, every: int = 0, refused: Iterable[int] = (), saved: int | None = None
) -> list[int]:
    """Keeps the newest `keep` complete checkpoints (0: all) and those whose step `every` divides (0: none), and deletes
    the other complete ones. Returns the deleted steps. Steps in `refused` are known to be damaged: they do not count
    and are kept. `saved`: the step just saved, which is kept even if other steps are higher."""
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
    """Why each name `step-N` that is not a folder is skipped: one sentence per name."""
    files, reasons = files_at(folder), []
    for _, name in _match_names(folder, PUBLISHED):
        path = join(folder, name)
        with suppress(OSError):
            if not files.is_folder(path):
                kind = "a link, which is not followed" if os.path.islink(path) else "not a folder"
                reasons.append(f"{path} is {kind}: it is skipped")
    return reasons


def clean_up(folder: Location) -> list[str]:
    """Removes the unpublished saves of a killed run. Returns what was done, as text. Call while no run writes here.

    A complete save that was about to replace an older one is renamed now.
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
        except OSError as error:  # does not prevent the start
            done.append(f"{hidden_name}: could not be removed ({error.strerror or error})")
    return done


def _finish_or_remove(files: Files, folder: Location, step: int, hidden_name: str) -> str:
    name, path = published_path(folder, step), join(folder, hidden_name)
    if SAVING.fullmatch(hidden_name) and files.is_folder(path) and _is_whole(path):
        if not files.exists(name):
            files.rename(path, name)
            return f"step-{step}: finished"
        outdated = _set_aside(files, folder, step)  # as in `publish`; it may be damaged, or not a folder
        files.rename(path, name)
        foreign.remove_unless_foreign(files, outdated)
        return f"step-{step}: finished, replacing an older one"
    files.remove(path)
    return f"{hidden_name}: removed"


def checkpoint_bytes(found: CheckpointInfo) -> int:
    """Bytes of all files except the manifest."""
    return sum(fact.size for fact in found.files.values())


def list_checkpoints(folder: Location) -> tuple[list[CheckpointInfo], list[tuple[int, str]]]:
    """The published checkpoints that are complete by name and size, and the others as (step, why); sorted by step."""
    whole, damaged = [], []
    for step, name in _matching(folder, PUBLISHED, with_manifest=None if files_at(folder).renames else True):
        try:
            whole.append(read_checkpoint(join(folder, name)))
        except InvalidCheckpoint as reason:
            if files_at(folder).exists(join(folder, name)):  # otherwise a run has deleted it meanwhile
                damaged.append((step, str(reason)))
    return whole, damaged


def _is_whole(path: Location) -> bool:
    with suppress(InvalidCheckpoint):
        return bool(read_checkpoint(path))
    return False


def _matching(folder: Location, pattern: re.Pattern[str], with_manifest: bool | None = None) -> list[tuple[int, str]]:
    """(step, name) of each match, sorted; of published ones only folders. Raises UserError if it cannot be listed."""
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
        fix = "repair the folder or its permissions; nothing was changed"
        raise UserError(Problem(str(folder), f"cannot be listed: {error.strerror or error}", fix=fix)) from error
    return sorted((int(match[1]), name) for name in names if (match := pattern.fullmatch(name)))


def _may_be_folder(files: Files, path: Location) -> bool:
    try:
        return files.is_folder(path)
    except FileNotFoundError:
        return False
    except OSError:  # reported when it is read
        return True


def _set_aside(files: Files, folder: Location, step: int) -> str:
    """Renames step N. Returns its new name. Files of another trainer are never removed."""
    if foreign.has_foreign_weights(files, published_path(folder, step)):
        aside = foreign.backup_path(files, str(folder), step)
    else:
        aside = join(folder, f".step-{step}.deleting")
    if files.exists(aside):
        files.remove(aside)
    files.rename(published_path(folder, step), aside)
    return aside
