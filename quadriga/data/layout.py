"""How files are cut into shards, kept with a checkpoint: so a run goes on in files that were mended in the meantime.

A stream's cursor counts documents from the beginning of a shard. Where shards begin follows from the sizes of the
files, which a mended file changes; so a resume takes over the cuts of the run that saved, moved to where the same lines
are now. The saved form is `{"names": ..., "sizes": [...], "newest": ..., "step": ..., "cuts": {"<file>": [...]}}`.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quadriga.data.files import File
from quadriga.data.line_reader import lines_of, open_bytes
from quadriga.errors import UserError, shortened
from quadriga.log import logger

WINDOW = 1 << 20  # bytes before and after, in which the first line of a shard is looked for ...
WIDE = 1 << 26  # ... and at most so many, as many as the file grew or shrank, where it is not found in those
NAMES_SHOWN = 3

Cuts = list[list[int]]  # by file: where its shards begin


class Anchor(NamedTuple):
    """The first line of a shard: where it begins, and its checksum."""

    start: int
    checksum: int


def layout_state(files: Sequence[File], step: int, cuts: Mapping[int, list[int]]) -> dict[str, Any]:
    """What a checkpoint keeps, JSON-able. `cuts`: of the files that are not cut every `step`."""
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
    """Where the saved run cut the files, as they were then."""
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
    """The files that have another size than then, or were written after the saved run listed them."""
    pairs = zip(files, saved["sizes"], strict=True)
    return [file for file, size in pairs if file.size != size or file.modified > saved["newest"]]


def format_files(files: Sequence[File]) -> str:
    names = ", ".join(shortened(file.name) for file in files[:NAMES_SHOWN])
    return names + (f" and {len(files) - NAMES_SHOWN} more" if len(files) > NAMES_SHOWN else "")


def find_anchor(file: File, start: int, end: int) -> Anchor | None:
    """The first line of the shard of a plain file; None where it has none, or cannot be read."""
    try:
        offset, line = next(lines_of(file, start, end), (0, None))
    except UserError:
        return None
    return None if line is None else Anchor(offset, zlib.crc32(line))


def move_cuts(file: File, starts: Sequence[int], size: int, anchors: Mapping[int, Anchor]) -> list[int]:
    """Where the shards of a file of `size` bytes begin, now that it has another size.

    `anchors`: by number of the shard in the file, of those that are being read. Each begins at its first line, wherever
    that is now. What lies between is moved as the next one is: then a file that was mended within a shard under way
    has all of its other lines in the shards that they were in. Where that would leave nothing of a shard under way, it
    keeps its length: what was removed lies behind it.
    """
    by_all = file.size - size
    found: dict[int, int] = {}
    shift = lost = 0
    for number, known in sorted(anchors.items()):
        at = _find(file, known, by_all, shift)
        if at is None and _begins_line(file, known.start + shift):
            at = known.start + shift  # the first line itself was mended
        if at is not None:
            found[number], shift = at, at - known.start
        lost += at is None
    if lost:
        name = shortened(file.name)
        what = f"{lost} of the shards that were being read begin cannot be found in it"
        logger.warning("data: %s changed, and where %s: documents may be read twice or left out", name, what)
    cuts: list[int] = []
    shift = by_all
    for number in range(len(starts) - 1, -1, -1):
        if number in found:
            shift = found[number] - anchors[number].start
        at = found[number] if number in found else starts[number] + shift if number else 0
        if number - 1 in found and number not in found and at <= found[number - 1]:
            at = starts[number] + found[number - 1] - anchors[number - 1].start
        cuts.append(at)
    cuts.reverse()
    least = 0
    for number, at in enumerate(cuts):
        least = max(least, min(at, file.size))
        cuts[number] = least
    return cuts


def _find(file: File, known: Anchor, by_all: int, shift: int) -> int | None:
    """Where the line is now: near where it was, or moved by what the file grew, or by `shift` as the one before it;
    else farther from these places, since what was added or removed may lie on both sides."""
    centers = {known.start, known.start + by_all, known.start + shift}
    for window in (WINDOW, min(abs(by_all), WIDE)):
        places = [at for center in centers for at in _matches(file, known.checksum, center, window)]
        if places or abs(by_all) <= WINDOW:
            return min(places, key=lambda at: min(abs(at - center) for center in centers), default=None)
    return None


def _begins_line(file: File, at: int) -> bool:
    with open_bytes(file) as stream:
        stream.seek(max(at - 1, 0))
        return at == 0 or (at > 0 and stream.read(1) == b"\n")


def _matches(file: File, checksum: int, center: int, window: int) -> list[int]:
    """Where lines with this checksum begin, within `window` bytes of `center`."""
    start = max(center - window, 0)
    with open_bytes(file) as stream:
        stream.seek(start)
        data = stream.read(center + window - start) if center + window > start else b""
    at = data.find(b"\n") + 1 if start else 0
    places = []
    while at < len(data):
        end = data.find(b"\n", at) + 1 or len(data)
        if zlib.crc32(data[at:end]) == checksum:
            places.append(start + at)
        at = end
    return places
