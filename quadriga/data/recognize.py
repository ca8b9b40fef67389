"""Detects data files whose format differs from their name, by their first bytes, and gives a remedy."""

from __future__ import annotations

import functools
import os

from quadriga.data.files import File
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import opened

HEAD = 512  # bytes that are examined
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAGIC = (
    (b"\x1f\x8b", "compressed by gzip, and its name does not end in .gz", "rename it to {name}.gz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd (not supported)", "decompress it (zstd -d), or compress it by gzip"),
    (b"BZh", "compressed by bzip2 (not supported)", "decompress it (bunzip2), or compress it by gzip"),
    (b"\xfd7zXZ\x00", "compressed by xz (not supported)", "decompress it (unxz), or compress it by gzip"),
    (b"\x04\x22\x4d\x18", "compressed by lz4 (not supported)", "decompress it (unlz4), or compress it by gzip"),
    (b"PK\x03\x04", "a zip archive", "unpack it (unzip)"),
    (b"PAR1", "a Parquet file", "name it *.parquet and set the dataset to parquet"),
    (b"PARE", "an encrypted Parquet file", "decrypt it first"),
    (b"ARROW1", "an Arrow file", "write it as Parquet and set the dataset to parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write it as Parquet and set the dataset to parquet"),
    (b"%PDF-", "a PDF document", "extract its text first"),
    (b"\x89HDF", "an HDF5 file", "write its texts as JSON lines or Parquet"),
    (b"\x93NUMPY", "a NumPy file", "write its texts as JSON lines or Parquet"),
    (b"SQLite format 3\x00", "an SQLite database", "write its texts as JSON lines or Parquet"),
)


def refuse_if_foreign(file: File, kind: str) -> None:
    """Raises UserError if the first bytes show that the file has another format than `kind` (text, jsonl, parquet)."""
    if (found := _foreign(file, kind)) is not None:
        what, fix = found
        raise UserError(Problem(shortened(file.path, 400), what, fix=fix))


@functools.lru_cache(maxsize=4096)
def _foreign(file: File, kind: str) -> tuple[str, str] | None:
    with opened(file.path, what="data file") as stream:
        head = stream.read(HEAD)
    if head.startswith(LFS_POINTER):
        return "the file is a pointer of Git LFS, not the data that it points to", "download the data: git lfs pull"
    if kind == "jsonl" and os.path.basename(file.name) in ("dataset_info.json", "dataset_infos.json"):
        fix = "set dataset_path to the data files of the data set"
        return "the file describes a data set of the library `datasets`; it has no documents", fix
    for magic, what, fix in MAGIC:
        if head.startswith(magic) and not (file.compressed and magic == b"\x1f\x8b"):
            if kind == "parquet" and magic == b"PAR1":
                return None
            return f"the file is {what}", fix.format(name=shortened(os.path.basename(file.name)))
    if not file.compressed and (encoding := _wide_encoding(head)):
        return f"the file is {encoding}, not UTF-8", f"convert it: iconv -f {encoding} -t UTF-8 IN > OUT"
    return None


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, detected by the byte order mark, or by the positions of the zero bytes of Latin text."""
    for mark, name in ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16")):
        if head.startswith(mark):
            return name
    if head.startswith(b"\xfe\xff"):
        return "UTF-16"
    pairs = len(head) // 2
    if pairs >= 2:
        even, odd = (sum(byte == 0 for byte in head[start : 2 * pairs : 2]) for start in (0, 1))
        if odd > 0.6 * pairs and even < 0.1 * pairs:
            return "UTF-16LE"
        if even > 0.6 * pairs and odd < 0.1 * pairs:
            return "UTF-16BE"
    return None
