"""The conformance test of every backend that may carry what `fully_shard` sends: the same checks of all, on real ranks.

The candidate is a pair of collectives in the form in which `fully_shard` takes them. On a machine with GPUs:

    python -m torch.distributed.run --nproc-per-node 4 tests/distributed/conformance_backend.py nvshmem

(or nccl, nccl-symm, gloo, host-slots) runs the checks and prints which passed.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

CAPACITY = 1 << 20  # bytes of the largest call of the checks
SIZES = (1, 7, 1000, 8191)  # numbers that each rank gives to an all-gather, or gets from a reduce-scatter
GATHER_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)
SUM_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TIMEOUT = 20.0


class CollectivePair(NamedTuple):
    all_gather: Any
    reduce_scatter: Any
    group: dist.ProcessGroup
    device: torch.device
    close: Callable[[], None]

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()


Make = Callable[[], CollectivePair]


# --- candidates -------------------------------------------------------------------------------------------------------


def torch_collectives() -> CollectivePair:
    """What `fully_shard` uses by itself, over whatever the default group is: gloo, nccl."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    return CollectivePair(DefaultAllGather(), DefaultReduceScatter(), group_of_all(), device_here(), lambda: None)


def nccl_symm() -> CollectivePair:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    world = group_of_all()
    made = (collectives.SymmMemAllGather(world, "NCCL"), collectives.SymmMemReduceScatter(world, "NCCL"))
    return CollectivePair(*made, world, device_here(), lambda: None)


def with_slots(backend: str, timeout: float = TIMEOUT) -> CollectivePair:
    from quadriga.comm.heap import Heap
    from quadriga.comm.sharding import open_shard_collectives

    register_test_backend()
    world, device = group_of_all(), device_here()
    sharding = open_shard_collectives(backend, world, Heap(CAPACITY, CAPACITY), device, timeout)
    assert sharding is not None
    return CollectivePair(sharding.all_gather, sharding.reduce_scatter, world, device, sharding.close)


def register_test_backend() -> None:
    import host_slots_backend

    host_slots_backend.register()


def host_slots() -> CollectivePair:
    return with_slots("host-slots")


def nvshmem() -> CollectivePair:
    return with_slots("nvshmem")


def host_slots_with_delays() -> CollectivePair:
    """Every put, signal and wait takes its own time, differently on each rank: what may overtake, will."""
    return with_random_delays(with_slots("host-slots"))


def with_random_delays(pair: CollectivePair) -> CollectivePair:
    transport, rng = pair.all_gather._exchange.transport, random.Random(pair.rank)

    def slowed(action: Callable[..., None]) -> Callable[..., None]:
        def act(*args: Any) -> None:
            random_delay(rng)
            action(*args)
            random_delay(rng)

        return act

    for name in ("put", "signal", "wait"):
        setattr(transport, name, slowed(getattr(transport, name)))
    return pair


def random_delay(rng: random.Random) -> None:
    if rng.random() < 0.3:
        time.sleep(rng.random() * 2e-3)


def group_of_all() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def device_here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# --- how a check is run ----------------------------------------------------------------------------------------------


def input_of_rank(rank: int, call: int, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a rank gives to a call: whole numbers that every dtype holds, and that no other rank or call has there."""
    numbers = torch.arange(numel, device=device) * 7 + rank * 13 + call * 29
    return (numbers % 101).to(dtype)


def run_all_gather(
    pair: CollectivePair, call: int, numel: int, dtype: torch.dtype, async_op: bool = False
) -> tuple[Tensor, Any]:
    """As `fully_shard` does it: the input is the own slot of the output."""
    output = pair.all_gather.allocate((pair.size * numel,), dtype=dtype, device=pair.device)
    own = output.narrow(0, pair.rank * numel, numel)
    own.copy_(input_of_rank(pair.rank, call, numel, dtype, pair.device))
    return output, pair.all_gather(output, own, pair.group, async_op=async_op)


def expected_all_gather(pair: CollectivePair, call: int, numel: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([input_of_rank(rank, call, numel, dtype, pair.device) for rank in range(pair.size)])


def run_reduce_scatter(pair: CollectivePair, whole: Tensor, async_op: bool = False) -> tuple[Tensor, Any]:
    source = pair.reduce_scatter.allocate((whole.numel(),), dtype=whole.dtype, device=pair.device)
    source.copy_(whole)
    shape = (whole.numel() // pair.size,)
    output = pair.reduce_scatter.allocate(shape, dtype=whole.dtype, device=pair.device)
    work = pair.reduce_scatter(output, source, pair.group, dist.ReduceOp.SUM, async_op=async_op)
    return output, (work, source)


def expected_sum(pair: CollectivePair, call: int, numel: int, dtype: torch.dtype) -> Tensor:
    """This rank's chunk of the sum. The numbers are whole and small, so that it is exact in every dtype but bfloat16,
    in which the sum of 2 or 4 ranks may be rounded."""
    parts = [input_of_rank(rank, call, pair.size * numel, dtype, pair.device).double() for rank in range(pair.size)]
    return torch.stack(parts).sum(0).narrow(0, pair.rank * numel, numel)


def assert_equal(found: Tensor, expected: Tensor, what: str) -> None:
    tolerance = 2.0**-7 if found.dtype == torch.bfloat16 and expected.dtype != found.dtype else 0.0
    worst = (found.double() - expected.double()).abs() - tolerance * expected.double().abs()
    assert float(worst.max()) <= 0, f"{what}: {int((worst > 0).sum())} of {found.numel()} numbers are wrong"


# --- checks -----------------------------------------------------------------------------------------------------------


def values(pair: CollectivePair) -> None:
    """Every dtype, in sizes that divide by nothing; an input that is the own slot, and one that is not."""
    for call, numel in enumerate(SIZES):
        for dtype in GATHER_DTYPES:
            output, _ = run_all_gather(pair, call, numel, dtype)
            assert_equal(output, expected_all_gather(pair, call, numel, dtype), f"all-gather of {numel} {dtype}")
            del output
        elsewhere = input_of_rank(pair.rank, call, numel, torch.float32, pair.device)
        output = pair.all_gather.allocate((pair.size * numel,), dtype=torch.float32, device=pair.device)
        pair.all_gather(output, elsewhere, pair.group)
        assert_equal(
            output, expected_all_gather(pair, call, numel, torch.float32), f"all-gather of {numel} from elsewhere"
        )
        del output
        for dtype in SUM_DTYPES:
            whole = input_of_rank(pair.rank, call, pair.size * numel, dtype, pair.device)
            found, _ = run_reduce_scatter(pair, whole)
            assert_equal(found, expected_sum(pair, call, numel, dtype), f"sum of {numel} {dtype}")


def sums_of_fractions(pair: CollectivePair) -> None:
    """Within the rounding of the dtype's additions, and no average."""
    for dtype, unit in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53), (torch.bfloat16, 2.0**-8)):
        whole = [
            torch.randn(pair.size * 1000, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
            .to(dtype)
            .to(pair.device)
            for rank in range(pair.size)
        ]
        found, _ = run_reduce_scatter(pair, whole[pair.rank])
        table = torch.stack([each.double() for each in whole]).narrow(1, pair.rank * 1000, 1000)
        off = (found.double() - table.sum(0)).abs() / table.abs().sum(0)
        assert float(off.max()) <= pair.size * unit, f"{dtype}: off by {float(off.max()):.1e} of the terms"


def uneven_sizes(pair: CollectivePair) -> None:
    """Calls that grow and shrink, of both kinds in turn, by ranks that come late."""
    rng = random.Random(pair.rank)
    for call, numel in enumerate((8191, 3, 500, 1, 8000, 2)):
        random_delay(rng)
        output, _ = run_all_gather(pair, call, numel, torch.float32)
        assert_equal(output, expected_all_gather(pair, call, numel, torch.float32), f"all-gather {call}")
        del output
        random_delay(rng)
        found, _ = run_reduce_scatter(
            pair, input_of_rank(pair.rank, call, pair.size * numel, torch.float32, pair.device)
        )
        assert_equal(found, expected_sum(pair, call, numel, torch.float32), f"sum {call}")


def overlapping_calls(pair: CollectivePair) -> None:
    """Two all-gathers and a sum at once, waited for in another order than they were made."""
    for call in range(0, 30, 3):
        first, first_work = run_all_gather(pair, call, 500, torch.float32, async_op=True)
        second, second_work = run_all_gather(pair, call + 1, 700, torch.bfloat16, async_op=True)
        whole = input_of_rank(pair.rank, call + 2, pair.size * 300, torch.float32, pair.device)
        found, (sum_work, _) = run_reduce_scatter(pair, whole, async_op=True)
        if sum_work is not None:  # torch's own reduce-scatter over gloo may have none
            sum_work.wait()
        assert_equal(found, expected_sum(pair, call + 2, 300, torch.float32), f"sum {call + 2} beside all-gathers")
        second_work.wait()
        assert_equal(second, expected_all_gather(pair, call + 1, 700, torch.bfloat16), f"all-gather {call + 1}")
        first_work.wait()
        assert_equal(first, expected_all_gather(pair, call, 500, torch.float32), f"all-gather {call}")
        del first, second


def buffer_reuse(pair: CollectivePair) -> None:
    """As in a forward pass: the output of one call is read while the next is on its way, by one rank slowly. Then sum
    after sum, with nothing between that would bring the ranks together."""
    previous: Tensor | None = None
    for call in range(30):
        output, work = run_all_gather(pair, call, 400, torch.float32, async_op=True)
        if previous is not None:
            if call % pair.size == pair.rank:
                time.sleep(5e-3)
            assert_equal(
                previous, expected_all_gather(pair, call - 1, 400, torch.float32), f"all-gather {call - 1}, read late"
            )
        previous = None
        work.wait()
        previous = output
    for call in range(30):
        found, _ = run_reduce_scatter(pair, input_of_rank(pair.rank, call, pair.size * 400, torch.float32, pair.device))
        assert_equal(found, expected_sum(pair, call, 400, torch.float32), f"sum {call}")


def errors(pair: CollectivePair) -> None:
    """What cannot be is refused on the spot, and harms no later call."""
    numel = 100
    output = pair.all_gather.allocate((pair.size * numel,), dtype=torch.float32, device=pair.device)
    too_long = torch.zeros(numel + 1, device=pair.device)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        pair.all_gather(output, too_long, pair.group)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        pair.all_gather(output, torch.zeros(numel, dtype=torch.float64, device=pair.device), pair.group)
    del output
    whole = torch.zeros(pair.size * numel, device=pair.device)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        pair.reduce_scatter(torch.zeros(numel - 1, device=pair.device), whole, pair.group, dist.ReduceOp.SUM)
    values(pair)


CHECKS = (values, sums_of_fractions, uneven_sizes, overlapping_calls, buffer_reuse, errors)


def run_checks(make: Make, *checks: Callable[[CollectivePair], None]) -> list[str]:
    """Run the checks of a candidate on this rank, and take it down; the names of those that passed."""
    pair = make()
    for check in checks:
        check(pair)
        dist.barrier()
    pair.close()
    return [check.__name__ for check in checks]


def run_twice(make: Make) -> list[str]:
    """Teardown: when one pair is gone, another can be made and works; nothing of the first is left on the machine."""
    before = leftover_shared_memory()
    for _ in range(2):
        run_checks(make, uneven_sizes)
        dist.barrier()
    return sorted(leftover_shared_memory() - before)


def leftover_shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("quadriga-slots-*")}


def main(backend: str) -> int:
    """Run the checks on the ranks that torchrun has started."""
    from quadriga.comm import process_group
    from quadriga.config.schema import Comm

    register_test_backend()
    process_group.start(Comm(), backend)
    candidates: dict[str, Make] = {"nvshmem": nvshmem, "host-slots": host_slots, "nccl-symm": nccl_symm}
    pair = candidates.get(backend, torch_collectives)()
    failed = 0
    for check in CHECKS:
        try:
            check(pair)
            verdict = "passed"
        except (AssertionError, RuntimeError, ValueError) as error:
            failed, verdict = 1, f"FAILED: {error}"
        print(f"rank {pair.rank} of {pair.size}, {backend}: {check.__name__}: {verdict}", flush=True)
        if failed:
            return 1  # the others are ended by torchrun
    with suppress(RuntimeError):
        pair.close()
    process_group.stop()
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (2, 1)]
    sys.exit(main(sys.argv[1]))
