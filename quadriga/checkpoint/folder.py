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

from quadriga.checkpoint import manifest as manifests
from quadriga.checkpoint import others
from quadriga.checkpoint.files import Files, Place, files_at, is_url
from quadriga.checkpoint.manifest import FORMAT, STATE_FILE, FileFacts, NotWhole, seal
from quadriga.errors import Fault, Problem, UserError

__all__ = ["FORMAT", "STATE_FILE", "FileFacts", "NotWhole", "seal"]  # of the manifest, for those who see this alone

NUMBER = "(0|[1-9][0-9]*)"  # as a step is written: no sign, no leading zeros, no other digits
PUBLISHED = re.compile(rf"step-{NUMBER}")
SAVING = re.compile(rf"\.step-{NUMBER}\.saving")
DELETING = re.compile(rf"\.step-{NUMBER}\.deleting")
CHUNK = 1 << 22  # bytes hashed at a time


class CheckpointError(Fault):
    """A checkpoint could not be written or read: what happened, what is safe, what next."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint. `extra` is what the trainer gave to `save`; `resume` is False where only its weights are
    to be taken (`checkpoint.initial_load_model_only`). `place` holds its files, `path` is its name."""

    step: int
    path: str
    contents: tuple[str, ...]  # "model", "optimizer", "random"
    extra: dict[str, Any] = field(default_factory=dict)
    resume: bool = True
    place: str = ""
    files: Mapping[str, FileFacts] = field(default_factory=dict)  # empty: not one of ours, and not to be verified
    trainer: str = ""  # whose it is, where that is known and it is not ours: see `titan`


def published(folder: Place, step: int) -> str:
    return join(folder, f"step-{step}")


def hidden(folder: Place, step: int) -> str:
    """Where step N is written on a file system until it is whole."""
    return join(folder, f".step-{step}.saving")


def join(folder: Place, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def prepare(folder: Place, step: int) -> str:
    """An empty place for the files of step N, where no reader looks."""
    files = files_at(folder)
    if not files.renames:
        return join(published(folder, step), uuid.uuid4().hex)
    place = hidden(folder, step)
    if files.exists(place):
        files.remove(place)
    files.make(place)
    return place


def publish(
    folder: Place,
    step: int,
    contents: Iterable[str],
    extra: Mapping[str, Any],
    place: Place | None = None,
    hashes: Mapping[str, str] | None = None,
) -> str:
    """Write the manifest of step N behind its files and give it its name, durably; the name.

    `place`: what `prepare` gave. `hashes`: SHA-256 by name of files that were hashed as they were written; others are
    read. A checkpoint that already has the name (of a run that went on from further back) is replaced.
    """
    files, name, place = files_at(folder), published(folder, step), str(place or hidden(folder, step))
    known = hashes or {}
    facts = {
        file: {"size": files.size(join(place, file)), "sha256": known.get(file) or sha256(files, join(place, file))}
        for file in files.names(place)
    }
    token = "." if files.renames else place.rpartition("/")[2]
    state = {
        "format": FORMAT,
        "step": step,
        "contents": list(contents),
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": token,
        "files": facts,
        "extra": dict(extra),
    }
    manifest = seal(state).encode()  # before a file is opened: what cannot be JSON must not leave half of one
    if not files.renames:
        files.write(join(name, STATE_FILE), manifest)
        with suppress(OSError):  # it is published; what is left goes at the next start
            others.remove_saves(files, name, keep=token)
        return name
    files.write(join(place, STATE_FILE), manifest)  # flushes the names of all files of the place, too
    outdated = _set_aside(files, folder, step) if files.exists(name) else None
    try:
        files.rename(place, name)
    except OSError:
        if outdated is not None:  # the older one is whole: it gets its name back
            files.rename(outdated, name)
        raise
    files.flush_names(folder)
    if outdated is not None:
        others.remove_unless_someone_elses(files, outdated)
    return name


def give_up(folder: Place, step: int, place: Place) -> None:
    """Remove what a failed save wrote, unless it was published all the same. Raises OSError where that fails."""
    files = files_at(folder)
    if not files.renames:
        try:
            manifest = join(published(folder, step), STATE_FILE)
            if manifests.parse(files.read(manifest), manifest).folder == str(place).rpartition("/")[2]:
                return  # the request that failed was heard
        except (FileNotFoundError, NotWhole):
            pass
    files.remove(place)


def read(path: Place) -> Found:
    """The checkpoint that a folder is. Raises NotWhole where a file is missing, has another size or is not listed.

    This is quick: contents are compared by `damage`."""
    files, manifest = files_at(path), join(path, STATE_FILE)
    said = _manifest(path)
    try:
        place = str(path) if said.folder == "." else join(path, said.folder)
        if not files.is_folder(place) and said.folder != ".":
            raise NotWhole(f"{place} is no folder")
        there = set(files.names(place))
    except OSError as error:
        raise NotWhole(f"{manifest} cannot be read ({error.strerror or error})") from error
    if (step := step_in_name(path)) not in (None, said.step):
        raise NotWhole(f"{manifest} is of step {said.step}, but its folder is called that of step {step}")
    for name, fact in said.files.items():
        file = join(place, name)
        if name not in there:
            raise NotWhole(f"{file} is missing")
        try:
            size = files.size(file)
        except OSError as error:  # a link that leads nowhere, a disk or a server that does not answer
            raise NotWhole(f"{file} cannot be read ({error.strerror or error})") from error
        if size != fact.size:
            raise NotWhole(f"{file} has {size} bytes instead of {fact.size}")
    if more := manifests.unlisted(said, there):
        raise NotWhole(f"{join(place, more[0])} is not listed in {STATE_FILE}")
    return Found(said.step, str(path), said.contents, said.extra, place=place, files=said.files)


def step_in_name(path: Place) -> int | None:
    """The step that a folder's name says, if any."""
    name = str(path).rstrip("/").rpartition("/")[2]
    matches = (pattern.fullmatch(name) for pattern in (PUBLISHED, SAVING, DELETING))
    return next((int(match[1]) for match in matches if match), None)


def damage(found: Found, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the contents of a checkpoint's files (all, or those named): one sentence for each."""
    files, wrong = files_at(found.place), []
    for name in found.files if names is None else names:
        path = join(found.place, name)
        try:
            same = files.retried(partial(sha256, files, path)) == found.files[name].sha256
        except OSError as error:
            wrong.append(f"{path} cannot be read ({error.strerror or error})")
            continue
        if not same:
            wrong.append(f"{path} is damaged (its hash differs from the one in {STATE_FILE})")
    return wrong


def sha256(files: Files, path: Place) -> str:
    digest = hashlib.sha256()
    with files.open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def whole_in(folder: Place) -> list[Found]:
    """The checkpoints in a folder that are whole by name and size, by step."""
    return sorted_out(folder)[0]


def damaged_in(folder: Place) -> list[str]:
    """Why each folder that is called `step-N` and is not whole is none. Such folders are passed over, never deleted."""
    return [reason for _, reason in sorted_out(folder)[1]]


def unpublished_in(folder: Place) -> list[str]:
    """What lies there of saves that were never published."""
    files = files_at(folder)
    if files.renames:
        return [name for _, name in _named(folder, SAVING)]
    return _without_manifest(files, folder, someone_elses=False)


def someone_elses_in(folder: Place) -> list[str]:
    """On an object store: the steps that another trainer saved, from which nothing here can go on."""
    files = files_at(folder)
    return [] if files.renames else _without_manifest(files, folder, someone_elses=True)


def _without_manifest(files: Files, folder: Place, someone_elses: bool) -> list[str]:
    named = [name for _, name in _named(folder, PUBLISHED, with_manifest=False)]
    return [name for name in named if others.is_someone_elses(files, join(folder, name)) == someone_elses]


def find(folder: Place, step: int = -1) -> Found | None:
    """The checkpoint of that step that is whole by name and size, -1: the newest; None where there is none."""
    for number, name in reversed(_named(folder, PUBLISHED)):  # the newest first: each look costs a request a file
        if step in (-1, number):
            with suppress(NotWhole):
                return read(join(folder, name))
    return None


def newest_extra(folder: Place, step: int = -1) -> dict[str, Any] | None:
    """What the newest checkpoint says beside its tensors, or that of `step`; None where there is none.

    `folder` holds checkpoints, or is one. Every rank asks, so the manifest alone is read. None where the newest is
    another trainer's: older ones of ours say nothing of that run. UserError: the folder cannot be listed."""
    named = [join(folder, name) for number, name in reversed(_named(folder, PUBLISHED)) if step in (-1, number)]
    for path in (*named, str(folder)):
        with suppress(NotWhole):
            return _manifest(path).extra
        if others.is_foreign_here(path):
            break
    return None


def _manifest(path: Place) -> manifests.Manifest:
    """What the manifest in a folder says. Raises NotWhole where it cannot be read."""
    manifest = join(path, STATE_FILE)
    try:
        return manifests.parse(files_at(path).read(manifest), manifest)
    except OSError as error:
        raise NotWhole(f"{manifest} cannot be read ({error.strerror or error})") from error


def delete_old(
    folder: Place, keep: int, every: int = 0, refused: Iterable[int] = (), saved: int | None = None
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
            others.remove_step(files, published(folder, step))
        gone.append(step)
    return gone


def no_folders(folder: Place) -> list[str]:
    """Why what is called `step-N` and is no folder counts for nothing: one sentence for each."""
    files, told = files_at(folder), []
    for _, name in _called(folder, PUBLISHED):
        path = join(folder, name)
        with suppress(OSError):
            if not files.is_folder(path):
                kind = "a link, which is not followed" if os.path.islink(path) else "no folder"
                told.append(f"{path} is {kind}: it is passed over")
    return told


def clean_up(folder: Place) -> list[str]:
    """Remove what a killed run left of unpublished saves; what was done, in words. Call while no run writes here.

    A save that was whole and lacked its new name only, since it was replacing an older one, gets it now.
    """
    files, done = files_at(folder), []
    if not files.renames:
        for name in unpublished_in(folder):
            files.remove(join(folder, name))
            done.append(f"{name} (never published): removed")
        for found in whole_in(folder):
            others.remove_saves(files, found.path, keep=found.place.rpartition("/")[2])
        return done
    for step, hidden_name in [*_named(folder, SAVING), *_named(folder, DELETING)]:
        try:
            done.append(_finish_or_remove(files, folder, step, hidden_name))
        except OSError as error:  # no reason not to start
            done.append(f"{hidden_name}: could not be removed ({error.strerror or error})")
    return done


def _finish_or_remove(files: Files, folder: Place, step: int, hidden_name: str) -> str:
    name, path = published(folder, step), join(folder, hidden_name)
    if SAVING.fullmatch(hidden_name) and files.is_folder(path) and _is_whole(path):
        if not files.exists(name):
            files.rename(path, name)
            return f"step-{step}: finished"
        outdated = _set_aside(files, folder, step)  # as `publish` was about to; it may be damaged, or no folder
        files.rename(path, name)
        others.remove_unless_someone_elses(files, outdated)
        return f"step-{step}: finished, in the place of an older one"
    files.remove(path)
    return f"{hidden_name}: removed"


def size(found: Found) -> int:
    """Bytes of all files but the manifest."""
    return sum(fact.size for fact in found.files.values())


def sorted_out(folder: Place) -> tuple[list[Found], list[tuple[int, str]]]:
    """The published checkpoints that are whole by name and size, and the others: (step, why); each by step."""
    whole, damaged = [], []
    for step, name in _named(folder, PUBLISHED, with_manifest=None if files_at(folder).renames else True):
        try:
            whole.append(read(join(folder, name)))
        except NotWhole as reason:
            if files_at(folder).exists(join(folder, name)):  # else a run has deleted it meanwhile
                damaged.append((step, str(reason)))
    return whole, damaged


def _is_whole(path: Place) -> bool:
    with suppress(NotWhole):
        return bool(read(path))
    return False


def _named(folder: Place, pattern: re.Pattern[str], with_manifest: bool | None = None) -> list[tuple[int, str]]:
    """Step and name of each match, by step; of published ones only folders. Raises UserError where it cannot look."""
    files, found = files_at(folder), _called(folder, pattern)
    if pattern is PUBLISHED:
        found = [one for one in found if _may_be_folder(files, join(folder, one[1]))]
    if with_manifest is None:
        return found
    return [one for one in found if files.exists(join(join(folder, one[1]), STATE_FILE)) == with_manifest]


def _called(folder: Place, pattern: re.Pattern[str]) -> list[tuple[int, str]]:
    try:
        names = files_at(folder).names(folder)
    except OSError as error:
        fix = "mend the folder or its permissions; nothing was changed"
        raise UserError(Problem(str(folder), f"cannot be listed: {error.strerror or error}", fix=fix)) from error
    return sorted((int(match[1]), name) for name in names if (match := pattern.fullmatch(name)))


def _may_be_folder(files: Files, path: Place) -> bool:
    try:
        return files.is_folder(path)
    except FileNotFoundError:
        return False
    except OSError:  # named when it is read
        return True


def _set_aside(files: Files, folder: Place, step: int) -> str:
    """Take its name from step N; the name that it has now. What another trainer left is never removed."""
    if others.is_someone_elses(files, published(folder, step)):
        aside = others.name_aside(files, str(folder), step)
    else:
        aside = join(folder, f".step-{step}.deleting")
    if files.exists(aside):
        files.remove(aside)
    files.rename(published(folder, step), aside)
    return aside
