"""Writes files of token ids from the specifications of their formats, without the code that reads them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(
    prefix: Path,
    documents: Sequence[Sequence[Sequence[int]]],  # of sequences of ids
    dtype: str = "uint16",
    modes: bool = False,
    code: int | None = None,
    version: int = 1,
) -> None:
    sequences = [sequence for document in documents for sequence in document]
    data = [np.array(sequence, dtype).tobytes() for sequence in sequences]
    Path(f"{prefix}.bin").write_bytes(b"".join(data))
    starts = np.cumsum([0, *map(len, data)])[: len(data)]
    firsts = np.cumsum([0, *map(len, documents)])
    parts = [
        b"MMIDIDX\x00\x00",
        struct.pack("<QBqq", version, code or MEGATRON_CODES[dtype], len(sequences), len(firsts)),
        np.array([len(sequence) for sequence in sequences], "<i4").tobytes(),
        starts.astype("<i8").tobytes(),
        firsts.astype("<i8").tobytes(),
        bytes(len(sequences)) if modes else b"",
    ]
    Path(f"{prefix}.idx").write_bytes(b"".join(parts))


def write_shards(
    folder: Path, shards: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16", tokenizer: str = "bytes"
) -> dict[str, Any]:
    """Shards of documents, and their manifest, which is returned."""
    lengths: dict[str, int] = {}
    entries = []
    for number, documents in enumerate(shards):
        ids = np.array([one for document in documents for one in document], np.dtype(dtype).newbyteorder("<"))
        ends = np.cumsum([len(document) for document in documents], dtype="<i8")
        files = {"bin": ids.tobytes(), "idx": ends.tobytes()}
        entry: dict[str, Any] = {"name": f"{number:05d}", "ids": len(ids), "documents": len(documents)}
        for suffix, content in files.items():
            (folder / f"{number:05d}.{suffix}").write_bytes(content)
            entry |= {f"{suffix}_sha256": hashlib.sha256(content).hexdigest(), f"{suffix}_bytes": len(content)}
        entries.append(entry)
        for document in documents:
            least = str(2 ** (len(document).bit_length() - 1) if document else 0)
            lengths[least] = lengths.get(least, 0) + 1
    manifest: dict[str, Any] = {
        "format": "quadriga-tokens",
        "version": 1,
        "dtype": dtype,
        "ids": sum(entry["ids"] for entry in entries),
        "documents": sum(entry["documents"] for entry in entries),
        "bad_records": 0,
        "tokenizer": {"fingerprint": tokenizer, "vocab_size": 258, "bos_id": 256, "eos_id": 257},
        "source": {"fingerprint": "jsonl:1:00", "dataset": "jsonl", "field": "text"},
        "document_lengths": lengths,
        "shards": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def llmc_header(count: int, dtype: str = "uint16") -> bytes:
    magic, version = {"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes()


def write_llmc(path: Path, ids: Sequence[int], dtype: str = "uint16") -> None:
    path.write_bytes(llmc_header(len(ids), dtype) + np.array(ids, dtype).tobytes())


def write_raw(path: Path, ids: Sequence[int], dtype: str = "uint16") -> None:
    path.write_bytes(np.array(ids, dtype).tobytes())


def write_arrow(path: Path, table: pa.Table, rows: int = 3, stream: bool = False) -> None:
    writer = pa.ipc.new_stream if stream else pa.ipc.new_file
    with writer(str(path), table.schema) as sink:
        for batch in table.to_batches(max_chunksize=rows):
            sink.write_batch(batch)


def write_parquet(path: Path, table: pa.Table, rows: int = 3, **options) -> None:
    pyarrow.parquet.write_table(table, path, row_group_size=rows, **options)


def lists(documents: Sequence[Sequence[int]], kind: pa.DataType | None = None, name: str = "input_ids") -> pa.Table:
    return pa.table({name: pa.array(documents, kind or pa.list_(pa.int32()))})
