"""One training run on any data-parallel layout: the losses of the debug configuration agree.

The quick test cuts sequences to 32 tokens and the model to 2 of its 6 layers, and leaves all else as it is: width,
heads, batch, accumulation, clipping, schedule.
"""

from __future__ import annotations

import pytest
from training import TINY, largest_difference, train

from quadriga.metrics.jsonl import read_metrics

LAYOUTS = {
    "FSDP 2": (2, ()),
    "FSDP 4": (4, ()),
    "HSDP 2x2": (4, ("--parallelism.data_parallel_replicate_degree=2",)),
    "DDP 4": (4, ("--parallelism.data_parallel_replicate_degree=4", "--parallelism.data_parallel_shard_degree=1")),
}
DEBUG = ("--metrics.log_freq=1", "--metrics.no_enable_tensorboard", "--profiling.no_enable_profiling")
DEBUG += ("--checkpoint.no_enable",)


SHORT = (*DEBUG, "--training.steps=20", "--training.seq_len=32", "--model.n_layers=2")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), 1, *SHORT)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "FSDP 4" else pytest.mark.slow) for name in LAYOUTS]
)
def test_losses_of_twenty_short_steps_agree(name, one_rank, tmp_path):
    ranks, arguments = LAYOUTS[name]
    records = train(tmp_path, ranks, *SHORT, *arguments)
    assert len(records) == 20
    # Far within the promised 1e-6: gradients are summed in float64, so that the weights are the same to the bit.
    assert largest_difference(records, one_rank, "loss") <= 1e-12
    assert largest_difference(records, one_rank, "grad_norm") == 0


def test_a_validation_is_that_of_one_rank(tmp_path):
    """The default is 64 windows on any layout: with torchtitan's `steps`, 32 batches of a row of each of two ranks."""
    validation = ("--validation.enable", "--validation.dataset=builtin_validation", "--validation.seq_len=64")
    found = []
    for ranks, steps in ((1, ()), (2, ("--validation.steps=32",))):
        folder = tmp_path / str(ranks)
        train(folder, ranks, *TINY, *validation, *steps, "--training.steps=1", "--checkpoint.no_enable")
        found += read_metrics(folder / "metrics.jsonl", kind="validation")
    one, two = found
    assert one["tokens"] == two["tokens"] == 64 * 64
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)


@pytest.mark.slow
def test_losses_of_the_whole_debug_run_agree(tmp_path):
    """Its 200 steps on every layout: within 1e-6 over the first 20 and within 1e-5 over all."""
    reference = train(tmp_path / "one", 1, *DEBUG, timeout=1800)
    assert len(reference) == 200
    for name, (ranks, arguments) in LAYOUTS.items():
        records = train(tmp_path / name, ranks, *DEBUG, *arguments, timeout=1800)
        assert largest_difference(records[:20], reference[:20], "loss") <= 1e-6, name
        assert largest_difference(records, reference, "loss") <= 1e-5, name
