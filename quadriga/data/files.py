"""Local data files: finds the files of a path, names them in a fingerprint, and keeps how they are cut into shards.

The cursor of a stream counts documents from the beginning of a shard. The starts of shards follow from the sizes of the
files, which a repair changes. A checkpoint keeps the cuts, so that a run can resume after files were repaired: with the
cuts of the run that saved, moved to where the same lines are now. The saved form is
`{"names": ..., "sizes": [...], "newest": ..., "step": ..., "cuts": {"<file>": [...]}}`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quadriga.config.assets import DATASETS, PACKED, local_path
from quadriga.data.unfinished import refuse_unfinished
from quadriga.errors import Problem, UserError, shortened
from quadriga.file_search import FolderListing, files_below, files_matching
from quadriga.log import logger
from quadriga.reading import file_kind
from quadriga.units import format_some

UNREADABLE = (".bz2", ".xz", ".zip", ".lz4", ".tar")
SAVED_BY_DATASETS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
MOST_PROBLEMS = 10  # reported for one path
MOST_NAMES = 5  # listed in a message
PATH_KEY = "training.dataset_path"

Cuts = list[list[int]]  # by file: the first byte (or row) of each shard


@dataclass(frozen=True)
class File:
    path: Path
    name: str  # relative to the folder, so that the fingerprint is the same wherever the folder is
    size: int  # bytes on disk
    compressed: bool
    modified: int = field(default=0, compare=False)  # nanoseconds since the epoch
    version: str = ""  # of an object in a store, what identifies its content
    url: str = ""  # of a file on another machine


def find_files(
    kind: str, pattern: str, key: str = PATH_KEY, *, suffixes: tuple[str, ...] | None = None
) -> tuple[File, ...]:
    """The files of a path, a folder (searched recursively, by suffix) or a glob, sorted by name. `key` named it.
    `suffixes`: of the files in a folder; by default those of the data set `kind`.

    Raises UserError if nothing is found, a file cannot be read, or its format is not supported.
    """
    path = Path(local_path(pattern)).expanduser()
    suffixes = DATASETS[kind].suffixes if suffixes is None else suffixes
    if os.path.isdir(path):
        refuse_unfinished(path)
        inside = files_below(path)
        found = [name for name in inside.files if name.lower().endswith(suffixes)]
        _refuse_saved_by_datasets(kind, path, inside.files, found)
        if not found:
            there = ", ".join(_format_names(inside.files)) or "nothing"
            what = f"the folder has no {kind} file; it contains {there}"
            raise UserError(Problem(key, what, value=pattern, allowed=", ".join("*" + s for s in suffixes)))
        files = describe_files([(path / name, name) for name in found], path)
        _warn_unexpected(suffixes, pattern, inside, found)
        return files
    if os.path.exists(path):
        return describe_files([(path, path.name)], path.parent)
    matching = [Path(name) for name in files_matching(str(path)) if not os.path.isdir(name)]
    if not matching:
        what = "no file matches" if any(sign in pattern for sign in "*?[") else "there is no such file or folder"
        fix = f"relative paths start at the current directory, {Path.cwd()}"
        raise UserError(Problem(key, what, value=pattern, fix=fix))
    root = Path(os.path.commonpath([file.parent for file in matching]))
    files = describe_files([(file, file.relative_to(root).as_posix()) for file in matching], root)
    _warn_unexpected(suffixes, pattern, FolderListing([], []), [file.name for file in files])
    return files


def c4_files(folder: str, split: str, key: str = PATH_KEY) -> tuple[File, ...]:
    """The shards of `split` of C4 in a folder or its subfolder `en`; otherwise every such file of no known split."""
    path = Path(folder).expanduser()

    def shards() -> list[str]:
        return sorted(file.name for file in path.iterdir() if file.name.endswith(DATASETS["c4"].suffixes))

    if path.is_dir() and not shards() and (path / "en").is_dir():
        path = path / "en"
    if not path.is_dir():
        return find_files("jsonl", folder, key)
    here = shards()
    found = [name for name in here if name.startswith(f"c4-{split}.")]
    found = found or [name for name in here if not name.startswith("c4-")]
    if not found:
        what = f"the folder has no C4 shard of the {split} split"
        fix = f"put c4-{split}.*.json.gz there, or remove {key} to stream C4 from the Hub"
        raise UserError(Problem(key, what, value=folder, allowed=f"c4-{split}.*.json.gz", fix=fix))
    return describe_files([(path / name, name) for name in found], path)


def describe_files(found: Sequence[tuple[Path, str]], root: Path) -> tuple[File, ...]:
    """The files at some paths, each with its name in the fingerprint. Raises UserError as `find_files`."""
    problems: list[Problem] = []
    files: list[File] = []
    for path, name in sorted(found, key=lambda pair: pair[1]):
        try:
            status = path.stat()
        except OSError as error:
            mode = stat.S_IFLNK if path.is_symlink() else 0
            what = f"is {file_kind(mode)}" if mode else f"the file cannot be read: {error.strerror}"
            problems.append(Problem(str(path), what, fix="restore it or the target of the link, or remove it"))
            continue
        if not stat.S_ISREG(status.st_mode):
            fix = "move it away, or name the files by a glob"
            problems.append(Problem(str(path), f"is {file_kind(status.st_mode)}, not a regular file", fix=fix))
        elif name.lower().endswith(UNREADABLE):
            what = f"{path.suffix} files cannot be read"
            problems.append(Problem(str(path), what, allowed="plain files, and .gz and .zst for text and jsonl"))
        files.append(File(path, name, status.st_size, path.suffix.lower() in PACKED, status.st_mtime_ns))
    if not problems and not sum(file.size for file in files):
        problems.append(Problem(str(root if len(files) > 1 else files[0].path), "every file is empty"))
    if problems:
        raise UserError(*problems[:MOST_PROBLEMS])
    return tuple(files)


def _refuse_saved_by_datasets(kind: str, folder: Path, inside: Sequence[str], found: Sequence[str]) -> None:
    """Raises UserError for a folder of `Dataset.save_to_disk`: Arrow files, and JSON files without documents."""
    described = [name for name in inside if name.rpartition("/")[2] in SAVED_BY_DATASETS]
    arrow = any(name.endswith(".arrow") for name in inside)
    if arrow and described and (kind == "jsonl" or not found):
        what = f"the folder was written by `save_to_disk` of the library `datasets` ({described[0]}), as Arrow files"
        raise UserError(
            Problem(
                shortened(folder, 400),
                what,
                fix="set the dataset to arrow",
            )
        )
    taken = [name for name in found if name.rpartition("/")[2] in SAVED_BY_DATASETS - {"state.json"}]
    if taken:
        what = "the file describes a data set of the library `datasets`; it has no documents"
        fix = "move it out of the folder, or name the files by a glob (dataset_path = FOLDER/*.jsonl)"
        raise UserError(*(Problem(shortened(folder / name, 400), what, fix=fix) for name in taken[:MOST_PROBLEMS]))


def _warn_unexpected(suffixes: tuple[str, ...], pattern: str, inside: FolderListing, found: Sequence[str]) -> None:
    """Warns about files that are read twice or skipped."""
    there = set(found)
    unpacked = Counter(_unpacked(name) for name in found)
    if twice := [name for name, count in unpacked.items() if count > 1]:
        both = " and ".join(shortened(name) for name in found if _unpacked(name) == twice[0])
        more = f", and {len(twice) - 1} more such pairs" if len(twice) > 1 else ""
        logger.warning("data: %s are both read%s; if one is a copy of the other, remove it", both, more)
    if inside.repeated:
        names = ", ".join(_format_names(inside.repeated))
        logger.warning("data: links in %s to folders that are already read are skipped: %s", shortened(pattern), names)
    packed = tuple(suffix + end for suffix in suffixes for end in (*UNREADABLE, *PACKED))
    if left_out := [name for name in inside.files if name.lower().endswith(packed) and name not in there]:
        names = ", ".join(_format_names(left_out))
        logger.warning("data: %d files with a compression that is not supported are skipped: %s", len(left_out), names)


def _unpacked(name: str) -> str:
    return name[: -len(end)] if (end := os.path.splitext(name)[1]).lower() in PACKED else name


def _format_names(names: Iterable[str]) -> list[str]:
    names = list(names)
    more = [f"and {len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
    return [shortened(name) for name in names[:MOST_NAMES]] + more


def fingerprint(kind: str, files: Sequence[File]) -> str:
    """A hash of names and sizes, so that no file has to be read."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        version = f"{file.version}\0" if file.version else ""
        digest.update(os.fsencode(f"{file.name}\0{file.size}\0{version}"))
    return f"{kind}:{len(files)}:{digest.hexdigest()}"


def layout_state(files: Sequence[File], step: int, cuts: Mapping[int, list[int]]) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON values. `cuts`: of the files that are not cut every `step` bytes."""
    return {
        "names": names_digest(files),
        "sizes": [file.size for file in files],
        "newest": max((file.modified for file in files), default=0),
        "step": step,
        "cuts": {str(index): starts for index, starts in cuts.items()},
    }


def names_digest(files: Sequence[File]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(os.fsencode(file.name) + b"\0")
    return digest.hexdigest()


def saved_cuts(files: Sequence[File], saved: Mapping[str, Any]) -> Cuts:
    """Where the saved run cut the files, in the positions of that time."""
    cuts = saved["cuts"]
    return [
        cuts[str(index)]
        if str(index) in cuts
        else [0]
        if file.compressed
        else list(range(0, saved["sizes"][index], saved["step"]))
        for index, file in enumerate(files)
    ]


def changed_files(files: Sequence[File], saved: Mapping[str, Any]) -> list[File]:
    """The files whose size differs from the saved one, or that were written after the saved run listed them."""
    pairs = zip(files, saved["sizes"], strict=True)
    return [file for file, size in pairs if file.size != size or file.modified > saved["newest"]]


def format_files(files: Sequence[File]) -> str:
    return format_some([shortened(file.name) for file in files], 3)
