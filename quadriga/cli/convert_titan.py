"""`quadriga convert to-torchtitan`: the states besides tensors in a torchtitan checkpoint, made from Quadriga's."""

from __future__ import annotations

import json
import pickle
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quadriga import limits
from quadriga.config.legacy_keys import started_with
from quadriga.config.model_spec import ModelSpec
from quadriga.config.schema import JobConfig
from quadriga.errors import Problem, UserError, printable
from quadriga.log import logger
from quadriga.models import registry

if TYPE_CHECKING:
    from quadriga.checkpoint.folder import CheckpointInfo

USE_ANOTHER = "name another checkpoint of the run"
WITHOUT_DATA = "--checkpoint.exclude_from_loading dataloader"


def write_torchtitan(found: CheckpointInfo, spec: ModelSpec, out: str) -> None:
    """Write a checkpoint of a model as `step-N` in `out`, from which torchtitan v0.2.2 resumes."""
    from quadriga.checkpoint.folder import CheckpointError, find_damage
    from quadriga.checkpoint.messages import convert_extra_errors
    from quadriga.checkpoint.titan_write import export_titan

    if spec.tie_embeddings:
        what = "the model has tied embeddings, which torchtitan's Llama does not support"
        raise UserError(Problem(found.path, what))
    if wrong := find_damage(found):
        raise CheckpointError("\n".join([*wrong, f"{out} was not written; name another checkpoint of the run"]))
    states: dict[str, Any] = {}
    group: dict[str, Any] = {}
    why: str | None = None
    ended = False
    if "optimizer" in found.contents:
        with convert_extra_errors(found, USE_ANOTHER):
            config = config_of(found)
            states, group = states_of(found, config)
            phases = config.lr_scheduler.phases(config.training.steps)
            ended = found.extra["lr_scheduler"]["done"] >= phases.total
            position, why = loader_state_of(found, config)
        if position is not None:
            states["dataloader"] = position
    name = export_titan(found, out, registry.tensor_names(spec), states, group)
    logger.info(f"{printable(found.path)} was converted to a checkpoint of torchtitan: {printable(name)}")
    start = f"--checkpoint.enable --checkpoint.initial_load_path {shlex.quote(printable(name))}"
    if not states:
        logger.warning("it contains only the weights, like the source")
    else:
        start += " --checkpoint.no_initial_load_model_only"
    if ended:
        rest = "the end of this run's schedule: with more steps, torchtitan's first step uses it"
        logger.warning(f"the saved learning rate is {group['lr']:g}, {rest}")
    if why is not None:
        logger.warning(f"the data position is omitted: {why}. With {WITHOUT_DATA}, the data starts from the beginning")
        start += f" {WITHOUT_DATA}"
    logger.info(f"torchtitan resumes from it with {start}")
    print(printable(name))


def config_of(found: CheckpointInfo) -> JobConfig:
    """The configuration of the saved run, with the defaults at the time of its start."""
    saved = found.extra.get("config")
    if not isinstance(saved, Mapping):
        raise UserError(Problem(found.path, "the checkpoint has no configuration"))
    tables = {name: dict(table) if isinstance(table, Mapping) else table for name, table in saved.items()}
    for key, value in started_with(found.extra).items():
        section, _, name = key.rpartition(".")
        tables.setdefault(section, {}).setdefault(name, value)
    try:
        wanted = {name: tables[name] for name in ("model", "optimizer", "lr_scheduler", "training") if name in tables}
        return JobConfig.model_validate_json(json.dumps(wanted))
    except ValueError as error:
        what = f"its configuration cannot be read: {str(error).partition(chr(10))[0]}"
        raise UserError(Problem(found.path, what)) from error


def states_of(found: CheckpointInfo, config: JobConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of torchtitan's trainer and schedule, and the fields of its one parameter group."""
    from quadriga.optim.schedule import lr_factor

    section, train_state = config.optimizer, found.extra["train_state"]
    step, seen, done = train_state["step"], train_state["tokens_seen"], found.extra["lr_scheduler"]["done"]
    if any(type(count) is not int or not 0 <= count < 1 << 63 for count in (step, seen, done)) or step != found.step:
        raise ValueError(f"it is step {found.step}, but has step {step}, tokens {seen}, scheduler steps {done}")
    rate = section.lr * lr_factor(done + 1, config.lr_scheduler, config.training.steps)
    if not section.decay_norms_and_biases and section.weight_decay:
        logger.warning("torchtitan has one parameter group: it also applies the weight decay to norms")
    if config.lr_scheduler.variant != "torchtitan":
        logger.warning("from the next step on, torchtitan uses its own schedule (lr_scheduler.variant)")
    group = {
        "lr": rate,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
        "weight_decay": section.weight_decay,
        "amsgrad": False,
        "maximize": False,
        "foreach": section.implementation == "foreach",
        "capturable": False,
        "differentiable": False,
        "fused": section.implementation == "fused",
        "decoupled_weight_decay": section.name == "AdamW",
        "initial_lr": section.lr,
    }
    schedule = {
        "base_lrs": [section.lr],
        "last_epoch": done,
        "_step_count": done + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [rate],
    }
    trainer = {"step": step, "ntokens_seen": seen}
    return {"train_state": trainer, "lr_scheduler": schedule}, group


def loader_state_of(found: CheckpointInfo, config: JobConfig) -> tuple[dict[str, Any] | None, str | None]:
    """The state of torchtitan's data loader for one data-parallel rank; or None, and the reason."""
    training, saved = config.training, found.extra.get("dataloader")
    if training.foreign_to_torchtitan:
        return None, f"the run read {training.foreign_to_torchtitan}, which torchtitan does not"
    if training.dataloader.shuffle:
        return None, "the run shuffled its data, and torchtitan reads it in order"
    if not isinstance(saved, Mapping):
        return None, "the checkpoint does not contain it"
    from quadriga.data.stream_loader import build_loader
    from quadriga.data.tokenizer import build_tokenizer

    batch, seed = found.extra["global_batch_size"], found.extra["seed"]
    if type(batch) is not int or not 0 < batch <= limits.BATCH_ROWS or type(seed) is not int:
        raise ValueError(f"its batch has {batch} rows, its seed is {seed}")
    try:
        loader = build_loader(
            training.text_keys,
            build_tokenizer(config.model.hf_assets_path),
            seed=seed,
            seq_len=training.seq_len,
            global_batch_size=batch,
            rows=range(batch),
            dataloader=training.dataloader,
        )
        loader.load_state_dict(saved)
        documents, ids = loader.read_so_far()
    except UserError as error:
        return None, f"the data cannot be read ({error.problems[0].where}: {error.problems[0].what})"
    rows = training.local_batch_size
    state = _loader_state(documents, ids, found.step * batch // rows, rows)
    return {"dp_rank_0": pickle.dumps(state), "world_size": 1}, None


def _loader_state(documents: int, ids: list[int], batches: int, rows: int) -> dict[str, Any]:
    """The state of torchdata's StatefulDataLoader without workers, over torchtitan's data set."""
    return {
        "_index_sampler_state": None,
        "_sampler_iter_state": {"samples_yielded": batches * rows},
        "_sampler_iter_yielded": batches,
        "_num_yielded": batches,
        "_IterableDataset_len_called": None,
        "_shared_seed": None,
        "fetcher_state": {"dataset_iter_state": None, "fetcher_ended": False},
        "dataset_state": {"token_buffer": ids, "sample_idx": documents},
        "_iterator_finished": False,
    }
