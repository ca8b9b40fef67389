"""What is read from where: precedence, `extends`, the forms of the command line, older names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quadriga.config import JobConfig
from quadriga.config.keys import KEYS, parse_value
from quadriga.config.load import load


def notices_of(run):
    return "\n".join(run.spec.notices)


def test_nothing_at_all_trains_the_debug_model_on_built_in_text(read_config):
    run = read_config()
    assert run.config == JobConfig()
    assert run.spec.tokenizer.kind == "bytes"
    assert run.origin == {}


LAYERS = ("default", "base", "file", "environment", "command line")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=32)
@given(layers=st.sets(st.sampled_from(LAYERS[1:])))
def test_the_strongest_source_wins(layers, write, read_config):
    """`comm.backend` is the one key that every kind of source may say."""
    names = {"base": "gloo", "file": "nccl", "environment": "gloo", "command line": "nccl"}
    write('[comm]\nbackend = "gloo"' if "base" in layers else "", "base.toml")
    own = '[comm]\nbackend = "nccl"' if "file" in layers else ""
    file = write(f'extends = "base.toml"\n{own}')
    environ = {"COMM_BACKEND": "gloo"} if "environment" in layers else {}
    arguments = ["--comm.backend", "nccl"] if "command line" in layers else []
    run = read_config(file, *arguments, environ=environ)
    strongest = max(layers, key=LAYERS.index, default="default")
    assert run.config.comm.backend == names.get(strongest)
    sources = {
        "base": "base.toml, line 2",
        "file": "run.toml, line 3",
        "environment": "COMM_BACKEND",
        "command line": "command line",
    }
    assert run.origin.get("comm.backend") == sources.get(strongest)


def test_an_empty_variable_says_nothing(read_config):
    assert read_config(environ={"COMM_BACKEND": ""}).config.comm.backend is None


def test_a_base_is_relative_to_the_file_that_names_it(write, read_config):
    write("[training]\nsteps = 7\nseq_len = 64", "base/root.toml")
    write('extends = "../base/root.toml"\n[training]\nseq_len = 128', "middle/middle.toml")
    run = read_config(write('extends = "middle/middle.toml"\n[optimizer]\nlr = 1e-3'))
    assert (run.config.training.steps, run.config.training.seq_len, run.config.optimizer.lr) == (7, 128, 1e-3)
    assert run.origin["training.steps"] == "middle/../base/root.toml, line 2"


def test_files_that_extend_one_another_in_a_circle_are_refused(write, refusal):
    write('extends = "run.toml"', "other.toml")
    (problem,) = refusal(write('extends = "other.toml"'))
    assert problem.where == "extends"
    assert "in a circle" in problem.what
    assert problem.source == "other.toml, line 1"


def test_a_missing_base_is_named_with_the_line_that_wants_it(write, refusal):
    (problem,) = refusal(write('\nextends = "bass.toml"'))
    assert (problem.where, problem.value, problem.source) == ("extends", "bass.toml", "run.toml, line 2")


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--training.steps", "20"], "training.steps", 20),
        (["--training.steps=20"], "training.steps", 20),
        (["--training.steps", "1_000"], "training.steps", 1000),
        (["--training.global-batch-size", "-1"], "training.global_batch_size", -1),
        (["--optimizer.lr", "3e-4"], "optimizer.lr", 3e-4),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--metrics.enable_tensorboard"], "metrics.enable_tensorboard", True),
        (["--metrics.enable_tensorboard", "true"], "metrics.enable_tensorboard", True),
        (["--metrics.enable_tensorboard", "False"], "metrics.enable_tensorboard", False),
        (["--metrics.enable_tensorboard=false"], "metrics.enable_tensorboard", False),
        (["--metrics.no_enable_tensorboard"], "metrics.enable_tensorboard", False),
        (["--metrics.no-enable-tensorboard"], "metrics.enable_tensorboard", False),
        (["--model.no_tie_embeddings"], "model.tie_embeddings", False),
        (["--compile.components", "model"], "compile.components", ("model",)),
        (["--compile.components", "model, loss"], "compile.components", ("model", "loss")),
        (["--compile.components", "['loss']"], "compile.components", ("loss",)),
        (["--compile.components", '["loss"]'], "compile.components", ("loss",)),
        (["--compile.components", ""], "compile.components", ()),
        (["--quantize.grouped_mm.mx.fqns=a,b"], "quantize.grouped_mm.mx.fqns", ("a", "b")),
        (
            ["--parallelism.module_fqns_per_model_part", '[["tok_embeddings"], ["output"]]'],
            "parallelism.module_fqns_per_model_part",
            (("tok_embeddings",), ("output",)),
        ),
        (["--lr_scheduler.decay_ratio", "0.5"], "lr_scheduler.decay_ratio", 0.5),
        (["--lr_scheduler.decay_ratio", "none"], "lr_scheduler.decay_ratio", None),
        (["--job.description", "two words, and a comma"], "job.description", "two words, and a comma"),
        (["--job.description=a=b"], "job.description", "a=b"),
        (["--job.description", ""], "job.description", ""),
        (["--training.steps", "5", "--training.steps", "6"], "training.steps", 6),
    ],
)
def test_the_forms_of_the_command_line(arguments, key, value):
    loaded = load(arguments, {})
    assert not loaded.problems
    found = loaded.config
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    assert loaded.origin[key] == "command line"


@pytest.mark.parametrize("off", ['"none"', '"None"', '""'])
def test_an_optional_key_is_switched_off_by_a_value(off, write, read_config):
    text = f"""
        [parallelism]
        context_parallel_load_balancer = {off}
        [job]
        save_config_file = {off}
        description = "none"
    """
    run = read_config(write(text))
    assert run.config.parallelism.context_parallel_load_balancer is None
    assert run.config.job.save_config_file is None
    assert run.config.job.description == "none"  # a plain text keeps its value


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("[training]\nseed = 7", "debug.seed", 7),
        ("[training]\ndeterministic = true", "debug.deterministic", True),
        ("[training]\ncompile = true", "compile.enable", True),
        ("[training]\nbatch_size = 3", "training.local_batch_size", 3),
        ("[lr_scheduler]\nlr_min = 0.1", "lr_scheduler.min_lr_factor", 0.1),
        ("[checkpoint]\nenable_checkpoint = true", "checkpoint.enable", True),
        ("[checkpoint]\ninitial_load_model_weights_only = false", "checkpoint.initial_load_model_only", False),
        ("[checkpoint]\nlast_save_model_weights_only = true", "checkpoint.last_save_model_only", True),
        ("[float8]\nemulate = true", "quantize.linear.float8.emulate", True),
        ('[mx]\nfilter_fqns = ["a"]', "quantize.linear.mx.filter_fqns", ("a",)),
        (
            '[parallelism]\ncontext_parallel_rotate_method = "alltoall"',
            "parallelism.context_parallel_method",
            "ring",
        ),
        (
            '[parallelism]\ncontext_parallel_rotate_method = "allgather"',
            "parallelism.context_parallel_method",
            "allgather",
        ),
    ],
)
def test_a_renamed_key_is_honoured_with_a_notice(old, new, value, write, read_config):
    run = read_config(write(old))
    found = run.config
    for name in new.split("."):
        found = getattr(found, name)
    assert found == value
    assert f"[run.toml, line 2] is now {new}" in notices_of(run)


def test_a_renamed_key_is_honoured_on_the_command_line(read_config):
    run = read_config("--training.seed", "5", "--parallelism.context_parallel_rotate_method", "alltoall")
    assert run.spec.seed == 5
    assert run.config.parallelism.context_parallel_method == "ring"


def test_old_and_new_name_that_agree_pass(write, read_config):
    assert read_config(write("[training]\nseed = 2\n[debug]\nseed = 2")).spec.seed == 2


def test_an_old_name_in_a_base_gives_way_to_the_new_one(write, read_config):
    write("[training]\nseed = 1", "base.toml")
    assert read_config(write('extends = "base.toml"\n[debug]\nseed = 2')).spec.seed == 2


def test_keys_that_went_away_without_effect_pass_with_a_notice(write, read_config):
    text = """
        [job]
        print_args = true
        use_for_integration_test = true
        [float8]
        force_recompute_fp8_weight_in_bwd = true
        [parallelism]
        pipeline_parallel_split_points = []
        enable_compiled_autograd = false
    """
    notices = notices_of(read_config(write(text)))
    for key in ("print_args", "use_for_integration_test", "force_recompute", "split_points", "compiled_autograd"):
        assert key in notices


def test_the_names_of_test_assets_mean_what_is_built_in(write, read_config):
    text = """
        [model]
        hf_assets_path = "./tests/assets/tokenizer"
        [training]
        dataset = "c4_test"
        [validation]
        enable = true
        dataset = "c4_test"
        steps = 2
    """
    run = read_config(write(text))
    assert run.config.model.hf_assets_path == "builtin:bytes"
    assert run.config.training.dataset == "builtin"
    assert run.config.validation.dataset == "builtin_validation"
    notices = notices_of(run)
    assert notices.count("is read as") == 3
    here = f"(relative to {json.dumps(str(Path.cwd()))}): start in torchtitan's folder, or "
    no_test_set = f"because tests/assets/c4_test does not exist {here}set"
    assert f'is read as "builtin", {no_test_set} training.dataset_path' in notices
    assert f'"builtin_validation", {no_test_set} validation.dataset_path' in notices
    assert f'is read as "builtin:bytes", because no tokenizer exists there {here}name another folder' in notices


def test_c4_test_with_a_path_is_read_from_there(write, read_config):
    write('{"text": "one"}', "data/data.json")
    run = read_config(write('[training]\ndataset = "c4_test"\ndataset_path = "data"'))
    assert run.config.training.dataset == "jsonl"


def test_c4_test_is_read_from_its_own_place_where_it_is_there(write, read_config):
    """Relative to the folder that the run is started from, as there; training and validation alike."""
    write('{"text": "one"}', "tests/assets/c4_test/data.json")
    run = read_config(write('[training]\ndataset = "C4_test"\n[validation]\nenable = true\ndataset = "c4_test"'))
    assert (run.config.training.dataset, run.config.training.dataset_path) == ("jsonl", "tests/assets/c4_test")
    assert (run.config.validation.dataset, run.config.validation.dataset_path) == ("jsonl", "tests/assets/c4_test")
    assert notices_of(run).count('"jsonl" in tests/assets/c4_test') == 2


def test_c4_test_may_hold_parquet(write, read_config):
    write("PAR1", "data/data.parquet")
    run = read_config(write('[training]\ndataset = "c4_test"\ndataset_path = "data"'))
    assert run.config.training.dataset == "parquet"


def test_order_and_overlap_from_the_command_line(read_config, refusal):
    given = read_config("--training.dataloader.no_shuffle", "--training.dataloader.window_overlap=0")
    assert (given.config.training.dataloader.shuffle, given.config.training.dataloader.window_overlap) == (False, 0)
    (problem,) = refusal("--training.dataloader.window_overlap=2")
    assert problem.where == "training.dataloader.window_overlap"
    assert problem.allowed == "0 (torchtitan's windows) or 1 (each token is a label once)"


TABLE = "in [training.dataloader]"
ORDER = (
    "training.dataloader.shuffle is true and training.dataloader.window_overlap 1: documents are shuffled, and each "
    f"token is a label once; for torchtitan's batches, set shuffle = false and window_overlap = 0 {TABLE}"
)
WINDOWS = (
    "training.dataloader.window_overlap is 1: windows share a token, so that each token is a label once; for "
    f"torchtitan's batches, set window_overlap = 0 {TABLE}"
)


@pytest.mark.parametrize(
    ("dataset", "more", "expected"),
    [
        ("c4", "", [ORDER]),
        ("c4_test", "", []),  # nothing is there, so that the built-in corpus is read
        ("builtin", "", []),
        ("c4", "[training.dataloader]\nshuffle = true", []),
        ("c4", "[training.dataloader]\nshuffle = false", [WINDOWS]),
        ("c4", "[training.dataloader]\nshuffle = false\nwindow_overlap = 1", []),
        ("c4", "[training.dataloader]\nshuffle = false\nwindow_overlap = 0", []),
        ("builtin", "[training.dataloader]\nshuffle = false", []),
    ],
)
def test_one_line_notes_other_batches_where_a_file_may_expect_torchtitans(write, read_config, dataset, more, expected):
    run = read_config(write(f'[training]\ndataset = "{dataset}"\n{more}'))
    assert [notice for notice in run.spec.notices if TABLE in notice] == expected


def test_tokenizer_path_is_honoured(write, read_config):
    write('{"model": {"vocab": {"a": 0, "b": 1}}}', "tok/tokenizer.json")
    run = read_config(write('[model]\ntokenizer_path = "tok"'))
    assert (run.spec.tokenizer.kind, run.spec.tokenizer.vocab_size) == ("huggingface", 2)


def test_features_that_are_off_leave_their_tables_alone(write, read_config):
    """What stands in the table of a feature that is switched off has no effect, and is no reason to refuse."""
    text = """
        [quantize.linear.float8]
        enable_fsdp_float8_all_gather = true
        recipe_name = "rowwise"
        [validation]
        enable = false
        dataset = "nothing"
        [fault_tolerance]
        enable = false
        semi_sync_method = "diloco"
        [checkpoint]
        enable = false
        async_mode = "async"
        keep_latest_k = 1
        last_save_in_hf = true
        [parallelism]
        pipeline_parallel_schedule = "ZBVZeroBubble"
        context_parallel_load_balancer = "ptrr"
        [profiling]
        profile_freq = 1
        [memory_estimation]
    """
    assert read_config(write(text)).spec.world_size == 1


def test_a_config_file_is_named_outside_of_itself(write, read_config):
    run = read_config(write('[job]\nconfig_file = "another.toml"'))
    assert run.config.job.config_file == "run.toml"
    assert "job.config_file" in notices_of(run)


def test_lines_are_found_behind_long_texts_and_arrays(write, refusal):
    text = ["[job]", 'description = """', "[training]", "steps = 0", '"""']
    text += ["[compile]", "components = [", '  "model",', "]", "[training]", "steps = 0"]
    (problem,) = refusal(write("\n".join(text)))
    assert problem.source == "run.toml, line 11"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("training.steps", text) for text in ("\u0663", "+5", "5\n")),
        *(("optimizer.lr", text) for text in ("1__0.5", "\u0663.\u0665")),
        ("model.converters", '["a"]\nfoo=2'),
    ],
)
def test_a_text_that_is_not_exactly_a_value_stays_a_text(key, text):
    assert parse_value(KEYS[key], text) == text


@pytest.mark.parametrize("text", ["7", "-1", "1e-3", ".5", "2.", "inf", "-1.5E+3"])
def test_numbers_of_the_command_line_are_read(text):
    assert parse_value(KEYS["optimizer.lr"], text) == float(text)
