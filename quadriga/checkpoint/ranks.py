"""Work that the ranks of a checkpoint do together: results and errors of a rank are sent to all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar, cast

import torch.distributed as dist

from quadriga.checkpoint.folder import CheckpointError, CheckpointInfo, FileFacts
from quadriga.errors import UserError
from quadriga.json_collectives import all_gather_json, broadcast_json, error_from_json, error_to_json

T = TypeVar("T")


def on_first_rank(group: dist.ProcessGroup | None, work: Callable[[], T]) -> T:
    """The result of `work` on the first rank, converted through JSON. Its error is raised on every rank.

    The other ranks raise the error that `error_from_json` returns: a UserError, CheckpointError or OSError with the
    same message, and a RuntimeError for any other error. Call on all ranks of the group; None: a single process.
    """
    if group is None:
        return cast(T, json.loads(json.dumps(work())))
    result: T | None = None
    error: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            result = work()
        except Exception as failed:  # noqa: BLE001 - the other ranks must not wait forever
            error = failed
    outcome = broadcast_json([result, None if error is None else error_to_json(error)], group)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise error_from_json(outcome[1], CheckpointError)
    return cast(T, outcome[0])


def on_all_ranks(group: dist.ProcessGroup | None, work: Callable[[], T]) -> T:
    """This rank's result of `work`. If it failed on any rank, every rank raises the error of the first that failed.

    Errors other than UserError and CheckpointError become a CheckpointError. Call on all ranks of the group."""
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except (UserError, CheckpointError) as failed:
        error = failed
    except Exception as failed:  # noqa: BLE001 - the other ranks must not wait forever
        error = CheckpointError(f"weights could not be read or written: {failed or type(failed).__name__}")
        error.__cause__ = failed
    own = None if error is None else error_to_json(error)
    outcome: list[Any] = [own] if group is None else all_gather_json(own, group)
    first = next((rank for rank, one in enumerate(outcome) if one is not None), None)
    if first is None:
        return cast(T, result)
    if error is not None and (group is None or first == dist.get_rank(group)):
        raise error  # not `from` itself, because a chain of causes must end
    raise error_from_json(outcome[first], CheckpointError) from error


def info_to_json(found: CheckpointInfo | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def info_from_json(record: Mapping[str, Any]) -> CheckpointInfo:
    files = {name: FileFacts(**facts) for name, facts in record["files"].items()}
    return CheckpointInfo(**{**record, "contents": tuple(record["contents"]), "files": files})
