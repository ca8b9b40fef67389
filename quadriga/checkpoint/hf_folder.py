"""Reads a folder of Hugging Face weights: only safetensors, in one file, or in several files with an index.

A file is opened for one tensor at a time and memory-mapped, so only the copied part is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quadriga.checkpoint.hf_headers import EMBEDDING, HEAD, HfHeaders, open_safetensors
from quadriga.log import logger

COMPARED_BYTES = 1 << 26  # bytes per matrix that are compared at a time
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # names in a file


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, from the header of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class HfFolder(HfHeaders):
    """A folder of weights whose tensors are read on request."""

    def config(self) -> dict[str, Any]:
        """The content of `config.json`, as `raw_config` reads it.

        As in transformers, `tie_word_embeddings` is ignored if the output layer differs from the embedding.
        """
        config = self.raw_config()
        if config.get("tie_word_embeddings") is True and {HEAD, EMBEDDING} <= self.files.keys():
            if self._are_equal(HEAD, EMBEDDING):
                del self.files[HEAD]
            else:
                config["tie_word_embeddings"] = False
                logger.warning(
                    f"{self.config_file} has tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: loaded as untied"
                )
        return config

    def _are_equal(self, one: str, other: str) -> bool:
        """Whether two matrices are equal. Only some rows of each are in memory at a time."""
        entries = self.entries((one, other))
        shape = entries[one].shape
        if entries[one] != entries[other] or len(shape) != 2:
            return False
        rows = max(1, COMPARED_BYTES // max(1, shape[1] * entries[one].dtype.itemsize))
        with open_safetensors(self.files[one], "pt") as first, open_safetensors(self.files[other], "pt") as second:
            a, b = first.get_slice(one), second.get_slice(other)
            return all(torch.equal(a[at : at + rows], b[at : at + rows]) for at in range(0, shape[0], rows))

    def entries(self, names: Iterable[str]) -> dict[str, TensorInfo]:
        """Shapes and dtypes by name, as `headers` reads them."""
        return {name: TensorInfo(shape, FORMATS[form]) for name, (shape, form) in self.headers(names).items()}

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """The names sorted by file, so that each file is read in one pass."""
        return sorted(names, key=lambda name: (str(self.files[name]), name))

    def fill(self, name: str, into: torch.Tensor, offset: Sequence[int]) -> None:
        """Copies the slice of a tensor at `offset` with the shape of `into` to `into`, and converts the dtype."""
        box = tuple(slice(start, start + size) for start, size in zip(offset, into.shape, strict=True))
        with open_safetensors(self.files[name], "pt") as file, torch.no_grad():
            into.copy_(file.get_slice(name)[box])
