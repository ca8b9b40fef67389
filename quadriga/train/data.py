"""The loaders of a run, for training and validation: of texts, of token files, or of a mixture of both."""

from __future__ import annotations

from typing import Any

import torch

from quadriga.comm.mesh import Mesh
from quadriga.config import Run
from quadriga.config.schema import TOKENS, Fetching, HeldOut
from quadriga.data.loader import Loader, row_format
from quadriga.data.mixture_data import collected
from quadriga.data.mixture_loader import MixtureLoader, build_mixture_loader
from quadriga.data.stream_loader import StreamLoader, build_loader
from quadriga.data.token_loader import build_token_loader
from quadriga.data.tokenizer import build_tokenizer
from quadriga.log import logger


def training_loader(run: Run, rows: range, device: torch.device) -> Loader:
    """The endless loader of `rows` of the global batch. Raises UserError if the data cannot be used."""
    section, spec = run.config.training, run.spec
    order: dict[str, Any] = {
        "seed": spec.seed,
        "seq_len": spec.seq_len,
        "global_batch_size": spec.global_batch_size,
        "rows": rows,
        "dataloader": dataloader_on(device, section.dataloader),
    }
    if section.sources:
        section = section.model_copy(update={"dataloader": order.pop("dataloader")})
        tokenizer = build_tokenizer(run.config.model.hf_assets_path) if section.reads_text else None
        return build_mixture_loader(section, tokenizer, spec.model.vocab_size, **order, assets=spec.tokenizer.assets)
    if section.dataset == TOKENS:
        order |= {"rows_have": row_format(section), "assets": spec.tokenizer.assets}
        return build_token_loader(section.token_keys, spec.model.vocab_size, **order)
    tokenizer = build_tokenizer(run.config.model.hf_assets_path)
    return build_loader(section.text_keys, tokenizer, **order, rows_have=row_format(section))


def validation_loaders(run: Run, mesh: Mesh, device: torch.device, training: Loader) -> list[Loader]:
    """For each held-out set the loader of this rank's rows, one pass per iteration. Texts are tokenized as those of the
    loader `training`.

    Raises UserError with the problems of all sets."""
    section, spec, what = run.config.validation, run.spec, run.spec.validation
    assert what is not None
    share = what.local_batch_size
    order: dict[str, Any] = {
        "seed": spec.seed,
        "seq_len": what.seq_len,
        "global_batch_size": share * mesh.batch_degree,
        "rows": range(mesh.batch_rank * share, (mesh.batch_rank + 1) * share),
        "dataloader": dataloader_on(device, section.dataloader),
        "infinite": False,
        "rows_have": row_format(run.config.training),
        "windows": what.windows,
    }
    known = training.tokenizer if isinstance(training, StreamLoader | MixtureLoader) else None
    if known is None and any(each.dataset != TOKENS for each in section.read_sets):
        known = build_tokenizer(run.config.model.hf_assets_path)

    def open_set(each: HeldOut) -> Loader:
        if each.dataset == TOKENS:
            keys = each.token_keys(run.config.training)
            return build_token_loader(keys, spec.model.vocab_size, **order, assets=spec.tokenizer.assets)
        assert known is not None
        return build_loader(each.text_keys(run.config.training), known, **order)

    return list(collected(open_set, section.read_sets))


def dataloader_on(device: torch.device, section: Fetching) -> Fetching:
    """The section, with `pin_memory` off if the run computes on a CPU, because pinning memory would initialize CUDA."""
    if section.pin_memory is None:
        return section.model_copy(update={"pin_memory": device.type == "cuda"})
    if not section.pin_memory or device.type == "cuda":
        return section
    logger.info("data: dataloader.pin_memory has no effect, because this run does not compute on CUDA")
    return section.model_copy(update={"pin_memory": False})
