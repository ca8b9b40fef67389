"""An independent training loop: what the trainer should have computed, worked out without it.

Documents are read from the JSON lines that the run read; which document each row took comes from the run's own list of
documents, and every window is made here. The model is that of `transformers`, the optimizer that of torch. Nothing of
`quadriga` is imported: a fault of the trainer cannot be a fault of the oracle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

BOS, EOS = 256, 257  # of the byte tokenizer


@dataclass(frozen=True)
class Setting:
    """One experiment, in the numbers that both trainers are given."""

    dim: int = 32
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn_dim: int = 64
    vocab_size: int = 320
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    seq_len: int = 48
    global_batch: int = 8
    steps: int = 40
    lr: float = 4e-3
    warmup: int = 6
    min_lr_factor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norms: bool = True
    max_norm: float = 0.6


@dataclass
class Trained:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def learning_rate(setting: Setting, step: int) -> float:
    """Linear warm-up, then linear decay from the peak in its first step, that would reach its floor one step after the
    last, as torchtitan v0.2.2 defines it. Steps count from 1."""
    if step <= setting.warmup:
        return setting.lr * (step / setting.warmup)
    progress = (step - 1 - setting.warmup) / (setting.steps - setting.warmup)
    return setting.lr * (setting.min_lr_factor + (1.0 - setting.min_lr_factor) * (1.0 - progress))


def texts_by_offset(path: Path) -> dict[int, str]:
    """The text of each line of a JSON lines file by the offset of its first byte."""
    texts, offset = {}, 0
    for line in path.read_bytes().splitlines(keepends=True):
        texts[offset] = json.loads(line)["text"]
        offset += len(line)
    return texts


def documents_read(folder: Path) -> dict[int, list[list[str]]]:
    """Of each row of the global batch, the names of the documents of every step, as the ranks wrote them down."""
    rows: dict[int, dict[int, list[str]]] = {}
    for file in sorted((folder / "documents").glob("rank*.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            for row, names in record["rows"].items():
                rows.setdefault(int(row), {})[record["step"]] = names
    return {row: [steps[step] for step in sorted(steps)] for row, steps in sorted(rows.items())}


def batches(setting: Setting, data: Path, rows: dict[int, list[list[str]]]) -> Iterator[Tensor]:
    """The ids of each step, (global_batch, seq_len + 1), made of whole documents and checked against the list."""
    texts = texts_by_offset(data)
    streams = [_windows(setting, texts, rows[row]) for row in range(setting.global_batch)]
    for _ in range(setting.steps):
        yield torch.tensor([next(stream) for stream in streams])


def _windows(setting: Setting, texts: dict[int, str], steps: list[list[str]]) -> Iterator[list[int]]:
    """Windows of seq_len + 1 ids of the row's documents one after the other; each begins with the last id of the one
    before, so that every id is predicted once."""
    order = [names[0] for names in steps[:1]]
    for names in steps:  # a document that goes on is the first of the next step too
        assert names[0] == order[-1] or len(order) == 1
        order += names if names[0] != order[-1] else names[1:]
    ids: list[int] = []
    owner: list[str] = []  # of each id, its document
    for name in order:
        document = [BOS, *texts[int(name.split(":")[2])].encode(), EOS]
        ids += document
        owner += [name] * len(document)
    for number, names in enumerate(steps):
        start = number * setting.seq_len
        window = slice(start, start + setting.seq_len + 1)
        assert list(dict.fromkeys(owner[window])) == names, f"step {number + 1} read other documents than its ids"
        yield ids[window]


def hugging_face_name(name: str) -> str:
    """`layers.0.attention.wq.weight` as `transformers` calls it."""
    parts = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "embed_tokens",
    }
    if name == "output.weight":
        return "lm_head.weight"
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def build_model(setting: Setting, weights: dict[str, Tensor]) -> torch.nn.Module:
    """A Llama of `transformers` that holds `weights`, which have the names of a checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=setting.dim,
        num_hidden_layers=setting.n_layers,
        num_attention_heads=setting.n_heads,
        num_key_value_heads=setting.n_kv_heads,
        intermediate_size=setting.ffn_dim,
        vocab_size=setting.vocab_size,
        rms_norm_eps=setting.norm_eps,
        # Llama 3.1's scaling (its config.json on the Hub): slow frequencies are eight times slower.
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": setting.rope_theta,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float()
    model.config.use_cache = False
    theirs = {hugging_face_name(name): tensor.clone() for name, tensor in weights.items()}
    missing = model.load_state_dict(theirs, strict=True)
    assert not missing.missing_keys
    return model


def train(setting: Setting, data: Path, rows: dict[int, list[list[str]]], start: dict[str, Tensor]) -> Trained:
    """Train from the weights `start` on the documents `rows`; one process, the whole batch at once."""
    model = build_model(setting, start)
    named = dict(model.named_parameters())
    norms = setting.weight_decay if setting.decay_norms else 0.0
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": setting.weight_decay},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": norms},
        ],
        lr=setting.lr,
        betas=setting.betas,
        eps=setting.eps,
        foreach=False,
    )
    trained = Trained()
    for step, ids in enumerate(batches(setting, data, rows), 1):
        lr = learning_rate(setting, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        gradients = [parameter.grad for parameter in named.values()]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        if norm > setting.max_norm:
            for gradient in gradients:
                gradient.mul_(setting.max_norm / norm)
        optimizer.step()
        optimizer.zero_grad()
        trained.losses.append(loss.item())
        trained.norms.append(norm)
        trained.lrs.append(lr)
    trained.weights = {name: named[hugging_face_name(name)].detach() for name in start}
    return trained


def read_weights(step_folder: Path, scratch: Path) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint, read by torch's own reader of its format."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(step_folder, scratch)
    state = torch.load(scratch, weights_only=True)
    return {name.removeprefix("model."): value for name, value in _flat(state) if name.startswith("model.")}


def _flat(state: dict[str, object], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield prefix + key, value
