"""The readers of token ids. A case is opened as a start does it; then all ids, documents and the indexes are read."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzzing import Reader

from quadriga.data.token_files import open_token_files

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "data"))
from token_writers import lists, write_arrow, write_llmc, write_megatron, write_parquet, write_raw

DOCUMENTS = [[i * 7 % 300 for i in range(j % 9)] for j in range(60)]
IDS = [one for document in DOCUMENTS for one in document]
NUMBERS = [struct.pack("<q", value) for value in (-1, 1 << 62, 1 << 31, 0, 60)] + [b"\xff\xff\xff\xff", b"\x00" * 64]


def megatron(folder: Path) -> None:
    write_megatron(folder / "a", [[document[:3], document[3:]] for document in DOCUMENTS], modes=True)


def llmc(folder: Path) -> None:
    write_llmc(folder / "a.bin", IDS)


def npy(folder: Path) -> None:
    np.save(folder / "a.npy", np.array(IDS, ">i4"))


def raw(folder: Path) -> None:
    write_raw(folder / "a.bin", IDS)


def parquet(folder: Path) -> None:
    for name, compression in (("a", "snappy"), ("b", "none")):
        write_parquet(folder / f"{name}.parquet", lists(DOCUMENTS), 17, compression=compression)


def arrow(folder: Path) -> None:
    write_arrow(folder / "a.arrow", lists(DOCUMENTS), 17)
    write_arrow(folder / "b.arrow", lists(DOCUMENTS), 17, stream=True)


def reader(**options: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        tokens = open_token_files(str(folder), eos_id=7, **options)
        try:
            for problem in tokens.verify(300):
                str(problem)
            for start in range(0, tokens.length, 50):
                stop = min(start + 50, tokens.length)
                assert len(tokens.read(start, stop)) == stop - start
                assert tokens.documents(start, stop)
                assert all(0 < border <= stop - start for border in tokens.borders(start, stop))
        finally:
            tokens.close()

    return read


READERS = [
    Reader("tokens, megatron", megatron, reader(), NUMBERS, ("**/*.idx",)),
    Reader("tokens, megatron data", megatron, reader(), NUMBERS, ("**/*.bin",)),
    Reader("tokens, llm.c", llmc, reader(), NUMBERS),
    Reader("tokens, npy", npy, reader(), NUMBERS),
    Reader("tokens, headerless", raw, reader(token_dtype="uint16"), NUMBERS),
    Reader("tokens, parquet", parquet, reader(), [*NUMBERS, b"PAR1", b"\x15\x04"]),
    Reader("tokens, arrow", arrow, reader(), [*NUMBERS, b"ARROW1"]),
]
