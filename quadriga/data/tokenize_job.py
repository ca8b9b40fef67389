"""A tokenization as a job that can be continued: what it is, and its folder.

While the job runs, the output folder has `.tokenize`: `job.json`, `state.json`, and the pieces that no finished shard
has taken yet. Everything else that is found there was left by a kill, and is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quadriga.config.schema import TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.pieces import LEAST_PIECES, cut_digest, cut_pieces, sync
from quadriga.data.shards import MANIFEST, MadeBy, ShardManifest, read_manifest
from quadriga.data.sources import Source
from quadriga.data.tokenizer import Tokenizer, build_tokenizer
from quadriga.data.tokenizer_fast import TOKENIZERS, FastTokenizer, library_version, require_known_library
from quadriga.data.unfinished import WORK
from quadriga.errors import Problem, UserError, shortened
from quadriga.reading import read_json_object

JOB, STATE, LOCK = "job.json", "state.json", "lock"
JSONL_STREAMS = LEAST_PIECES  # so that a small file has enough ranges for all processes
CONTINUE = "run the same command again to continue"


@dataclass(frozen=True)
class TokenizeJob:
    """What is tokenized, and how. `tokenizer`: as `model.hf_assets_path`. `library`: one of
    `tokenizer_fast.LIBRARIES`."""

    keys: TextKeys
    tokenizer: str
    skip_bad: bool = False
    shard_tokens: int = 100_000_000
    library: str = TOKENIZERS

    def open(self, *, compare: bool = False) -> tuple[Source, Tokenizer]:
        """`compare`: a library that is not the default must give equal ids. Raises UserError."""
        require_known_library(self.library)
        tokenizer = build_tokenizer(self.tokenizer)
        # The bytes of JSON lines do not depend on where files are cut. Text is cut as rarely as possible: a cut can
        # divide what is one token.
        streams = JSONL_STREAMS if self.keys.dataset == "jsonl" else 1
        source = open_source(self.keys, streams=streams)
        if self.library == TOKENIZERS:
            return source, tokenizer
        fast = FastTokenizer(tokenizer, self.tokenizer)
        if compare:
            fast.require_equal(source)
        return source, fast

    def identity(self, source: Source) -> dict[str, str]:
        """All that decides the bytes of the shards, except the tokenizer. It is `source` in the manifest."""
        return {
            "fingerprint": source.fingerprint,
            "dataset": self.keys.dataset,
            "field": self.keys.field,
            "on_bad_record": "skip" if self.skip_bad else "stop",
            "shard_tokens": str(self.shard_tokens),
            "library": library_version(self.library),
        }


def made_by(tokenizer: Tokenizer) -> MadeBy:
    return MadeBy(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)


def piece_path(work: Path, number: int) -> Path:
    return work / f"{number:07d}.piece"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that is complete or as it was. Raises OSError."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("wb") as file:
        file.write(json.dumps(content, indent=1).encode())
        sync(file)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes sure that the renames in a folder are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def unwritable(folder: Path, error: OSError) -> Problem:
    what = f"cannot be written: {error.strerror or error}"
    return Problem("OUT", what, str(folder), fix=f"free space or repair it, and {CONTINUE}")


def prepare_folder(out: Path, job: TokenizeJob, source: Source, tokenizer: Tokenizer) -> ShardManifest | BinaryIO:
    """The manifest if the job is finished; else the lock on the folder, which has `job.json` then.

    Raises UserError: the folder holds something else, or another process writes it; OSError: it cannot be written.
    """
    identity, maker = job.identity(source), made_by(tokenizer)
    work = out / WORK
    if job.keys.path is not None and out.resolve().is_relative_to(Path(job.keys.path).expanduser().resolve()):
        what = f"is in the source, {shortened(job.keys.path, 200)}, so the shards would be files of the source"
        raise UserError(Problem("OUT", what, str(out), fix="name a folder outside of the source"))
    if out.exists() and not out.is_dir():
        raise UserError(Problem("OUT", "is not a folder", str(out)))
    manifest = read_manifest(out) if (out / MANIFEST).exists() else None
    if manifest is not None:
        _require_equal({**manifest.source, **_texts(manifest.tokenizer)}, {**identity, **_texts(maker)}, out)
        shutil.rmtree(work, ignore_errors=True)
        return manifest
    if out.is_dir() and not work.is_dir() and any(out.iterdir()):
        fix = "name a new folder, or an empty one"
        raise UserError(Problem("OUT", "the folder holds other files", str(out), fix=fix))
    work.mkdir(parents=True, exist_ok=True)
    lock = (work / LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        newest = max((file.modified for file in source.files), default=0)
        here = {**identity, **_texts(maker), "newest": str(newest), "cut": cut_digest(source, cut_pieces(source))}
        _begin_or_continue(work, here)
    except BlockingIOError:
        lock.close()
        raise UserError(Problem("OUT", "another process is writing this folder", str(out))) from None
    except BaseException:
        lock.close()
        raise
    return lock


def _begin_or_continue(work: Path, here: Mapping[str, str]) -> None:
    """Writes `job.json`. Raises UserError if there is one of another job that has complete pieces."""
    if not (work / JOB).exists() or not ((work / STATE).exists() or any(work.glob("*.piece"))):
        write_json(work / JOB, here)
        return
    then = read_json_object(work / JOB, what="job")
    if then.get("newest") != here["newest"]:
        what = "a file of the source was changed since this job began"
        raise UserError(Problem("OUT", what, str(work.parent), fix="remove the folder, and start again"))
    if {**then, "on_bad_record": "skip"} == here:  # no record of a complete piece was bad, so it is the same with skip
        write_json(work / JOB, here)
        return
    if then.get("cut") != here["cut"] and {**then, "cut": here["cut"]} == here:
        what = "another Quadriga, which cuts the source at other places, began this job"
        raise UserError(Problem("OUT", what, str(work.parent), fix="remove the folder, and start again"))
    _require_equal(then, here, work.parent)


def require_unchanged(source: Source, out: Path) -> None:
    """Raises UserError if a file has changed since the source was opened: pieces can be of different contents."""
    for file in source.files:
        now = file.path.stat() if file.path.exists() else None
        if now is None or (now.st_size, now.st_mtime_ns) != (file.size, file.modified):
            fix = f"remove {shortened(out, 200)}, and start again"
            raise UserError(Problem(shortened(file.path, 400), "was changed while it was tokenized", fix=fix))


def _texts(maker: MadeBy) -> dict[str, str]:
    return {f"tokenizer {name}": str(value) for name, value in asdict(maker).items()}


def _require_equal(then: Mapping[str, Any], now: Mapping[str, str], out: Path) -> None:
    """Raises UserError if two descriptions of jobs differ."""
    differ = [name for name in {**now, **then} if name != "cut" and then.get(name) != now.get(name)]
    if differ:
        pairs = ((name, shortened(then.get(name)), shortened(now.get(name))) for name in differ)
        shown = "; ".join(f"{name} was {before}, and is {after}" for name, before, after in pairs)
        fix = "name another folder; or remove this one, to make it again"
        raise UserError(Problem("OUT", f"the folder is of another job: {shown}", str(out), fix=fix))
