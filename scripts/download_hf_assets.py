#!/usr/bin/env python3
"""Download tokenizer, configuration and, on request, weights of a Hugging Face repository.

    python scripts/download_hf_assets.py
    python scripts/download_hf_assets.py --repo_id meta-llama/Llama-3.1-70B --assets tokenizer config safetensors

Files go to LOCAL_DIR/NAME, NAME being the repository's own (./assets/hf/Llama-3.1-8B). HF_TOKEN and HF_ENDPOINT are
read. The paths of the files are printed to standard output, progress to standard error. What is already there and
unchanged is not fetched again; an interrupted download goes on where it stopped. Exit code 2: something that you can
mend (licence, token, name); 1: the network or the disk.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quadriga.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE, Problem, UserError, causes
from quadriga.units import show_bytes

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
NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "socket")


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
            print(path)
    except UserError as error:
        print(error.report, file=sys.stderr)
        return EXIT_USAGE
    except MachineError as error:
        print(f"quadriga: {error}", file=sys.stderr)
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


def download(repo_id: str, assets: Sequence[str], target: Path, token: str | None, endpoint: str) -> Iterator[Path]:
    """Fetch the files of `assets` and yield each path when it is there. Raises UserError or MachineError."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.utils.logging import set_verbosity_error
    except ImportError as error:
        step = "pip install -r requirements.txt"
        raise UserError(Problem("huggingface_hub", "this Python does not have the package", fix=step)) from error
    set_verbosity_error()  # it tells of each retry; what is left in the end is told here
    try:
        facts = HfApi(endpoint=endpoint, token=token).model_info(repo_id, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in facts.siblings or []}
        names = files_of(assets, sizes, repo_id)
        total = show_bytes(sum(sizes[name] for name in names))
        say(f"{repo_id}: {len(names)} files, {total}, from {endpoint} to {target}")
        target.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names, start=1):
            say(f"[{number}/{len(names)}] {name}  {show_bytes(sizes[name])}")
            path = hf_hub_download(repo_id, name, revision=facts.sha, local_dir=target, token=token, endpoint=endpoint)
            if sizes[name] and Path(path).stat().st_size != sizes[name]:
                raise MachineError(f"{path} is not whole; the same command fetches the rest")
            yield Path(path)
    except (UserError, MachineError):
        raise
    except Exception as error:
        raise explained(error, repo_id, target, token, endpoint) from error


def files_of(assets: Sequence[str], present: Mapping[str, int], repo_id: str) -> list[str]:
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


def explained(error: Exception, repo_id: str, target: Path, token: str | None, endpoint: str) -> Exception:
    """What went wrong in a user's words, with the next step."""
    from huggingface_hub import errors as hub

    page = f"{endpoint}/{repo_id}"
    with_token = "a token of yours (https://huggingface.co/settings/tokens) as HF_TOKEN or --hf_token"
    status = next((code for one in causes(error) if (code := status_of(one)) is not None), None)
    for one in causes(error):
        if isinstance(one, hub.GatedRepoError):
            step = f"accept the licence at {page}, then give {with_token}"
            if token:
                step = f"ask for access at {page} with the account of this token; approval can take a while"
            return UserError(Problem("--repo_id", "the repository is gated", value=repo_id, fix=step))
        if isinstance(one, hub.RepositoryNotFoundError):
            step = f"check the name at {page}" + ("" if token else f"; if it is private, give {with_token}")
            return UserError(Problem("--repo_id", f"{endpoint} has no such repository", value=repo_id, fix=step))
        if isinstance(one, hub.HFValidationError):
            return UserError(Problem("--repo_id", "not the name of a repository", value=repo_id, allowed="OWNER/NAME"))
        if isinstance(one, OSError) and one.errno in NO_ROOM:
            return MachineError(f"no room left in {target}: {one}\nmake room; the same command fetches the rest")
        if isinstance(one, OSError) and one.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            return UserError(
                Problem("--local_dir", f"cannot be written: {one}", value=str(target), fix="another folder")
            )
    if status == 401:
        return UserError(
            Problem("HF_TOKEN", f"{endpoint} does not accept the token", fix=f"give {with_token}, or unset it")
        )
    if status is not None:
        return MachineError(f"{endpoint} answered {status} for {repo_id}: {first_line(error)}\ntry again later")
    if any(is_of_network(one) for one in causes(error)):
        return MachineError(
            f"no connection to {endpoint}, or it broke off: {first_line(error)}\n"
            "check the network (HTTPS_PROXY, HF_ENDPOINT for a mirror), or copy the files from another machine to "
            f"{target}; what is there already is kept"
        )
    return MachineError(f"{repo_id} was not fetched: {type(error).__name__}: {first_line(error)}")


def status_of(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def is_of_network(error: BaseException) -> bool:
    return (
        isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in NETWORK_LIBRARIES
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
