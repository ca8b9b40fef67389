"""torchtitan's Llama: the same tensors under the same names, but rows of `wq` and `wk` in another order.

Rotary embeddings turn pairs of entries of a head against each other. torchtitan pairs neighbours (2i, 2i + 1), as
Meta's code does; here, as in transformers, entry i of the first half is paired with entry i of the second.
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
        """Of every tensor, by its name, which is the same on both sides."""
        return {parameter.name: parameter.shape for parameter in parallel_plan(self.spec).parameters}

    def paired_rows(self, name: str) -> int:
        """How many rows make a head, where rows are paired in this tensor; 0 where they are not."""
        return self.spec.head_dim if _PAIRED.fullmatch(name) else 0
