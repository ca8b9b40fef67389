"""Whether data are those of a checkpoint: compares fingerprints. Files that were repaired since are allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.data.files import File, names_digest
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem

# Of checkpoints that were saved before these keys existed.
OLDER_DEFAULTS = {"shuffle": "true", "window_overlap": "1"}


def data_changes(state: Mapping[str, Any], here: str, files: Sequence[File], tokenizer: Tokenizer) -> list[Problem]:
    """Why the data in `files`, with the fingerprint `here`, differ from those of `state` (`Loader.state_dict`)."""
    found = differences(state["fingerprint"], here)
    still = {"dataset": _same_files(state, here, files), "tokenizer": earlier_tokenizer(state, tokenizer) is not None}
    return [problem for problem in found if not still.get(problem.where.rpartition(" ")[2])]


def earlier_tokenizer(state: Mapping[str, Any], tokenizer: Tokenizer) -> Tokenizer | None:
    """The tokenizer as an older version of Quadriga used it, if `state` was saved with that; else None."""
    earlier = tokenizer.earlier
    return earlier if earlier and f"; tokenizer={earlier.fingerprint};" in state["fingerprint"] else None


def _same_files(state: Mapping[str, Any], here: str, files: Sequence[File]) -> bool:
    """Whether the files have the same names as in `state`, and are read in the same way."""
    layout = state.get("layout")
    saved, now = (text.partition(";")[0].split(":") for text in (state["fingerprint"], here))
    same_kind = saved[:2] + saved[3:] == now[:2] + now[3:]  # all but the hash of names and sizes
    return same_kind and layout is not None and layout["names"] == names_digest(files)


def differences(saved: str, here: str) -> list[Problem]:
    """One problem per difference between two fingerprints of data; [] if they are equal."""
    then, now = (OLDER_DEFAULTS | dict(part.split("=", 1) for part in text.split("; ")) for text in (saved, here))
    if then["shuffle"] == now["shuffle"] == "false":  # then neither key changes the order of documents
        then, now = (
            {key: parts[key] for key in parts if key not in ("seed", "global_batch_size")} for parts in (then, now)
        )
    fix = "restore the saved value, or read the current data from their start: --checkpoint.allow_change"
    return [
        Problem(f"data of the checkpoint: {key}", f"was {then.get(key)} when it was saved", value=now.get(key), fix=fix)
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
