"""Asks one GPU what a CPU cannot answer: rates, attention kernels and their errors, copies, skipped updates.

    python benchmarks/gpu_probe.py --out probe.json      # on a GPU, about a minute
    python benchmarks/gpu_probe.py --dry                 # without one: the questions that a CPU can answer, small

Each question is asked by itself, and one that fails does not stop the next. The answers are printed as lines of JSON.
The exit code is 1 if a question failed. `gpu_check.sh` runs this script, and `gpu_table.py` judges the answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common  # noqa: F401 (makes the package importable)
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quadriga.comm.nvshmem import is_offered
from quadriga.config.schema import Optimizer as OptimizerSection
from quadriga.optim.clip import gradient_norms
from quadriga.optim.optimizer import build_optimizer, skip_update_if
from quadriga.parallel.attention_kernels import attend, attend_backward

HALF, SINGLE = torch.bfloat16, torch.float32
BLOCK_OF_8B = (4096, 14336)  # the largest matrix of a block of the 8B model
ROUNDS = 200  # of the race of found_inf


def versions(device: torch.device) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": torch.cuda.nccl.version(),
        "device": torch.cuda.get_device_name(device),
        "nvshmem_offered": is_offered(),
    }


def rates(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and FLOP/s of a matrix product in bfloat16 and float32."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy_tb_per_s": 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e9}
    for name, dtype in (("bfloat16", HALF), ("float32", SINGLE)):
        matrix = torch.randn(8192, 8192, device=device, dtype=dtype)
        found[f"{name}_tflops"] = 2 * 8192**3 / milliseconds(partial(torch.matmul, matrix, matrix)) / 1e9
    return found


def attention_time(device: torch.device) -> dict[str, Any]:
    """Forward and backward of the attention of one block of 8B at 8,192 tokens, for each kernel; which is the default.

    FLOP: 4 per pair of positions and dimension forward, 10 backward, of which the causal mask leaves half.
    """
    q, k, v = (torch.randn(1, heads, 8192, 128, device=device, dtype=HALF, requires_grad=True) for heads in (32, 8, 8))
    grad = torch.randn(1, 32, 8192, 128, device=device, dtype=HALF)
    flop = 14 * 32 * 8192**2 * 128 / 2

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    node = forward().grad_fn  # ScaledDotProductCudnnAttentionBackward0
    name = node.name().removeprefix("ScaledDotProduct").partition("Attention")[0] if node is not None else "no"
    found: dict[str, Any] = {"default": f"{name.upper()}_ATTENTION"}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            taken = milliseconds(lambda: forward().backward(grad))
        found[backend.name] = {"ms": taken, "tflops": flop / taken / 1e9}
    return found


def attention_of_parts(device: torch.device) -> dict[str, list[float]]:
    """Relative errors of out, dq, dk and dv of the kernels of context parallelism against float64: for queries at the
    end of the keys, and for a length that the memory-efficient kernel pads."""
    dtypes = (HALF, SINGLE) if device.type == "cuda" else (SINGLE,)
    return {
        f"{str(dtype).removeprefix('torch.')}, {queries} queries": attention_errors(device, dtype, queries)
        for dtype in dtypes
        for queries in (256, 96)
    }


def attention_errors(device: torch.device, dtype: torch.dtype, queries: int) -> list[float]:
    keys, head_dim = 256, 64
    shapes = ((8, queries), (2, keys), (2, keys), (8, queries))
    q, k, v, grad = (torch.randn(2, heads, length, head_dim, device=device, dtype=dtype) for heads, length in shapes)
    out, lse = attend(q, k, v, True)
    found = (out, *attend_backward(grad, q, k, v, out.to(dtype), lse, True))
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    wide_k, wide_v = (tensor.repeat_interleave(4, dim=1) for tensor in exact[1:])
    scores = exact[0] @ wide_k.mT / head_dim**0.5
    seen = torch.ones(queries, keys, device=device, dtype=torch.bool).tril(keys - queries)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide_v
    expected.backward(grad.double())
    wanted = (expected.detach(), *(tensor.grad for tensor in exact))
    return [relative_error(ours, theirs) for ours, theirs in zip(found, wanted, strict=True) if theirs is not None]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def copies_to_the_device(device: torch.device) -> dict[str, float]:
    """Milliseconds that the host waits in a copy of token ids while the device is busy, by bytes and kind of memory."""
    found = {}
    for bytes_of_ids in (1 << 15, 1 << 16, 1 << 17, 1 << 19):
        for pinned in (False, True):
            ids = torch.zeros(bytes_of_ids // 8, dtype=torch.int64, pin_memory=pinned)
            torch.cuda.synchronize()
            torch.cuda._sleep(100_000_000)
            start = time.perf_counter()
            ids.to(device, non_blocking=True)
            found[f"{bytes_of_ids}, {'pinned' if pinned else 'pageable'}"] = 1e3 * (time.perf_counter() - start)
            torch.cuda.synchronize()
    return found


def race_of_found_inf(device: torch.device) -> dict[str, int]:
    """With CPU offload, Adam runs on the host, and whether a step is bad is known on the device only. Counts good steps
    whose update was skipped, and bad steps whose update was made."""
    wrong = {"good_steps_skipped": 0, "bad_steps_taken": 0}
    for number in range(ROUNDS):
        bad = number % 2 == 1
        weight = torch.nn.Parameter(torch.zeros(64))
        optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
        weight.grad = torch.ones(64)
        # The host memory that the next small copy takes has the wrong answer in it.
        stale = torch.full((1,), float(not bad), device=device).to("cpu", non_blocking=True)
        synchronize(device)
        del stale
        if device.type == "cuda":
            torch.cuda._sleep(2_000_000)
        skip_update_if(torch.full((), float(bad), device=device) > 0, optimizer, on_device=device.type == "cuda")
        optimizer.step()
        moved = bool(weight.detach().abs().max() > 0)
        wrong["good_steps_skipped"] += not bad and not moved
        wrong["bad_steps_taken"] += bad and moved
    return {"rounds": ROUNDS, **wrong}


def norm_time(device: torch.device) -> dict[str, float]:
    """Milliseconds of the norm of 16 gradients in float32, as clipping computes it, and the bytes read per second."""
    shape = BLOCK_OF_8B if device.type == "cuda" else (64, 64)
    gradients = [torch.randn(shape, device=device) for _ in range(16)]
    taken = milliseconds(lambda: gradient_norms(gradients))
    return {"ms": taken, "tb_per_s": 4 * sum(gradient.numel() for gradient in gradients) / taken / 1e9}


def update_time(device: torch.device) -> dict[str, float]:
    """Milliseconds of an update of 8 B parameters, computed from 8 matrices, by formats of weights and moments."""
    shape = BLOCK_OF_8B if device.type == "cuda" else (64, 64)
    found = {}
    for weights, moments in ((HALF, HALF), (HALF, SINGLE), (SINGLE, HALF), (SINGLE, None)):
        named = [
            (f"{number}", torch.nn.Parameter(torch.randn(shape, device=device).to(weights))) for number in range(8)
        ]
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        state_dtype = moments and str(moments).removeprefix("torch.")
        optimizer = build_optimizer(named, OptimizerSection.model_validate({"state_dtype": state_dtype}))
        count = sum(parameter.numel() for _, parameter in named)
        found[f"{weights}, moments {moments or weights}"] = 8e9 * milliseconds(optimizer.step, 5) / count
        del named, optimizer
    return found


def milliseconds(run: Callable[[], object], times: int = 10) -> float:
    """The mean time of `run` on the device, after two calls that do not count; on a CPU of one call."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    run()
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


ANYWHERE = (attention_of_parts, race_of_found_inf, norm_time, update_time)
QUESTIONS: tuple[Callable[[torch.device], Any], ...] = (
    *(versions, rates, attention_time, attention_of_parts, race_of_found_inf),
    *(copies_to_the_device, norm_time, update_time),
)


def ask(question: Callable[[torch.device], Any], device: torch.device) -> Any:
    """The answer, or the error as {"failed": text}."""
    try:
        return question(device)
    except Exception as error:  # noqa: BLE001 - an answer too; the next question is asked
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask one GPU what a CPU cannot answer.")
    parser.add_argument("--dry", action="store_true", help="only the questions that a CPU can answer, on small tensors")
    parser.add_argument("--out", type=Path, help="also write the answers as one JSON object")
    chosen = parser.parse_args()
    if not chosen.dry and not torch.cuda.is_available():
        print("not measured: no CUDA device is visible")
        return 2
    device = torch.device("cpu") if chosen.dry else torch.device("cuda", 0)
    answers = {}
    for question in ANYWHERE if chosen.dry else QUESTIONS:
        answers[question.__name__] = answer = ask(question, device)
        print(json.dumps({question.__name__: answer}), flush=True)
    if chosen.out is not None and not chosen.dry:
        chosen.out.write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")
    return int(any(isinstance(answer, dict) and "failed" in answer for answer in answers.values()))


if __name__ == "__main__":
    sys.exit(main())
