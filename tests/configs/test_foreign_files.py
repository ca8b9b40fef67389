"""Files written for other trainers in this vocabulary load: the four Llama presets of v0.2.2, and one of v0.1.0's kind.

The values are those of the published presets; each is read in a dry run from a folder that holds none of their assets.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from tokenizer_folders import TOKENIZER, write_folder

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.config.keys import KEYS, format_toml
from quadriga.config.rules import config_value
from quadriga.config.torchtitan import titan_keys
from quadriga.errors import EXIT_OK, UserError
from quadriga.launch.supervisor import main
from quadriga.models.registry import catalogue
from quadriga.optim.schedule import lr_factor

COMMON = """
[job]
dump_folder = "./outputs"
description = "a preset"
print_config = false

[profiling]
enable_profiling = true
save_traces_folder = "profile_trace"
profile_freq = 100
enable_memory_snapshot = false
save_memory_snapshot_folder = "memory_snapshot"

[metrics]
log_freq = 10
disable_color_printing = false
enable_tensorboard = true
save_tb_folder = "tb"
enable_wandb = false

[checkpoint]
enable = false
folder = "checkpoint"
interval = 500
last_save_model_only = true
export_dtype = "float32"
async_mode = "disabled"

[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]

[validation]
enable = false
dataset = "c4_validation"
freq = 500
steps = 1200
"""

PARALLELISM = """
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
fsdp_reshard_after_forward = "default"
pipeline_parallel_degree = 1
context_parallel_degree = 1
"""

PRESETS = {
    "debug_model": f"""
        {COMMON}
        [model]
        name = "llama3"
        flavor = "debugmodel"
        hf_assets_path = "./tests/assets/tokenizer"
        [optimizer]
        name = "AdamW"
        lr = 8e-4
        eps = 1e-8
        [lr_scheduler]
        warmup_steps = 2
        decay_ratio = 0.8
        decay_type = "linear"
        min_lr_factor = 0.0
        [training]
        local_batch_size = 8
        seq_len = 2048
        max_norm = 1.0
        steps = 10
        dataset = "c4_test"
        [training.dataloader]
        num_workers = 0
        [parallelism]
        {PARALLELISM}
        tensor_parallel_degree = 1
        enable_async_tensor_parallel = false
        pipeline_parallel_schedule = "Interleaved1F1B"
        [activation_checkpoint]
        mode = "selective"
        selective_ac_option = "2"
        [compile]
        enable = false
        components = ["model", "loss"]
    """,
    "llama3_8b": f"""
        {COMMON}
        [model]
        name = "llama3"
        flavor = "8B"
        hf_assets_path = "./assets/hf/Llama-3.1-8B"
        [optimizer]
        name = "AdamW"
        lr = 3e-4
        eps = 1e-8
        [lr_scheduler]
        warmup_steps = 200
        [training]
        local_batch_size = 1
        seq_len = 8192
        max_norm = 1.0
        steps = 1000
        dataset = "c4"
        [parallelism]
        {PARALLELISM}
        tensor_parallel_degree = 1
        [activation_checkpoint]
        mode = "selective"
        selective_ac_option = "op"
        [compile]
        enable = false
        components = ["model", "loss"]
    """,
    "llama3_70b": f"""
        {COMMON}
        [model]
        name = "llama3"
        flavor = "70B"
        hf_assets_path = "./assets/hf/Llama-3.1-70B"
        [optimizer]
        name = "AdamW"
        lr = 1.5e-4
        eps = 1e-8
        [lr_scheduler]
        warmup_steps = 200
        [training]
        local_batch_size = 8
        seq_len = 8192
        max_norm = 1.0
        steps = 1000
        dataset = "c4"
        [parallelism]
        {PARALLELISM}
        tensor_parallel_degree = 8
        [activation_checkpoint]
        mode = "full"
        [compile]
        enable = false
        components = ["model", "loss"]
    """,
    "llama3_405b": f"""
        {COMMON}
        [model]
        name = "llama3"
        flavor = "405B"
        hf_assets_path = "./assets/hf/Llama-3.1-405B"
        converters = ["float8"]
        [optimizer]
        name = "AdamW"
        lr = 8e-5
        eps = 1e-8
        [lr_scheduler]
        warmup_steps = 600
        [training]
        local_batch_size = 2
        seq_len = 8192
        max_norm = 1.0
        steps = 3000
        dataset = "c4"
        [parallelism]
        {PARALLELISM}
        tensor_parallel_degree = 8
        enable_async_tensor_parallel = true
        [activation_checkpoint]
        mode = "full"
        [compile]
        enable = true
        components = ["model", "loss"]
    """,
}

V010 = """
[job]
dump_folder = "./outputs"
print_args = false
use_for_integration_test = true
[model]
name = "llama3"
flavor = "8B"
tokenizer_path = "./assets/tokenizer/original/tokenizer.model"
converters = []
[optimizer]
name = "AdamW"
lr = 3e-4
[lr_scheduler]
warmup_steps = 200
lr_min = 0.1
[training]
local_batch_size = 1
seq_len = 8192
steps = 1000
compile = true
dataset = "c4"
seed = 7
deterministic = false
[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
enable_async_tensor_parallel = false
context_parallel_rotate_method = "allgather"
pipeline_parallel_split_points = []
enable_compiled_autograd = false
[checkpoint]
enable_checkpoint = false
last_save_model_weights_only = false
[memory_estimation]
enabled = false
[float8]
enable_fsdp_float8_all_gather = false
force_recompute_fp8_weight_in_bwd = false
filter_fqns = ["output"]
"""


def dry_run(text, tmp_path, monkeypatch, ranks, training=False):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preset.toml").write_text(text)
    argv = ["--job.config_file", "preset.toml"]
    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=training)


@pytest.mark.parametrize(
    ("name", "ranks", "dp", "tp", "tokens"),
    [
        ("debug_model", 8, 8, 1, 8 * 8 * 2048),
        ("llama3_8b", 8, 8, 1, 8 * 8192),
        ("llama3_70b", 256, 32, 8, 32 * 8 * 8192),
        ("llama3_405b", 512, 64, 8, 64 * 2 * 8192),
    ],
)
def test_a_preset_of_v022_loads(name, ranks, dp, tp, tokens, tmp_path, monkeypatch):
    spec = dry_run(PRESETS[name], tmp_path, monkeypatch, ranks).spec
    assert (spec.degrees.dp_shard, spec.degrees.tp, spec.tokens_per_step) == (dp, tp, tokens)


RATES = {  # shares of the peak at some steps, from v0.2.2's own scheduler
    "debug_model": {1: 0.5, 2: 1.0, 3: 1.0, 4: 0.875, 5: 0.75, 9: 0.25, 10: 0.125},
    "llama3_8b": {1: 0.005, 200: 1.0, 201: 1.0, 202: 0.99875, 501: 0.625, 1000: 0.00125},
    "llama3_70b": {1: 0.005, 200: 1.0, 201: 1.0, 202: 0.99875, 501: 0.625, 1000: 0.00125},
    "llama3_405b": {1: 1 / 600, 600: 1.0, 601: 1.0, 602: 0.9995833333333334, 1501: 0.625, 3000: 1 / 2400},
}
RECOMPUTED = {  # of the blocks of one rank
    "debug_model": ("layers.1", "layers.3", "layers.5"),
    **{
        name: tuple(f"layers.{block}" for block in range(blocks))
        for name, blocks in (("llama3_8b", 32), ("llama3_70b", 80), ("llama3_405b", 126))
    },
}
# Defaults of ours that no file says otherwise. A validation's length and batch follow the training.
ALIKE_IN_ALL = {"debug.seed": 42, "profiling.profiler_active": 5}
ALIKE_IN_ALL |= {"validation.seq_len": None, "validation.local_batch_size": None}
READ_AS = {
    "debug_model": {"training.dataset": "builtin", "model.hf_assets_path": "builtin:bytes"},
    "llama3_405b": {"model.converters": ["quantize.linear.float8"]},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_means_what_it_meant(name, tmp_path, monkeypatch):
    """Each key of v0.2.2, of the file or its default, has its value here; and so have the things that follow."""
    run = dry_run(PRESETS[name], tmp_path, monkeypatch, 512)
    there = {key: field.default for key, field in titan_keys().items()} | dict(leaves(tomllib.loads(PRESETS[name])))
    there["job.config_file"] = "preset.toml"
    differing = {}
    for key, value in there.items():
        if key in KEYS:
            here = config_value(run.config, key)
            here = list(here) if isinstance(here, tuple) else here
            if here != value and (here or value):
                differing[key] = here
    assert differing == ALIKE_IN_ALL | READ_AS.get(name, {})
    for step, rate in RATES[name].items():
        assert lr_factor(step, run.config.lr_scheduler, run.spec.steps) == pytest.approx(rate, rel=1e-12)
    recomputes = run.config.activation_checkpoint.recomputes_block
    blocks = tuple(f"layers.{number}" for number in range(run.spec.model.n_layers) if recomputes(number + 1))
    assert blocks == RECOMPUTED[name]
    assert run.spec.reshard_after_forward
    assert (run.spec.accumulation_steps, run.config.training.mixed_precision_param) == (1, "bfloat16")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_dry_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preset.toml").write_text(PRESETS[name])
    (folder,) = re.findall(r'hf_assets_path = "\./(.*)"', PRESETS[name])
    write_folder(tmp_path / folder, TOKENIZER)  # a small one
    assert main([], {"DRY_RUN": "1", "NGPU": "512", "CONFIG_FILE": "preset.toml"}) == EXIT_OK
    shown = capsys.readouterr().out
    assert "Dry run of preset.toml" in shown
    assert "Ready to train." in shown


def test_the_debug_preset_trains_as_it_stands(tmp_path, monkeypatch):
    spec = dry_run(PRESETS["debug_model"], tmp_path, monkeypatch, 4, training=True).spec
    assert spec.tokenizer.kind == "bytes"
    assert sum("is read as" in notice for notice in spec.notices) == 2


def test_the_405b_preset_says_what_its_converter_means(tmp_path, monkeypatch):
    run = dry_run(PRESETS["llama3_405b"], tmp_path, monkeypatch, 512)
    assert run.config.model.converters == ("quantize.linear.float8",)
    assert any('["float8"]' in notice for notice in run.spec.notices)


def test_a_file_of_v010_loads_with_a_notice_for_each_older_key(tmp_path, monkeypatch):
    run = dry_run(V010, tmp_path, monkeypatch, 4)
    assert run.config.compile.enable
    assert run.spec.seed == 7
    assert run.config.lr_scheduler.min_lr_factor == 0.1
    assert run.config.model.hf_assets_path == "./assets/tokenizer/original/tokenizer.model"
    assert run.config.quantize.linear.float8.filter_fqns == ("output",)
    older = ["tokenizer_path", "lr_min", "training.compile", "training.seed", "training.deterministic", "rotate_method"]
    older += ["split_points", "compiled_autograd", "enable_checkpoint", "last_save_model_weights_only", "print_args"]
    older += ["memory_estimation.enabled", "float8.filter_fqns", "force_recompute", "use_for_integration_test"]
    for key in older:
        assert sum(key in notice for notice in run.spec.notices) >= 1, key


def leaves(table, prefix=""):
    for name, value in table.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


def defaults(release):
    return (Path(__file__).parent / f"defaults_{release}.toml").read_text()


@pytest.mark.parametrize(("release", "count"), [("v010", 92), ("v022", 140)])
def test_every_default_of_an_older_release_loads(release, count, tmp_path, monkeypatch):
    """All at once, for training; and each alone, with a profiler and without."""
    text = defaults(release)
    keys = dict(leaves(tomllib.loads(text)))
    assert abs(len(keys) - count) < 10
    spec = dry_run(text, tmp_path, monkeypatch, 4, training=True).spec
    assert spec.tokens_per_step == 4 * 8 * 2048
    for key, value in keys.items():
        table, _, name = key.rpartition(".")
        for more in ("", "[profiling]\nenable_profiling = true\n"):
            if more and table == "profiling":
                continue
            dry_run(f"{more}[{table}]\n{name} = {format_toml(value)}\n", tmp_path, monkeypatch, 1, training=True)


@pytest.mark.parametrize(("value", "kernel"), [("true", "triton"), ("false", "torch")])
def test_the_mx_kernel_of_v010_is_one_of_today(value, kernel, tmp_path, monkeypatch):
    text = f"[mx]\nuse_fp8_dim1_cast_triton_kernel = {value}"
    run = dry_run(text, tmp_path, monkeypatch, 1)
    assert run.config.quantize.linear.mx.mxfp8_dim1_cast_kernel_choice == kernel
    assert any("is now quantize.linear.mx.mxfp8_dim1_cast_kernel_choice" in notice for notice in run.spec.notices)
    argv = [f"--mx.use_fp8_dim1_cast_triton_kernel={value}"]
    run = read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=False)
    assert run.config.quantize.linear.mx.mxfp8_dim1_cast_kernel_choice == kernel


@pytest.mark.parametrize(
    ("keys", "warmup", "active"),
    [
        ("profile_freq = 7", 3, 4),
        ("profile_freq = 4", 3, 1),
        ("profile_freq = 2", 1, 1),
        ("profile_freq = 1", 0, 1),
        ("profile_freq = 6\nprofiler_active = 5", 1, 5),
        ("profile_freq = 4\nprofiler_warmup = 0", 0, 4),
        ("profile_freq = 10", 3, 5),
    ],
)
def test_a_short_profiling_cycle_shortens_the_defaults(keys, warmup, active, tmp_path, monkeypatch):
    run = dry_run(f"[profiling]\nenable_profiling = true\n{keys}", tmp_path, monkeypatch, 1)
    assert (run.config.profiling.profiler_warmup, run.config.profiling.profiler_active) == (warmup, active)
    assert any("is shorter than a default cycle" in notice for notice in run.spec.notices) == ("10" not in keys)


def test_a_cycle_that_was_written_out_is_not_changed(tmp_path, monkeypatch):
    keys = "profile_freq = 6\nprofiler_warmup = 3\nprofiler_active = 5"
    with pytest.raises(UserError, match="a cycle includes"):
        dry_run(f"[profiling]\nenable_profiling = true\n{keys}", tmp_path, monkeypatch, 1)


@pytest.mark.parametrize("backend", ["", '[comm]\nbackend = "gloo"\n'])
def test_async_tensor_parallelism_without_tensor_parallelism_changes_nothing(backend, tmp_path, monkeypatch):
    text = f"{backend}[parallelism]\nenable_async_tensor_parallel = true"
    notices = dry_run(text, tmp_path, monkeypatch, 4, training=True).spec.notices
    assert any("parallelism.enable_async_tensor_parallel has no effect" in notice for notice in notices)
