"""Every shipped configuration loads, resolves at the number of GPUs that its card states, and its card is current."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from quadriga.cli.card import card_path, make_card, target_for
from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.config.card import read_target
from quadriga.config.load import load
from quadriga.config.torchtitan import titan_keys
from quadriga.hardware import device_named
from quadriga.models.registry import catalogue
from quadriga.planning.estimate import estimate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*/*.toml"))
NAMES = {"debug", "llama3_1b", "llama3_3b", "llama3_8b", "llama3_8b_bf16", "llama3_70b", "llama3_405b"}


def resolved(file, ranks, *arguments):
    argv = ["--job.config_file", str(file), *arguments]
    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=False)


def stated_gpus(file):
    return read_target(card_path(file).read_text(encoding="utf-8")).gpus


def test_each_lies_in_a_folder_of_its_name():
    assert {file.stem for file in FILES} == NAMES
    assert all(file.stem == file.parent.name for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_resolves_at_the_stated_number_of_gpus(file):
    run = resolved(file, stated_gpus(file))
    assert run.spec.world_size == stated_gpus(file)
    assert run.spec.degrees.dp_shard == stated_gpus(file)
    assert not [notice for notice in run.spec.notices if "is now" in notice or "does not support" in notice]


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != "debug"], ids=lambda file: file.stem)
@pytest.mark.parametrize("ranks", [1, 3, 8, 96])
def test_all_but_debug_fit_any_number_of_ranks(file, ranks):
    run = resolved(file, ranks)
    assert run.config.parallelism.data_parallel_shard_degree == run.config.training.global_batch_size == -1
    assert run.spec.global_batch_size == ranks * run.config.training.local_batch_size


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_debug_trains_the_same_batches_on_every_layout(ranks):
    spec = resolved(CONFIGS / "debug/debug.toml", ranks).spec
    assert (spec.global_batch_size, spec.tokens_per_step) == (16, 4096)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_card_is_up_to_date(file):
    assert card_path(file).read_text(encoding="utf-8") == make_card(target_for(file, None, None), file), "quadriga docs"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_card_leaves_no_placeholder_and_no_topic_out(file):
    card = card_path(file).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`]*`|<!--.*?-->|</?(details|summary)>", "", card, flags=re.DOTALL)
    assert not re.findall(r"<[^>]+>|\{[^}]*\}|\b(TODO|TBD|FIXME|XXX|None|nan)\b|\?\?|\.\.\.", prose)
    run = resolved(file, stated_gpus(file))
    unit = "rank" if file.stem == "debug" else "GPU"  # whose card is made for the CPU
    for text in (
        f"{run.spec.model.n_parameters:,} parameters",
        f"FSDP over {stated_gpus(file)} {unit}s" if stated_gpus(file) > 1 else f"One {unit}",
        f"| total {unit}s | {stated_gpus(file)} |",
        f"{run.spec.steps:,} steps",
        f"{run.spec.tokens_per_step:,} tokens per step",
        f"the model computes in {run.config.training.mixed_precision_param}",
        "| recompute |",
        "| compile |",
        "| profiling |",
        "| checkpoints |",
        f"`{run.spec.folders.dump}/metrics.jsonl`",
        "./run_train.sh",
        "torchtitan/train.py --job.config_file",
        "DRY_RUN=1",
        *(f"`{name}`" for name in ("CONFIG_FILE", "NGPU", "COMM_BACKEND", "LOG_RANK", "DRY_RUN", "HF_TOKEN")),
        "tensorboard --logdir",
        "**Out of memory.**",
        "**Communication backend.**",
        "**Missing assets.**",
        "`pipeline_parallel_degree`",
        "## Hardware",
    ):
        assert text in card, text


def test_debug_has_the_values_that_are_written_down():
    config = resolved(CONFIGS / "debug/debug.toml", 4).config
    assert (config.model.name, config.model.flavor, config.model.hf_assets_path) == (
        "llama3",
        "debugmodel",
        "builtin:bytes",
    )
    training = config.training
    assert (training.dataset, training.local_batch_size, training.seq_len) == ("builtin", 2, 256)
    assert (training.steps, config.lr_scheduler.warmup_steps, config.optimizer.lr) == (200, 20, 8e-4)
    assert (training.dtype, training.mixed_precision_param, training.max_norm) == ("float32", "float32", 1.0)
    assert (config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option) == ("selective", "2")
    assert not config.compile.enable
    assert config.profiling.enable_profiling
    assert config.profiling.profiler_active == 5
    assert config.metrics.enable_tensorboard
    assert config.checkpoint.enable
    assert not config.checkpoint.last_save_model_only


def test_the_reference_has_the_values_that_are_written_down():
    file = CONFIGS / "llama3_8b/llama3_8b.toml"
    config = resolved(file, 4).config
    assert (config.model.flavor, config.model.hf_assets_path) == ("8B", "./assets/hf/Llama-3.1-8B")
    training = config.training
    assert (training.dataset, training.local_batch_size, training.global_batch_size, training.seq_len) == (
        "c4",
        2,
        -1,
        512,
    )
    assert (training.steps, config.lr_scheduler.warmup_steps) == (200, 50)
    assert (config.optimizer.name, config.optimizer.lr) == ("AdamW", 3e-4)
    assert (training.dtype, training.mixed_precision_param, training.max_norm) == ("float32", "float32", 1.0)
    assert (config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option) == ("selective", "op")
    assert not config.compile.enable
    assert not config.checkpoint.enable
    assert config.profiling.enable_profiling
    assert config.metrics.enable_tensorboard
    written = tomllib.loads(file.read_text())
    assert written["training"]["dtype"] == written["training"]["mixed_precision_param"] == "float32"
    degrees = written["parallelism"]
    assert [degrees[f"{kind}_parallel_degree"] for kind in ("tensor", "pipeline", "context")] == [1, 1, 1]
    assert stated_gpus(file) == 4


def test_the_card_of_the_reference_says_what_float32_costs():
    text = card_path(CONFIGS / "llama3_8b/llama3_8b.toml").read_text(encoding="utf-8")
    assert "H100 multiplies matrices at 67 TFLOP/s, and in bfloat16 at 989.4 (15 times)" in text
    assert "`--training.mixed_precision_param bfloat16`" in text


def test_8b_in_bfloat16_trains_the_model_of_the_reference_and_fits_where_its_file_says():
    file, reference = (CONFIGS / f"{name}/{name}.toml" for name in ("llama3_8b_bf16", "llama3_8b"))
    run, before = resolved(file, 1), resolved(reference, 1)
    training, config = run.config.training, run.config
    assert run.spec.model == before.spec.model
    assert (training.dtype, training.mixed_precision_param, training.mixed_precision_reduce) == (
        "float32",
        "bfloat16",
        "float32",
    )
    assert config.optimizer == before.config.optimizer.model_copy(update={"state_dtype": "bfloat16"})
    assert config.compile.enable is True
    assert config.lr_scheduler == before.config.lr_scheduler
    assert training.dataloader == before.config.training.dataloader
    fits = {
        (ranks, device, moments): estimate(
            resolved(file, ranks, f"--optimizer.state_dtype={moments}"), device_named(device, "")
        ).memory_fit()
        for ranks, device, moments in (
            (1, "h200-141gb", "bfloat16"),
            (1, "h200-141gb", "float32"),
            (1, "h100-80gb", "bfloat16"),
            (2, "h100-80gb", "bfloat16"),
        )
    }
    assert [fit.fits for fit in fits.values()] == [True, False, False, True]


def test_the_reference_means_what_it_means_in_torchtitan():
    """Beside keys of v0.2.2 it has marked ones alone, and they say what is done there."""
    file = CONFIGS / "llama3_8b/llama3_8b.toml"
    there, table, marked = titan_keys(), "", {}
    for line in file.read_text(encoding="utf-8").splitlines():
        table = line.strip("[] ") if line.startswith("[") else table
        key = f"{table}.{line.partition(' = ')[0]}"
        if " = " in line and not line.startswith("#"):
            assert (key in there) != ("(*)" in line), line
            marked |= {key: line.partition(" = ")[2].split("#")[0].strip()} if "(*)" in line else {}
    assert marked == {
        "model.depth_init": "true",
        "training.dataloader.shuffle": "false",
        "training.dataloader.window_overlap": "0",
        "optimizer.decay_norms_and_biases": "true",
        "lr_scheduler.variant": '"torchtitan"',
    }
    notices = resolved(file, 4).spec.notices
    assert not [notice for notice in notices if "torchtitan" in notice or "by default" in notice]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_what_it_chooses(file):
    """Where other trainers, or older commits, do something else: written in the file or the one that it extends."""
    origin = load(["--job.config_file", str(file)], {}).origin
    chosen = {
        *("training.dataloader.shuffle", "training.dataloader.window_overlap", "lr_scheduler.variant"),
        *("lr_scheduler.decay_type", "optimizer.weight_decay", "optimizer.decay_norms_and_biases", "debug.seed"),
        *("model.depth_init", "training.dtype", "training.mixed_precision_param"),
    }
    assert chosen <= origin.keys()
