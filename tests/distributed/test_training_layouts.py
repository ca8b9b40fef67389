"""One training run on any data-parallel layout: the losses of the debug configuration agree."""

from __future__ import annotations

import pytest
from training import largest_difference, train

LAYOUTS = {
    "FSDP 2": (2, ()),
    "FSDP 4": (4, ()),
    "HSDP 2x2": (4, ("--parallelism.data_parallel_replicate_degree=2",)),
    "DDP 4": (4, ("--parallelism.data_parallel_replicate_degree=4", "--parallelism.data_parallel_shard_degree=1")),
}
DEBUG = ("--metrics.log_freq=1", "--metrics.no_enable_tensorboard", "--profiling.no_enable_profiling")
DEBUG += ("--checkpoint.no_enable",)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), 1, *DEBUG, "--training.steps=20", timeout=300)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_of_twenty_steps_agree(name, one_rank, tmp_path):
    ranks, arguments = LAYOUTS[name]
    records = train(tmp_path, ranks, *DEBUG, "--training.steps=20", *arguments, timeout=300)
    assert len(records) == 20
    assert largest_difference(records, one_rank, "loss") <= 1e-6


@pytest.mark.slow
def test_losses_of_two_hundred_steps_agree(tmp_path):
    """The whole debug run, on every layout."""
    reference = train(tmp_path / "one", 1, *DEBUG, timeout=900)
    assert len(reference) == 200
    for name, (ranks, arguments) in LAYOUTS.items():
        records = train(tmp_path / name, ranks, *DEBUG, *arguments, timeout=900)
        assert largest_difference(records, reference, "loss") <= 1e-5, name
