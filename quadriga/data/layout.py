"""How files are cut into shards. A checkpoint keeps this, so that a run can resume after files were repaired.

The cursor of a stream counts documents from the beginning of a shard. The starts of shards follow from the sizes of the
files, which a repair changes. So a resume uses the cuts of the run that saved, moved to where the same lines are now.
The saved form is `{"names": ..., "sizes": [...], "newest": ..., "step": ..., "cuts": {"<file>": [...]}}`.
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

WINDOW = 1 << 20  # bytes before and after in which the first line of a shard is searched
WIDE = 1 << 26  # if it is not found: as many bytes as the file grew or shrank, at most so many
NAMES_SHOWN = 3

Cuts = list[list[int]]  # by file: the first byte (or row) of each shard


class Anchor(NamedTuple):
    """The first line of a shard: its first byte, and its CRC-32."""

    start: int
    checksum: int


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
    names = ", ".join(shortened(file.name) for file in files[:NAMES_SHOWN])
    return names + (f" and {len(files) - NAMES_SHOWN} more" if len(files) > NAMES_SHOWN else "")


def find_anchor(file: File, start: int, end: int) -> Anchor | None:
    """The first line of a shard of a plain file; None if it has no line or cannot be read."""
    try:
        offset, line = next(lines_of(file, start, end), (0, None))
    except UserError:
        return None
    return None if line is None else Anchor(offset, zlib.crc32(line))


def move_cuts(file: File, starts: Sequence[int], size: int, anchors: Mapping[int, Anchor]) -> list[int]:
    """Moves the starts of the shards of a file that had `size` bytes and now has another size.

    `anchors`: of the partly read shards, by number of the shard in the file. Each of them starts at its first line,
    wherever that is now. Shards between them move like the next one. So if a file was changed within a partly read
    shard, all other lines stay in their shards. A partly read shard that would become empty keeps its length, because
    the removed lines are behind it.
    """
    by_all = file.size - size
    found: dict[int, int] = {}
    shift = lost = 0
    for number, known in sorted(anchors.items()):
        at = _find(file, known, by_all, shift)
        if at is None and _begins_line(file, known.start + shift):
            at = known.start + shift  # the first line itself changed
        if at is not None:
            found[number], shift = at, at - known.start
        lost += at is None
    if lost:
        name = shortened(file.name)
        what = f"the first lines of {lost} partly read shards were not found in it"
        logger.warning("data: %s changed, and %s: documents may be read twice or skipped", name, what)
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
    """The new position of a line: near its old one, or moved by the growth of the file, or by `shift` like the line
    before it. If it is not there, searches farther from these positions, because lines may have been added or removed
    on both sides."""
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
    """The starts of lines with this checksum, within `window` bytes of `center`."""
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
