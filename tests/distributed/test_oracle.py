"""The whole trainer against an independent loop (`tests/oracle.py`): 40 steps in float32 with AdamW, warm-up and decay,
accumulation and clipping. Layout tests compare Quadriga with itself; here the right answer comes from elsewhere."""

from __future__ import annotations

import ast
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Setting, Trained
from training import TINY, train

SETTING = Setting()
WORDS = [
    "the",
    "a",
    "of",
    "model",
    "loss",
    "gradient",
    "rank",
    "shard",
    "step",
    "token",
    "byte",
    "window",
    "layer",
    "head",
    "norm",
    "weight",
    "learns",
    "what",
    "it",
    "reads",
]
MATRICES = "--optimizer.no_decay_norms_and_biases"
# ranks, rows of a micro-batch, degrees and more
LAYOUTS = {
    "one rank": (1, 4, ()),
    "FSDP 2, accumulation 2": (2, 2, ("--parallelism.data_parallel_shard_degree=2",)),
    "HSDP 2x2, accumulation 2": (
        4,
        1,
        ("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=2", MATRICES),
    ),
}


def arguments(data: Path, rows: int) -> list[str]:
    s = SETTING
    return [
        *("--model.flavor=debugmodel", "--model.hf_assets_path=builtin:bytes", f"--model.dim={s.dim}"),
        *(f"--model.n_layers={s.n_layers}", f"--model.n_heads={s.n_heads}", f"--model.n_kv_heads={s.n_kv_heads}"),
        *(f"--model.ffn_dim={s.ffn_dim}", f"--model.vocab_size={s.vocab_size}"),
        *(f"--training.dataset_path={data}", "--training.dataset=jsonl", f"--training.seq_len={s.seq_len}"),
        *(f"--training.global_batch_size={s.global_batch}", f"--training.local_batch_size={rows}"),
        *(f"--training.steps={s.steps}", f"--training.max_norm={s.max_norm}", "--training.dtype=float32"),
        *("--training.mixed_precision_param=float32", "--training.mixed_precision_reduce=float32"),
        *("--optimizer.name=AdamW", f"--optimizer.lr={s.lr}", f"--optimizer.weight_decay={s.weight_decay}"),
        *(f"--optimizer.beta1={s.betas[0]}", f"--optimizer.beta2={s.betas[1]}", f"--optimizer.eps={s.eps}"),
        *(f"--lr_scheduler.warmup_steps={s.warmup}", "--lr_scheduler.decay_type=linear"),
        *(f"--lr_scheduler.min_lr_factor={s.min_lr_factor}", "--activation_checkpoint.mode=none"),
        *("--metrics.log_freq=1", "--metrics.log_documents", "--checkpoint.enable", "--checkpoint.interval=1000"),
        *("--checkpoint.async_mode=disabled", "--checkpoint.no_last_save_model_only"),
        *("--profiling.no_enable_profiling", "--metrics.no_enable_tensorboard", "--comm.init_timeout_seconds=300"),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """120 documents of all lengths: shorter than a window, and longer than several."""
    rng = random.Random(5)
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(120):
            text = " ".join(rng.choices(WORDS, k=rng.choice((1, 4, 20, 60))))
            file.write(json.dumps({"text": f"{number} {text} \u00e9"}) + "\n")
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trainer_computes_what_a_plain_loop_computes(layout: str, data: Path, tmp_path: Path) -> None:
    ranks, rows, degrees = LAYOUTS[layout]
    run, given = tmp_path / "run", [*arguments(data, rows), *degrees]
    train(run, ranks, *given, "--checkpoint.create_seed_checkpoint", file=None)
    records = train(run, ranks, *given, file=None)
    start = oracle.read_weights(run / "checkpoint/step-0", tmp_path / "start.pt")
    end = oracle.read_weights(run / f"checkpoint/step-{SETTING.steps}", tmp_path / "end.pt")
    read = oracle.documents_read(run)
    setting = replace(SETTING, decay_norms=MATRICES not in degrees)
    expected = oracle.train(setting, data, read, start)

    compare(records, end, start, expected)
    finished = [names[0] for row in read.values() for names in row]
    assert len(set(finished)) > 40, "many documents are read"


def compare(records: list[dict], end: dict[str, torch.Tensor], start: dict[str, torch.Tensor], right: Trained) -> None:
    assert [record["step"] for record in records] == list(range(1, SETTING.steps + 1))
    assert sum(norm > SETTING.max_norm for norm in right.norms) >= 30, "clipping bites"
    for key, values, tolerance in (
        ("loss", right.losses, 1e-5),
        ("grad_norm", right.norms, 1e-4),
        ("lr", right.lrs, 0),
    ):
        found = [record[key] for record in records]
        assert found == pytest.approx(values, rel=tolerance, abs=0), key
    assert end.keys() == right.weights.keys() == start.keys()
    for name, weight in end.items():
        moved = (right.weights[name] - start[name]).norm()
        assert moved > 0, name
        assert (weight - right.weights[name]).norm() / moved <= 1e-3, name


@pytest.mark.parametrize(
    ("seed", "digest"),
    [
        (42, "e64284d8e47e075dc455a0a636ae0d519b38ac26eca0f7ec37194d3cb6856137"),
        (7, "cc67c05e08ea2d688b068653ce7f206a3b81410c8862204bfb490b68f02f97b4"),
    ],
)
def test_a_seed_has_its_initial_weights_for_ever(seed: int, digest: str, tmp_path: Path) -> None:
    """On every layout, in every release: bytes in the order of names, float32, little-endian."""
    run = tmp_path / "run"
    train(run, 1, *TINY, f"--debug.seed={seed}", "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")
    weights = oracle.read_weights(run / "checkpoint/step-0", tmp_path / "start.pt")
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + b"\0" + weights[name].numpy().astype("<f4").tobytes())
    assert found.hexdigest() == digest


def test_the_oracle_knows_nothing_of_the_trainer() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {"torch", "json"} <= imported
    assert not [name for name in imported if name.split(".")[0] == "quadriga"]
