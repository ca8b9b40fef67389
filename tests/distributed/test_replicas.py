"""Copies of the weights that drift apart by one bit are found, and named as far as they can be; equal ones raise no
alarm."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fault_injection import InjectedFault, flip_lowest_bit, inject
from pipelines import make_state, read_run
from ranks import run_ranks
from training import DEBUG_FILE, TINY, one_rank, train

from quadriga.comm.mesh import build_mesh
from quadriga.errors import Fault
from quadriga.metrics.events import read_events
from quadriga.resilience.replica_checks import BLOCK, ReplicaCheck, hashes_of

REPLICATE = "--parallelism.data_parallel_replicate_degree="
DDP = ("--parallelism.data_parallel_shard_degree=1",)
BATCH = ("--training.local_batch_size=2",)
WEIGHT = "layers.1.attention.wq.weight"


def hash_of(*tensors: torch.Tensor) -> list[int]:
    return hashes_of(tensors).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_any_bit_and_the_order_count(dtype):
    whole = torch.randn(7, 3).to(dtype)
    bits = whole.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
    found = {hash_of(whole)[0]}  # all are different, not only from the first
    for place in range(21):
        for bit in range(8 * whole.element_size()):
            changed = bits.clone()
            number = torch.tensor(1).to(bits.dtype) << bit
            changed.view(-1)[place] ^= number
            found.add(hash_of(changed.view(dtype))[0])
    assert len(found) == 1 + 21 * 8 * whole.element_size()
    assert hash_of(whole.flip(0)) != hash_of(whole)
    assert hash_of(whole, whole.clone()) == hash_of(whole) * 2


def test_long_shards_are_hashed_block_by_block():
    whole = torch.zeros(2 * BLOCK + 5)
    hashes = {hash_of(whole)[0]}
    for place in (0, BLOCK - 1, BLOCK, 2 * BLOCK, 2 * BLOCK + 4):
        changed = whole.clone()
        flip_lowest_bit(changed, place)
        hashes.add(hash_of(changed)[0])
    assert len(hashes) == 6


def compared(arguments: tuple[str, ...], flipped: dict[int, int]) -> list[str]:
    """What this rank says of the weights as they are made, and after the ranks of `flipped` changed a bit each."""
    run = read_run((*BATCH, *arguments), dist.get_world_size())
    mesh = build_mesh(run.spec.degrees, "cpu")
    state = make_state(run, mesh)
    check = ReplicaCheck(1, state.parts, mesh)
    messages = []
    for _ in range(2):
        try:
            check.compare(7)
            messages.append("")
        except Fault as fault:
            messages.append(str(fault))
        if dist.get_rank() in flipped:
            flip_lowest_bit(
                dict(pair for part in state.parts for pair in part.named_parameters())[WEIGHT], flipped[dist.get_rank()]
            )
    return messages


def test_one_of_two_copies_is_found_but_not_blamed():
    """HSDP 2x2: ranks 1 and 3 hold the second half each."""
    for before, after in run_ranks(compared, 4, (REPLICATE + "2",), {3: 5}):
        assert before == ""
        assert after.startswith("step 7: copies of the weights differ, but must be equal to the bit: " + WEIGHT + "\n")
        assert "between ranks 1, 3: there are too few copies to find the wrong one" in after
        assert "--checkpoint.load_step" in after


def test_one_of_four_copies_is_blamed():
    for before, after in run_ranks(compared, 4, (REPLICATE + "4", *DDP), {2: 0}):
        assert before == ""
        assert "rank 2 (replica 2) has other weights than most replicas" in after
        assert "between ranks" not in after


def rank_with_faults(argv: list[str], injected: InjectedFault) -> tuple[int, str]:
    inject(injected)
    try:
        return one_rank(argv), ""
    except Fault as fault:
        return fault.exit_code, str(fault)


def test_twenty_steps_without_a_false_alarm_and_a_flipped_bit_that_ends_the_run(tmp_path):
    keys = (REPLICATE + "2", *DDP, "--checkpoint.no_enable", "--health.replica_check_interval=4")
    records = train(tmp_path / "good", 2, *TINY, *keys, "--training.steps=20")
    assert len(records) == 20
    argv = ["--job.config_file", DEBUG_FILE, "--job.dump_folder", str(tmp_path / "bad"), *TINY, *keys]
    injected = InjectedFault(5, rank=1, flip_bit_of=WEIGHT)
    ended = run_ranks(rank_with_faults, 2, [*argv, "--training.steps=20"], injected, timeout=120, backend=None)
    assert [code for code, _ in ended] == [1, 1]
    assert all("step 8: copies of the weights differ" in message for _, message in ended)
    faults = [event for event in read_events(tmp_path / "bad") if event["event"] == "fault"]
    assert [(event["rank"], event["step"]) for event in faults] == [(0, 8)]
