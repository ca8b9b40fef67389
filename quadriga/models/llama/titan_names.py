"""torchtitan's Llama: the same tensors with the same names, but the rows of `wq` and `wk` have another order.

Rotary embeddings rotate pairs of entries of a head. torchtitan, like Meta's code, pairs neighbors (2i, 2i + 1).
Quadriga, like transformers, pairs entry i of the first half with entry i of the second half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quadriga.config.model_spec import ModelSpec
from quadriga.models.llama.plan import parallel_plan

_PAIRED = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")


@dataclass(frozen=True)
class TitanNames:
    """The tensors of one model in a checkpoint of torchtitan."""

    spec: ModelSpec

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by its name, which is the same in both programs."""
        return {parameter.name: parameter.shape for parameter in parallel_plan(self.spec).parameters}

    def paired_rows(self, name: str) -> int:
        """Rows per head, if the rows of this tensor are rotated in pairs; otherwise 0."""
        return self.spec.head_dim if _PAIRED.fullmatch(name) else 0
