"""Measures the loader: tokens per second that reach the trainer, compared with the tokenizer library alone.

    python benchmarks/data_speed.py

The text is the built-in corpus. There are two tokenizers: bytes, and a byte-pair tokenizer of 16,000 entries, trained
by the script. The upper limit is `encode_batch_fast` of `tokenizers` on the same documents in memory, in batches of
256, without using the ids: on one thread and on all cores. The loader reads the documents from disk, shuffles,
tokenizes and packs them into windows of 2,048 tokens and batches of 8 rows, without workers (one prefetching thread)
and with one worker per core. The measurements alternate in rounds; figures are medians.
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

import tokenizers
from common import command_line, save, text_table, usable_cores
from tokenizers import decoders, models, pre_tokenizers, trainers

from quadriga.config.schema import Dataloader
from quadriga.data.catalogue import open_source
from quadriga.data.loader import build_loader
from quadriga.data.tokenizer import build_tokenizer

CLAIM = "the loader supplies tokens almost as fast as the tokenizer library produces them"
SEQ_LEN, ROWS, VOCABULARY, BATCH_OF_TEXTS = 2048, 8, 16_000, 256
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def texts(most_characters: int) -> list[str]:
    """Documents of every fifth shard of the built-in corpus, in order: the same mixture as the whole."""
    source = open_source("builtin")
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
        "builtin",
        None,
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


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="from the loader in each round")
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
    print(f"\nwritten: {save('data_speed', figures, command=command_line(), claim=CLAIM)}")
    return 0


def print_speeds(speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Print the table and return its figures. Shares are of the library alone with the same number of threads."""
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    one, many, no_worker, workers, _ = medians
    limits = {no_worker: medians[one], workers: medians[many]}
    figures = [
        {
            "what": way,
            "tokens_per_second": medians[way],
            "share_of_the_library": medians[way] / limits[way] if way in limits else None,
            "rounds": values,
        }
        for way, values in speeds.items()
    ]
    rows = []
    for each in figures:
        share = each["share_of_the_library"]
        rows.append([each["what"], f"{each['tokens_per_second']:,.0f}", f"{share:.2f}" if share else ""])
    print(text_table(["", "tokens/s", "share of the library"], rows))
    return figures


if __name__ == "__main__":
    sys.exit(main())
