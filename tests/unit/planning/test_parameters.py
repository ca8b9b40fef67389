"""Parameters, gradients and moments by rank: those of the built model, number by number, on many layouts."""

from __future__ import annotations

import pytest
from estimating import keys, run_of
from fake_ranks import on_fake_ranks, own, rehearsed_state

from quadriga.config import Run
from quadriga.planning.parameters import Weight, build_stages
from quadriga.planning.setup import Setup

ODD = ("--model.ffn_dim=772", "--model.vocab_size=1031", "--model.n_layers=7")  # nothing divides evenly over shards
TIED = ("--model.tie_embeddings",)
WIDE = ("--model.n_heads=16", "--model.n_kv_heads=8")
LAYOUTS = [
    *((ranks, (), more) for ranks in (1, 2, 3, 4, 5, 8) for more in ((), ODD, TIED)),
    *((4, keys(rep=2), more) for more in ((), ODD, TIED)),
    *((4, keys(rep=4, shard=1), more) for more in ((), TIED)),
    *((ranks, keys(tp=2), more) for ranks in (2, 4, 6) for more in ((), TIED, WIDE)),
    *((8, keys(tp=4), more) for more in ((), TIED)),
    *((4, keys(cp=2), more) for more in ((), ODD)),
    *((8, keys(cp=2, tp=2), more) for more in ((), TIED)),
    *((ranks, keys(pp=2), more) for ranks in (2, 4) for more in ((), ODD)),
    (8, keys(pp=4), ODD),
    (8, keys(pp=2, tp=2), ()),
    (4, keys(pp=2, schedule="Interleaved1F1B"), ()),
    (4, keys(pp=2, schedule="ZBVZeroBubble"), ODD),
    (16, keys(pp=2, tp=2, cp=2), ()),
]


def built(run: Run, rank: int) -> int:
    """Numbers of the parameters that `rank` holds."""
    return sum(own(parameter).numel() for parameter in rehearsed_state(run)[0].parameters())


def stepped(run: Run, rank: int) -> tuple[int, int, int]:
    """The same, of the parameters' gradients before the update, and of both moments after it."""
    state, step = rehearsed_state(run)
    gradients: list[int] = []
    state.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(own(each.grad).numel() for each in state.parameters() if each.grad is not None))
    )
    step()
    moments = [value for values in state.optimizer.state.values() for value in values.values() if value.dim() > 0]
    return (
        sum(own(each).numel() for each in state.parameters()),
        gradients[0],
        sum(own(each).numel() for each in moments),
    )


def predicted(run: Run, rank: int) -> int:
    setup, degrees = Setup(run, "cpu"), run.spec.degrees
    pipeline_rank, shard = rank // (run.spec.world_size // degrees.pp), rank // degrees.tp % setup.shards
    return sum(stage.held(degrees.tp, setup.shards, shard) for stage in setup.stages_of(pipeline_rank))


SAMPLE = {7, 13, 21, 28, 33, 37, 41}


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=() if number in SAMPLE else pytest.mark.slow) for number in range(len(LAYOUTS))],
)
def test_every_rank_holds_what_is_predicted(number: int) -> None:
    ranks, layout, more = LAYOUTS[number]
    run = run_of(*layout, *more, ranks=ranks)
    looked_at = sorted({0, ranks // 2, ranks - 1})
    assert on_fake_ranks(built, run, *looked_at) == [predicted(run, rank) for rank in looked_at]


@pytest.mark.parametrize("number", [8, 33])
def test_gradients_and_moments_are_as_many(number: int) -> None:
    ranks, layout, more = LAYOUTS[number]
    run = run_of(*layout, *more, ranks=ranks)
    own_numbers = predicted(run, ranks - 1)
    assert on_fake_ranks(stepped, run, ranks - 1) == [(own_numbers, own_numbers, 2 * own_numbers)]


def test_there_are_forty_layouts() -> None:
    assert len(LAYOUTS) >= 40


@pytest.mark.parametrize("flavor", ["1B", "3B", "8B", "70B", "405B"])
@pytest.mark.parametrize("degrees", [{}, {"tp": 8}, {"pp": 4, "tp": 2}, {"rep": 2, "cp": 2}])
def test_the_shards_of_every_size_add_up(flavor: str, degrees: dict[str, int]) -> None:
    """All ranks of one copy hold each number once, but for norms, which tensor-parallel ranks share."""
    if flavor in ("1B", "3B") and "pp" in degrees:
        pytest.skip("tied matrices are not cut into stages")
    base = (f"--model.flavor={flavor}", "--model.hf_assets_path=x", "--training.local_batch_size=4")
    run = run_of(*keys(**degrees), ranks=64, base=base)
    setup, tp = Setup(run, "cuda"), run.spec.degrees.tp
    model = run.spec.model
    whole = sum(stage.held(tp, setup.shards, rank) for stage in setup.stages for rank in range(setup.shards))
    norms = (2 * model.n_layers + 1) * model.dim
    assert tp * (whole - norms) + norms == model.n_parameters


def test_tensor_parallelism_cuts_rows_and_columns_where_the_model_says() -> None:
    run = run_of("--model.dim=32", "--model.ffn_dim=96", ranks=1)
    weights = build_stages(run.spec.model, None)[0].block.weights
    cuts = {weight.shape: weight.shard_dim for weight in weights}
    assert cuts[96, 32] == 0, "w1 and w3 are cut along what they make"
    assert cuts[32, 96] == 1, "w2 is cut along what it takes"
    assert cuts[(32,)] is None, "norms are whole"
    assert Weight((32, 96), 1, "w1").local_shape(3) == (32, 32)
