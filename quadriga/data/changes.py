"""Whether data are those of a checkpoint: compares fingerprints. Files that were repaired since are allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quadriga.data.files import File, names_digest
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Problem

# Of checkpoints that were saved before these keys existed.
OLDER_DEFAULTS = {"shuffle": "true", "window_overlap": "1"}
SOURCES = "sources"  # the key of the names in the fingerprint of a mixture
STAGE = "stage from step "  # begins the key of a stage in the fingerprint of a mixture


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
    if other := other_kind(saved, here):
        return other
    then, now = (OLDER_DEFAULTS | fingerprint_parts(text) for text in (saved, here))
    if then["shuffle"] == now["shuffle"] == "false":  # then neither key changes the order of documents
        then, now = (
            {key: parts[key] for key in parts if key not in ("seed", "global_batch_size")} for parts in (then, now)
        )
    return _unlike(then, now, "restore the saved value")


def mixture_differences(saved: str, here: str, step: int) -> list[Problem]:
    """As `differences`, of two mixtures after `step` steps. Stages that begin later may differ: no row has met them."""
    then, now = (_begun(fingerprint_parts(text), step) for text in (saved, here))
    fix = f"restore the saved value; or change the weights from now on, in a stage with from_step of at least {step}"
    return _unlike(then, now, fix)


def fingerprint_parts(text: str) -> dict[str, str]:
    """The parts of a fingerprint of data, by key."""
    return dict(part.split("=", 1) for part in text.split("; "))


def other_kind(saved: str, here: str) -> list[Problem]:
    """A problem if one fingerprint is that of a mixture, and the other is not."""
    then, now = ("a mixture" if SOURCES in fingerprint_parts(text) else "one data set" for text in (saved, here))
    fix = "start another run (--job.dump_folder), or read the current data from their start: --checkpoint.allow_change"
    return [Problem("data of the checkpoint", f"was {then} when it was saved", now, fix=fix)] if then != now else []


def _begun(parts: Mapping[str, str], step: int) -> dict[str, str]:
    return {
        key: text for key, text in parts.items() if not key.startswith(STAGE) or int(key.removeprefix(STAGE)) < step
    }


def _unlike(then: Mapping[str, str], now: Mapping[str, str], fix: str) -> list[Problem]:
    remedy = f"{fix}, or read the current data from their start: --checkpoint.allow_change"
    return [
        Problem(
            f"data of the checkpoint: {key}", f"was {then.get(key)} when it was saved", value=now.get(key), fix=remedy
        )
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
