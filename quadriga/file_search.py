"""Search for the files below a folder, or that match a pattern. Links are followed, and every search ends."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import deque
from typing import NamedTuple

from quadriga import limits
from quadriga.errors import Problem, UserError, shortened


class FolderListing(NamedTuple):
    """The content of a folder and its sub-folders, as sorted names relative to the folder."""

    files: list[str]  # all entries except folders
    repeated: list[str]  # links to a folder that is read under another name, or that contains the start folder


def files_below(folder: str | os.PathLike[str]) -> FolderListing:
    """All entries of a folder and its sub-folders, without hidden ones. Links to folders are followed.

    Each folder is read once, and under its own name if that is below `folder`. So a cycle of links ends, and the names
    of files do not change when a link is added.

    Raises:
        UserError: a folder cannot be read, or there are more than `limits.DATA_FILES` entries.
    """
    root = os.fspath(folder)
    files: list[str] = []
    repeated: list[str] = []
    links = deque([""])  # the folder itself first
    seen: set[tuple[int, int]] = set()
    above = os.path.join(os.path.realpath(root), "")
    while links:
        link = links.popleft()
        if link and above.startswith(os.path.join(os.path.realpath(os.path.join(root, link)), "")):
            repeated.append(link)
            continue
        waiting = [link]
        while waiting:
            name = waiting.pop()
            try:
                status = os.stat(os.path.join(root, name))
                if (status.st_dev, status.st_ino) in seen:
                    repeated.append(name)
                    continue
                folders, files_here, links_here = _entries(root, name)
            except OSError as error:
                where = shortened(os.path.join(root, name), 400)
                raise UserError(Problem(where, f"the folder cannot be read: {error.strerror}")) from error
            seen.add((status.st_dev, status.st_ino))
            waiting += folders
            links.extend(links_here)
            files += files_here
            if len(files) + len(seen) + len(links) > limits.DATA_FILES:
                allowed = f"at most {limits.DATA_FILES:,} files and folders"
                raise UserError(Problem(shortened(root, 400), "the folder holds too many files", allowed=allowed))
    return FolderListing(sorted(files), sorted(repeated))


def _entries(root: str, name: str) -> tuple[list[str], list[str], list[str]]:
    """Folders, other entries, and links to folders in the folder `name` below `root`, as names below `root`."""
    folders: list[str] = []
    files: list[str] = []
    links: list[str] = []
    with os.scandir(os.path.join(root, name)) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                inner = f"{name}/{entry.name}" if name else entry.name
                (links if entry.is_symlink() else folders if entry.is_dir() else files).append(inner)
    leading = {link for link in links if os.path.isdir(os.path.join(root, link))}
    files += [link for link in links if link not in leading]
    return sorted(folders, reverse=True), files, sorted(leading)


def files_matching(pattern: str) -> list[str]:
    """The paths that a glob pattern matches, sorted. `**` matches any number of folders, searched by `files_below`.

    Raises:
        UserError: as `files_below`.
    """
    parts = pattern.split("/")
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    at = parts.index("**")
    above = "/".join(parts[:at]) or ("/" if pattern.startswith("/") else ".")
    folders = sorted(glob.glob(above)) if glob.has_magic(above) else [above]
    listings = ((folder, files_below(folder).files) for folder in folders if os.path.isdir(folder))
    return sorted(
        name if above == "." else os.path.join(folder, name)
        for folder, names in listings
        for name in names
        if _matches(name.split("/"), parts[at:])
    )


def _matches(names: list[str], parts: list[str]) -> bool:
    """Whether the names of a path match the parts of a pattern. `ends`: the numbers of names that the parts so far can
    match, so that the time does not grow exponentially with several `**`."""
    ends = {0}
    for part in parts:
        if part == "**":
            ends = set(range(min(ends), len(names) + 1))
        else:
            ends = {end + 1 for end in ends if end < len(names) and fnmatch.fnmatchcase(names[end], part)}
        if not ends:
            return False
    return len(names) in ends
