"""`quadriga tokenize`: the bytes of the shards are the same for any number of workers and after any kill."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import corpora
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from tokenizer_folders import byte_level, write_folder

from quadriga.cli.main import main
from quadriga.cli.tokenize import format_progress
from quadriga.config.schema import Dataloader, TextKeys, TokenKeys
from quadriga.data import pieces
from quadriga.data.shards import dtype_for, read_manifest
from quadriga.data.stream_loader import build_loader
from quadriga.data.token_files import open_token_files
from quadriga.data.token_loader import build_token_loader
from quadriga.data.tokenize_job import TokenizeJob
from quadriga.data.tokenize_run import TokenizeProgress, tokenize_into
from quadriga.data.tokenizer import Tokenizer, build_tokenizer
from quadriga.data.unfinished import WORK
from quadriga.errors import EXIT_OK, EXIT_USAGE, Fault, UserError

SHARD_TOKENS = 12_000
# A process in the background of a shell inherits that interrupts are ignored; the tests of Ctrl-C need the default.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from quadriga.data import pieces
pieces.PIECE_BYTES = 1
from quadriga.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def write_lines(folder: Path, files: int = 16, lines: int = 40) -> Path:
    folder.mkdir()
    for number in range(files):
        texts = corpora.texts(lines)
        corpora.write_jsonl(folder / f"{number:02d}.jsonl", [f"{number}. {text}" for text in texts])
    return folder


def arguments(source: Path | str, out: Path, *more: str, tokenizer: Path | str = "builtin:bytes") -> list[str]:
    options = ["--tokenizer", str(tokenizer), "--shard-tokens", str(SHARD_TOKENS), *more]
    return ["tokenize", str(source), str(out), *options]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SLOW = """
import time
from quadriga.data.tokenize_shards import Assembler
add = Assembler.add
Assembler.add = lambda self, piece: (time.sleep(0.1), add(self, piece))
"""  # before DRIVER: pieces are put together so slowly that a signal comes in time on any machine


def start(source: Path, out: Path, *more: str, before: str = "", **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + DRIVER, *arguments(source, out, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code, and what is on standard error."""
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("source") / "lines")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards that one worker writes without a kill."""
    out = tmp_path_factory.mktemp("expected") / "out"
    before, pieces.PIECE_BYTES = pieces.PIECE_BYTES, 1
    try:
        assert main(arguments(source, out, "--workers", "1")) == EXIT_OK
    finally:
        pieces.PIECE_BYTES = before
    assert len(content(out)) > 30
    return content(out)


# --- the same bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_are_the_same_for_any_number_of_workers(source, expected, tmp_path, small_pieces, workers):
    assert main(arguments(source, tmp_path / "out", "--workers", str(workers))) == EXIT_OK
    assert content(tmp_path / "out") == expected


def test_the_bytes_do_not_depend_on_the_pieces(source, expected, tmp_path):
    assert main(arguments(source, tmp_path / "out", "--workers", "1")) == EXIT_OK
    assert content(tmp_path / "out") == expected


def test_the_bytes_are_the_same_after_kills(source, expected, tmp_path):
    """The process is killed when it has finished some shards; the next start continues, until it is killed again."""
    out, killed = tmp_path / "out", 0
    for shards in (0, 3, 6, 10):
        process = start(source, out, "--workers", "2")
        while process.poll() is None:
            there = len(list(out.glob("*.bin"))) + len(list((out / WORK).glob("*.piece")))
            if there >= shards and (out / WORK / "job.json").exists():
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += not (out / "manifest.json").exists()
                break
        process.communicate()
    assert killed >= 3
    process = start(source, out, "--workers", "3")
    shown, errors = process.communicate()
    assert process.returncode == EXIT_OK, errors
    assert content(out) == expected
    assert "ids, 640 documents" in shown


def test_an_interrupt_leaves_what_the_same_command_continues(source, expected, tmp_path):
    out = tmp_path / "out"
    process = start(source, out, "--workers", "1", before=SLOW)
    while not list((out / WORK).glob("*.piece")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "is kept in" in errors
    assert "Traceback" not in errors
    assert finish(start(source, out, "--workers", "1")) == (EXIT_OK, "")
    assert content(out) == expected


def test_a_finished_job_is_not_done_again(source, expected, tmp_path, small_pieces, capsys):
    out = tmp_path / "out"
    assert main(arguments(source, out)) == EXIT_OK
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(arguments(source, out)) == EXIT_OK
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


# --- the right ids --------------------------------------------------------------------------------------------------

DOCUMENTS = corpora.texts(60)


def in_files(documents: list[str], count: int) -> list[str]:
    """The documents in the order of files that have every `count`-th one."""
    return [text for part in range(count) for text in documents[part::count]]


SOURCES = {
    "jsonl": in_files(DOCUMENTS, 3),
    "jsonl_gz": in_files(DOCUMENTS, 3),
    "c4": in_files(DOCUMENTS, 5),
    "text": ["".join(DOCUMENTS[part::4]) for part in range(4)],
    "text_gz": ["".join(DOCUMENTS[part::2]) for part in range(2)],
    "parquet": in_files(DOCUMENTS, 2),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_documents_are_those_of_a_plain_loop(tmp_path, small_pieces, kind):
    """Also documents that a source gives in pieces."""
    assets = write_folder(
        tmp_path / "tokenizer", byte_level(), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"}
    )
    plain = tokenizers.Tokenizer.from_file(str(assets / "tokenizer.json"))
    bos, eos = plain.token_to_id("<s>"), plain.token_to_id("</s>")
    (tmp_path / "source").mkdir()
    corpora.KINDS[kind](tmp_path / "source", DOCUMENTS, 1)
    named = [] if kind in ("jsonl", "parquet", "text") else ["--dataset", kind.removesuffix("_gz")]
    assert main(arguments(tmp_path / "source", tmp_path / "out", *named, tokenizer=assets)) == EXIT_OK
    files = open_token_files(str(tmp_path / "out"))
    assert not list(files.verify(plain.get_vocab_size()))
    ids = [[bos, *plain.encode(text, add_special_tokens=False).ids, eos] for text in SOURCES[kind]]
    assert files.read(0, files.length).tolist() == [one for document in ids for one in document]
    assert files.borders(0, files.length).tolist() == np.cumsum(list(map(len, ids))).tolist()
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.documents, manifest.tokenizer.fingerprint) == (len(ids), build_tokenizer(str(assets)).fingerprint)
    lengths = [2 ** (len(document).bit_length() - 1) for document in ids]
    assert dict(manifest.lengths) == {length: lengths.count(length) for length in sorted(set(lengths))}


def test_training_on_shards_is_training_on_the_text(source, expected, tmp_path, small_pieces):
    assert main(arguments(source, tmp_path / "out")) == EXIT_OK
    section = Dataloader(shuffle=False)
    order = {"seed": 1, "seq_len": 32, "global_batch_size": 4, "rows": range(4), "dataloader": section}
    text = build_loader(TextKeys("jsonl", str(source)), build_tokenizer("builtin:bytes"), **order)
    tokens = build_token_loader(TokenKeys("training", str(tmp_path / "out"), "auto", None, None, None), 258, **order)
    for _ in range(200):
        ours, theirs = tokens.next(), text.next()
        assert (ours.tokens == theirs.tokens).all()
        assert (ours.labels == theirs.labels).all()
    text.close(), tokens.close()


def test_the_tokenizer_decides_the_dtype():
    assert [dtype_for(size) for size in (258, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def test_another_field_is_read(tmp_path):
    pa.parquet.write_table(pa.table({"body": ["a", "bc"]}), tmp_path / "a.parquet")
    assert main(arguments(tmp_path / "a.parquet", tmp_path / "out", "--field", "body")) == EXIT_OK
    assert open_token_files(str(tmp_path / "out")).read(0, 7).tolist() == [256, 97, 257, 256, 98, 99, 257]


def test_torch_is_not_loaded(source, tmp_path):
    code = f"{DRIVER.replace('sys.exit(main(sys.argv[1:]))', '')}\nmain(sys.argv[1:])\nprint('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *arguments(source / "00.jsonl", tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("kind", SOURCES)
def test_the_sizes_of_shards_are_those_of_the_files(tmp_path, kind):
    source = corpora.KINDS[kind](tmp_path, DOCUMENTS, 1)
    total = sum(map(source.bytes_of, range(source.shards)))
    assert source.disk_bytes - source.shards <= total <= source.disk_bytes


# --- progress -------------------------------------------------------------------------------------------------------


def test_progress_has_share_speed_and_time_left():
    progress = TokenizeProgress(total_bytes=1000, kept_bytes=200, source_bytes=400, ids=50_000)
    assert format_progress(progress, 10.0) == "40%, 50.0 k tokens, 5,000 tokens/s, 30.0s left"
    assert format_progress(TokenizeProgress(1000, 0, 0), 1.0) == "0%, 0 tokens, 0 tokens/s"


def test_a_terminal_shows_a_bar(source, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", DRIVER, *arguments(source, tmp_path / "out", "--workers", "2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(ours, 1 << 16):
            shown += data
    os.close(ours)
    assert process.wait() == EXIT_OK
    assert b"tokens/s" in shown


# --- bad records ----------------------------------------------------------------------------------------------------


def test_bad_records_stop_or_are_skipped_and_counted(tmp_path, small_pieces, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jsonl").write_text('{"text": "a"}\n{"text": 7}\n\n{"text": "b"}\n')
    assert main(arguments(source, tmp_path / "out", "--workers", "2")) == EXIT_USAGE
    shown = capsys.readouterr().err
    assert f"{source}/0.jsonl, line 2" in shown  # the first one, whichever worker is faster
    assert "Traceback" not in shown
    assert main(arguments(source, tmp_path / "skipped", "--on-bad-record", "skip", "--workers", "2")) == EXIT_OK
    shown = capsys.readouterr()
    assert "3 bad records skipped" in shown.out
    assert f"skipped: {source}/1.jsonl, line 2" in shown.err
    assert open_token_files(str(tmp_path / "skipped")).read(0, 6).tolist() == [256, 97, 257, 256, 98, 257]
    assert read_manifest(tmp_path / "skipped").bad_records == 3


def test_a_job_that_met_a_bad_record_goes_on_with_skip(tmp_path, small_pieces):
    """The pieces before the bad record are kept, and the result is that of a job that skips from its start on."""
    source = write_lines(tmp_path / "source", files=4)
    with (source / "03.jsonl").open("a") as file:
        file.write('{"text": 7}\n')
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert main(arguments(source, out, "--workers", "1")) == EXIT_USAGE
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert kept
    assert main(arguments(source, out, "--on-bad-record", "skip")) == EXIT_OK
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert main(arguments(source, whole, "--on-bad-record", "skip")) == EXIT_OK
    assert content(out) == content(whole)
    assert read_manifest(out).bad_records == 1


def test_a_job_without_a_complete_piece_begins_anew_with_other_arguments(tmp_path, capsys):
    """The remedy of the message works in the same folder."""
    source, out = write_lines(tmp_path / "source", files=1), tmp_path / "out"
    shown = refusal(capsys, *arguments(source, out, "--field", "txt"))
    assert "set --field to the field that holds the documents, here perhaps text" in shown
    assert not list(out.glob(f"{WORK}/*.[0-9]*"))  # no part of a piece is left
    assert main(arguments(source, out, "--field", "text")) == EXIT_OK


def test_a_document_whose_end_is_bad_ends_where_the_next_one_begins(tmp_path, small_pieces):
    """Its last part is skipped, and nothing says that it has ended. Training gives it no EOS either."""
    good = b"x" * 99 + b"\n"
    (tmp_path / "a.txt").write_bytes(good * 20 + b"\xff\xff")
    (tmp_path / "b.txt").write_bytes(good * 3)
    assert main(arguments(tmp_path / "*.txt", tmp_path / "out", "--on-bad-record", "skip")) == EXIT_OK
    files = open_token_files(str(tmp_path / "out"))
    first, second = np.diff(files.borders(0, files.length), prepend=0).tolist()
    assert second == 302
    assert first % 100 == 1  # BOS, and no EOS
    assert files.read(first - 1, first + 1).tolist() == [10, 256]


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == EXIT_USAGE
    shown = capsys.readouterr()
    return shown.out + shown.err


def test_a_folder_of_another_job_is_refused(source, expected, tmp_path, capsys, small_pieces):
    out = tmp_path / "out"
    assert main(arguments(source, out)) == EXIT_OK
    shown = refusal(capsys, *arguments(source / "00.jsonl", out))
    assert "the folder is of another job: fingerprint was jsonl:16:" in shown
    assert content(out) == expected
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("x")
    assert "the folder holds other files" in refusal(capsys, *arguments(source, full))
    assert "is not a folder" in refusal(capsys, *arguments(source, full / "notes.txt"))


def test_an_unfinished_job_is_continued_only_as_it_was(source, tmp_path, capsys):
    out = tmp_path / "out"
    process = start(source, out, "--workers", "1")
    while not list(out.glob("*.bin")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)  # it cannot finish before it is killed
    assert "another process is writing this folder" in refusal(capsys, *arguments(source, out))
    process.kill()
    process.communicate()
    shown = refusal(capsys, *arguments(source, out, "--shard-tokens", "5"))
    assert "shard_tokens was 12000, and is 5" in shown
    assert "which cuts the source at other places" in refusal(capsys, *arguments(source, out))  # PIECE_BYTES differs
    shown = refusal(capsys, "dry-run", str(corpora_config(tmp_path, out)), "--ngpu", "1")
    assert "are not complete" in shown
    later = time.time_ns() + 10**9
    os.utime(source / "00.jsonl", ns=(later, later))
    assert "a file of the source was changed" in refusal(capsys, *arguments(source, out))


def corpora_config(folder: Path, data: Path) -> Path:
    file = folder / "run.toml"
    file.write_text(f'[training]\ndataset = "tokens"\ndataset_path = {json.dumps(str(data))}\n')
    return file


def test_what_does_not_exist_is_named_by_its_argument(source, tmp_path, capsys):
    shown = refusal(capsys, *arguments(source, tmp_path / "out", tokenizer=tmp_path / "none"))
    assert "--tokenizer = " in shown
    shown = refusal(capsys, *arguments(tmp_path / "none", tmp_path / "out"))
    assert "SOURCE = " in shown
    assert "there is no such file, folder or data set" in shown
    shown = refusal(capsys, *arguments(source, tmp_path / "out", "--dataset", "josnl"))
    assert "did you mean: jsonl" in shown
    shown = refusal(capsys, *arguments(source, tmp_path / "out", "--field", "txt"))
    assert "set --field to the field that holds the documents, here perhaps text" in shown
    (tmp_path / "mixed").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / "mixed" / name).write_text("x")
    shown = refusal(capsys, *arguments(tmp_path / "mixed", tmp_path / "out"))
    assert "has files of several kinds: text, jsonl" in shown
    assert "these are token ids already" in refusal(capsys, *arguments(source, tmp_path / "out", "--dataset", "tokens"))


def test_a_file_that_changes_during_the_job_is_refused(tmp_path, capsys, small_pieces):
    """It has the same size, so nothing else would say that the shards have old and new lines."""
    source, out = write_lines(tmp_path / "source", files=2), tmp_path / "out"
    job = TokenizeJob(TextKeys("jsonl", str(source)), "builtin:bytes")

    def change(progress: TokenizeProgress) -> None:
        if progress.source_bytes:
            (source / "00.jsonl").write_bytes((source / "00.jsonl").read_bytes().replace(b"line", b"LINE"))

    with pytest.raises(UserError, match="was changed while it was tokenized"):
        tokenize_into(out, job, 1, os.environ, change)
    assert not (out / "manifest.json").exists()
    assert "a file of the source was changed" in refusal(capsys, *arguments(source, out))


def test_shards_are_not_written_into_their_source(source, tmp_path, capsys):
    """Their manifest would be one of its files."""
    shown = refusal(capsys, *arguments(source, source / "shards"))
    assert "is in the source" in shown
    assert not (source / "shards").exists()
    assert main(arguments(source, tmp_path / "out")) == EXIT_OK
    shown = refusal(capsys, *arguments(tmp_path / "out", tmp_path / "again"))
    assert "SOURCE = " in shown
    assert "these are token ids already" in shown


def test_a_full_disk_is_one_message_and_the_job_continues(tmp_path):
    source = tmp_path / "a.jsonl.gz"
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    source.write_bytes(gzip.compress(line * 300))
    out = tmp_path / "out"
    limit = (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    process = start(source, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, errors = process.communicate()
    assert process.returncode == EXIT_USAGE
    assert "cannot be written: File too large" in errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert finish(start(source, out)) == (EXIT_OK, "")
    assert open_token_files(str(out)).length == 300 * 1002


def test_a_process_that_is_killed_is_a_fault_and_the_job_continues(source, expected, tmp_path, capfd, monkeypatch):
    out, killed = tmp_path / "out", []

    def kill_worker(progress: TokenizeProgress) -> None:
        if progress.source_bytes and not killed:
            children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
            workers = [pid for pid in children if b"tokenize_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            killed.append(int(workers[0]))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    job = TokenizeJob(TextKeys("jsonl", str(source)), "builtin:bytes", shard_tokens=SHARD_TOKENS)
    with pytest.raises(Fault, match="a process was ended by signal 9; finished pieces are kept: run the same command"):
        tokenize_into(out, job, 1, os.environ, kill_worker)
    assert main(arguments(source, out, "--workers", "1")) == EXIT_OK
    assert content(out) == expected


def test_an_id_outside_of_the_vocabulary_is_refused(tmp_path):
    class Wrong(Tokenizer):
        vocab_size, bos_id, eos_id = 10, None, None

        def encode_batch(self, texts):
            return [np.array([3, 11], np.int32) for _ in texts]

    (tmp_path / "a.txt").write_text("x")
    from quadriga.data.catalogue import open_source
    from quadriga.errors import UserError

    with pytest.raises(UserError, match="gives the id 11, which is not in its vocabulary of 10"):
        pieces.write_piece(
            tmp_path / "a.piece",
            open_source(TextKeys("text", str(tmp_path / "a.txt"))),
            [0],
            Wrong(),
            "uint16",
            skip_bad=False,
            report=lambda ids: None,
        )
