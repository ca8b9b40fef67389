"""torch 2.11 and 2.13 both work: a name that either lacks or deprecates appears in one file only."""

from __future__ import annotations

import pytest
from tree import PACKAGE, sources

COMPATIBILITY = "comm/collectives.py"
NOT_EVERYWHERE = [
    "set_symm_mem_for_comm",
    "set_separate_reduce_scatter_group",
    "set_reduce_scatter_max_input_buffers",
    "set_reduce_scatter_unused_params",
    "reset_iter_state",
    "DataParallelMeshDims",
    "linear_cross_entropy",
    "all_gather_single",
    "reduce_scatter_single",
    "dist.all_gather_into_tensor",
    "dist.reduce_scatter_tensor",
    "reduce_scatter_offset",
    "_warmup_p2p",
    "enable_symm_mem_for_group",
]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_file_names_what_versions_lack(path):
    if str(path.relative_to(PACKAGE)) == COMPATIBILITY:
        return
    text = path.read_text(encoding="utf-8")
    assert not [name for name in NOT_EVERYWHERE if name in text]
