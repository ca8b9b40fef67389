"""Measures how fast data are supplied: `quadriga tokenize`, the loader, token files, and the wait of training.

    python benchmarks/data_speed.py            # about 6 minutes on 2 cores
    python benchmarks/data_speed.py --quick    # small data, to see that it works; nothing is saved

**Text.** `quadriga tokenize` with one process per core is compared with a plain loop over the same JSON lines:
`json.loads`, and `encode_batch_fast` of the library `tokenizers` on as many threads, in batches of 256 documents, whose
ids are dropped. The text is the built-in corpus, and the tokenizer a byte-pair one of 16,000 entries, trained by the
script. Both alternate, each pair gives a ratio, and the figure is the median. The time of a source of one line, which
is the start of the command and its processes, is subtracted, because it is the same for a terabyte; the figure with it
is beside. The same is measured with `--library fastokens`. The loader (shuffled, packed, one worker per core) is
compared with the same loop.

**Token files.** Batches of 8 x 2,048 random uint16 ids from a file of 256 MiB, which is in the page cache. Tokens per
second of CPU time of all threads, so of one core.

**Wait.** Eight ranks of one host each train 15,000 tokens/s: a process takes a batch, and sleeps for the time of a
step. The wait is the share of time in `next()`, of the rank that waits longest, after the first batch. On 2 cores all
ranks share them, so this is harder than on a host of GPUs.

**10^12 ids.** 10,000 sparse files of 10^8 ids in the format of llm.c: time until the loader is open, the largest
memory of its process, how many of the files are open or mapped after 1,000 random reads, and the time to the batch of
step 1,000,000 after the state of that step was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from common import BENCHMARKS, child_environment, command_line, met_or_missed, save, text_table, usable_cores
from data_children import SEQ_LEN
from tokenizers import decoders, models, pre_tokenizers, trainers

from quadriga.config.schema import Dataloader, TextKeys, TokenKeys
from quadriga.data.catalogue import open_source
from quadriga.data.loader import Loader
from quadriga.data.stream_loader import build_loader
from quadriga.data.token_loader import build_token_loader
from quadriga.data.tokenize_job import TokenizeJob
from quadriga.data.tokenize_run import tokenize_into
from quadriga.data.tokenizer import build_tokenizer

CLAIM = "data are supplied faster than training consumes them, and text is tokenized as fast as its library can"
ROWS, VOCABULARY, BATCH_OF_TEXTS = 8, 16_000, 256
RANDOM_IDS, SHARD_IDS = 1 << 27, 10**8
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
HEADER = np.array([20240520, 1, SHARD_IDS, *[0] * 253], "<i4").tobytes()  # of llm.c, for uint16
# What each figure is compared with: the key of the figures, the limit, and whether the figure may be at most the limit.
TARGETS = {
    "tokenize": (0.9, False),
    "token files": (20e6, False),
    "wait of text": (0.01, True),
    "wait of token files": (0.01, True),
    "seconds to open": (2.0, True),
    "bytes of memory": (1e9, True),
    "files open": (256, True),
    "seconds to the step": (2.0, True),
}


def texts(most_characters: int) -> list[str]:
    """Documents of the built-in corpus."""
    source = open_source(TextKeys("builtin"))
    found: list[str] = []
    left = most_characters
    for shard in range(source.shards):
        found += [source.parse(record).text for record in source.read(shard)]
        left -= len(found[-1])
        if left <= 0:
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


def write_lines(file: Path, documents: list[str], copies: int) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    with file.open("w") as out:
        for _ in range(copies):
            out.write(lines)
    return file


def library_speed(assets: Path, lines: Path) -> float:
    """Tokens per second of a plain loop over the lines, with the library on all cores."""
    tokenizer = tokenizers.Tokenizer.from_file(str(assets / "tokenizer.json"))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # read at each call
    tokens, start, batch = 0, time.perf_counter(), list[str]()

    def encode() -> int:
        return sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))

    with lines.open("rb") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            if len(batch) == BATCH_OF_TEXTS:
                tokens += encode()
                batch.clear()
    tokens += encode()
    return tokens / (time.perf_counter() - start)


def tokenize_seconds(assets: Path, lines: Path, library: str) -> tuple[int, float]:
    """The ids and the seconds of a whole tokenization, with one process per core."""
    job = TokenizeJob(TextKeys("jsonl", str(lines)), str(assets), library=library)
    with tempfile.TemporaryDirectory(dir=assets) as out:
        start = time.perf_counter()
        manifest = tokenize_into(Path(out, "shards"), job, usable_cores(), os.environ, lambda progress: None)
        return manifest.ids, time.perf_counter() - start


def measured_text(
    folder: Path, documents: list[str], copies: int, rounds: int, tokens: int
) -> Iterator[dict[str, Any]]:
    """Of each way: tokens per second, and its ratio to the library in the same round. Medians, and all rounds."""
    lines, one = write_lines(folder / "lines.jsonl", documents, copies), write_lines(folder / "one.jsonl", ["a"], 1)
    ways = {"tokenize": "tokenizers", "tokenize, fastokens": "fastokens"}
    fetching = Dataloader(num_workers=usable_cores())
    alone: list[float] = []
    loaders: list[float] = []
    starts: dict[str, list[float]] = {way: [] for way in ways}
    runs: dict[str, list[tuple[int, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        alone.append(library_speed(folder, lines))
        for way, library in ways.items():
            starts[way].append(tokenize_seconds(folder, one, library)[1])
            runs[way].append(tokenize_seconds(folder, lines, library))
        loader = build_loader(TextKeys("builtin"), build_tokenizer(str(folder)), dataloader=fetching, **ORDER)
        loaders.append(loader_speed(loader, tokens, time.perf_counter))
    speeds = {"library": alone, "loader": loaders}
    for way, found in runs.items():
        start = min(starts[way])
        speeds[way] = [ids / max(seconds - start, seconds / 10) for ids, seconds in found]
        speeds[f"{way}, with its start"] = [ids / seconds for ids, seconds in found]
    for way, values in speeds.items():
        ratios = [value / library for value, library in zip(values, alone, strict=True)]
        yield {
            "what": way,
            "tokens_per_second": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "seconds_of_start": min(starts[way]) if way in starts else None,
        }


ORDER: dict[str, Any] = {"seed": 42, "seq_len": SEQ_LEN, "global_batch_size": ROWS, "rows": range(ROWS)}


def loader_speed(loader: Loader, tokens: int, clock: Callable[[], float]) -> float:
    """Tokens per second of a new loader, without its first two batches, which wait for the first documents."""
    try:
        loader.next(), loader.next()
        count = max(tokens // (ROWS * SEQ_LEN), 1)
        start = clock()
        for _ in range(count):
            loader.next()
        return count * ROWS * SEQ_LEN / (clock() - start)
    finally:
        loader.close()


def measured_token_files(file: Path, tokens: int, rounds: int) -> float:
    """Tokens per second of CPU time."""
    keys = TokenKeys("training", str(file), "raw", "uint16", None, None)
    speeds = []
    for _ in range(rounds):
        loader = build_token_loader(keys, 1 << 16, dataloader=Dataloader(), **ORDER)
        speeds.append(loader_speed(loader, tokens, time.process_time))
    return statistics.median(speeds)


def child(*given: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(BENCHMARKS / "data_children.py"), *map(str, given)]
    environ = child_environment(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, **options)


def answer(process: subprocess.Popen[str], given: str | None = None) -> dict[str, float]:
    out, _ = process.communicate(given)
    if process.returncode:
        raise SystemExit(f"a process of the benchmark ended with exit code {process.returncode}")
    return json.loads(out.splitlines()[-1])


def measured_wait(data: str, assets: Path, ranks: int, seconds: float) -> dict[str, Any]:
    """The share of time in which the rank that waits longest waits. All ranks begin when the last one is ready."""
    processes = [child("rank", data, assets, rank, ranks, seconds, stdin=subprocess.PIPE) for rank in range(ranks)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    shares = [found["waited"] / found["seconds"] for found in map(answer, processes)]
    return {"share": max(shares), "shares": shares, "ranks": ranks}


def measured_shards(folder: Path, shards: int) -> dict[str, float]:
    folder.mkdir()
    for number in range(shards):
        with (folder / f"{number:05d}.bin").open("wb") as file:
            file.write(HEADER)
            file.truncate(len(HEADER) + 2 * SHARD_IDS)
    return answer(child("shards", folder))


def measured(folder: Path, quick: bool) -> dict[str, Any]:
    rounds = 1 if quick else 3
    documents = texts(100_000 if quick else 1 << 62)
    train_tokenizer(folder, documents[::20])
    text = list(measured_text(folder, documents, 1 if quick else 4, rounds, 20_000 if quick else 1_000_000))
    ids = np.random.default_rng(0).integers(0, 1 << 16, RANDOM_IDS >> (5 if quick else 0), np.uint16)
    ids.tofile(folder / "ids.bin")
    speed = measured_token_files(folder / "ids.bin", 1_000_000 if quick else 64_000_000, rounds)
    ranks, seconds = (2, 1.0) if quick else (8, 15.0)
    sources = {"text": "builtin", "token files": str(folder / "ids.bin")}
    waits = {kind: measured_wait(data, folder, ranks, seconds) for kind, data in sources.items()}
    return {
        "text": text,
        "cores": usable_cores(),
        "fastokens": metadata.version("fastokens"),
        "token_files": {"tokens_per_second": speed},
        "wait": waits,
        "shards": measured_shards(folder / "shards", 100 if quick else 10_000),
    }


def compared(figures: dict[str, Any]) -> dict[str, float]:
    """The figures that have a target, by the names of TARGETS."""
    shards = figures["shards"]
    return {
        "tokenize": next(each["ratio"] for each in figures["text"] if each["what"] == "tokenize"),
        "token files": figures["token_files"]["tokens_per_second"],
        "wait of text": figures["wait"]["text"]["share"],
        "wait of token files": figures["wait"]["token files"]["share"],
        "seconds to open": shards["opened"],
        "bytes of memory": shards["memory"],
        "files open": shards["files"],
        "seconds to the step": shards["reached"],
    }


def is_met(name: str, value: float) -> bool:
    limit, at_most = TARGETS[name]
    return value <= limit if at_most else value >= limit


def main() -> int:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--quick", action="store_true", help="small data; nothing is saved")
    parser.add_argument("--no-save", action="store_true", help="print the figures only")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quadriga-data-") as name:
        figures = measured(Path(name), chosen.quick)
    rows = [[each["what"], f"{each['tokens_per_second']:,.0f}", f"{each['ratio']:.2f}"] for each in figures["text"]]
    print(text_table(["text", "tokens/s", "ratio to the library"], rows) + "\n")
    values = compared(figures)
    figures["met"] = {name: is_met(name, value) for name, value in values.items()}
    rows = []
    for name, value in values.items():
        rows.append([name, f"{value:,.4g}", f"{TARGETS[name][0]:,g}", met_or_missed(figures["met"][name])])
    print(text_table(["figure", "measured", "target", ""], rows))
    if not chosen.no_save and not chosen.quick:
        print(f"\nwritten: {save('data_speed', figures, command=command_line(), claim=CLAIM)}")
    return 0 if chosen.quick or all(figures["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
