"""What Hugging Face import and export refuse: each reported once, by name, with exit code 2."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import SCALED, SPEC, logits, random_model, save, write_hf
from safetensors.torch import load_file, save_file

from quadriga.checkpoint.hf import read_hf
from quadriga.checkpoint.hf_folder import HfFolder
from quadriga.cli.main import main
from quadriga.errors import UserError
from quadriga.models.registry import spec_from_hf, tensor_names


@pytest.fixture
def hf(tmp_path) -> Path:
    return write_hf(random_model(SPEC), tmp_path / "hf")


def refused(source: Path | str, out: Path, capsys, direction: str = "from-hf") -> str:
    """What the command tells; nothing is written."""
    before = sorted(out.rglob("*")) if out.exists() else []
    assert main(["convert", direction, str(source), str(out)]) == 2
    assert (sorted(out.rglob("*")) if out.exists() else []) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def refused_in_a_run(source: Path, **keys) -> str:
    with pytest.raises(UserError) as caught:
        read_hf(source, random_model(SPEC).state_dict(), tensor_names(SPEC), None, **keys)
    return str(caught.value)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into the weights, or take them out; `.` is written `__` in names."""
    held = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        held.pop(name.replace("__", "."), None)
        if value is not None:
            held[name.replace("__", ".")] = value
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_tensors_that_do_not_fit_are_named_all_at_once(hf, tmp_path, capsys):
    change(
        hf,
        model__layers__3__mlp__up_proj__weight=None,
        model__layers__3__mlp__up_projection__weight=torch.zeros(56, 32),
        model__norm__weight=torch.zeros(31),
        model__layers__0__self_attn__q_proj__bias=torch.zeros(32),
    )
    for report in (refused(hf, tmp_path / "out", capsys), refused_in_a_run(hf)):
        assert report.startswith("quadriga: 3 problems")
        assert "tensors of the model are missing: model.layers.3.mlp.up_proj.weight" in report
        assert "did you mean: model.layers.3.mlp.up_projection.weight" in report
        assert (
            "that the model does not have: model.layers.0.self_attn.q_proj.bias, model.layers.3.mlp.up_proj" in report
        )
        assert "shapes differ: model.norm.weight: [31] in the folder, [32] in the model" in report
        assert "to do: " in report


def test_many_that_are_missing_are_counted(hf, tmp_path, capsys):
    configure(hf, num_hidden_layers=6)
    assert "and 13 more" in refused(hf, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mistral"}, "model_type = mistral\n    this is not a Llama"),
        ({"model_type": None}, "this is not a Llama"),
        ({"hidden_size": "wide", "vocab_size": None}, "whole numbers of at least 1: hidden_size, vocab_size"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3\n    it does not divide 4 heads"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor, orig"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not supported"),
    ],
)
def test_another_model_is_refused_by_its_config(hf, tmp_path, capsys, fields, says):
    configure(hf, **fields)
    report = refused(hf, tmp_path / "out", capsys)
    assert says in report
    assert str(hf / "config.json") in report
    assert says in refused_in_a_run(hf, allow_change=True)


def test_a_config_that_is_missing_or_broken(hf, tmp_path, capsys):
    (hf / "config.json").write_text("[]")
    assert "is not a JSON object" in refused(hf, tmp_path / "out", capsys)
    (hf / "config.json").write_text("{")
    assert "cannot be read" in refused(hf, tmp_path / "out", capsys)
    (hf / "config.json").unlink()
    assert "missing: only this file has the number of heads" in refused(hf, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rope_theta": 10_000.0}, "rope_theta is 10000.0; the model of this run has 500000.0 (model.rope_theta)"),
        ({"num_attention_heads": 8, "head_dim": 4}, "num_attention_heads is 8; the model of this run has 4"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06; the model of this run has 1e-05 (model.flavor)"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                              "original_max_position_embeddings": 64}},
            "rope_scaling is RopeScaling(factor=8.0",
        ),
    ],
)  # fmt: skip
def test_a_run_takes_no_weights_that_were_made_with_other_numbers(hf, fields, says):
    """No shape tells them: the weights would load, and mean something else."""
    configure(hf, **fields)
    assert says in refused_in_a_run(hf)
    model = random_model(dataclasses.replace(SPEC, n_layers=4), seed=9)
    read_hf(hf, model.state_dict(), tensor_names(SPEC), None, allow_change=True)
    assert torch.equal(model.norm.weight, random_model(SPEC).norm.weight)


def test_a_model_of_another_size_is_reported_with_its_sizes(hf):
    configure(hf, num_hidden_layers=2)
    assert "num_hidden_layers is 2; the model of this run has 4 (model.n_layers)" in refused_in_a_run(hf)


def test_tensors_that_can_be_done_without(tmp_path):
    """The frequencies that old files hold, and the output layer of a model that shares its embedding."""
    spec = dataclasses.replace(SPEC, tie_embeddings=True, rope_scaling=SCALED)
    folder = write_hf(random_model(spec), tmp_path / "hf")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=embedding)
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "out")]) == 0
    extra = json.loads((tmp_path / "out/step-0/train_state.json").read_text())["extra"]
    assert extra["model"]["tie_embeddings"] is True


@pytest.mark.parametrize("rows", [1, 98])
def test_an_output_layer_that_differs_is_not_tied(tmp_path, monkeypatch, capsys, rows):
    """As transformers does, which is asked; a run that ties them is refused."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("quadriga.checkpoint.hf_folder.COMPARED_BYTES", 32 * 4 * 10)  # ten rows at a time
    spec = dataclasses.replace(SPEC, tie_embeddings=True)
    folder = write_hf(random_model(spec), tmp_path / "hf")
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    head[rows] += 1
    change(folder, lm_head__weight=head)
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "out")]) == 0
    assert "lm_head.weight differs from model.embed_tokens.weight: loaded as untied" in capsys.readouterr().err
    source = HfFolder(folder)
    untied = spec_from_hf(source.config(), source.config_file)
    assert untied.tie_embeddings is False
    ours = random_model(untied)
    read_hf(folder, ours.state_dict(), tensor_names(untied), None)
    assert torch.equal(ours.output.weight, head)
    assert (logits(AutoModelForCausalLM.from_pretrained(folder), spec) - logits(ours, spec)).abs().max() <= 1e-4
    for allow_change in (False, True):
        with pytest.raises(UserError, match=r"tie_word_embeddings|lm_head"):
            read_hf(folder, random_model(spec).state_dict(), tensor_names(spec), None, allow_change=allow_change)


def test_pickles_are_never_read(hf, tmp_path, capsys):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    report = refused(hf, tmp_path / "out", capsys)
    assert (
        "weights as a pickle (pytorch_model.bin): reading one can run any code, so only safetensors are read" in report
    )
    assert "save_pretrained" in report


def test_folders_that_are_something_else(hf, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert "there is no such folder" in refused(tmp_path / "none", out, capsys)
    assert "--repo_id meta-llama/Llama-3.1-8B --assets all" in refused("meta-llama/Llama-3.1-8B", out, capsys)
    assert "a file; its folder is expected" in refused(hf / "model.safetensors", out, capsys)
    assert "not from a URL" in refused("s3://bucket/llama", out, capsys)
    found = save(random_model(SPEC), tmp_path / "checkpoint")
    assert "a checkpoint of torch.distributed.checkpoint" in refused(found.path, out, capsys)
    assert "a checkpoint of torch.distributed.checkpoint" in refused(tmp_path / "checkpoint", out, capsys)
    (hf / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json; it contains config.json" in refused(
        hf, out, capsys
    )


def split(hf: Path, file: str = "model-00001-of-00001.safetensors") -> Path:
    """The same weights, with an index."""
    names = list(load_file(hf / "model.safetensors"))
    (hf / "model.safetensors").rename(hf / "model-00001-of-00001.safetensors")
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
    return index


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/model.safetensors", "weights.bin"])
def test_an_index_may_name_only_safetensors_beside_it(hf, tmp_path, capsys, file):
    index = split(hf, file)
    report = refused(hf, tmp_path / "out", capsys)
    assert f"{index}\n    has entries other than safetensors next to it: {file}" in report


def test_an_index_that_lies(hf, tmp_path, capsys):
    index = split(hf)
    (hf / "model-00001-of-00001.safetensors").rename(hf / "away")
    assert "lists files that are missing: model-00001-of-00001" in refused(hf, tmp_path / "out", capsys)
    (hf / "away").rename(hf / "model-00001-of-00001.safetensors")
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], "model.norm.weight": 7}}))
    assert "other than safetensors next to it: 7" in refused(hf, tmp_path / "out", capsys)
    index.write_text("{}")
    assert "not an index of safetensors: it has no object" in refused(hf, tmp_path / "out", capsys)


def test_an_index_may_not_name_a_tensor_that_its_file_lacks(hf, tmp_path, capsys):
    change(hf, model__norm__weight=None)
    index = split(hf)
    listed = json.loads(index.read_text())["weight_map"]
    listed["model.norm.weight"] = "model-00001-of-00001.safetensors"
    index.write_text(json.dumps({"weight_map": listed}))
    report = refused(hf, tmp_path / "out", capsys)
    assert "damaged or incomplete" in report
    assert "model.norm.weight" in report


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_file_that_was_cut_off(hf, tmp_path, capsys, left):
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    report = refused(hf, tmp_path / "out", capsys)
    assert f"{file}\n    damaged or incomplete" in report
    assert "damaged or incomplete" in refused_in_a_run(hf)


def test_formats_that_are_not_read(hf, tmp_path, capsys):
    change(hf, model__norm__weight=torch.zeros(32).to(torch.float8_e4m3fn))
    assert "model.norm.weight has dtype F8_E4M3, which is not supported" in refused(hf, tmp_path / "out", capsys)


def test_nothing_that_is_there_is_overwritten(hf, tmp_path, capsys):
    found = save(random_model(SPEC), tmp_path / "checkpoint")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for direction, source in (("from-hf", hf), ("to-hf", Path(found.path))):
        assert "already exists, and is not empty" in refused(source, out, capsys, direction)
        assert "already exists, and is not empty" in refused(source, out / "thesis.txt", capsys, direction)
    shutil.rmtree(out)
    out.mkdir()  # an empty folder is nobody's work
    assert main(["convert", "to-hf", found.path, str(out)]) == 0


def test_checkpoints_that_are_none(hf, tmp_path, capsys):
    out = tmp_path / "out"
    assert "there is no checkpoint of Quadriga" in refused(tmp_path / "none", out, capsys, "to-hf")
    assert "there is no checkpoint of Quadriga" in refused(hf, out, capsys, "to-hf")
    found = save(random_model(SPEC), tmp_path / "run" / "checkpoint")
    Path(found.path, "__0_0.distcp").unlink()
    assert "__0_0.distcp is missing" in refused(found.path, out, capsys, "to-hf")
    assert "no complete checkpoint: " in refused(tmp_path / "run", out, capsys, "to-hf")
    Path(found.path, "train_state.json").unlink()
    report = refused(found.path, out, capsys, "to-hf")
    assert "another trainer may order the rows of heads differently" in report


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sideways", "a", "b"], "invalid choice: 'sideways'"),
        (["to-hf", "a"], "the following arguments are required: OUT"),
        (["to-hf", "a", "b", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["from-hf", "a", "b", "--tokenizer", "c"], "not for from-hf"),
    ],
)
def test_mistakes_of_the_command_line(arguments, says, capsys):
    assert main(["convert", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_there_must_be_free_space_before_the_first_byte(hf, tmp_path, capsys, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "157.88 KiB of space are needed, and 1000 B are free" in refused(hf, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "fields",
    [
        *({"num_hidden_layers": 10**9}, {"hidden_size": 10**12}, {"vocab_size": 10**400}, {"vocab_size": True}),
        *({"num_attention_heads": 10**9, "hidden_size": 10**9}, {"num_key_value_heads": 10**9}, {"head_dim": [8]}),
        *({"num_key_value_heads": "2"}, {"num_key_value_heads": False}, {"rms_norm_eps": "small"}, {"rms_norm_eps": 0}),
        *({"rms_norm_eps": -1e-5}, {"rope_theta": "10000"}, {"rope_theta": 0}, {"rope_theta": []}, {"model_type": {}}),
        *({"tie_word_embeddings": "false"}, {"tie_word_embeddings": 1}, {"rope_scaling": [1]}, {"rope_scaling": "x"}),
        *({"rope_parameters": 3}, {"rope_scaling": {"rope_type": ["llama3"]}}, {"rope_scaling": {"type": "\x1b[2J"}}),
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 1,
                          "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "llama3", "factor": "8", "low_freq_factor": 1, "high_freq_factor": 4,
                          "original_max_position_embeddings": 64}},
        *({"hidden_act": ["silu"] * 5000}, {"quantization_config": {"a" * 9999: 1}}, {"partial_rotary_factor": "half"}),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_are_none(hf, tmp_path, capsys, fields):
    configure(hf, **fields)
    report = refused(hf, tmp_path / "out", capsys)
    assert str(hf / "config.json") in report
    assert len(report) < 2000
    assert "\x1b" not in report


CONFIGS = {
    "levels": b"[" * 200_000,
    "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "NaN": b'{"rope_theta": NaN}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_bytes_that_are_no_json(hf, tmp_path, capsys, kind, name):
    split(hf)
    (hf / name).write_bytes(CONFIGS[kind])
    report = refused(hf, tmp_path / "out", capsys)
    assert str(hf / name) in report
    assert len(report) < 2000


def test_what_is_no_file(hf, tmp_path, capsys):
    (hf / "config.json").unlink()
    os.mkfifo(hf / "config.json")
    assert "is a FIFO, not a regular file" in refused(hf, tmp_path / "out", capsys)
    (hf / "config.json").unlink()
    (hf / "config.json").symlink_to("/dev/zero")
    assert "is a device, not a regular file" in refused(hf, tmp_path / "out", capsys)
    (hf / "config.json").unlink()
    (hf / "config.json").symlink_to(tmp_path / "gone")
    assert "cannot be read" in refused(hf, tmp_path / "out", capsys)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(300 << 20)
    (hf / "config.json").unlink()
    (hf / "config.json").symlink_to(tmp_path / "large.json")
    assert "is longer than a model's configuration may be" in refused(hf, tmp_path / "out", capsys)


def test_an_index_with_names_of_any_length(hf, tmp_path, capsys):
    index = split(hf, "a" * 5000 + ".safetensors")
    assert "lists files that are missing" in refused(hf, tmp_path / "out", capsys)
    names = {f"\x1b[2J{number}" + "x" * 50_000: "model-00001-of-00001.safetensors" for number in range(30)}
    index.write_text(json.dumps({"weight_map": names}))
    report = refused(hf, tmp_path / "out", capsys)
    assert len(report) < 10_000
    assert "\x1b" not in report


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


NUMBERS = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS = {
    "a length beyond the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "a length of 200 MB": (200 << 20).to_bytes(8, "little") + b"{" * 100,
    "levels": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "overlapping": header(a=NUMBERS, b={**NUMBERS, "data_offsets": [8, 24]}) + b"\0" * 24,
    "beyond the file": header(a={**NUMBERS, "data_offsets": [0, 1 << 40], "shape": [1 << 38]}) + b"\0" * 16,
    "another size": header(a={**NUMBERS, "shape": [3, 3]}) + b"\0" * 16,
    "a shape that overflows": header(a={**NUMBERS, "shape": [1 << 62, 1 << 62]}) + b"\0" * 16,
    "a hole": header(a={**NUMBERS, "data_offsets": [4, 20]}) + b"\0" * 20,
    "another dtype": header(a={**NUMBERS, "dtype": "\x1b[2J"}) + b"\0" * 16,
    "5,000 digits": header(a=NUMBERS).replace(b"16]", b"9" * 5000 + b"]"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie(hf, tmp_path, capsys, kind):
    (hf / "model.safetensors").write_bytes(HEADERS[kind])
    report = refused(hf, tmp_path / "out", capsys)
    assert f"{hf / 'model.safetensors'}\n    damaged or incomplete" in report
    assert len(report) < 2000


def test_control_characters_of_arguments_are_escaped(hf, tmp_path, capsys):
    assert main(["convert", "from-hf", f"{tmp_path}/\x1b[2Jnone", str(tmp_path / "out")]) == 2
    assert main(["convert", "from-hf", str(hf), f"{tmp_path}/o\x1b[2J\nut"]) == 0
    assert (
        main(["convert", "to-hf", f"{tmp_path}/o\x1b[2J\nut", f"{tmp_path}/b\x07ack", "--tokenizer", "x\x1b[31m"]) == 2
    )
    assert main(["convert", "to-hf", f"{tmp_path}/o\x1b[2J\nut", f"{tmp_path}/b\x07ack"]) == 0
    printed = capsys.readouterr()
    assert not [c for c in printed.out + printed.err if not c.isprintable() and c != "\n"]
    assert len(printed.out.splitlines()) == 2
