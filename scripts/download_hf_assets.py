#!/usr/bin/env python3
"""Download tokenizer, configuration and, on request, weights of a Hugging Face repository.

    python scripts/download_hf_assets.py
    python scripts/download_hf_assets.py --repo_id meta-llama/Llama-3.1-70B --assets tokenizer config safetensors

Files go to LOCAL_DIR/NAME, NAME being the repository's own (./assets/hf/Llama-3.1-8B). HF_TOKEN and HF_ENDPOINT are
read. The paths of the files are printed to standard output, progress to standard error. The content of each file is
compared with the hash that the Hub states. What is already there and equal to it is not fetched again; an interrupted
download goes on where it stopped. A connection or a silence may take
20 s, a whole file 60 s and 1 s for each 50 kB.
Exit code 2: something that you can mend (licence, token, name); 1: the network or the disk.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import http.client
import os
import re
import signal
import ssl
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quadriga import limits
from quadriga.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE, NEWLINE, Problem, UserError, printable, shortened
from quadriga.reading import json_type, parse_json
from quadriga.units import format_bytes

DEFAULT_REPOSITORY = "meta-llama/Llama-3.1-8B"
DEFAULT_FOLDER = "./assets/hf"
HUB = "https://huggingface.co"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
CONFIG_FILES = ("config.json", "generation_config.json")
INDEX_ENDING = ".safetensors.index.json"
ASSETS = ("tokenizer", "config", "index", "safetensors")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP)
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
COMMIT, SHA1, SHA256 = (re.compile(f"[0-9a-f]{{{digits}}}") for digits in ("40,64", "40", "64"))

# ssl.SSLError: of a body that is cut off or damaged within TLS. ValueError: of an address that the hub redirects to and
# that is none.
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    ValueError,
)
SILENT_SECONDS = 20.0  # without a byte
WHOLE_SECONDS, LEAST_RATE = 60.0, 50_000  # a whole answer: so many seconds, and one for each so many bytes
TRIES, CONNECT_TRIES = 5, 2
PIECE = 1 << 20
ERROR_BYTES = 1 << 14  # that are read of an answer which is an error


class MachineError(Exception):
    """The network or the disk failed; the message says what happened and what next."""


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    wanted = read_arguments(argv)
    token = wanted.hf_token or environ.get("HF_TOKEN") or None
    endpoint = (environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    assets = ASSETS if "all" in wanted.assets else tuple(dict.fromkeys(wanted.assets))
    target = target_folder(wanted.local_dir, wanted.repo_id)
    try:
        for path in download(wanted.repo_id, assets, target, token, endpoint):
            print(printable(path))
    except UserError as error:
        print(error.report, file=sys.stderr)
        return EXIT_USAGE
    except MachineError as error:
        print(f"quadriga: {printable(error, keep=NEWLINE)}", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("quadriga: stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_FAULT
    return EXIT_OK


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repo_id", default=DEFAULT_REPOSITORY, help=f"default: {DEFAULT_REPOSITORY}")
    parser.add_argument(
        "--assets",
        nargs="+",
        choices=(*ASSETS, "all"),
        default=["tokenizer", "config"],
        help="what to fetch, one or several; default: tokenizer config; weights are `index` and `safetensors`",
    )
    parser.add_argument(
        "--local_dir", default=DEFAULT_FOLDER, help=f"the folder that gets a folder NAME; default: {DEFAULT_FOLDER}"
    )
    parser.add_argument("--hf_token", default=None, help="a token for gated repositories; default: HF_TOKEN")
    return parser.parse_args(argv)


def target_folder(local_dir: str, repo_id: str) -> Path:
    """LOCAL_DIR/NAME; LOCAL_DIR itself where it already ends in NAME."""
    folder, name = Path(local_dir), repo_id.rstrip("/").rsplit("/", 1)[-1]
    return folder if folder.name == name else folder / name


class RemoteFile(NamedTuple):
    """What the Hub says of a file: its bytes, and their SHA-256 (large files) or git's SHA-1 of them."""

    size: int
    sha256: str | None
    git_sha1: str | None

    @property
    def hash(self) -> str:
        return self.sha256 or self.git_sha1 or ""

    def describes(self, path: Path) -> bool:
        """Whether a regular file, no link to one, has this content."""
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size != self.size:
                    return False
                digest = hashlib.sha256() if self.sha256 else hashlib.sha1(f"blob {self.size}\0".encode())
                while piece := file.read(PIECE):
                    digest.update(piece)
        except OSError:
            return False
        return digest.hexdigest() == self.hash


def download(repo_id: str, assets: Sequence[str], target: Path, token: str | None, endpoint: str) -> Iterator[Path]:
    """Fetch the files of `assets` and yield each path when it is there and whole. Raises UserError or MachineError."""
    if not REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise UserError(Problem("--repo_id", "not the name of a repository", value=repo_id, allowed="OWNER/NAME"))
    if not is_address(endpoint):
        raise UserError(Problem("HF_ENDPOINT", "not an address", value=endpoint, allowed="http://..., https://..."))
    hub = Hub(endpoint, repo_id, token, target)
    commit, present = read_listing(hub.listing(), hub.listing_url, repo_id)
    names = files_of(assets, present, repo_id)
    total = format_bytes(sum(present[name].size for name in names))
    say(f"{repo_id}: {len(names)} files, {total}, from {endpoint} to {target}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names, start=1):
            say(f"[{number}/{len(names)}] {name}  {format_bytes(present[name].size)}")
            yield fetched(hub, commit, name, present[name]).absolute()
    except OSError as error:
        raise of_the_disk(error, target) from error


def read_listing(content: bytes, where: str, repo_id: str) -> tuple[str, dict[str, RemoteFile]]:
    """The commit of a repository, and its files by path, as `/api/models/...?blobs=true` answers.

    Raises:
        UserError: the answer is no such listing; names that are no plain paths are left out only if nobody asks for
            them (`files_of` takes names of the top folder alone).
    """
    try:
        listing = parse_json(content, where)
    except UserError as error:
        refuse_listing(where, repo_id, error.problems[0].what)
    commit = listing.get("sha") if isinstance(listing, dict) else None
    siblings = listing.get("siblings") if isinstance(listing, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or not isinstance(siblings, list):
        refuse_listing(where, repo_id, 'it has no "sha" of a commit and no array "siblings"')
    files: dict[str, RemoteFile] = {}
    for number, entry in enumerate(siblings):
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            refuse_listing(where, repo_id, f"siblings[{number}] is no object with a file name")
        if not is_plain(name):
            continue
        if name in files:
            refuse_listing(where, repo_id, f"{shortened(name)} is listed twice")
        files[name] = remote_file(entry, where, repo_id, name)
    return commit, files


def remote_file(entry: Mapping[str, Any], where: str, repo_id: str, name: str) -> RemoteFile:
    lfs = entry.get("lfs")
    if lfs is not None and not isinstance(lfs, dict):
        refuse_listing(where, repo_id, f"lfs of {shortened(name)} is a JSON {json_type(lfs)}")
    size = entry.get("size") if lfs is None or "size" not in lfs else lfs["size"]
    sha256 = None if lfs is None else lfs.get("sha256", lfs.get("oid"))  # as the two kinds of listing call it
    git_sha1 = entry.get("blobId", entry.get("oid"))
    if type(size) is not int or not 0 <= size < 1 << 50:
        refuse_listing(where, repo_id, f"size of {shortened(name)} is {shortened(size)}")
    if lfs is not None and not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
        refuse_listing(where, repo_id, f"the SHA-256 of {shortened(name)} is {shortened(sha256)}")
    if lfs is None and not (isinstance(git_sha1, str) and SHA1.fullmatch(git_sha1)):
        refuse_listing(where, repo_id, f"the blobId of {shortened(name)} is {shortened(git_sha1)}, no SHA-1")
    return RemoteFile(size, sha256, None if lfs is not None else git_sha1)


def refuse_listing(where: str, repo_id: str, why: str) -> NoReturn:
    what = f"the listing of {repo_id} cannot be used: {why}"
    fix = "HF_ENDPOINT names another hub; without it the files come from https://huggingface.co"
    raise UserError(Problem(where, what, fix=fix))


def is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:  # a port or an address that is none
        return False


def is_plain(name: str) -> bool:
    """Whether a path of the Hub is one below a folder, in characters that can be printed."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and len(name) < 500 and not {"", ".", "..", ".cache"} & {*parts}


def fetched(hub: Hub, commit: str, name: str, file: RemoteFile) -> Path:
    """The path of a file that is whole: as it was, or fetched beside it and renamed. Links are never followed."""
    final = hub.target / name
    if file.describes(final):
        return final
    parts = hub.target / ".cache" / "download"
    for folder in (parts.parent, parts, final.parent):
        own_folder(folder, hub.target)
    part = parts / f"{file.hash}.part"
    hub.fetch(f"{hub.page}/resolve/{commit}/{quote(name)}", part, file, name)
    os.replace(part, final)
    for folder in (parts, parts.parent):
        with suppress(OSError):  # not empty: the part of another
            folder.rmdir()
    return final


def own_folder(folder: Path, target: Path) -> None:
    """Make a folder below `target`, which may be no link to another place."""
    if folder == target:
        return
    with suppress(FileExistsError):
        folder.mkdir()
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise UserError(Problem("--local_dir", "a link or a file, where a folder is needed", value=str(folder)))


class Hub:
    """A repository on the Hub, as its files are asked for."""

    def __init__(self, endpoint: str, repo_id: str, token: str | None, target: Path) -> None:
        self.endpoint, self.repo_id, self.token, self.target = endpoint, repo_id, token, target
        self.page = f"{endpoint}/{repo_id}"
        self.listing_url = f"{endpoint}/api/models/{repo_id}?blobs=true"
        self._opener = urllib.request.build_opener(_Redirects())

    def listing(self) -> bytes:
        """The answer, of at most `limits.JSON_BYTES`."""

        def read() -> bytes:
            with self._open(self.listing_url, 0) as answer:
                content = bytes(answer.read(limits.JSON_BYTES + 1))
            if len(content) > limits.JSON_BYTES:
                refuse_listing(self.listing_url, self.repo_id, f"it is longer than {limits.JSON_BYTES:,} bytes")
            return content

        with time_limit(WHOLE_SECONDS, f"{self.endpoint} gave no listing of {self.repo_id}"):
            return self._again_and_again(read)

    def fetch(self, url: str, part: Path, file: RemoteFile, name: str) -> None:
        """Bring `part` to the content that the Hub states. Raises MachineError where that does not come."""
        seconds = WHOLE_SECONDS + file.size / LEAST_RATE
        with time_limit(seconds, f"{name} did not come: {format_bytes(file.size)} in {seconds:.0f} s is too slow"):
            began = part.exists()  # by an earlier call
            self._again_and_again(lambda: self._fetch(url, part, file, name))
            if began and not file.describes(part):
                part.unlink()
                self._again_and_again(lambda: self._fetch(url, part, file, name))
        if not file.describes(part):
            part.unlink()
            raise MachineError(
                f"{name} as {self.endpoint} sent it does not have the hash that the Hub states ({file.hash}); it was "
                "removed\nthe same command fetches it again; if it comes so again, do not use this repository"
            )

    def _fetch(self, url: str, part: Path, file: RemoteFile, name: str) -> None:
        if part.is_symlink():
            part.unlink()
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(handle, "r+b") as out:
            there = out.seek(0, os.SEEK_END)
            if there > file.size or (there == file.size and not file.describes(part)):
                there = 0
            if there == file.size and there:
                return
            with self._open(url, there) as answer:
                if there and not self._goes_on(answer, there):
                    there = 0
                out.truncate(out.seek(there))
                while piece := answer.read1(PIECE):
                    there += len(piece)
                    if there > file.size:
                        out.truncate(0)
                        raise MachineError(f"{self.endpoint} sends more of {name} than the {file.size:,} bytes it has")
                    out.write(piece)
        if there < file.size:
            raise ConnectionError(f"{name} ended after {there:,} of {file.size:,} bytes")

    @staticmethod
    def _goes_on(answer: http.client.HTTPResponse, there: int) -> bool:
        return answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {there}-")

    def _open(self, url: str, start: int) -> http.client.HTTPResponse:
        headers = {"User-Agent": "quadriga", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(url, headers=headers)
        answer: http.client.HTTPResponse = self._opener.open(request, timeout=SILENT_SECONDS)
        return answer

    def _again_and_again(self, work: Any) -> Any:
        """The result of `work`, tried again where the network failed. Raises UserError or MachineError."""
        for attempt in range(1, TRIES + 1):
            try:
                return work()
            except urllib.error.HTTPError as error:
                answered = self._answered(error)
                if isinstance(answered, UserError) or error.code not in (408, 416, 429, *range(500, 600)):
                    raise answered from None
                failure = answered
                tries = TRIES
            except NETWORK_ERRORS as error:
                failure = self._no_connection(error)
                tries = CONNECT_TRIES if isinstance(error, urllib.error.URLError) else TRIES
            if attempt >= tries:
                break
            time.sleep(min(8, 2 ** (attempt - 1)))
        raise failure

    def _no_connection(self, error: Exception) -> MachineError:
        return MachineError(
            f"no connection to {self.endpoint}, or it broke off: {shortened(error, 300)}\n"
            "check the network (HTTPS_PROXY, HF_ENDPOINT for a mirror), or copy the files from another machine to "
            f"{self.target}; what is there already is kept"
        )

    def _answered(self, error: urllib.error.HTTPError) -> UserError | MachineError:
        """What an answer that is an error means for the user."""
        with error:
            said = error.headers.get("X-Error-Message") or ""
            code = error.headers.get("X-Error-Code") or ""
        with_token = "a token of yours (https://huggingface.co/settings/tokens) as HF_TOKEN or --hf_token"
        if code == "GatedRepo":
            step = f"accept the licence at {self.page}, then give {with_token}"
            if self.token:
                step = f"ask for access at {self.page} with the account of this token; approval can take a while"
            return UserError(Problem("--repo_id", "the repository is gated", value=self.repo_id, fix=step))
        if error.code == 401 and said == "Invalid credentials in Authorization header":
            fix = f"give {with_token}, or unset it"
            return UserError(Problem("HF_TOKEN", f"{self.endpoint} does not accept the token", fix=fix))
        if code == "RepoNotFound" or error.code == 401:
            step = f"check the name at {self.page}" + ("" if self.token else f"; if it is private, give {with_token}")
            what = f"{self.endpoint} has no such repository"
            return UserError(Problem("--repo_id", what, value=self.repo_id, fix=step))
        reason = shortened(said or error.reason, 300)
        return MachineError(f"{self.endpoint} answered {error.code} for {self.repo_id}: {reason}\ntry again later")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https alone, ten at most, and takes the token to no other host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        there, here = urlsplit(newurl), urlsplit(req.full_url)
        if there.scheme not in ("http", "https"):
            raise ConnectionError(f"it was redirected to {shortened(newurl)}")
        if new is not None and (there.scheme, there.netloc) != (here.scheme, here.netloc):
            new.remove_header("Authorization")
        return new


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise MachineError after so many seconds. In the main thread alone, where a signal can end any waiting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: object) -> None:
        raise MachineError(f"{what}\nwhat came is kept; the same command goes on from there")

    start, handler = time.monotonic(), signal.signal(signal.SIGALRM, end)
    before, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, before - (time.monotonic() - start)))


def of_the_disk(error: OSError, target: Path) -> UserError | MachineError:
    if error.errno in NO_ROOM:
        return MachineError(f"no room left in {target}: {error}\nmake room; the same command fetches the rest")
    if error.errno in NO_WRITING:
        return UserError(Problem("--local_dir", f"cannot be written: {error}", value=str(target), fix="another folder"))
    return MachineError(f"{target} cannot be written: {error}")


def files_of(assets: Sequence[str], present: Mapping[str, RemoteFile], repo_id: str) -> list[str]:
    """The repository's files for these assets. Raises UserError naming each asset that it has nothing for."""
    top = [name for name in present if "/" not in name]
    # Llama repositories of Meta keep the original tokenizer in a folder of its own.
    vocabulary = any(name in top for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    original = [] if vocabulary else [name for name in present if name == "original/tokenizer.model"]
    found = {
        "tokenizer": [name for name in TOKENIZER_FILES if name in top] + original,
        "config": [name for name in CONFIG_FILES if name in top],
        "index": [name for name in top if name.endswith(INDEX_ENDING)],
        "safetensors": [name for name in top if name.endswith((".safetensors", INDEX_ENDING))],
    }
    # Weights in one file have no index, and need none.
    needless = {"index"} if "safetensors" in assets and found["safetensors"] else set()
    absent = [asset for asset in assets if not found[asset] and asset not in needless]
    if absent:
        kinds = ", ".join(asset for asset in ASSETS if found[asset])
        raise UserError(
            *(
                Problem("--assets", f"{repo_id} has no file for it", value=asset, allowed=kinds or "nothing there fits")
                for asset in absent
            )
        )
    return sorted({name for asset in assets for name in found[asset]})


def say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
