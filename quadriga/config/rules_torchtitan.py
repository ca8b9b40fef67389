"""Notices for values that mean something else than in torchtitan v0.2.2 and change the numbers of the training.

docs/from-torchtitan.md has the whole table, one row per key. Features of it that training does not support yet are one
entry each in `UNSUPPORTED`: training refuses them by name, and a dry run accepts them. Delete the entry when a feature
is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quadriga.config.keys import format_toml
from quadriga.config.rules import Check, Conflict, Findings, RuleContext, config_value, rule
from quadriga.config.rules_layout import CP, DP_SHARD, TP
from quadriga.config.rules_pipeline import PP
from quadriga.config.schema import JobConfig

FILES = {"model.hf_assets_path": "./tests/assets/tokenizer", "training.dataset": "c4_test"}  # torchtitan's defaults
SEED = "debug.seed"
COMPUTES_IN = "training.mixed_precision_param"
MAX_NORM = "training.max_norm"


@rule(*FILES)
def defaults_need_no_files(ctx: RuleContext) -> Findings:
    mixed, tokens = bool(ctx.config.training.sources), not ctx.config.training.reads_text
    named = {"training.dataset": mixed or tokens, "model.hf_assets_path": tokens}
    keys = [key for key in FILES if key not in ctx.origin and not named[key]]
    if keys:
        defaulted = " and ".join(f"{key} = {format_toml(config_value(ctx.config, key))}" for key in keys)
        there = " and ".join(format_toml(FILES[key]) for key in keys)
        yield f"{defaulted} by default, so that no file is needed (torchtitan: {there})"


@rule(SEED)
def seed_is_a_number(ctx: RuleContext) -> Findings:
    if SEED not in ctx.origin:
        yield f"{SEED} is {ctx.config.debug.seed} by default, so that a run can be repeated (torchtitan: a random one)"


@rule("memory_estimation.enable", "comm.mode")
def a_run_is_only_rehearsed(ctx: RuleContext) -> Findings:
    rehearsed = "the run is estimated and rehearsed, not trained"
    if ctx.config.memory_estimation.enable:
        yield f"memory_estimation.enable: {rehearsed} (torchtitan's trainer ignores it)"
    elif ctx.config.comm.mode == "fake_backend":
        yield f'comm.mode = "fake_backend": {rehearsed} (torchtitan takes steps)'


@rule("training.dataloader.num_workers")
def threads_read_each_document_once(ctx: RuleContext) -> Findings:
    count = ctx.config.training.dataloader.num_workers
    if count > 1:
        yield (
            f"training.dataloader.num_workers = {count}: threads, which change no batch (torchtitan: "
            f"{count} processes, each of which reads every document once per epoch)"
        )


@rule(MAX_NORM)
def clipping_has_an_off(ctx: RuleContext) -> Findings:
    if ctx.config.training.max_norm == 0:
        yield f"{MAX_NORM} = 0 switches clipping off (torchtitan: it makes every gradient 0)"


@rule(COMPUTES_IN, "training.dtype", DP_SHARD, CP, TP, PP)
def computing_format_holds_on_every_layout(ctx: RuleContext) -> Findings:
    """In torchtitan, `fully_shard` converts if the shard or the context degree is above 1. Otherwise torch.autocast
    does, by operation, or nothing with tensor or pipeline parallelism."""
    training, degrees = ctx.config.training, ctx.degrees
    if training.mixed_precision_param == "float32" or degrees.dp_shard * degrees.cp > 1:
        return
    if degrees.tp * degrees.pp > 1:
        there = f"torchtitan computes in training.dtype ({training.dtype})"
        same = training.dtype == training.mixed_precision_param
    else:
        there, same = "torchtitan uses torch.autocast, which keeps the residual stream in float32", False
    if not same:
        yield (
            f"{COMPUTES_IN} = {training.mixed_precision_param} holds for the whole model, as under FSDP; without FSDP "
            f'{there}. With "float32" both compute the same'
        )


@dataclass(frozen=True)
class UnsupportedFeature:
    """A feature that is not supported: its keys, whether a configuration requests it, and what to do instead."""

    keys: tuple[str, ...]
    requested: Callable[[JobConfig], bool]
    name: str
    instead: str


UNSUPPORTED = (
    UnsupportedFeature(
        ("model.converters",),
        lambda config: bool(set(config.model.converters) - {"quantize.linear.float8"}),
        "microscaling formats and grouped matrix products in 8 bits",
        'use "quantize.linear.float8" alone, or remove the converters',
    ),
    UnsupportedFeature(
        ("checkpoint.initial_load_in_hf_quantized",),
        lambda config: config.checkpoint.enable and config.checkpoint.initial_load_in_hf_quantized,
        "starting from quantized weights",
        "start from weights that are not quantized",
    ),
    UnsupportedFeature(
        ("optimizer.early_step_in_backward",),
        lambda config: config.optimizer.early_step_in_backward,
        "updating parameters within the backward pass",
        "set it to false",
    ),
    UnsupportedFeature(
        ("fault_tolerance.enable",),
        lambda config: config.fault_tolerance.enable,
        "replica groups that can fail independently",
        "set it to false; a run that dies resumes from its newest checkpoint",
    ),
    UnsupportedFeature(
        ("comm.mode",),
        lambda config: config.comm.mode == "local_tensor",
        "all ranks in one process",
        'set it to "default" to train on the CPU with gloo, or to "fake_backend" to rehearse',
    ),
)


def _refuse(feature: UnsupportedFeature) -> Check:
    def feature_is_supported(ctx: RuleContext) -> Findings:
        if feature.requested(ctx.config):
            what = f"training does not support {feature.name} yet"
            yield Conflict(what, feature.instead) if ctx.training else f"{what} ({', '.join(feature.keys)})"

    return feature_is_supported


for _feature in UNSUPPORTED:
    rule(*_feature.keys)(_refuse(_feature))
