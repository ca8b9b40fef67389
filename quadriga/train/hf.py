"""Hugging Face weights: loads them at the start of a run, and exports those of the last step."""

from __future__ import annotations

import time

import torch
from torch import nn

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.states import ModelState
from quadriga.comm import process_group
from quadriga.config import Run
from quadriga.data.tokenizer import build_tokenizer
from quadriga.data.tokenizer_export import transformers_files
from quadriga.log import logger
from quadriga.models import registry
from quadriga.units import format_seconds


def start_from_hf(run: Run, parts: tuple[nn.Module, ...]) -> int:
    """With `checkpoint.initial_load_in_hf`, load Hugging Face weights into this rank's parts of the model.

    Returns the number of positions that the weights were trained for; 0 if nothing is loaded. Call on all ranks of a
    run without a checkpoint. Raises UserError on every rank if the weights do not fit."""
    section = run.config.checkpoint
    if not (section.enable and section.initial_load_in_hf):
        return 0
    from quadriga.checkpoint.hf import read_hf

    start, place = time.monotonic(), section.initial_load_path or run.config.model.hf_assets_path
    group = process_group.host_group(section.timeout_seconds)
    names = registry.hf_names(run.spec.model)
    hf_config = read_hf(place, ModelState(parts).state_dict(), names, group, allow_change=section.allow_change)
    logger.info("weights of %s read in %s", place, format_seconds(time.monotonic() - start))
    return registry.positions_from_hf(hf_config)


def export_last_step(run: Run, step: int) -> None:
    """With `checkpoint.last_save_in_hf`, write `step-N-hf` next to `step-N`, which must be published. Call on all
    ranks. Raises CheckpointError on every rank if it cannot be written; `step-N` is then still complete."""
    section = run.config.checkpoint
    if not (section.enable and section.last_save_in_hf) or section.load_only:
        return
    from quadriga.checkpoint.hf_export import export_hf

    start, found = time.monotonic(), folders.read_checkpoint(folders.published_path(run.spec.folders.checkpoint, step))
    assets = run.config.model.hf_assets_path
    tokenizer = build_tokenizer(assets)
    model, (bos_id, eos_id) = run.spec.model, tokenizer.special_ids
    positions = max(found.extra.get("max_positions", 0), run.spec.seq_len)
    config = registry.hf_config(model, bos_id=bos_id, eos_id=eos_id, positions=positions)
    dtype = getattr(torch, section.export_dtype)
    out, group = f"{found.path}-hf", process_group.host_group(section.timeout_seconds)
    export_hf(
        found,
        out,
        registry.hf_names(model),
        config,
        group,
        dtype=dtype,
        tokenizer=transformers_files(assets),
        replace=True,
    )
    logger.info("saved %s in %s", out, format_seconds(time.monotonic() - start))
