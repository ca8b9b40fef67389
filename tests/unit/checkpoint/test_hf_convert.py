"""`quadriga convert` against the library of Hugging Face: the same logits, the same bits, whatever the model."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from hf_models import SCALED, SPEC, logits, random_model, save, write_hf
from safetensors.torch import load, load_file

from quadriga.checkpoint.files import files_at
from quadriga.checkpoint.folder import read_checkpoint
from quadriga.checkpoint.hf import import_hf, read_hf
from quadriga.checkpoint.hf_export import export_hf
from quadriga.checkpoint.hf_folder import HfFolder
from quadriga.checkpoint.load import load_tensors
from quadriga.cli.main import main
from quadriga.config.schema import JobConfig
from quadriga.models.llama.model import Llama
from quadriga.models.registry import hf_config, spec_from_hf, tensor_names


def convert(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def theirs(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load_checkpoint(folder: Path, model: Llama) -> Llama:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_tensors(folder, {f"model.{name}": value for name, value in model.state_dict().items()}, None)
    return model


@pytest.mark.parametrize("scaling", [None, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_gives_the_same_logits(tmp_path, tied, scaling):
    spec = dataclasses.replace(SPEC, tie_embeddings=tied, rope_scaling=scaling)
    model = random_model(spec)
    save(model, tmp_path / "checkpoint")
    convert("to-hf", tmp_path / "checkpoint", tmp_path / "out")
    assert ("lm_head.weight" in weights_in(tmp_path / "out")) is not tied
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["torch_dtype"]) == (tied, "float32")
    loaded = theirs(tmp_path / "out")
    expected = logits(model, spec)
    assert expected.std() > 0.5
    assert loaded.dtype == torch.float32
    assert (logits(loaded, spec) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("scaling", [None, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_random_llama_of_theirs_gives_the_same_logits_here(tmp_path, tied, scaling):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = hf_config(dataclasses.replace(SPEC, tie_embeddings=tied, rope_scaling=scaling), bos_id=1, eos_id=2)
    torch.manual_seed(1)
    reference = LlamaForCausalLM(LlamaConfig(**{**config, "initializer_range": 0.3}))
    reference.save_pretrained(tmp_path / "hf", max_shard_size="60KB")  # in the spelling of their version
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    convert("from-hf", tmp_path / "hf", tmp_path / "ours")
    found = read_checkpoint(tmp_path / "ours" / "step-0")
    assert (found.step, found.contents) == (0, ("model",))
    folder = HfFolder(tmp_path / "hf")
    spec = spec_from_hf(folder.config(), folder.config_file)
    expected = logits(reference, spec)
    assert expected.std() > 0.5
    converted = load_checkpoint(tmp_path / "ours" / "step-0", Llama(spec))
    assert (logits(converted, spec) - expected).abs().max() <= 1e-4
    direct = random_model(spec)
    read_hf(tmp_path / "hf", direct.state_dict(), tensor_names(spec), None)
    assert torch.equal(logits(direct, spec), logits(converted, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_there_and_back_no_bit_changes(tmp_path, dtype):
    model = random_model(SPEC).to(dtype)
    save(model, tmp_path / "first")
    convert("to-hf", tmp_path / "first", tmp_path / "out")
    convert("from-hf", tmp_path / "out", tmp_path / "second")
    convert("to-hf", tmp_path / "second", tmp_path / "again")
    back = load_checkpoint(tmp_path / "second" / "step-0", Llama(SPEC).to(dtype))
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
        assert back.state_dict()[name].dtype == dtype
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "again")]
    assert files[0] == files[1]


def test_files_are_as_large_as_asked_for_and_listed(tmp_path):
    model = random_model(SPEC)
    found = save(model, tmp_path / "checkpoint")
    names, config = tensor_names(SPEC), hf_config(SPEC, bos_id=None, eos_id=None)
    export_hf(found, tmp_path / "out", names, config, None, most=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 5
    assert all(file.stat().st_size <= 20_000 + 4_000 for file in files)  # tensors, and the header
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert set(held) == {tensor_names(SPEC).hf_name(name) for name in model.state_dict()}
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert (logits(theirs(tmp_path / "out"), SPEC) - logits(model, SPEC)).abs().max() <= 1e-4


def test_weights_are_rounded_on_request(tmp_path):
    model = random_model(SPEC)
    save(model, tmp_path / "checkpoint")
    convert("to-hf", tmp_path / "checkpoint", tmp_path / "out", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    held = weights_in(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(held[tensor_names(SPEC).hf_name(name)], value.bfloat16())
    convert("from-hf", tmp_path / "out", tmp_path / "back", "--dtype", "float32")
    back = load_checkpoint(tmp_path / "back" / "step-0", Llama(SPEC))
    assert torch.equal(back.norm.weight, model.norm.weight.bfloat16().float())


def test_values_that_float16_cannot_hold_are_refused(tmp_path, capsys):
    model = random_model(SPEC)
    with torch.no_grad():
        model.layers["2"].attention.wo.weight[3, 3] = 1e5
    save(model, tmp_path / "checkpoint")
    write_hf(model, tmp_path / "hf")
    for direction, source in (("to-hf", "checkpoint"), ("from-hf", "hf")):
        out = tmp_path / direction
        assert main(["convert", direction, str(tmp_path / source), str(out), "--dtype", "float16"]) == 2
        output = capsys.readouterr().err
        assert "model.layers.2.self_attn.o_proj.weight\n    has values outside the range of float16" in output
        assert not out.exists() or not list(out.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    folder = tmp_path / "assets"
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 5, "</s>": 6}, "a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "notes.txt").write_text("not to be copied")
    return folder


def test_tokenizer_and_ids_come_from_the_run_or_from_the_command_line(tmp_path, tokenizer_folder):
    config = JobConfig.model_validate(
        {"model": {"hf_assets_path": str(tokenizer_folder)}, "training": {"seq_len": 200_000}}
    )
    save(random_model(SPEC), tmp_path / "checkpoint", config=config.model_dump(mode="json"))
    convert("to-hf", tmp_path / "checkpoint", tmp_path / "out")
    save(random_model(SPEC), tmp_path / "bare")
    convert("to-hf", tmp_path / "bare", tmp_path / "named", "--tokenizer", tokenizer_folder)
    for out, longest in (("out", 200_000), ("named", 8192)):
        written = json.loads((tmp_path / out / "config.json").read_text())
        assert (written["bos_token_id"], written["eos_token_id"], written["max_position_embeddings"]) == (5, 6, longest)
        names = {path.name for path in (tmp_path / out).iterdir()}
        assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_that_has_gone_leaves_the_ids_open(tmp_path, capsys):
    config = JobConfig.model_validate({"model": {"hf_assets_path": str(tmp_path / "gone")}}).model_dump(mode="json")
    save(random_model(SPEC), tmp_path / "checkpoint", config=config)
    convert("to-hf", tmp_path / "checkpoint", tmp_path / "out")
    assert "no tokenizer is at" in capsys.readouterr().err
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (None, None)


@pytest.mark.parametrize("assets", [None, "tokenizer_folder"])
def test_token_files_without_a_tokenizer_have_their_eos(tmp_path, request, capsys, assets):
    training = {"dataset": "tokens", "dataset_path": "ids.bin", "token_eos_id": 3}
    model = {"hf_assets_path": str(request.getfixturevalue(assets))} if assets else {}
    config = JobConfig.model_validate({"model": model, "training": training}).model_dump(mode="json")
    save(random_model(SPEC), tmp_path / "checkpoint", config=config)
    convert("to-hf", tmp_path / "checkpoint", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == ((5, 6) if assets else (None, 3))
    assert ("of its token ids only EOS is set" in capsys.readouterr().err) == (not assets)


def test_the_newest_checkpoint_of_a_run_folder_is_taken(tmp_path, capsys):
    for step in (3, 12):
        save(random_model(SPEC, seed=step), tmp_path / "run" / "saves", step)
    for number, source in enumerate(("run", "run/saves", "run/saves/step-12")):
        convert("to-hf", tmp_path / source, tmp_path / f"out-{number}")
        assert capsys.readouterr().out == f"{tmp_path}/out-{number}\n"
        found = weights_in(tmp_path / f"out-{number}")["model.norm.weight"]
        assert torch.equal(found, random_model(SPEC, seed=12).norm.weight)


def test_a_file_says_what_a_checkpoint_does_not(tmp_path, capsys):
    """Of a checkpoint from before the model was written into it."""
    text = "[model]\nvocab_size = 320\ndim = 64\nn_layers = 2\nn_heads = 4\nn_kv_heads = 2\nffn_dim = 96\n"
    (tmp_path / "run.toml").write_text(text)
    spec = dataclasses.replace(
        SPEC, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=320, rope_scaling=SCALED
    )
    found = save(random_model(spec), tmp_path / "checkpoint")
    manifest = Path(found.path, "train_state.json")
    forget_the_model(manifest)
    assert main(["convert", "to-hf", found.path, str(tmp_path / "out")]) == 2
    assert "--config FILE.toml" in capsys.readouterr().err
    convert("to-hf", found.path, tmp_path / "out", "--config", tmp_path / "run.toml")
    assert set(weights_in(tmp_path / "out")) == {
        tensor_names(spec).hf_name(name) for name in random_model(spec).state_dict()
    }
    (tmp_path / "run.toml").write_text(text.replace("96", "128"))
    assert main(["convert", "to-hf", found.path, str(tmp_path / "other"), "--config", str(tmp_path / "run.toml")]) == 2
    assert "layers.0.feed_forward.w1.weight: [96, 64] in the checkpoint, [128, 64]" in capsys.readouterr().err


def forget_the_model(manifest: Path) -> None:
    from quadriga.checkpoint.folder import format_manifest

    state = json.loads(manifest.read_text())
    del state["extra"]["model"]
    manifest.write_text(format_manifest(state))


def test_what_a_killed_conversion_left_is_in_nobodys_way(tmp_path):
    found = save(random_model(SPEC), tmp_path / "checkpoint")
    left = tmp_path / ".out.saving"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    convert("to-hf", found.path, tmp_path / "out")
    assert not left.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    left = tmp_path / "back" / ".step-0.saving"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    convert("from-hf", tmp_path / "out", tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["step-0"]


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, direction, root):
    """No file of the process may grow beyond a limit, which is the same to a writer."""
    model = random_model(SPEC)
    source = save(model, tmp_path / "checkpoint").path if direction == "to-hf" else write_hf(model, tmp_path / "hf")
    done = subprocess.run(
        [sys.executable, "-m", "quadriga.cli", "convert", direction, str(source), str(tmp_path / "out")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if "out" in path.name and path.is_file()]
    assert sorted(path.name for path in tmp_path.iterdir()) in (["checkpoint"], ["hf", "out"])


def test_a_bit_that_flipped_in_the_checkpoint_is_not_exported(tmp_path, capsys):
    found = save(random_model(SPEC), tmp_path / "checkpoint")
    file = Path(found.path, "__0_0.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert main(["convert", "to-hf", found.path, str(tmp_path / "out")]) == 1
    assert f"{file} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_may_replace_an_older_one(tmp_path):
    config, names = hf_config(SPEC, bos_id=None, eos_id=None), tensor_names(SPEC)
    export_hf(save(random_model(SPEC, 1), tmp_path, 1), tmp_path / "out", names, config, None, most=20_000)
    export_hf(save(random_model(SPEC, 2), tmp_path, 2), tmp_path / "out", names, config, None, replace=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(weights_in(tmp_path / "out")["model.norm.weight"], random_model(SPEC, 2).norm.weight)


def test_an_import_into_a_place_of_our_own(tmp_path):
    """`import_hf` is what the command calls; the name that it returns can be read."""
    source = HfFolder(write_hf(random_model(SPEC), tmp_path / "hf"))
    name = import_hf(source, tmp_path / "ours", tensor_names(SPEC), {"model": {}})
    assert read_checkpoint(name).extra == {"model": {}}


def test_checkpoints_and_exports_may_lie_in_an_object_store(tmp_path):
    model = random_model(SPEC)
    hf = write_hf(model, tmp_path / "hf")
    store = f"memory://{tmp_path.name}"
    convert("from-hf", hf, f"{store}/run/checkpoint")
    convert("to-hf", f"{store}/run", f"{store}/out", "--dtype", "bfloat16")
    files = files_at(store)
    assert files.names(f"{store}/out") == ["config.json", "model.safetensors"]
    held = load(files.read(f"{store}/out/model.safetensors"))
    assert all(torch.equal(held[tensor_names(SPEC).hf_name(n)], v.bfloat16()) for n, v in model.state_dict().items())
    assert main(["convert", "to-hf", f"{store}/run", f"{store}/out"]) == 2, "what is there is not overwritten"


def test_messages_of_a_conversion_can_be_followed(tmp_path, capsys):
    source, out = tmp_path / "hf", tmp_path / "a b"
    write_hf(random_model(SPEC), source)
    convert("from-hf", source, out)
    assert f"to start from it: --checkpoint.enable --checkpoint.initial_load_path '{out}'" in capsys.readouterr().err
    assert main(["convert", "to-hf", str(out), str(tmp_path / "c"), "--tokenizer", "none"]) == 2
    assert "--tokenizer = none" in capsys.readouterr().err
