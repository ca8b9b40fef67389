"""The card says what the run is, in words that follow from it: layouts, schedules, sizes, ways out of trouble."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadriga.cli.card import figures_of
from quadriga.config import messages
from quadriga.config.card import CardTarget, read_target, render_card
from quadriga.hardware import find_device

DP_REPLICATE = "--parallelism.data_parallel_replicate_degree"
DP_SHARD = "--parallelism.data_parallel_shard_degree"
EIGHT_B = ("--model.flavor", "8B", "--training.seq_len", "512", "--training.local_batch_size", "2")


@pytest.fixture
def card(read_config):
    def make(*arguments, gpus=4, device=None):
        run = read_config(*arguments, ranks=gpus, training=False)
        known = find_device(device) if device else None
        return render_card(run, CardTarget("some/file.toml", gpus, device), figures_of(run, known), known)

    return make


names = st.text("abcXYZ_-./0123456789 '", min_size=1).filter(lambda text: text == text.strip() and "--" not in text)


@given(file=names, gpus=st.integers(1, 10**6), device=st.none() | names)
def test_the_first_line_names_what_the_card_was_made_for(file, gpus, device):
    target = CardTarget(file, gpus, device)
    assert read_target(f"{target.header}\n# more") == target


@pytest.mark.parametrize("text", ["", "# A card by hand\n", "<!-- quadriga card x.toml -->\n"])
def test_another_page_is_no_card(text):
    assert read_target(text) is None


@pytest.mark.parametrize(
    ("arguments", "gpus", "says"),
    [
        ([], 1, "One GPU reads every row."),
        ([], 4, "FSDP over 4 GPUs: parameters, gradients and optimizer state are sharded, one shard per GPU"),
        ([DP_REPLICATE, "4"], 4, "DDP over 4 GPUs: each holds the whole model"),
        ([DP_REPLICATE, "2"], 4, "HSDP over 2 x 2 GPUs: 2 copies of the model"),
        ([], 4, "just before it needs them and frees them after use"),
        (["--parallelism.fsdp_reshard_after_forward", "never"], 4, "keeps them until the backward pass"),
        (["--parallelism.tensor_parallel_degree", "2"], 4, "Tensor parallelism over 2 GPUs"),
        (["--parallelism.context_parallel_degree", "2"], 4, "Context parallelism over 2 GPUs"),
        (["--parallelism.pipeline_parallel_degree", "2"], 4, "A pipeline over 2 GPUs"),
        (["--parallelism.tensor_parallel_degree", "4"], 4, "All GPUs compute on the same rows."),
        (["--training.global_batch_size", "64"], 4, "x 2 micro-batches = 64 sequences"),
        (["--training.global_batch_size", "64"], 4, "Gradients are reduced once per step"),
    ],
)
def test_the_layout_is_described(arguments, gpus, says, card):
    assert says in card(*arguments, gpus=gpus)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "a linear warm-up of 200 steps to 0.0008, then a linear decay towards 0 over 9,800 steps"),
        (["--lr_scheduler.warmup_steps", "0"], "starts at 0.0008, then a linear decay towards 0 over 10,000 steps"),
        (
            ["--lr_scheduler.decay_ratio", "0.2", "--lr_scheduler.min_lr_factor", "0.1"],
            "to 0.0008, then 7,800 steps at 0.0008, then a linear decay towards 8e-05 over 2,000 steps",
        ),
        (["--lr_scheduler.decay_ratio", "0"], "a linear warm-up of 200 steps to 0.0008, then 9,800 steps at 0.0008"),
        (["--training.steps", "50"], "a linear warm-up of 50 steps to 0.0008"),
        (
            ["--lr_scheduler.decay_type", "cosine", "--lr_scheduler.total_steps", "300"],
            "a cosine decay towards 0 over 100",
        ),
        (
            ["--training.steps", "50", "--lr_scheduler.variant", "early_decay"],
            "a linear warm-up to 0.0008, cut off after 50 of 200 steps",
        ),
        (
            ["--lr_scheduler.variant", "early_decay"],
            "a linear decay towards 0 over 9,800 steps, started one step early",
        ),
    ],
)
def test_the_schedule_is_described(arguments, says, read_config):
    assert says in messages.schedule(read_config(*arguments))


@pytest.mark.parametrize(
    ("option", "says"),
    [("0", "every block is"), ("1", "every block is"), ("007", "one of every 7 blocks is"), ("2", "one of every 2")],
)
def test_recompute_is_described(option, says, read_config):
    run = read_config("--activation_checkpoint.mode=selective", f"--activation_checkpoint.selective_ac_option={option}")
    assert f"selective ({option}): {says}" in messages.recompute(run.config.activation_checkpoint)


def test_state_and_save_are_arithmetic(card):
    text = card(*EIGHT_B, device="H100")
    assert "parameters 7.48 GiB + gradients 7.48 GiB + Adam's moments 14.96 GiB = 29.92 GiB per rank" in text
    assert "one full save would take about 96.4 GB (89.75 GiB)" in text
    assert "14.96 GiB per rank" in card(*EIGHT_B, "--training.dtype", "bfloat16")
    assert "29.92 GiB of host memory per rank" in card(*EIGHT_B, "--training.enable_cpu_offload", device="H100")


def test_every_device_of_the_table_has_its_verdict(card):
    text = card(*EIGHT_B, device="H100")
    assert "| a100-40gb | 39.40 GiB |" in text
    assert "does not fit" in text
    assert re.search(r"\| h200-141gb \| 138.8. GiB \| [0-9.]+ GiB \| fits \|", text)
    assert text.count("no units for this format") == 1, "T4 has no bfloat16"


def test_a_device_gives_a_bound_and_none_is_made_up(card):
    text = card(*EIGHT_B, "--training.mixed_precision_param", "float32", device="H100")
    run_flops = 4096 * 45.4e9
    bound = run_flops / (4 * 67e12)
    assert f"at least {1000 * bound:.0f} ms. This is a bound from arithmetic, not a measurement" in text
    assert "no units for bfloat16" in card(*EIGHT_B, device="T4")
    assert "TFLOP/s" not in card(*EIGHT_B)


def test_ways_out_of_memory_are_those_that_were_not_taken(card):
    plain = card("--training.mixed_precision_param", "float32")
    for way in (
        "local_batch_size 1 --training.global_batch_size 32",
        "mode full",
        "mixed_precision_param bfloat16",
        "offload",
    ):
        assert way in plain
    taken = card(
        *("--training.local_batch_size", "1", "--activation_checkpoint.mode", "full"),
        *("--training.enable_cpu_offload", DP_SHARD, "4"),
    )
    trouble = taken[taken.index("**Out of memory.**") : taken.index("**Communication backend.**")]
    for way in ("local_batch_size", "mode full", "bfloat16", "offload", "more GPUs"):
        assert way not in trouble


def test_several_machines_are_started_one_by_one(card):
    text = card(*EIGHT_B, gpus=64)
    assert "NNODES=8 NODE_RANK=0 RDZV_ENDPOINT=node0:29500 NGPU=8" in text
    assert "torchrun --nnodes=8 --node_rank=0" in text
    assert "NODE_RANK is 0 to 7" in text


def test_what_is_switched_on_is_shown(card):
    text = card(
        *("--metrics.enable_tensorboard", "--metrics.enable_wandb", "--profiling.enable_profiling", "--compile.enable"),
        *("--validation.enable", "--validation.dataset", "builtin_validation", "--checkpoint.enable"),
        *("--checkpoint.interval_minutes", "30", "--activation_checkpoint.mode", "full"),
    )
    for says in (
        "tensorboard --logdir outputs/tb",
        "WANDB_PROJECT names",
        "ui.perfetto.dev",
        "| compile | on (model, loss; inductor) |",
        "validation on `builtin_validation` at step 1 and every 10 steps",
        "on: every 500 steps and every 30 minutes, and at the end",
        "full: every block keeps only its input",
    ):
        assert says in text, says


def test_the_card_does_not_depend_on_where_it_is_made(card, write):
    """Assets that happen to lie here, and the path of the file, are not in it."""
    before = card("--model.hf_assets_path", "tok")
    write('{"model": {"vocab": {"a": 0}}}', "tok/tokenizer.json")
    assert card("--model.hf_assets_path", "tok") == before


def test_moments_in_a_format_of_their_own_are_saved_in_it(read_config):
    narrow = read_config("--optimizer.state_dtype", "bfloat16")
    assert messages.save_bytes(narrow, 1_000_000) == 8e6
    assert "Adam's moments are held in bfloat16" in messages.formats(narrow)
    wide = read_config("--training.dtype", "bfloat16", "--optimizer.state_dtype", "float32")
    assert messages.save_bytes(wide, 1_000_000) == 10e6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "so the file runs on any number of ranks."),
        ([DP_REPLICATE, "2"], "so the file runs on any number of ranks that 2 divides."),
        (["--training.global_batch_size", "64"], "the global batch of 64 allows 1, 2, 4, 8 ranks."),
        ([DP_REPLICATE, "2", "--training.global_batch_size", "64"], "the global batch of 64 allows 2, 4, 8 ranks."),
    ],
)
def test_the_card_says_on_how_many_ranks_the_file_runs(arguments, says, card, read_config):
    assert says in card(*arguments)
    for ranks in (2, 4, 8):
        read_config(*arguments, ranks=ranks)


def test_a_rank_can_be_called_by_another_name(read_config):
    run = read_config(ranks=2)
    assert messages.strategy(run.spec, "rank").startswith("FSDP over 2 ranks: ")
    assert "GPU" not in messages.strategy(run.spec, "rank")
