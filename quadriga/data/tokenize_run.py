"""Runs a tokenization on several processes. The shards do not depend on how many there are, nor on kills.

1. The source is cut into pieces, by its files and ranges of records alone.
2. Processes (`tokenize_worker`) write pieces. A piece is written under another name, and renamed when it is complete.
3. This process puts the pieces together to shards, in order (`tokenize_shards`). After each shard it writes which
   pieces the finished shards have, and then removes those pieces.

A job that is continued keeps the finished shards and all complete pieces.
"""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quadriga.data.pieces import Piece, cut_pieces
from quadriga.data.shards import ShardManifest, dtype_for
from quadriga.data.sources import Source
from quadriga.data.tokenize_job import (
    CONTINUE,
    TokenizeJob,
    made_by,
    piece_path,
    prepare_folder,
    require_unchanged,
    unwritable,
)
from quadriga.data.tokenize_shards import Assembler
from quadriga.data.tokenizer import Tokenizer
from quadriga.data.unfinished import WORK
from quadriga.errors import Fault, Problem, UserError

REFRESH_SECONDS = 0.5
EXIT_SECONDS = 10.0
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # of each process, in the libraries


@dataclass
class TokenizeProgress:
    """`ids`: tokenized by this start of the job. `source_bytes`: of the source, in complete pieces; `kept_bytes` of
    them are from earlier starts. `bad`: locations of bad records and reasons that are to be printed."""

    total_bytes: int
    kept_bytes: int
    source_bytes: int
    ids: int = 0
    bad: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Answer:
    """What a process said. `content`: its JSON object; None: it has exited."""

    worker: int
    piece: int
    content: dict[str, Any] | None


def tokenize_into(
    out: Path, job: TokenizeJob, workers: int, environ: Mapping[str, str], show: Callable[[TokenizeProgress], None]
) -> ShardManifest:
    """Tokenizes into the folder `out`, or continues there, and returns the manifest.

    `environ`: of the processes. `show` is called at least about every REFRESH_SECONDS.

    Raises:
        UserError: the source or the tokenizer cannot be used, a record is bad, or the folder cannot be written or holds
            something else. What is complete is kept.
        Fault: a process was killed, or the network failed.
    """
    source, tokenizer = job.open(compare=True)
    try:
        ready = prepare_folder(out, job, source, tokenizer)
        if isinstance(ready, ShardManifest):
            return ready
        with ready:
            return _run(out, job, source, tokenizer, workers, environ, show)
    except OSError as error:
        raise UserError(unwritable(out, error)) from error


def _run(
    out: Path,
    job: TokenizeJob,
    source: Source,
    tokenizer: Tokenizer,
    workers: int,
    environ: Mapping[str, str],
    show: Callable[[TokenizeProgress], None],
) -> ShardManifest:
    work, dtype, pieces = out / WORK, dtype_for(tokenizer.vocab_size), cut_pieces(source)
    order = {
        "job": asdict(job),
        "work": str(work.resolve()),
        "dtype": dtype,
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }
    sizes = [sum(map(source.bytes_of, shards)) for shards in pieces]
    with ExitStack() as stack:
        assembler = Assembler(out, dtype, job.shard_tokens)
        stack.callback(assembler.close)
        complete = _complete_pieces(work, assembler.finished.piece, len(pieces), dtype)
        kept = sum(sizes[number] for number in (*range(assembler.piece), *complete))
        progress = TokenizeProgress(sum(sizes), kept, kept)
        missing = [number for number in range(assembler.piece, len(pieces)) if number not in complete]
        answers = stack.enter_context(_Workers(min(workers, len(missing)), order, environ)).answers(missing, pieces)
        for number in _finished_pieces(answers, complete, sizes, progress, show):
            complete.add(number)
            while assembler.piece in complete:
                assembler.add(Piece(piece_path(work, assembler.piece), dtype))
        require_unchanged(source, out)
        manifest = assembler.complete(made_by(tokenizer), job.identity(source))
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _complete_pieces(work: Path, first: int, count: int, dtype: str) -> set[int]:
    """The complete pieces from number `first` on. Removes everything else that a kill has left."""
    there = {piece_path(work, number).name: number for number in range(first, count)}
    found = set()
    for path in work.glob("*.p*"):  # pieces and parts
        with suppress(ValueError):
            Piece(path, dtype)
            if path.name in there:
                found.add(there[path.name])
                continue
        if path.suffix == ".piece" or path.stem not in ("bin", "idx"):
            path.unlink(missing_ok=True)
    return found


def _finished_pieces(
    answers: Iterator[_Answer],
    complete: set[int],
    sizes: Sequence[int],
    progress: TokenizeProgress,
    show: Callable[[TokenizeProgress], None],
) -> Iterator[int]:
    """Yields a complete piece of an earlier start, if there is one, and the pieces that are finished by `answers`.

    Raises UserError with the problems of the first piece that has some, after all pieces before it are finished.
    """
    yield from sorted(complete)[:1]
    running: dict[int, int] = {}  # by piece, its ids so far
    done, problems = 0, dict[int, tuple[Problem, ...]]()
    for answer in answers:
        content = answer.content or {}
        if "fault" in content:
            raise Fault(f"{content['fault']}. Finished pieces are kept: {CONTINUE}")
        if "problems" in content:
            problems[answer.piece] = tuple(Problem(**problem) for problem in content["problems"])
        elif answer.content is not None:
            running[answer.piece] = content.get("ids", 0)
        if "done" in content:
            running.pop(answer.piece)
            done += content["done"]
            progress.source_bytes += sizes[answer.piece]
            progress.bad = tuple(content["bad"])
            yield answer.piece
        progress.ids = done + sum(running.values())
        show(progress)
        progress.bad = ()
    if problems:
        raise UserError(*problems[min(problems)])


class _Workers:
    """Processes, each with a thread that gives it pieces and passes on its answers."""

    def __init__(self, count: int, order: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "quadriga.data.tokenize_worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._queue: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._failed = threading.Event()
        # Not in the group of the terminal: Ctrl-C ends this process, and the pipe that it closes ends the others.
        self._processes = [
            subprocess.Popen(command, env={**environ, **ONE_THREAD}, start_new_session=True, **pipes)  # type: ignore[call-overload]
            for _ in range(count)
        ]
        self._order, self._threads = json.dumps(order), list[threading.Thread]()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._failed.set()
        for process in self._processes:
            with suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.stdout.close()

    def answers(self, numbers: Sequence[int], pieces: Sequence[range]) -> Iterator[_Answer]:
        """Gives the processes the pieces of these numbers, in order, and yields what they say until all are done.

        After a problem no further piece begins. Raises Fault if a process exits before its work is done.
        """
        left, lock = iter(numbers), threading.Lock()

        def take() -> int | None:
            with lock:
                return None if self._failed.is_set() else next(left, None)

        for index in range(len(self._processes)):
            self._threads.append(threading.Thread(target=self._serve, args=(index, take, pieces), daemon=True))
            self._threads[-1].start()
        running = len(self._threads)
        while running:
            try:
                answer = self._queue.get(timeout=REFRESH_SECONDS)
            except queue.Empty:
                continue
            if answer.content is None and answer.piece >= 0:
                code = self._processes[answer.worker].wait()
                how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise Fault(f"quadriga tokenize: a process {how}; finished pieces are kept: {CONTINUE}")
            running -= answer.content is None
            yield answer

    def _serve(self, index: int, take: Callable[[], int | None], pieces: Sequence[range]) -> None:
        """The thread of one process. Its last answer has no content, and the piece -1 if all went well."""
        process = self._processes[index]
        number: int | None = 0
        with suppress(OSError, ValueError):
            _send(process.stdin, self._order)
            while (number := take()) is not None:
                shards = pieces[number]
                _send(process.stdin, json.dumps({"number": number, "first": shards.start, "after": shards.stop}))
                for line in process.stdout:
                    content = json.loads(line)
                    if "problems" in content:
                        self._failed.set()
                    self._queue.put(_Answer(index, number, content))
                    if "ids" not in content:
                        break
                else:
                    break
        self._queue.put(_Answer(index, -1 if number is None else number, None))


def _send(pipe: BinaryIO, line: str) -> None:
    pipe.write(f"{line}\n".encode())
    pipe.flush()
