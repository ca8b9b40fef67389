"""Real files of every kind for the data tests: the same documents, written in each format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from quadriga.config.schema import TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.hub import HubSource
from quadriga.data.sources import Source


def texts(count: int) -> list[str]:
    """Documents of many lines and very different lengths; every line of every document is unlike any other."""
    return [
        "".join(f"{i}.{line} Füße, 漢字, {'x' * (i % 7)}\n" for line in range(1 + i * 13 % 29)) for i in range(count)
    ]


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    lines = "".join(json.dumps({"text": text, "url": "http://x"}) + "\n" for text in documents).encode()
    packed = {".gz": gzip.compress, ".zst": zstd_frames}
    path.write_bytes(packed[path.suffix](lines) if path.suffix in packed else lines)
    return path


def zstd_frames(data: bytes, size: int = 1000) -> bytes:
    """Several frames of zstd."""
    import pyarrow

    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in parts)


def jsonl(folder: Path, documents: Sequence[str], streams: int) -> Source:
    for part in range(3):
        write_jsonl(folder / f"part{part}.jsonl", documents[part::3])
    return open_source(TextKeys("jsonl", str(folder)), streams=streams)


def jsonl_gz(folder: Path, documents: Sequence[str], streams: int) -> Source:
    for part in range(3):
        write_jsonl(folder / f"part{part}.jsonl.gz", documents[part::3])
    return open_source(TextKeys("jsonl", str(folder / "part*.gz")), streams=streams)


def jsonl_zst(folder: Path, documents: Sequence[str], streams: int) -> Source:
    for part in range(3):
        write_jsonl(folder / f"part{part}.jsonl.zst", documents[part::3])
    return open_source(TextKeys("jsonl", str(folder)), streams=streams)


def c4(folder: Path, documents: Sequence[str], streams: int) -> Source:
    for part in range(5):
        write_jsonl(folder / f"c4-train.{part:05d}-of-00005.json.gz", documents[part::5])
    write_jsonl(folder / "c4-validation.00000-of-00001.json.gz", ["held out\n"])
    return open_source(TextKeys("c4", str(folder)), streams=streams)


def hub(folder: Path, documents: Sequence[str], streams: int) -> Source:
    files = [write_jsonl(folder / f"c4-train.{part:05d}.json.gz", documents[part::5]) for part in range(5)]
    return HubSource("json", None, "train", data_files=[str(file) for file in files], keys=TextKeys("hub"))


def write_repository(folder: Path, documents: Sequence[str]) -> Path:
    """A folder that `datasets` reads as a repository of the Hub, of 5 files."""
    repository = folder / "repository"
    repository.mkdir(exist_ok=True)
    for part in range(5):
        if not (repository / f"train-{part}.jsonl").exists():
            write_jsonl(repository / f"train-{part}.jsonl", documents[part::5])
    return repository


def hub_folder(folder: Path, documents: Sequence[str], streams: int) -> Source:
    return open_source(TextKeys("hub", str(write_repository(folder, documents))), streams=streams)


def hub_local(folder: Path, documents: Sequence[str], streams: int) -> Source:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        keys = TextKeys("hub", str(write_repository(folder, documents)), streaming=False)
        return open_source(keys, streams=streams)


def jsonl_url(folder: Path, documents: Sequence[str], streams: int) -> Source:
    """In fsspec's memory, of this process."""
    import fsspec

    url = f"memory://{folder}"
    for part in range(3):
        file = write_jsonl(folder / f"part{part}.jsonl{'.zst' * (part == 2)}", documents[part::3])
        fsspec.filesystem("memory").pipe(str(file), file.read_bytes())
    return open_source(TextKeys("jsonl", url), streams=streams)


def text(folder: Path, documents: Sequence[str], streams: int) -> Source:
    for part in range(4):
        (folder / f"part{part}.txt").write_text("".join(documents[part::4]), encoding="utf-8")
    return open_source(TextKeys("text", str(folder)), streams=streams)


def text_gz(folder: Path, documents: Sequence[str], streams: int) -> Source:
    for part in range(2):
        data = "".join(documents[part::2]).encode()
        (folder / f"part{part}.txt.gz").write_bytes(gzip.compress(data))
    return open_source(TextKeys("text", str(folder)), streams=streams)


def text_zst(folder: Path, documents: Sequence[str], streams: int) -> Source:
    for part in range(2):
        (folder / f"part{part}.txt.zst").write_bytes(zstd_frames("".join(documents[part::2]).encode()))
    return open_source(TextKeys("text", str(folder)), streams=streams)


def parquet(folder: Path, documents: Sequence[str], streams: int) -> Source:
    import pyarrow
    import pyarrow.parquet

    for part in range(2):
        table = pyarrow.table({"url": ["http://x"] * len(documents[part::2]), "text": documents[part::2]})
        pyarrow.parquet.write_table(table, folder / f"part{part}.parquet", row_group_size=9)
    return open_source(TextKeys("parquet", str(folder)), streams=streams)


def arrow(folder: Path, documents: Sequence[str], streams: int) -> Source:
    """A stream, an IPC file, a compressed one, and one of dictionaries."""
    import pyarrow

    for part in range(4):
        texts = documents[part::4]
        column = pyarrow.array(texts, pyarrow.large_string() if part == 1 else pyarrow.string())
        columns = {"id": list(range(len(texts))), "text": column.dictionary_encode() if part == 3 else column}
        table = pyarrow.table(columns)
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd" if part == 2 else None)
        make = pyarrow.ipc.new_stream if part == 0 else pyarrow.ipc.new_file
        with make(str(folder / f"part{part}.arrow"), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=6)
    return open_source(TextKeys("arrow", str(folder)), streams=streams)


def saved(folder: Path, documents: Sequence[str], streams: int) -> Source:
    """A folder of `save_to_disk`, with a template."""
    import datasets

    if not (folder / "saved").exists():
        datasets.Dataset.from_list(parts_of(documents)).save_to_disk(str(folder / "saved"), num_shards=3)
    return open_source(TextKeys("arrow", str(folder / "saved"), template=TEMPLATE), streams=streams)


TEMPLATE = "{title}\n{text}"


def parts_of(documents: Sequence[str]) -> list[dict[str, str]]:
    """The documents as records of which `TEMPLATE` makes them."""
    pairs = [text.split("\n", 1) for text in documents]
    return [{"text": text, "url": "http://x", "title": title} for title, text in pairs]


def jsonl_template(folder: Path, documents: Sequence[str], streams: int) -> Source:
    lines = [json.dumps(record) + "\n" for record in parts_of(documents)]
    (folder / "all.jsonl").write_text("".join(lines), encoding="utf-8")
    return open_source(TextKeys("jsonl", str(folder), template=TEMPLATE), streams=streams)


def parquet_template(folder: Path, documents: Sequence[str], streams: int) -> Source:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(parts_of(documents))
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=9)
    return open_source(TextKeys("parquet", str(folder), template=TEMPLATE), streams=streams)


KINDS: dict[str, Callable[[Path, Sequence[str], int], Source]] = {
    made.__name__: made
    for made in (
        *(jsonl, jsonl_gz, jsonl_zst, jsonl_template, c4, hub, hub_folder, hub_local, jsonl_url),
        *(text, text_gz, text_zst, parquet, parquet_template, arrow, saved),
    )
}
