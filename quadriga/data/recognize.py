"""Detects data files whose format differs from their name, by their first bytes, and gives a remedy."""

from __future__ import annotations

import functools
import io
import os
import struct

from quadriga.data.byte_files import FileBytes
from quadriga.data.files import File
from quadriga.data.stored_arrays import path_of
from quadriga.errors import Problem, UserError, shortened

HEAD = 4096  # bytes that are examined
WIDE_IDS = 32  # ids that show how wide ids are
CONTROL = frozenset(range(32)) - frozenset(b"\b\t\n\f\r\x1b")  # bytes that text does not have
MEGATRON_MAGIC, OLD_MEGATRON_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"  # of index files
LLMC_HEADERS = {  # by magic and version, the dtype of the ids
    struct.pack("<ii", 20240520, 1): "uint16",
    struct.pack("<ii", 20240801, 1): "uint32",
    struct.pack("<ii", 20240801, 7): "uint32",
}
FOR_IDS = "for token ids, set the dataset to tokens"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
UNPACKED = {GZIP: "decompress it (gunzip)", ZSTD: "decompress it (zstd -d)"}  # for files that are not read compressed
OWN = {"parquet": (b"PAR1",), "arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
MAGIC = (
    (GZIP, "compressed by gzip, and its name does not end in .gz", "rename it to {name}.gz"),
    (ZSTD, "compressed by zstd, and its name does not end in .zst", "rename it to {name}.zst"),
    (b"BZh", "compressed by bzip2 (not supported)", "decompress it (bunzip2), or compress it by gzip"),
    (b"\xfd7zXZ\x00", "compressed by xz (not supported)", "decompress it (unxz), or compress it by gzip"),
    (b"\x04\x22\x4d\x18", "compressed by lz4 (not supported)", "decompress it (unlz4), or compress it by gzip"),
    (b"PK\x03\x04", "a zip archive", "unpack it (unzip)"),
    (b"PAR1", "a Parquet file", "name it *.parquet and set the dataset to parquet"),
    (b"PARE", "an encrypted Parquet file", "decrypt it first"),
    (b"ARROW1", "an Arrow file", f"name it *.arrow and set the dataset to arrow; {FOR_IDS}"),
    (b"\xff\xff\xff\xff", "an Arrow stream", f"name it *.arrow and set the dataset to arrow; {FOR_IDS}"),
    (b"%PDF-", "a PDF document", "extract its text first"),
    (b"\x89HDF", "an HDF5 file", "write its texts as JSON lines or Parquet"),
    (b"\x93NUMPY", "a NumPy file", f"{FOR_IDS}; write texts as JSON lines or Parquet"),
    (MEGATRON_MAGIC, "an index of Megatron's token files", FOR_IDS),
    (OLD_MEGATRON_MAGIC, "an index of Megatron's older format (TNTIDX)", "write it again in the newer one (mmap)"),
    *((magic, f"a file of {dtype} token ids of llm.c", FOR_IDS) for magic, dtype in LLMC_HEADERS.items()),
    (b"SQLite format 3\x00", "an SQLite database", "write its texts as JSON lines or Parquet"),
)


def refuse_if_foreign(file: File, kind: str) -> None:
    """Raises UserError if the first bytes show that the file is not of `kind` (text, jsonl, parquet, arrow)."""
    if (found := _foreign(file, kind)) is not None:
        what, fix = found
        raise UserError(Problem(path_of(file), what, fix=fix))


@functools.lru_cache(maxsize=4096)
def _foreign(file: File, kind: str) -> tuple[str, str] | None:
    with io.BufferedReader(FileBytes(file)) as stream:
        head = stream.read(HEAD)
    if head.startswith(LFS_POINTER):
        return "the file is a pointer of Git LFS, not the data that it points to", "download the data: git lfs pull"
    if kind == "jsonl" and os.path.basename(file.name) in ("dataset_info.json", "dataset_infos.json"):
        fix = "set dataset_path to the data files of the data set"
        return "the file describes a data set of the library `datasets`; it has no documents", fix
    for magic, what, fix in MAGIC:
        own = file.compressed and magic == (ZSTD if file.name.lower().endswith(".zst") else GZIP)
        if head.startswith(magic) and not own:
            if magic in OWN.get(kind, ()):
                return None
            remedy = fix if kind in ("text", "jsonl") else UNPACKED.get(magic, fix)
            return f"the file is {what}", remedy.format(name=shortened(os.path.basename(file.name)))
    if file.compressed:
        return None
    if encoding := _wide_encoding(head):
        return f"the file is {encoding}, not UTF-8", f"convert it: iconv -f {encoding} -t UTF-8 IN > OUT"
    if (binary := _binary(head)) is not None:
        return binary, f"{FOR_IDS}; otherwise write texts as UTF-8"
    return None


def damaged_file(file: File, lines: int, error: Exception) -> Problem:
    """The problem of a compressed file whose reading failed after `lines` lines. Raises UserError if the file has
    another format."""
    refuse_if_foreign(file, "text")
    reason = str(error)
    truncated = isinstance(error, EOFError) or "truncated" in reason.lower()
    what = "the compressed file is truncated" if truncated else f"the compressed file is damaged ({reason})"
    return Problem(f"{path_of(file)}, after line {lines}", what, fix="download or write the file again")


def foreign_to_ids(head: bytes, *, or_text: bool = True) -> tuple[str, str] | None:
    """What a headerless file of token ids is instead, by its first bytes, and a remedy; None if it can be one.
    `or_text`: whether it can be text instead."""
    if head.startswith(LFS_POINTER):
        return "the file is a pointer of Git LFS, not the data that it points to", "download the data: git lfs pull"
    for magic, what, _ in MAGIC:
        # Two ids can begin like gzip by chance, so its method is compared too.
        if head.startswith(magic + b"\x08" if magic == GZIP else magic):
            return f"the file is {what}", "unpack or convert it, or name other files"
    if or_text and len(head) >= 2 * WIDE_IDS and _is_text(head):
        return "the file is text, not token ids", "set the dataset to text, jsonl or parquet, or name other files"
    return None


def _is_text(head: bytes) -> bool:
    """Whether the bytes, the last of which can be a part of a character, are UTF-8 without control characters."""
    try:
        head[: max(len(head) - 3, 0)].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return False
    return CONTROL.isdisjoint(head)


def _binary(head: bytes) -> str | None:
    """What the file is if it is no text: by the places of its NUL bytes, how wide token ids it may have."""
    if len(head) < WIDE_IDS or sum(byte in CONTROL for byte in head) * 50 < len(head):
        return None
    if not any(head):
        return "the file begins with NUL bytes alone: token ids, or a damaged copy"
    for width, names in ((8, "int64"), (4, "uint32 or int32")):
        # Real vocabularies have less than 2^20 ids. Narrower ids, read as wide ones, have a second id above that.
        ids = (int.from_bytes(head[at : at + width], "little") for at in range(0, len(head) - width + 1, width))
        if all(number < 1 << 20 for number in ids):
            return f"the file looks like {names} token ids, not text"
    odd, even = (head[start::2].count(0) for start in (1, 0))
    if odd >= 3 and odd > 3 * even:
        return "the file looks like uint16 token ids, not text"
    return "the file is binary, not text"


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
        little, big = odd > 0.6 * pairs and even < 0.1 * pairs, even > 0.6 * pairs and odd < 0.1 * pairs
        # The characters themselves have no zero; small token ids have the same zeros, and control characters.
        if (little or big) and CONTROL.isdisjoint(head[: 2 * pairs][int(big) :: 2]):
            return "UTF-16LE" if little else "UTF-16BE"
    return None
