"""gloo and the slots of nvshmem, over host memory, pass the conformance test; what is broken on purpose fails it."""

from __future__ import annotations

import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance_backend
import pytest
import torch
from conformance_backend import CHECKS, CollectivePair, buffer_reuse, overlapping_calls, uneven_sizes, values
from ranks import RankError, run_ranks

NAMES = [check.__name__ for check in CHECKS]
CANDIDATES = {
    "gloo": conformance_backend.torch_collectives,
    "host-slots": conformance_backend.host_slots,
    "host-slots with delays": conformance_backend.host_slots_with_delays,
}


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CANDIDATES)
def test_a_backend_passes(name: str, ranks: int) -> None:
    assert run_ranks(conformance_backend.run_checks, ranks, CANDIDATES[name], *CHECKS) == [NAMES] * ranks


def test_nothing_is_left_when_it_is_taken_down() -> None:
    assert run_ranks(conformance_backend.run_twice, 2, conformance_backend.host_slots) == [[], []]


# --- the conformance test can fail ------------------------------------------------------------------------------------


def broken(mutate: Callable[[CollectivePair], None]) -> CollectivePair:
    pair = conformance_backend.with_random_delays(conformance_backend.with_slots("host-slots", timeout=2.0))
    mutate(pair)
    return pair


def exchanges(pair: CollectivePair) -> list[Any]:
    return [pair.all_gather._exchange, pair.reduce_scatter._exchange]


def without_handshake() -> CollectivePair:
    def mutate(pair: CollectivePair) -> None:
        for exchange in exchanges(pair):
            exchange.handshake = lambda number: None

    return broken(mutate)


def ignoring_the_ready_signal() -> CollectivePair:
    def mutate(pair: CollectivePair) -> None:
        for exchange in exchanges(pair):
            wait, ready = exchange.transport.wait, range(exchange._ready, exchange._full)
            exchange.transport.wait = lambda peer, word, value, wait=wait, ready=ready: (
                None if word in ready else wait(peer, word, value)
            )

    return broken(mutate)


def without_waiting_until_full() -> CollectivePair:
    def mutate(pair: CollectivePair) -> None:
        for exchange in exchanges(pair):
            exchange.wait_until_full = lambda number: None

    return broken(mutate)


def into_the_wrong_slot() -> CollectivePair:
    def mutate(pair: CollectivePair) -> None:
        for exchange in exchanges(pair):
            put = exchange.put
            exchange.put = lambda start, size, peer, number, put=put: put(start + size, size, peer, number)

    return broken(mutate)


def signal_before_the_bytes() -> CollectivePair:
    def mutate(pair: CollectivePair) -> None:
        transport = pair.all_gather._exchange.transport

        def put(start: int, stop: int, peer: int, word: int, value: int) -> None:
            transport.signal(peer, word, value)
            time.sleep(5e-3)
            transport._memories[peer][start:stop].copy_(transport.memory[start:stop])

        transport.put = put

    return broken(mutate)


def own_slot_changed_too_early() -> CollectivePair:
    """A put that comes back before it has read its source: what the next chunk overwrites is lost."""

    def mutate(pair: CollectivePair) -> None:
        transport = pair.all_gather._exchange.transport
        late: list[tuple[int, int, int, int, int]] = []
        put, wait = transport.put, transport.wait

        def waiting(*args: int) -> None:
            while late:
                put(*late.pop(0))
            wait(*args)

        transport.put, transport.wait = lambda *args: late.append(args), waiting

    return broken(mutate)


def work_that_does_not_wait() -> CollectivePair:
    def mutate(pair: CollectivePair) -> None:
        for exchange in exchanges(pair):
            run = exchange.run
            exchange.run = lambda steps, whole, async_op, run=run: (
                WorkWithoutWait(run(steps, whole, True)) if async_op else run(steps, whole, False)
            )

    return broken(mutate)


class WorkWithoutWait:
    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self) -> None:
        return None


def averages() -> CollectivePair:
    def mutate(pair: CollectivePair) -> None:
        total = torch.sum
        torch.sum = lambda slots, **kwargs: (
            total(slots, **kwargs) / pair.size
        )  # for good: this rank's process ends with it

    return broken(mutate)


MUTANTS: dict[str, tuple[Callable[[], CollectivePair], Callable[[CollectivePair], None]]] = {
    "no handshake before a buffer is used again": (without_handshake, buffer_reuse),
    "a handshake that does not listen": (ignoring_the_ready_signal, buffer_reuse),
    "reads before the slots are full": (without_waiting_until_full, values),
    "puts into the wrong slot": (into_the_wrong_slot, values),
    "signals before the bytes are there": (signal_before_the_bytes, uneven_sizes),
    "changes its slot before it is read": (own_slot_changed_too_early, values),
    "work that does not wait": (work_that_does_not_wait, overlapping_calls),
    "averages instead of sums": (averages, values),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_broken_fails(name: str) -> None:
    make, check = MUTANTS[name]
    with pytest.raises(RankError, match=r"numbers are wrong|did not signal within|in use at the same time"):
        run_ranks(conformance_backend.run_checks, 3, make, check)


# --- a peer that dies -------------------------------------------------------------------------------------------------


def lose_the_last_rank(make: conformance_backend.Make, folder: Path) -> None:
    """The last rank dies between two calls; what the others see of it goes into `folder`, since they are ended too."""
    pair = make()
    uneven_sizes(pair)
    if pair.rank == pair.size - 1:
        die_with_pipe_open(folder, pair.size - 1)
    start = time.monotonic()
    try:
        uneven_sizes(pair)
        message = "nothing"
    except RuntimeError as error:
        message = str(error)
    part = folder / f"{pair.rank}.part"
    part.write_text(f"{time.monotonic() - start:.1f}\n{message}")
    part.rename(folder / f"{pair.rank}.report")
    time.sleep(60)  # until the caller ends it


def die_with_pipe_open(folder: Path, survivors: int) -> None:
    """Die as a killed rank does. A child keeps the pipe to the test open until all survivors have reported, for the
    test would end them at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads at a fork: the child only sleeps
        holder = os.fork()
    if holder:
        os.kill(os.getpid(), signal.SIGKILL)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            with socket.socket(fileno=os.dup(descriptor)) as found:
                if found.family == socket.AF_UNIX:
                    continue
            os.close(descriptor)
        except OSError:
            continue
    while len(list(folder.glob("*.report"))) < survivors:
        time.sleep(0.05)
    os._exit(0)


def host_slots_with_short_timeout() -> CollectivePair:
    return conformance_backend.with_slots("host-slots", timeout=5.0)


@pytest.mark.parametrize("name", ["gloo", "host-slots"])
def test_a_peer_that_dies_is_an_error_at_the_others(name: str, tmp_path: Path) -> None:
    make = conformance_backend.torch_collectives if name == "gloo" else host_slots_with_short_timeout
    with pytest.raises(RankError, match="rank 2 of 3 died"):
        run_ranks(lose_the_last_rank, 3, make, tmp_path)
    for rank in range(2):
        seconds, message = (tmp_path / f"{rank}.report").read_text().split("\n", 1)
        assert message != "nothing"
        assert float(seconds) < 15
    if name == "host-slots":  # the one that waits for the dead one says so
        assert any("rank 2 of 3 did not signal within 5 s" in path.read_text() for path in tmp_path.glob("*.report"))
