"""transformers' own text generation on an export of a checkpoint, with the tokenizer that came with it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hf_models import SCALED, SPEC, logits, random_model, save, write_hf
from tokenizer_folders import byte_level, write_folder

from quadriga.cli.main import main
from quadriga.config.schema import JobConfig

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokenizer", ["builtin:bytes", "folder"])
def test_the_pipeline_generates(tmp_path, tokenizer):
    from transformers import pipeline

    spec = dataclasses.replace(SPEC, vocab_size=320, rope_scaling=SCALED)
    if tokenizer == "folder":
        tokenizer = str(write_folder(tmp_path / "assets", byte_level(), tokenizer_config=NAMED))
    config = JobConfig.model_validate({"model": {"hf_assets_path": tokenizer}, "training": {"seq_len": 96}})
    model = random_model(spec)
    with torch.no_grad():
        model.output.weight[256:] = -10 * model.output.weight[:1].abs()  # bytes are generated, and no special token
    save(model, tmp_path / "run" / "checkpoint", config=config.model_dump(mode="json"))
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["max_position_embeddings"]) == (256, 257, 96)
    generate = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    assert (generate.tokenizer.bos_token_id, generate.tokenizer.eos_token_id) == (256, 257)
    assert (logits(generate.model, spec) - logits(model, spec)).abs().max() <= 1e-4
    (answer,) = generate("Once", max_new_tokens=8, do_sample=False)
    assert answer["generated_text"].startswith("Once")
    assert len(answer["generated_text"]) > len("Once")


def test_positions_of_the_source_go_through(tmp_path):
    """From their folder into a checkpoint and out again; a run of longer sequences raises them."""
    hf = write_hf(random_model(SPEC), tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4321}))
    assert main(["convert", "from-hf", str(hf), str(tmp_path / "ours")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 4321
