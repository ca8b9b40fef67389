"""Small checkpoints that torchtitan v0.2.2 saved; `distributed/torchtitan_v022/make.py` makes them anew."""

from __future__ import annotations

import io
import shutil
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from quadriga.checkpoint.stored import open_stored
from quadriga.config.model_spec import ModelSpec

TORCHTITAN_FOLDER = Path(__file__).parent / "distributed/torchtitan_v022"
SPEC = ModelSpec(
    "llama3", "theirs", dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=272, rope_theta=5e5
)
SIZES = tuple(
    f"--model.{name}={getattr(SPEC, name)}"
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
)


def unpack(name: str, folder: Path) -> Path:
    """A checkpoint folder of theirs: `one_rank` (step-3; step-6, weights alone) or `two_ranks` (step-2)."""
    with tarfile.open(TORCHTITAN_FOLDER / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def run_folder(name: str, folder: Path) -> Path:
    """A run folder of theirs, whose `checkpoint/` was unpacked."""
    unpack(name, folder / "checkpoint")
    return folder


def by_dcp(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by its own names, as stock torch.distributed.checkpoint reads them."""
    tensors = {
        name: torch.zeros(one.shape, dtype=one.dtype) for name, one in open_stored(step, None).plan.tensors.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=step)
    return tensors


def in_rotate_half_order(name: str, theirs: torch.Tensor) -> torch.Tensor:
    """Row by row: entry 2i + j of a head there is entry i + j * half here."""
    if (".attention.wq.weight" not in name and ".attention.wk.weight" not in name) or theirs.dim() == 0:
        return theirs
    ours, half = torch.empty_like(theirs), SPEC.head_dim // 2
    for row in range(theirs.shape[0]):
        head, place = divmod(row, SPEC.head_dim)
        pair, second = divmod(place, 2)
        ours[head * SPEC.head_dim + pair + second * half] = theirs[row]
    return ours


def expected(step: Path) -> dict[str, torch.Tensor]:
    """What a load must give, by our flat names."""
    return {our_name(name): in_rotate_half_order(name, tensor) for name, tensor in by_dcp(step).items()}


def our_name(theirs: str) -> str:
    if theirs.startswith("optimizer."):
        return f"optimizer.{theirs.removeprefix('optimizer.state.')}"
    return f"model.{theirs}"


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def zip64(value: bytes, start: int) -> bytes:
    """An archive of one record whose first byte the directory gives as a number of 64 bits."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", value)
    content = stream.getvalue()
    at, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entry = bytearray(content[at:end])
    entry[30:32], entry[42:46] = b"\x0c\x00", b"\xff" * 4
    entry += struct.pack("<HHQ", 1, 8, start)
    closing = content[end : end + 12] + struct.pack("<LL", len(entry), at) + content[end + 20 :]
    return content[:at] + bytes(entry) + closing
