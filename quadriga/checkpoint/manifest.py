"""The manifest of a checkpoint, `train_state.json`: its format and its validation.

Its hash covers its own text, so damage is detected. The hash contains no secret: a forged checkpoint can have a valid
manifest. So every value is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quadriga.errors import UserError, printable, shortened
from quadriga.reading import json_type, parse_json

STATE_FILE = "train_state.json"
METADATA = ".metadata"  # DCP's own file: every checkpoint has one
FORMAT = "quadriga-2"
TOKEN = re.compile(r"[0-9a-f]{32}")  # the folder of a save on an object store
SHA256 = re.compile(r"[0-9a-f]{64}")
LOADED_FILES = re.compile(r"\.metadata|plan\.json|.*\.distcp", re.DOTALL)  # such a file must be listed
# Of one file in a folder. JSON can contain lone surrogates, which no file system call takes.
FILE_NAME = re.compile(r"[^/\\\0\ud800-\udfff]{1,255}")


class InvalidCheckpoint(Exception):
    """A folder is not a complete checkpoint of Quadriga. The message names the file and the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))  # names and contents of files can have control characters


@dataclass(frozen=True)
class FileFacts:
    """The entry of a file in the manifest."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest. `folder`: "." or a token, the folder of the files. `files`: by name without path."""

    step: int
    contents: tuple[str, ...]
    folder: str
    files: Mapping[str, FileFacts]
    extra: dict[str, Any]


def format_manifest(state: Mapping[str, Any]) -> str:
    """The text of a manifest. It includes a SHA-256 of its other fields, so that every change is detected."""
    text = json.dumps({key: value for key, value in state.items() if key != "sha256"}, indent=1)
    return json.dumps({**json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parses a manifest. `where`: the file, for messages. Raises InvalidCheckpoint if it is damaged or invalid."""
    try:
        state = parse_json(content, where, nan=True)
    except UserError as error:
        raise InvalidCheckpoint(f"{where} is damaged ({error.problems[0].what})") from error
    if not isinstance(state, dict):
        raise InvalidCheckpoint(f"{where} is damaged (it is a JSON {json_type(state)})")
    if state.get("format") != FORMAT:
        raise InvalidCheckpoint(
            f"{where} has format {shortened(repr(state.get('format')))}, this version reads {FORMAT!r}"
        )
    if format_manifest(state).encode() != content:
        raise InvalidCheckpoint(f"{where} is damaged (its own hash differs)")
    if (wrong := _find_error(state)) is not None:
        raise InvalidCheckpoint(f"{where} is not a valid manifest of a checkpoint ({wrong})")
    files = {name: FileFacts(entry["size"], entry["sha256"]) for name, entry in state["files"].items()}
    return Manifest(state["step"], tuple(state["contents"]), state["folder"], files, state["extra"])


def unlisted_files(manifest: Manifest, there: set[str]) -> list[str]:
    """Names of files that a load could read and that have no hash in the manifest."""
    return sorted(name for name in there - manifest.files.keys() if LOADED_FILES.fullmatch(name))


def _find_error(state: Mapping[str, Any]) -> str | None:
    """A description of the first invalid value; None if all are valid."""
    step, contents, folder, files = (state.get(key) for key in ("step", "contents", "folder", "files"))
    if type(step) is not int or step < 0:
        return f"its step is {shortened(step)}"
    if not isinstance(contents, list) or not all(isinstance(part, str) for part in contents):
        return f"its contents are {shortened(contents)}"
    if not isinstance(folder, str) or (folder != "." and not TOKEN.fullmatch(folder)):
        return f"its folder is {shortened(folder)}, where '.' or 32 hexadecimal digits are expected"
    if not isinstance(files, dict) or not isinstance(state.get("extra"), dict):
        return "its files or its extra are not objects"
    if METADATA not in files:
        return f"it does not list {METADATA}"
    return next(
        (f"its entry of {shortened(name)}" for name, entry in files.items() if not _is_valid_entry(name, entry)), None
    )


def is_file_name(name: str) -> bool:
    return name not in (".", "..") and FILE_NAME.fullmatch(name) is not None


def _is_valid_entry(name: str, entry: Any) -> bool:
    if name == STATE_FILE or not is_file_name(name) or not isinstance(entry, dict):
        return False
    size, digest = entry.get("size"), entry.get("sha256")
    good = type(size) is int and size >= 0 and isinstance(digest, str) and SHA256.fullmatch(digest) is not None
    return good and len(entry) == 2
