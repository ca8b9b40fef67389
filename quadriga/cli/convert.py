"""`quadriga convert to-hf | from-hf | to-torchtitan`: convert checkpoints to and from other formats."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from quadriga import limits
from quadriga.cli.arguments import Parser, run_from_file
from quadriga.config.assets import BUILTIN_TOKENIZER
from quadriga.config.model_spec import ModelSpec, RopeScaling
from quadriga.config.schema import TOKENS
from quadriga.errors import EXIT_OK, Problem, UserError, printable
from quadriga.log import logger, start_logging
from quadriga.models import registry
from quadriga.units import format_some

if TYPE_CHECKING:
    import torch

    from quadriga.checkpoint.folder import CheckpointInfo

ABOUT = (
    "`to-hf` writes the weights of a checkpoint (a folder `step-N`, or the newest of a run or checkpoint folder) as "
    "safetensors with config.json and tokenizer, which transformers loads. `from-hf` writes such a folder as `step-0` "
    "of a checkpoint folder, for checkpoint.initial_load_path. Both need memory for one tensor, not for the model. "
    "`to-torchtitan` writes a checkpoint as `step-N` of a folder from which torchtitan v0.2.2 resumes: weights, "
    "moments, step, schedule, and for unshuffled data the position in it, for one data-parallel rank. Run it in the "
    "directory in which the run was started, so that its data is found. It needs memory for 2 GB of tensors. "
    "(Checkpoints of torchtitan need no conversion: see checkpoint.initial_load_path.)"
)
DTYPES = ("float32", "bfloat16", "float16")
CHECKPOINTS = "checkpoint"  # the folder within a run folder that is searched first


@dataclass(frozen=True)
class SavedModel:
    """A saved model. `tokenizer`: the value of `model.hf_assets_path`, "" if it is not known. `positions`: the length
    of the longest sequences that it was trained on, 0 if it is not known. `eos_id`: what ends a document of token files
    that it was trained on without a tokenizer."""

    spec: ModelSpec
    tokenizer: str = ""
    positions: int = 0
    eos_id: int | None = None


def main(argv: Sequence[str]) -> int:
    parser = Parser("convert", ABOUT)
    parser.add_argument("direction", choices=("to-hf", "from-hf", "to-torchtitan"), help="the conversion")
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint; from-hf: a folder with safetensors")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet; to-torchtitan: gets `step-N`")
    parser.add_argument("--dtype", choices=DTYPES, help="format of the weights (default: unchanged)")
    parser.add_argument("--config", metavar="FILE", help="to-hf: the TOML file, for a checkpoint without configuration")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="to-hf: its tokenizer (default: that of the run)")
    options = parser.parse_args(argv)
    if not options.source or not options.out:
        raise UserError(Problem("SOURCE, OUT", "is empty", fix="name two folders"))
    start_logging()
    if options.direction == "to-hf":
        convert_to_hf(options.source, options.out, options.dtype, options.config, options.tokenizer)
    elif options.direction == "to-torchtitan":
        if options.config or options.tokenizer or options.dtype:
            raise UserError(Problem("--config, --tokenizer, --dtype", "not for to-torchtitan", fix="remove them"))
        convert_to_torchtitan(options.source, options.out)
    elif options.config or options.tokenizer:
        raise UserError(Problem("--config, --tokenizer", "not for from-hf, which reads config.json", fix="remove them"))
    else:
        convert_from_hf(options.source, options.out, options.dtype)
    return EXIT_OK


def convert_to_hf(source: str, out: str, dtype: str | None, file: str | None, tokenizer: str | None) -> None:
    from quadriga.checkpoint.folder import CheckpointError, find_damage
    from quadriga.checkpoint.hf_export import export_hf
    from quadriga.checkpoint.messages import convert_extra_errors

    found = find_checkpoint(source)
    with convert_extra_errors(found, "name the configuration that it was saved with: --config FILE.toml"):
        model = saved_model(found.extra, file, found.path)
    if wrong := find_damage(found):
        raise CheckpointError("\n".join([*wrong, f"{out} was not written; name another checkpoint of the run"]))
    (bos_id, eos_id), files = tokenizer_of(tokenizer, model)
    config = registry.hf_config(model.spec, bos_id=bos_id, eos_id=eos_id, positions=model.positions)
    export_hf(found, out, registry.tensor_names(model.spec), config, None, dtype=torch_dtype(dtype), tokenizer=files)
    logger.info(f"{printable(found.path)} was written in Hugging Face's format to {printable(out)}")
    print(printable(out))


def convert_to_torchtitan(source: str, out: str) -> None:
    from quadriga.checkpoint.messages import convert_extra_errors
    from quadriga.cli.convert_titan import USE_ANOTHER, write_torchtitan

    found = find_checkpoint(source)
    with convert_extra_errors(found, USE_ANOTHER):
        spec = saved_model(found.extra, None, found.path).spec
    write_torchtitan(found, spec, out)


def convert_from_hf(source: str, out: str, dtype: str | None) -> None:
    from quadriga.checkpoint.hf import import_hf
    from quadriga.checkpoint.hf_folder import HfFolder

    folder = HfFolder(source)
    config = folder.config()
    spec = registry.spec_from_hf(config, folder.config_file)
    extra = {"model": asdict(spec), "max_positions": registry.positions_from_hf(config)}
    name = import_hf(folder, out, registry.tensor_names(spec), extra, torch_dtype(dtype))
    start = shlex.join(["--checkpoint.enable", "--checkpoint.initial_load_path", out])
    logger.info(printable(f"{source} was converted; to start from it: {start}"))
    print(printable(name))


def find_checkpoint(source: str) -> CheckpointInfo:
    """The checkpoint at `source`: the folder itself, or the newest good one in it or in one of its folders."""
    from quadriga.checkpoint.files import files_at, join
    from quadriga.checkpoint.folder import (
        STATE_FILE,
        InvalidCheckpoint,
        damaged_in,
        find_complete,
        read_checkpoint,
    )

    files = files_at(source)
    try:
        if files.exists(join(source, STATE_FILE)):
            return read_checkpoint(source)
    except InvalidCheckpoint as reason:
        raise UserError(Problem(source, f"not a complete checkpoint: {reason}")) from reason
    inside = [join(source, name) for name in sorted(files.names(source), key=lambda name: name != CHECKPOINTS)]
    damaged, several = [], []
    for folder in (source, *inside):
        if found := find_complete(folder):
            if folder in (source, join(source, CHECKPOINTS)):
                return found
            several.append(found)
        damaged += damaged_in(folder)
    if len(several) > 1:
        names = format_some([found.path for found in several])
        raise UserError(Problem(source, "several of its folders have checkpoints", allowed=names, fix="name one"))
    if several:
        return several[0]
    what = f"no complete checkpoint: {'; '.join(damaged)}" if damaged else "there is no checkpoint of Quadriga"
    if files.exists(join(source, ".metadata")):
        what += "; another trainer may order the rows of heads differently, so use its own tools to convert"
    raise UserError(Problem(source, what, allowed="a folder `step-N`, the folder around it, or a run folder"))


def saved_model(extra: Mapping[str, Any], file: str | None, where: str) -> SavedModel:
    """The model of the TOML file `file` if given, else that of the checkpoint.

    Raises:
        UserError: the checkpoint has no model, and `file` is None.
        KeyError, TypeError, ValueError: its values are damaged.
    """
    if file is not None:
        return model_from_config(file)
    if "model" not in extra:
        fix = "name the configuration that it was saved with: --config FILE.toml"
        raise UserError(Problem(where, "the checkpoint has no description of its model", fix=fix))
    numbers = dict(extra["model"])
    if numbers.get("rope_scaling") is not None:
        numbers["rope_scaling"] = RopeScaling(**numbers["rope_scaling"])
    spec, positions = ModelSpec(**numbers), extra.get("max_positions", 0)
    sizes = (spec.n_layers, spec.dim, spec.n_heads, spec.n_kv_heads, spec.ffn_dim, spec.vocab_size)
    most = (limits.MODEL_LAYERS, *[limits.MODEL_WIDTH] * 4, limits.VOCABULARY)
    if not all(type(size) is int and 0 < size <= top for size, top in zip(sizes, most, strict=True)):
        raise ValueError(f"layers, widths, heads and ids of {sizes} are out of range")
    if "config" not in extra:
        return SavedModel(spec, positions=positions)
    config = extra["config"]
    positions = max(positions, config["training"]["seq_len"])
    training = config["training"]
    sources = [(source["dataset"], source.get("token_eos_id")) for source in training.get("sources") or [training]]
    tokenizer, eos_id = _of_data(config["model"]["hf_assets_path"], sources)
    if eos_id is not None and not (type(eos_id) is int and 0 <= eos_id < spec.vocab_size):
        raise ValueError(f"token_eos_id {eos_id} is out of range")
    return SavedModel(spec, tokenizer, positions, eos_id)


def model_from_config(file: str) -> SavedModel:
    run = run_from_file(file, None)
    training = run.config.training
    sources = [(source.dataset, source.token_eos_id) for source in training.sources or [training]]
    tokenizer, eos_id = _of_data(run.config.model.hf_assets_path, sources)
    return SavedModel(run.spec.model, tokenizer, run.spec.seq_len, eos_id)


def _of_data(path: str, sources: list[tuple[str, int | None]]) -> tuple[str, int | None]:
    """The tokenizer of a configuration. The built-in one, which is the default, does not belong to token files; then
    the second is EOS, if all files have the same. `sources`: the data set of each, and its `token_eos_id`."""
    if path != BUILTIN_TOKENIZER or any(dataset != TOKENS for dataset, _ in sources):
        return path, None
    eos_ids = {eos_id for _, eos_id in sources}
    return "", eos_ids.pop() if len(eos_ids) == 1 else None


def tokenizer_of(requested: str | None, model: SavedModel) -> tuple[tuple[int | None, int | None], dict[str, bytes]]:
    """(BOS id, EOS id), and the tokenizer's files. If the run's tokenizer no longer exists: None, no files, and a
    warning."""
    from quadriga.data.tokenizer import build_tokenizer
    from quadriga.data.tokenizer_export import transformers_files

    place = requested or model.tokenizer
    if not place:
        known = "token ids are not set" if model.eos_id is None else "of its token ids only EOS is set"
        logger.warning(f"no tokenizer is known: {known}; --tokenizer FOLDER names one")
        return (None, model.eos_id), {}
    try:
        return build_tokenizer(place).special_ids, transformers_files(place)
    except UserError as error:
        if requested:
            raise UserError(*(replace(each, where=_of_option(each.where)) for each in error.problems)) from None
        if os.path.exists(place):
            raise
        logger.warning(f"no tokenizer is at {printable(place)}: token ids are not set; --tokenizer FOLDER names one")
        return (None, None), {}


def _of_option(where: str) -> str:
    return where.replace("model.hf_assets_path", "--tokenizer")


def torch_dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
