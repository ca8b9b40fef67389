"""Values between ranks as JSON: what arrives, what is refused, and that errors say the same on every rank."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from quadriga import json_collectives
from quadriga.checkpoint.folder import CheckpointError, CheckpointInfo, FileFacts
from quadriga.checkpoint.ranks import info_from_json, info_to_json, on_all_ranks, on_first_rank
from quadriga.errors import EXIT_NO_GOOD_CHECKPOINT, Problem, UserError
from quadriga.json_collectives import all_gather_json, broadcast_bytes, broadcast_json, gather_json

LONG = "ä" * 100_000


def values() -> dict[str, Any]:
    rank, group = dist.get_rank(), dist.new_group(backend="gloo")
    odd = {"rank": rank, "pair": (1, None), "name": "\udc80", "text": LONG if rank == 1 else "", "inf": float("inf")}
    return {
        "all": all_gather_json(odd),
        "own group": all_gather_json([rank], group),
        "first": gather_json({"of": rank}, group),
        "received": broadcast_json({1: "x"} if rank == 0 else None),
        "bytes": broadcast_bytes(b"\x00\xff" * 70_000 if rank == 0 else None, group) == b"\x00\xff" * 70_000,
        "nothing": broadcast_bytes(b"" if rank == 0 else None),
    }


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_comes_back_is_what_json_makes_of_it(ranks: int) -> None:
    for rank, seen in enumerate(run_ranks(values, ranks)):
        assert [one["rank"] for one in seen["all"]] == list(range(ranks))
        assert all(one["pair"] == [1, None] and one["name"] == "\udc80" for one in seen["all"])
        assert [len(one["text"]) for one in seen["all"]] == [0, len(LONG), 0][:ranks]
        assert seen["own group"] == [[number] for number in range(ranks)]
        assert seen["first"] == ([{"of": number} for number in range(ranks)] if rank == 0 else None)
        assert (seen["received"], seen["bytes"], seen["nothing"]) == ({"1": "x"}, True, b"")


def test_without_a_process_group_nothing_is_sent() -> None:
    assert (all_gather_json((1, 2)), gather_json("a"), broadcast_json([None])) == ([[1, 2]], ["a"], [None])
    assert broadcast_bytes(b"abc") == b"abc"


def refused() -> list[str]:
    """Every rank raises, each call, and the ranks still understand each other afterwards."""
    rank, messages = dist.get_rank(), []
    json_collectives.RANK_MESSAGE_BYTES = 1000
    calls: list[Callable[[], Any]] = [
        lambda: all_gather_json(object() if rank == 1 else 1),
        lambda: gather_json("x" * 2000 if rank == 1 else "x"),
        lambda: broadcast_json(object() if rank == 0 else None),
        lambda: broadcast_bytes(b"x" * 2000 if rank == 0 else None),
    ]
    for call in calls:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - its words are what is tested
            messages.append(f"{type(error).__name__}: {error}")
    assert all_gather_json(rank) == [0, 1]
    return messages


def test_a_message_that_cannot_be_sent_raises_on_every_rank() -> None:
    first, second = run_ranks(refused, 2)
    long = "announced a message of 2{} bytes; at most 1000 are allowed"
    assert "rank 1 could not encode its value as JSON" in first[0]
    assert "not JSON serializable" in second[0]
    assert first[1] == second[1] == f"Fault: rank 1 {long.format('002')}"
    assert "not JSON serializable" in first[2]
    assert "rank 0 could not encode its value as JSON" in second[2]
    assert first[3] == second[3] == f"Fault: rank 0 {long.format('000')}"


def raised_by(call: Callable[[Callable[[], Any]], Any], at: int) -> list[tuple[Any, ...]]:
    """What each kind of error, raised by rank `at` alone, becomes on this rank."""
    errors = [
        UserError(Problem("a.b", "is wrong", "3", "file", allowed="4", fix="set 4"), Problem("c", "too")),
        CheckpointError("none is good", EXIT_NO_GOOD_CHECKPOINT),
        OSError(errno.ENOSPC, "No space left on device", "/data/x"),
        KeyError("what"),
    ]
    seen = []
    for error in errors:

        def work(error: Exception = error) -> None:
            if dist.get_rank() == at:
                raise error

        try:
            call(work)
        except Exception as caught:  # noqa: BLE001 - its words are what is tested
            chain, cause = [], caught.__cause__
            while cause is not None and len(chain) < 5:
                chain.append(type(cause).__name__)
                cause = cause.__cause__
            seen.append((type(caught).__name__, str(caught), getattr(caught, "exit_code", None), chain))
    return seen


def on_first() -> list[tuple[Any, ...]]:
    group = dist.new_group(backend="gloo")
    assert on_first_rank(group, lambda: [dist.get_rank(), (1,)]) == [0, [1]]
    return raised_by(lambda work: on_first_rank(group, work), 0)


def on_any() -> list[tuple[Any, ...]]:
    group = dist.new_group(backend="gloo")
    assert on_all_ranks(group, dist.get_rank) == dist.get_rank()
    return raised_by(lambda work: on_all_ranks(group, work), 1)


def test_an_error_of_the_first_rank_says_the_same_on_every_rank() -> None:
    first, second = run_ranks(on_first, 2)
    assert first[:3] == second[:3]
    assert [kind for kind, *_ in first] == ["UserError", "CheckpointError", "OSError", "KeyError"]
    assert "set 4" in second[0][1]
    assert second[1][1:3] == ("none is good", EXIT_NO_GOOD_CHECKPOINT)
    assert second[2][1] == "[Errno 28] No space left on device: '/data/x'"
    assert second[3][:2] == ("RuntimeError", "on the first rank: KeyError: 'what'")


def test_an_error_of_any_rank_says_the_same_on_every_rank() -> None:
    first, second = run_ranks(on_any, 2)
    assert [one[:3] for one in first] == [one[:3] for one in second]
    assert [kind for kind, *_ in first] == ["UserError", "CheckpointError", "CheckpointError", "CheckpointError"]
    assert all(chain == [] for *_, chain in first)
    assert [chain for *_, chain in second] == [[], [], ["OSError"], ["KeyError"]]  # none is its own cause


def test_a_checkpoint_that_was_found_comes_back_as_it_was() -> None:
    facts = {"a.distcp": FileFacts(3, "ab")}
    found = CheckpointInfo(7, "run/step-7", ("model", "optimizer"), {"lanes": {"0": [1]}}, False, "run/step-7/x", facts)
    assert broadcast_json(info_to_json(found)) != found
    assert info_from_json(broadcast_json(info_to_json(found))) == found
    assert info_from_json(broadcast_json(info_to_json(replace(found, files={})))).files == {}
    assert info_to_json(None) is None
