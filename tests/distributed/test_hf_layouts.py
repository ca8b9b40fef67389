"""Hugging Face import and export on real ranks: each reads the slices it holds and writes the files assigned to it."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_models import random_model, save, write_hf
from pipelines import pipeline, read_run, whole_weights
from ranks import RankError, run_ranks
from safetensors.torch import load_file

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint.folder import CheckpointError
from quadriga.checkpoint.hf import read_hf
from quadriga.checkpoint.hf_export import export_hf
from quadriga.checkpoint.tensors import ModelState, save_tensors
from quadriga.comm.mesh import build_mesh
from quadriga.config.model_spec import ModelSpec
from quadriga.models.registry import hf_config, tensor_names
from quadriga.train.build import build_parts, build_state

CPU = torch.device("cpu")
FSDP = ("--parallelism.data_parallel_shard_degree=2",)
TP = ("--parallelism.tensor_parallel_degree=2",)
LAYOUTS = {
    "fsdp 2": (2, FSDP),
    "tp 2": (2, TP),
    "pp 2": (2, pipeline(2)),
    "fsdp 2 x tp 2": (4, FSDP + TP),
}
TIED = ("--model.tie_embeddings",)


def spec_of(arguments: tuple[str, ...] = ()) -> ModelSpec:
    return read_run(arguments, 1).spec.model


def parts_of(arguments: tuple[str, ...]):
    run = read_run(arguments, dist.get_world_size())
    return run, build_parts(run, build_mesh(run.spec.degrees, "cpu"), CPU)


def load(folder: str, arguments: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The weights that this rank's parts of the model have after reading, whole."""
    run, parts = parts_of(arguments)
    group = dist.new_group(backend="gloo")
    read_hf(folder, ModelState(parts).state_dict(), tensor_names(run.spec.model), group)
    return whole_weights(build_state(run, parts, None, torch.device("cpu")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same_weights(tmp_path, layout):
    ranks, arguments = LAYOUTS[layout]
    model = random_model(spec_of()).bfloat16()  # the run is in float32: what is read is converted
    write_hf(model, tmp_path / "hf")
    found: dict[str, torch.Tensor] = {}
    for weights in run_ranks(load, ranks, str(tmp_path / "hf"), arguments):
        found |= weights
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value.float()), name


def test_a_shared_embedding_is_read_once(tmp_path):
    model = random_model(spec_of(TIED))
    write_hf(model, tmp_path / "hf")
    for weights in run_ranks(load, 2, str(tmp_path / "hf"), FSDP + TIED):
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_other_weights_are_refused_on_every_rank(tmp_path):
    """Of a pipeline the first stage does not hold what is wrong with the last; it must not wait for it."""
    model = random_model(spec_of())
    write_hf(model, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "rope_theta": 1e4}))
    with pytest.raises(RankError, match=r"rope_theta is 10000\.0; the model of this run has 500000\.0"):
        run_ranks(load, 2, str(tmp_path / "hf"), pipeline(2))


def export(folder: str, out: str, arguments: tuple[str, ...], full_on_rank: int) -> str:
    """Save on this layout, then export by all ranks; what went wrong. One rank's disk may be full."""
    run, parts = parts_of(arguments)
    group = dist.new_group(backend="gloo")
    read_hf(str(Path(folder, "hf")), ModelState(parts).state_dict(), tensor_names(run.spec.model), group)
    if dist.get_rank() == 0:
        folders.prepare(folder, 5)
    dist.barrier()
    tensors = {f"model.{name}": value for name, value in ModelState(parts).state_dict().items()}
    save_tensors(folders.staging_path(folder, 5), tensors, group)
    if dist.get_rank() == 0:
        folders.publish(folder, 5, ("model",), {})
    dist.barrier()
    if dist.get_rank() == full_on_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    config = hf_config(run.spec.model, bos_id=None, eos_id=None)
    found, names = folders.read_checkpoint(folders.published_path(folder, 5)), tensor_names(run.spec.model)
    try:
        export_hf(found, out, names, config, group, dtype=torch.bfloat16, most=10_000, replace=True)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", ["fsdp 2", "pp 2"])
def test_every_rank_writes_its_share(tmp_path, layout):
    ranks, arguments = LAYOUTS[layout]
    model = random_model(spec_of())
    write_hf(model, tmp_path / "hf")
    assert run_ranks(export, ranks, str(tmp_path), str(tmp_path / "step-5-hf"), arguments, -1) == [""] * ranks
    files = sorted((tmp_path / "step-5-hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "step-5-hf" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 4
    assert set(index.values()) == {file.name for file in files}
    held = {name: value for file in files for name, value in load_file(file).items()}
    theirs = {tensor_names(model.spec).hf_name(name): value for name, value in model.state_dict().items()}
    assert held.keys() == theirs.keys()
    assert all(torch.equal(held[name], value.bfloat16()) for name, value in theirs.items())


def test_a_full_disk_of_one_rank_stops_all_and_harms_nothing(tmp_path):
    model = random_model(spec_of())
    write_hf(model, tmp_path / "hf")
    out = tmp_path / "step-5-hf"
    out.mkdir()
    (out / "older").write_text("an export that was whole")
    for message in run_ranks(export, 2, str(tmp_path), str(out), FSDP, 1):
        assert "File too large" in message
    assert [path.name for path in out.iterdir()] == ["older"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "step-5", "step-5-hf"]


def test_an_export_holds_what_one_process_would_write(tmp_path):
    """The files do not depend on the number of ranks."""
    model = random_model(spec_of())
    write_hf(model, tmp_path / "hf")
    run_ranks(export, 2, str(tmp_path), str(tmp_path / "step-5-hf"), FSDP, -1)
    found, spec = save(model, tmp_path / "alone"), model.spec
    config = hf_config(spec, bos_id=None, eos_id=None)
    export_hf(found, tmp_path / "out", tensor_names(spec), config, None, dtype=torch.bfloat16, most=10_000)
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("step-5-hf", "out")]
    assert files[0] == files[1]
