"""The reference loop: a minimal training of a Llama in plain PyTorch. Prints `step N loss L` after each step.

    python benchmarks/bare.py --shape small --dtype bfloat16
    torchrun --standalone --nproc-per-node 2 benchmarks/bare.py     # FSDP2: each block and the root are units

It does only what training needs: random tokens from a pool in memory, forward pass, loss, backward pass, clipping,
fused AdamW. It reads no files and has no metrics, checkpoints or configuration. It trains the model of Quadriga (GQA,
SwiGLU, RMSNorm, RoPE, SDPA, float32 loss), and is the 1.00 with which `speed.py` and `startup.py` compare. Attention is
computed in the dtype of the model, and RoPE with negated and concatenated halves, as in a typical script. `--attention
float32` computes attention in float32, as Quadriga does for bfloat16 on a CPU. `--compile` compiles the whole model as
one graph, and the loss.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from shapes import BETAS, DTYPES, EPS, LR, MAX_NORM, NORM_EPS, ROPE_THETA, SHAPES, WEIGHT_DECAY, Shape
from torch import Tensor, nn

POOL = 8  # batches held in memory


class Attention(nn.Module):
    def __init__(self, shape: Shape, in_float32: bool) -> None:
        super().__init__()
        self.shape, self.in_float32 = shape, in_float32
        self.wq = nn.Linear(shape.dim, shape.n_heads * shape.head_dim, bias=False)
        self.wk = nn.Linear(shape.dim, shape.n_kv_heads * shape.head_dim, bias=False)
        self.wv = nn.Linear(shape.dim, shape.n_kv_heads * shape.head_dim, bias=False)
        self.wo = nn.Linear(shape.n_heads * shape.head_dim, shape.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads = (rows, length, -1, self.shape.head_dim)
        q = rotate(self.wq(x).view(heads).transpose(1, 2), cos, sin)
        k = rotate(self.wk(x).view(heads).transpose(1, 2), cos, sin)
        v = self.wv(x).view(heads).transpose(1, 2)
        if self.in_float32:
            q, k, v = q.float(), k.float(), v.float()
        grouped = self.shape.n_kv_heads != self.shape.n_heads
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.wo(attended.to(x.dtype).transpose(1, 2).reshape(rows, length, -1))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.w2 = nn.Linear(shape.ffn_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, shape: Shape, in_float32: bool) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(shape, in_float32), FeedForward(shape)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(shape.dim, eps=NORM_EPS), nn.RMSNorm(shape.dim, eps=NORM_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, in_float32: bool = False) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape, in_float32) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.dim, eps=NORM_EPS)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.seq_len).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.output(self.norm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def build(shape: Shape, dtype: torch.dtype, device: torch.device, in_float32: bool) -> Llama:
    torch.manual_seed(0)
    model = Llama(shape, in_float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model.to(device, dtype)


def shard(model: Llama, device: torch.device) -> None:
    """FSDP2 over all ranks, with parameters and gradients in the dtype of the model."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def random_batches(shape: Shape, rows: int, device: torch.device, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, labels), each int64 (rows, seq_len)."""
    generator = torch.Generator().manual_seed(rank)
    windows = torch.randint(shape.vocab_size, (POOL, rows, shape.seq_len + 1), generator=generator).to(device)
    while True:
        for window in windows:
            yield window[:, :-1], window[:, 1:]


def train(
    model: nn.Module,
    data: Iterator[tuple[Tensor, Tensor]],
    micro_batch: int,
    steps: int,
    prints_loss: bool,
    compiled: bool = False,
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    mean_loss = torch.compile(next_token_loss) if compiled else next_token_loss
    for step in range(1, steps + 1):
        tokens, labels = next(data)
        mean = torch.zeros((), device=tokens.device)
        parts = max(len(tokens) // micro_batch, 1)
        for x, y in zip(tokens.split(micro_batch), labels.split(micro_batch), strict=True):
            loss = mean_loss(model(x), y) / parts
            loss.backward()
            mean += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = mean.item()  # every rank waits for its step, as in Quadriga
        if prints_loss:
            print(f"step {step} loss {value:.4f}", flush=True)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description="The reference loop: a Llama in plain PyTorch.")
    parser.add_argument("--shape", default="debug", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of parameters, compute and gradients")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--attention", default="plain", choices=("plain", "float32"))
    parser.add_argument("--compile", action="store_true", help="torch.compile of the whole model, and of the loss")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seq_len", type=int, help="sequence length (default: the shape's)")
    parser.add_argument("--batch", type=int, help="global batch, in rows (default: the shape's)")
    parser.add_argument("--micro_batch", type=int, help="rows of one forward pass (default: all of the rank)")
    chosen = parser.parse_args()

    named = SHAPES[chosen.shape]
    shape = Shape(**{**vars(named), "seq_len": chosen.seq_len or named.seq_len, "batch": chosen.batch or named.batch})
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if chosen.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    model = build(shape, getattr(torch, chosen.dtype), device, chosen.attention == "float32")
    if ranks > 1:
        shard(model, device)
    if chosen.compile:
        model.compile()
    rows = shape.batch // ranks
    train(
        model,
        random_batches(shape, rows, device, rank),
        chosen.micro_batch or rows,
        chosen.steps,
        prints_loss=rank == 0,
        compiled=chosen.compile,
    )


if __name__ == "__main__":
    main()
