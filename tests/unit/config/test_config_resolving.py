"""What follows from a configuration: degrees, batch arithmetic, when gradients are reduced, folders, notices."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quadriga.errors import UserError
from quadriga.models.registry import hf_config, tensor_names


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(
    replicate=st.integers(1, 4),
    shard=st.integers(1, 4),
    local=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    resolved=st.booleans(),
)
def test_the_batch_is_what_its_factors_say(replicate, shard, local, accumulation, resolved, read_config):
    ranks = replicate * shard
    total = ranks * local * accumulation
    run = read_config(
        f"--parallelism.data_parallel_replicate_degree={replicate}",
        f"--parallelism.data_parallel_shard_degree={-1 if resolved else shard}",
        f"--training.local_batch_size={local}",
        f"--training.global_batch_size={-1 if accumulation == 1 and resolved else total}",
        ranks=ranks,
    )
    spec = run.spec
    assert spec.degrees.world_size == spec.world_size == ranks
    assert (spec.degrees.dp_replicate, spec.degrees.dp_shard) == (replicate, shard)
    assert spec.global_batch_size == total
    assert spec.accumulation_steps == accumulation
    assert spec.rows_per_rank == local * accumulation


def test_without_a_number_of_ranks_there_are_as_many_as_the_degrees_ask_for(read_config):
    degrees = ["--parallelism.data_parallel_replicate_degree", "2", "--parallelism.tensor_parallel_degree", "4"]
    spec = read_config(*degrees, ranks=None, training=False).spec
    assert (spec.world_size, spec.degrees.dp_shard) == (8, 1)
    spec = read_config(*degrees, "--parallelism.data_parallel_shard_degree", "3", ranks=None, training=False).spec
    assert spec.world_size == 24


def test_single_dimensions_override_the_flavor(read_config):
    spec = read_config(
        *("--model.flavor", "8B", "--model.n_layers", "2", "--model.dim", "128", "--model.n_heads", "4"),
        *("--model.n_kv_heads", "2", "--model.ffn_dim", "96", "--model.vocab_size", "512", "--model.tie_embeddings"),
        *("--model.rope_theta", "10000"),
    ).spec.model
    assert (spec.n_layers, spec.dim, spec.n_heads, spec.n_kv_heads) == (2, 128, 4, 2)
    assert (spec.ffn_dim, spec.vocab_size, spec.tie_embeddings, spec.rope_theta) == (96, 512, True, 10000.0)
    assert spec.flavor == "8B"
    assert spec.rope_scaling is not None


@pytest.mark.parametrize(
    ("arguments", "ranks", "choice"),
    [
        ([], 4, "once"),
        (["--training.global_batch_size", "64"], 4, "once"),
        (["--model.flavor", "8B", "--training.global_batch_size", "64"], 4, "every_micro_batch"),
        (["--model.flavor", "8B", "--training.global_batch_size", "64"], 1, "once"),
        (
            ["--model.flavor", "8B", "--training.global_batch_size", "64", "--parallelism.reduce_gradients", "once"],
            4,
            "once",
        ),
    ],
)
def test_gradients_are_reduced_once_a_step_where_memory_allows(arguments, ranks, choice, read_config):
    spec = read_config(*arguments, ranks=ranks).spec
    assert spec.reduce_gradients == choice
    assert spec.reduce_reason


@pytest.mark.parametrize(
    ("policy", "pp", "frees"),
    [("default", 1, True), ("default", 2, False), ("always", 2, True), ("never", 1, False)],
)
def test_gathered_parameters_are_freed_unless_there_is_a_pipeline(policy, pp, frees, read_config):
    arguments = ["--parallelism.fsdp_reshard_after_forward", policy, "--parallelism.pipeline_parallel_degree", str(pp)]
    assert read_config(*arguments, ranks=pp, training=False).spec.reshard_after_forward is frees


def test_folders_lie_in_the_run_folder(read_config):
    folders = read_config("--job.dump_folder", "out/a", "--checkpoint.folder", "saves").spec.folders
    assert (folders.dump, folders.checkpoint, folders.traces) == ("out/a", "out/a/saves", "out/a/profile_trace")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--training.steps", "10"], "lr_scheduler.warmup_steps = 200 is longer than training.steps = 10"),
        (["--training.steps", "10"], "the warm-up is shortened to 10 steps"),
        (
            ["--training.steps", "10", "--lr_scheduler.variant", "early_decay"],
            "lr_scheduler.warmup_steps = 200 is longer than training.steps = 10: the warm-up is cut off, not rescaled",
        ),
        (
            ["--lr_scheduler.total_steps", "100", "--training.steps", "50"],
            "lr_scheduler.warmup_steps = 200 is longer than lr_scheduler.total_steps = 100: the warm-up is shortened",
        ),
        (
            ["--lr_scheduler.total_steps", "1000", "--training.steps", "50"],
            "lr_scheduler.warmup_steps = 200 is longer than training.steps = 50: the run ends within the warm-up",
        ),
        (["--lr_scheduler.total_steps", "300"], "the rate stays at its last value, 0, from step 301 on"),
        (
            ["--lr_scheduler.total_steps", "300", "--lr_scheduler.min_lr_factor", "0.5"],
            "the rate stays at its last value, 0.0004, from step 301 on",
        ),
        (
            ["--lr_scheduler.total_steps", "300", "--lr_scheduler.decay_ratio", "0"],
            "the rate stays at its last value, 0.0008, from step 301 on",
        ),
        (
            ["--training.steps", "10", "--lr_scheduler.warmup_steps", "5", "--lr_scheduler.decay_ratio", "0.8"],
            "the decay is shortened to 5 steps",
        ),
        (["--profiling.enable_profiling", "--profiling.profile_freq", "20000"], "the last steps are traced"),
        (["--checkpoint.enable"], "checkpoint.last_save_model_only is false by default"),
        (["--training.dtype", "bfloat16"], "small updates are rounded away"),
        (["--training.dtype", "bfloat16", "--optimizer.beta2", "0.997"], 'use optimizer.state_dtype = "float32"'),
        (["--activation_checkpoint.selective_ac_option", "7"], "exceeds the 6 blocks"),
        (["--debug.moe_force_load_balance"], "has no experts"),
        (
            ["--model.converters", "float8", "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"],
            "precompute_float8_dynamic_scale_for_fsdp has no effect",
        ),
        (["--debug.deterministic_warn_only"], "has no effect without debug.deterministic"),
        (["--training.dataloader.persistent_workers"], "workers always run until the run ends"),
        (
            ["--validation.enable", "--validation.dataset", "builtin_validation", "--validation.seq_len", "4096"],
            "validation.seq_len = 4096 is longer than training.seq_len = 2048",
        ),
        ([], "the tokenizer has 258 ids, the model 2,048 rows"),
    ],
)
def test_what_is_worth_a_notice_gets_one(arguments, says, read_config):
    assert says in "\n".join(read_config(*arguments).spec.notices)


@pytest.mark.parametrize("suffix", ["_flex", "_varlen", "_flex_attn", "_varlen_attn"])
def test_flavors_of_torchtitan_that_mask_documents(suffix, read_config):
    run = read_config("--model.flavor", f"debugmodel{suffix}")
    assert (run.spec.model.flavor, run.config.training.document_mask) == ("debugmodel", True)
    assert any(f'"debugmodel{suffix}"' in notice and "is no label" in notice for notice in run.spec.notices)
    run = read_config("--model.flavor", f"debugmodel{suffix}", "--training.document_mask", "false")
    assert not run.config.training.document_mask
    with pytest.raises(UserError, match="nosuch"):
        read_config("--model.flavor", f"nosuch{suffix}")


PP = ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "4"]
CP = ["--parallelism.context_parallel_degree", "2"]
TP = ["--parallelism.tensor_parallel_degree"]


@pytest.mark.parametrize(
    ("arguments", "ranks", "says"),
    [
        ([*TP, "3"], 3, "16 attention heads do not divide over 3 ranks"),
        ([*TP, "3"], 3, "the vocabulary of 2048 does not divide"),
        ([*TP, "4", "--model.n_kv_heads", "2"], 4, "2 key and value heads do not divide over 4 ranks"),
        ([*TP, "2", "--training.seq_len", "255"], 2, "2 equal pieces (tp x cp)"),
        ([*CP, "--training.seq_len", "254"], 2, "4 equal pieces (tp x cp x 2)"),
        ([*CP, "--parallelism.context_parallel_load_balancer", "ptrr"], 2, "balances block masks"),
        (
            ["--parallelism.context_parallel_degree", "32", "--parallelism.context_parallel_method", "ulysses"],
            32,
            "`ulysses` exchanges heads",
        ),
        (["--parallelism.pipeline_parallel_degree", "9"], 9, "9 stages need at least as many layers"),
        ([*PP, "--parallelism.pipeline_parallel_microbatch_size", "3"], 2, "must divide the local batch"),
        ([*PP, "--parallelism.pipeline_parallel_microbatch_size", "4"], 2, "needs at least 2 micro-batches"),
        ([*PP, "--parallelism.pipeline_parallel_layers_per_stage", "2"], 2, "1F1B needs one stage per rank"),
        ([*PP, "--parallelism.pipeline_parallel_layers_per_stage", "3"], 2, "3 stages do not divide over 2 ranks"),
        ([*PP, "--parallelism.module_fqns_per_model_part", '[["a"], ["b"], ["c"]]'], 2, "3 listed stages"),
        (
            [*PP, "--parallelism.pipeline_parallel_schedule", "ZBVZeroBubble", "--compile.enable"],
            2,
            "splits the backward pass",
        ),
        (
            [*PP, "--parallelism.pipeline_parallel_schedule", "Interleaved1F1B", "--training.local_batch_size", "5"],
            2,
            "2 equal rounds",
        ),
        ([*TP, "2", "--parallelism.enable_async_tensor_parallel"], 2, "the compiler creates the overlap"),
        (
            [*TP, "2", "--parallelism.enable_async_tensor_parallel", "--compile.enable", "--compile.backend", "eager"],
            2,
            "inductor creates the overlap",
        ),
        (
            [
                *(*TP, "2", "--parallelism.enable_async_tensor_parallel", "--compile.enable"),
                "--parallelism.no_enable_sequence_parallel",
            ],
            2,
            "collectives of sequence parallelism",
        ),
        (
            [*TP, "2", "--parallelism.enable_async_tensor_parallel", "--compile.enable", "--comm.backend", "gloo"],
            2,
            "choose nccl",
        ),
        (
            ["--model.converters", "float8", "--quantize.linear.float8.emulate", "--compile.enable"],
            1,
            "eager mode only",
        ),
        (
            [
                *("--model.converters", "float8", "--quantize.linear.float8.enable_fsdp_float8_all_gather"),
                *("--quantize.linear.float8.recipe_name", "rowwise"),
            ],
            1,
            "only tensorwise scaling",
        ),
        (
            [
                *("--model.converters", "float8", "--quantize.linear.float8.recipe_name", "rowwise_with_gw_hp"),
                *("--quantize.linear.float8.filter_fqns", "auto_filter_small_kn"),
            ],
            1,
            "no thresholds for this recipe",
        ),
        (["--model.converters", "quantize.linear.float8,quantize.linear.mx"], 1, "convert the same layers"),
    ],
)
def test_a_dry_run_checks_what_training_does_not_support_yet(arguments, ranks, says, refusal):
    assert says in "\n".join(map(str, refusal(*arguments, ranks=ranks, training=False)))


@pytest.mark.parametrize("backend", [(), ("--comm.backend", "gloo")])
def test_float8_is_gathered_over_gloo_by_name_as_by_default(backend, read_config):
    keys = ("--model.converters", "float8", "--quantize.linear.float8.emulate")
    gather = "--quantize.linear.float8.enable_fsdp_float8_all_gather"
    assert read_config(*keys, gather, *backend, ranks=2).config.quantize.linear.float8.enable_fsdp_float8_all_gather


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        (["--model.converters", "quantize.linear.mx"], 1),
        (["--model.converters", "quantize.grouped_mm.float8"], 1),
        (["--fault_tolerance.enable"], 1),
        (["--checkpoint.enable", "--checkpoint.initial_load_in_hf_quantized"], 1),
        (["--optimizer.early_step_in_backward"], 1),
        (["--comm.mode", "local_tensor"], 1),
    ],
)
def test_what_is_not_built_passes_a_dry_run_and_is_refused_in_training(arguments, ranks, read_config, refusal):
    notices = read_config(*arguments, ranks=ranks, training=False).spec.notices
    assert any("training does not support" in notice for notice in notices)
    (problem,) = refusal(*arguments, ranks=ranks)
    assert "training does not support" in problem.what
    assert problem.fix


@pytest.mark.parametrize("keys", [("--comm.mode=fake_backend",), ("--memory_estimation.enable",)])
def test_what_is_only_rehearsed_needs_no_assets(keys, read_config):
    assert read_config(*keys, "--model.hf_assets_path=none/here").config.only_rehearses
    assert not read_config().config.only_rehearses


def test_missing_assets_are_noted_in_a_dry_run(write, read_config):
    text = '[model]\nhf_assets_path = "none/here"\n[training]\ndataset = "text"\ndataset_path = "none.txt"'
    spec = read_config(write(text), training=False).spec
    notices = "\n".join(spec.notices)
    assert "model.hf_assets_path = none/here" in notices
    assert "training.dataset_path = none.txt" in notices
    assert (spec.tokenizer.kind, spec.tokenizer.vocab_size) == ("missing", None)


@pytest.mark.parametrize(("value", "factor"), [("flavor", 8.0), ("none", None), ("llama3.1", 8.0), ("llama3.2", 32.0)])
def test_rotary_scaling_is_a_key(value, factor, write, read_config):
    """Llama 3 before 3.1 has none; its 8B and 70B have the sizes of 3.1's."""
    spec = read_config(write(f'[model]\nflavor = "8B"\nrope_scaling = "{value}"'), training=False).spec.model
    assert (spec.rope_scaling and spec.rope_scaling.factor) == factor
    config = hf_config(spec, bos_id=1, eos_id=2)
    assert config["max_position_embeddings"] == (8192 if factor is None else 131072)
    assert tensor_names(spec).config_differences(config, "config.json") == []
    if factor is None:
        scaled = read_config("--model.flavor=8B", training=False).spec.model
        (problem,) = tensor_names(scaled).config_differences(config, "config.json")
        assert problem.fix == 'set model.rope_scaling = "none"'
