"""A run that starts from Hugging Face weights and leaves its last step in their form, through the real trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import logits, random_model, write_hf
from pipelines import read_run
from ranks import RankError
from safetensors.torch import load_file
from training import TINY, train

from quadriga.checkpoint.load import load_tensors
from quadriga.models.llama.model import Llama
from quadriga.models.registry import tensor_names

STEPS = ("--training.steps=4", "--checkpoint.enable", "--checkpoint.interval=100")
FSDP = ("--parallelism.data_parallel_shard_degree=2",)


def spec():
    return read_run((), 1, TINY).spec.model


def run(folder: Path, ranks: int, hf: Path, *arguments: str) -> list[dict]:
    start = ("--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={hf}")
    return train(folder, ranks, *TINY, *STEPS, *start, *arguments)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_a_run_starts_from_their_weights_and_ends_in_them(tmp_path):
    model = random_model(spec())
    hf = write_hf(model, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4321}))
    alone = run(tmp_path / "alone", 1, hf, "--checkpoint.last_save_in_hf")
    sharded = run(tmp_path / "sharded", 2, hf, *FSDP, "--checkpoint.last_save_in_hf", "--checkpoint.async_mode=async")
    assert [record["loss"] for record in sharded] == pytest.approx([record["loss"] for record in alone], rel=1e-5)
    assert alone[0]["loss"] > 6.5, "far from the initial weights, whose loss is that of a guess: log(320) = 5.8"
    for folder in ("alone", "sharded"):
        place = tmp_path / folder / "checkpoint"
        assert sorted(path.name for path in place.iterdir()) == ["step-4", "step-4-hf"]
        saved = Llama(spec())
        load_tensors(place / "step-4", {f"model.{n}": v for n, v in saved.state_dict().items()}, None)
        exported = weights_in(place / "step-4-hf")
        assert all(torch.equal(exported[tensor_names(spec()).hf_name(n)], v) for n, v in saved.state_dict().items())
        config = json.loads((place / "step-4-hf" / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (256, 257, "float32")
        assert config["max_position_embeddings"] == 4321, "the source's: more than the run's own sequences"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "alone" / "checkpoint" / "step-4-hf")
    assert tokenizer("ab").input_ids == [256, 97, 98]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded" / "checkpoint" / "step-4-hf")
    load_tensors(tmp_path / "sharded/checkpoint/step-4", {f"model.{n}": v for n, v in model.state_dict().items()}, None)
    assert (logits(theirs, spec()) - logits(model, spec())).abs().max() <= 1e-4


def test_a_run_goes_on_from_its_own_checkpoint_not_from_theirs(tmp_path):
    """And it may be extended: beside the export lies what a resume needs."""
    hf = write_hf(random_model(spec()), tmp_path / "hf")
    whole = run(tmp_path / "whole", 1, hf, "--training.steps=6", "--lr_scheduler.decay_ratio=0")
    run(tmp_path / "cut", 1, hf, "--lr_scheduler.decay_ratio=0", "--checkpoint.last_save_in_hf")
    (hf / "model.safetensors").unlink()  # not needed any more
    more = ("--training.steps=6", "--lr_scheduler.decay_ratio=0", "--checkpoint.last_save_in_hf")
    cut = run(tmp_path / "cut", 1, hf, *more, "--checkpoint.export_dtype=bfloat16")
    assert [record["loss"] for record in cut] == [record["loss"] for record in whole]
    exported = weights_in(tmp_path / "cut" / "checkpoint" / "step-6-hf")
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_of_another_model_are_refused(ranks, tmp_path):
    hf = write_hf(random_model(spec()), tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rope_theta": 1e4}))
    with pytest.raises(RankError, match=r"rope_theta is 10000\.0; the model of this run has 500000\.0"):
        run(tmp_path / "run", ranks, hf)
    assert run(tmp_path / "run", 1, hf, "--checkpoint.allow_change")[0]["step"] == 1
