"""Measures the loader and `quadriga tokenize`: tokens per second, compared with the tokenizer library alone.

    python benchmarks/data_speed.py

The text is the built-in corpus. There are two tokenizers: bytes, and a byte-pair tokenizer of 16,000 entries, trained
by the script. The upper limit is `encode_batch_fast` of `tokenizers` on the same documents in memory, in batches of
256, without using the ids: on one thread and on all cores. The loader reads the documents from disk, shuffles,
tokenizes and packs them into windows of 2,048 tokens and batches of 8 rows, without workers (one prefetching thread)
and with one worker per core. The measurements alternate in rounds; figures are medians.

`quadriga tokenize` writes shards from the same documents as JSON lines, so often that the start of its processes counts
little. Its time is that of the whole command. The target is 0.9 of the library on as many threads.

Token files are batches of random uint16 ids from a file of 256 MiB, which is in the page cache. This figure is tokens
per second of CPU time of all threads, so it is that of one core. The target is 20 million.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from common import command_line, met_or_missed, save, text_table, usable_cores
from tokenizers import decoders, models, pre_tokenizers, trainers

from quadriga.config.schema import Dataloader, TextKeys, TokenKeys
from quadriga.data.catalogue import open_source
from quadriga.data.loader import build_loader
from quadriga.data.token_loader import build_token_loader
from quadriga.data.tokenize_job import TokenizeJob
from quadriga.data.tokenize_run import tokenize_into
from quadriga.data.tokenizer import build_tokenizer

CLAIM = "the loader and quadriga tokenize supply tokens almost as fast as the tokenizer library produces them"
SEQ_LEN, ROWS, VOCABULARY, BATCH_OF_TEXTS = 2048, 8, 16_000, 256
COPIES = 4  # of the documents that `tokenize` reads, for each process
RANDOM_IDS = 1 << 27
TARGETS = {"tokenize": 0.9, "token files": 20e6}  # a share of the library, and tokens per second of a core
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def texts(most_characters: int) -> list[str]:
    """Documents of every fifth shard of the built-in corpus, in order: the same mixture as the whole."""
    source = open_source(TextKeys("builtin"))
    found: list[str] = []
    for shard in range(0, source.shards, 5):
        found += [source.parse(record).text for record in source.read(shard)]
        if sum(map(len, found)) >= most_characters:
            break
    return found


def train_tokenizer(folder: Path, samples: list[str]) -> Path:
    """Train a byte-level byte-pair tokenizer, and save it in Hugging Face's format."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(samples, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    return folder


def raw_speed(tokenizer: tokenizers.Tokenizer, documents: list[str], parallel: bool) -> float:
    """Tokens per second of the library alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if parallel else "false"  # read at each call
    tokens = 0
    start = time.perf_counter()
    for at in range(0, len(documents), BATCH_OF_TEXTS):
        encoded = tokenizer.encode_batch_fast(documents[at : at + BATCH_OF_TEXTS], add_special_tokens=False)
        tokens += sum(map(len, encoded))
    return tokens / (time.perf_counter() - start)


def loader_speed(assets: str, workers: int, tokens: int) -> float:
    """Tokens per second of a new loader, without its first two batches, which wait for the first documents."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loader = build_loader(
        TextKeys("builtin"),
        build_tokenizer(assets),
        seed=42,
        seq_len=SEQ_LEN,
        global_batch_size=ROWS,
        rows=range(ROWS),
        dataloader=Dataloader(num_workers=workers),
    )
    try:
        loader.next(), loader.next()
        count = max(tokens // (ROWS * SEQ_LEN), 1)
        start = time.perf_counter()
        for _ in range(count):
            loader.next()
        return count * ROWS * SEQ_LEN / (time.perf_counter() - start)
    finally:
        loader.close()


def write_lines(file: Path, documents: list[str]) -> Path:
    """JSON lines of the documents, COPIES times for each core."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    with file.open("w") as out:
        for _ in range(COPIES * usable_cores()):
            out.write(lines)
    return file


def tokenize_speed(assets: str, lines: Path, workers: int) -> float:
    """Tokens per second of a whole tokenization."""
    job = TokenizeJob(TextKeys("jsonl", str(lines)), assets)
    environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(dir=lines.parent) as out:
        start = time.perf_counter()
        manifest = tokenize_into(Path(out, "shards"), job, workers, environ, lambda progress: None)
        return manifest.ids / (time.perf_counter() - start)


def token_file_speed(file: Path, tokens: int) -> float:
    """Tokens per second of CPU time, of batches of a token file."""
    loader = build_token_loader(
        TokenKeys("training", str(file), "raw", "uint16", None, None),
        1 << 16,
        seed=42,
        seq_len=SEQ_LEN,
        global_batch_size=ROWS,
        rows=range(ROWS),
        dataloader=Dataloader(),
    )
    try:
        loader.next(), loader.next()
        count = max(tokens // (ROWS * SEQ_LEN), 1)
        start = time.process_time()
        for _ in range(count):
            loader.next()
        return count * ROWS * SEQ_LEN / (time.process_time() - start)
    finally:
        loader.close()


def measurements(folder: Path, documents: list[str], tokens: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """The measurements by name."""
    assets = str(folder)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    cores = usable_cores()
    yield "tokenizers alone, 1 thread", lambda: raw_speed(raw, documents, parallel=False)
    yield f"tokenizers alone, {cores} threads", lambda: raw_speed(raw, documents, parallel=True)
    yield "loader, no worker", lambda: loader_speed(assets, 0, tokens)
    yield f"loader, {cores} workers", lambda: loader_speed(assets, cores, tokens)
    yield "loader, bytes, no worker", lambda: loader_speed("builtin:bytes", 0, 4 * tokens)
    lines = write_lines(folder / "lines.jsonl", documents)
    yield "tokenize, 1 process", lambda: tokenize_speed(assets, lines, 1)
    yield f"tokenize, {cores} processes", lambda: tokenize_speed(assets, lines, cores)
    ids = np.random.default_rng(0).integers(0, 1 << 16, RANDOM_IDS, np.uint16)
    ids.tofile(folder / "ids.bin")
    yield "token files, per core", lambda: token_file_speed(folder / "ids.bin", 32 * tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="from the loader in each round")
    parser.add_argument("--no-save", action="store_true", help="print the figures only")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quadriga-data-") as name:
        documents = texts(8_000_000)
        folder = train_tokenizer(Path(name), documents[::4])
        measured = dict(measurements(folder, documents, chosen.tokens))
        speeds: dict[str, list[float]] = {way: [] for way in measured}
        for _ in range(chosen.rounds):
            for way, run in measured.items():
                speeds[way].append(run())
    figures = print_speeds(speeds)
    if not chosen.no_save:
        print(f"\nwritten: {save('data_speed', figures, command=command_line(), claim=CLAIM)}")
    return 0


def print_speeds(speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Print the table and return its figures. Shares are of the library alone with the same number of threads."""
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    one, many, no_worker, workers, _, process, processes, token_files = medians
    limits = dict.fromkeys((no_worker, process), medians[one]) | dict.fromkeys((workers, processes), medians[many])
    shares = {way: medians[way] / limit for way, limit in limits.items()}
    met = {way: shares[way] >= TARGETS["tokenize"] for way in (process, processes)}
    met[token_files] = medians[token_files] >= TARGETS["token files"]
    figures = [
        {
            "what": way,
            "tokens_per_second": medians[way],
            "share_of_the_library": shares.get(way),
            "meets_the_target": met.get(way),
            "rounds": values,
        }
        for way, values in speeds.items()
    ]
    rows = []
    for each in figures:
        share = each["share_of_the_library"]
        target = met_or_missed(met[way]) if (way := str(each["what"])) in met else ""
        rows.append([each["what"], f"{each['tokens_per_second']:,.0f}", f"{share:.2f}" if share else "", target])
    print(text_table(["", "tokens/s", "share of the library", "target"], rows))
    return figures


if __name__ == "__main__":
    sys.exit(main())
