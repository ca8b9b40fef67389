"""Collectives on small Python values, sent as JSON. Received bytes are never unpickled. One rank alone sends nothing.

    counts = all_gather_json({"step": 3})        # by rank, on every rank
    places = gather_json(["a", "b"], group)      # by rank, on the group's first rank; None on the others
    plan = broadcast_json(plan_or_none, group)   # the value of the group's first rank

- Every call is a collective: all ranks of the group must make it. The group must have gloo for CPU tensors; None is the
  default group.
- Results have passed through JSON, also on the sender and on one rank: tuples become lists, and keys of dicts become
  strings. NaN and infinities are allowed.
- A value that JSON cannot represent, or a message longer than `RANK_MESSAGE_BYTES`, raises on every rank of the group,
  so no rank is left waiting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from quadriga.errors import EXIT_FAULT, Fault, Problem, UserError
from quadriga.limits import RANK_MESSAGE_BYTES

ENCODE_FAILED = -1  # sent as the length if the value could not be encoded


def all_gather_json(item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks of the group, by rank, on every rank."""
    text, lengths = _exchange_lengths(item, group)
    if len(lengths) == 1:
        return [_value(text, 0)]
    own = _padded(text, max(lengths))
    rows = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(rows, own, group=group)
    return _values(rows, lengths)


def gather_json(item: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """The values of all ranks of the group, by rank, on its first rank; None on the others."""
    text, lengths = _exchange_lengths(item, group)
    if len(lengths) == 1:
        return [_value(text, 0)]
    own = _padded(text, max(lengths))
    rows = [torch.empty_like(own) for _ in lengths] if dist.get_rank(group) == 0 else None
    dist.gather(own, rows, group=group, group_dst=0)
    return None if rows is None else _values(rows, lengths)


def broadcast_json(item: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The value of the group's first rank, on every rank. The others may pass None."""
    text, failed = _encode(item) if _is_first(group) else (b"", None)
    data = _broadcast(text, group, failed)
    return _value(data, 0)


def broadcast_bytes(data: bytes | None, group: dist.ProcessGroup | None = None) -> bytes:
    """The bytes of the group's first rank, on every rank. The others may pass None."""
    return _broadcast(data or b"", group, None)


def error_to_json(error: BaseException) -> dict[str, Any]:
    """An error as a JSON value. `error_from_json` makes an error with the same message of it on another rank."""
    if isinstance(error, UserError):
        return {"kind": "user", "problems": [asdict(problem) for problem in error.problems]}
    if isinstance(error, Fault):
        return {"kind": "fault", "message": str(error), "exit_code": error.exit_code}
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        return {"kind": "os", "errno": error.errno, "message": str(error.strerror), "file": file}
    return {"kind": "other", "message": f"{type(error).__name__}: {error}"}


def error_from_json(record: Mapping[str, Any], fault: type[Fault] = Fault) -> Exception:
    """The error of an `error_to_json` record. A Fault becomes a `fault`. Errors other than UserError, Fault and OSError
    become a RuntimeError."""
    match record["kind"]:
        case "user":
            return UserError(*(Problem(**problem) for problem in record["problems"]))
        case "fault":
            return fault(record["message"], record["exit_code"])
        case "os":
            named = [] if record["file"] is None else [record["file"]]
            return OSError(record["errno"], record["message"], *named)
    return RuntimeError(f"on the first rank: {record['message']}")


def _exchange_lengths(item: Any, group: dist.ProcessGroup | None) -> tuple[bytes, list[int]]:
    """The encoded value of this rank, and the lengths of all ranks' values. Raises on every rank if one failed."""
    text, failed = _encode(item)
    ranks = _size(group)
    lengths = [torch.tensor([ENCODE_FAILED if failed else len(text)]) for _ in range(ranks)]
    if ranks > 1:
        own = lengths[0].clone()
        dist.all_gather(lengths, own, group=group)
    numbers = [int(length) for length in lengths]
    for rank, number in enumerate(numbers):
        _check_length(number, rank, failed)
    return text, numbers


def _broadcast(data: bytes, group: dist.ProcessGroup | None, failed: Exception | None) -> bytes:
    length_tensor = torch.tensor([ENCODE_FAILED if failed else len(data)])
    several = _size(group) > 1
    if several:
        dist.broadcast(length_tensor, group=group, group_src=0)
    length = int(length_tensor)
    _check_length(length, 0, failed)
    if not several:
        return data
    sent = _padded(data, length)
    dist.broadcast(sent, group=group, group_src=0)
    return data if _is_first(group) else sent[:length].numpy().tobytes()


def _check_length(length: int, rank: int, failed: Exception | None) -> None:
    if failed is not None:
        raise failed
    if length == ENCODE_FAILED:
        raise RuntimeError(f"rank {rank} could not encode its value as JSON")
    if not 0 <= length <= RANK_MESSAGE_BYTES:
        what = f"rank {rank} announced a message of {length} bytes; at most {RANK_MESSAGE_BYTES} are allowed"
        raise Fault(what, EXIT_FAULT)


def _encode(item: Any) -> tuple[bytes, Exception | None]:
    try:
        return json.dumps(item, separators=(",", ":")).encode(), None
    except (TypeError, ValueError, RecursionError) as error:
        return b"", error


def _padded(text: bytes, length: int) -> torch.Tensor:
    tensor = torch.zeros(max(length, 1), dtype=torch.uint8)
    if text:
        tensor[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensor


def _values(rows: list[torch.Tensor], lengths: list[int]) -> list[Any]:
    texts = (row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True))
    return [_value(text, rank) for rank, text in enumerate(texts)]


def _value(text: bytes, rank: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"the message of rank {rank} is not JSON") from error


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _is_first(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_rank(group) == 0
