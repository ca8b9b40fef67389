"""Loads tensors of a checkpoint into a run of any layout: of Quadriga, or weights and moments of torchtitan.

See `titan` for the content of a checkpoint of torchtitan.

torchtitan rotates pairs of neighboring rows of query and key matrices, Quadriga pairs of the two halves
(`TensorNames.paired_rows`). The rows of moments have the same order as those of their weights. A rank reads the
heads that overlap its shard and reorders their rows before it copies them. So there is no communication, and at most
one whole tensor of the model is in memory besides the shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from quadriga.checkpoint.files import Files, Location, files_at, join
from quadriga.checkpoint.folder import FileFacts
from quadriga.checkpoint.foreign import TensorNames
from quadriga.checkpoint.messages import compare_shapes, other_tensors, refusal_error
from quadriga.checkpoint.plan import Chunk, Plan, PlanError, PlannedTensor
from quadriga.checkpoint.stored import (
    Slice,
    TensorPlanner,
    TensorReader,
    copy_part,
    dcp_metadata,
    open_file,
    open_stored,
    read_chunk,
)
from quadriga.checkpoint.tensors import Tensors, convert_dcp_errors
from quadriga.checkpoint.titan import OPTIMIZER, STATE, refuse_other_titan_model, titan_name
from quadriga.errors import UserError
from quadriga.json_collectives import all_gather_json


def load_tensors(
    location: Location,
    tensors: Tensors,
    group: dist.ProcessGroup | None,
    *,
    facts: Mapping[str, FileFacts] | None = None,
    may_hold_more: bool = False,
    prefix: str = "",
    retries: int = 5,
    optional: str | None = None,
) -> tuple[list[str], list[str]]:
    """Fills the tensors in place from what `save_tensors` wrote on any layout. Call on all ranks.

    `tensors` must have exactly the names of the checkpoint with the same first words (`model.`, `optimizer.`). A name
    that only one side has (with `may_hold_more`: only `tensors`), or another shape, raises UserError on every rank.
    A damaged checkpoint, or one that differs from its plan, raises CheckpointError on every rank.

    Names that begin with `optional` can be missing on either side or have another shape; such tensors are unchanged.
    Returns the names of this rank that were not filled, and the unused names of the checkpoint that equal one of this
    rank up to the last point.

    Args:
        facts: the files in the manifest; None or empty without a manifest.
        prefix: of all names in `tensors`. If no name in the checkpoint has it, it is removed.
    """
    stored = open_stored(location, group, facts, retries)
    there = stored.plan.tensors
    if prefix and not any(name.startswith(prefix) for name in there):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    may_lack = {name for name in tensors.keys() | there.keys() if optional and name.startswith(optional)}
    unfilled = sorted(name for name in may_lack & tensors.keys() if not _fits(there.get(name), tensors[name]))
    beginnings = {name.rpartition(".")[0] for name in may_lack & tensors.keys()}
    unused = sorted(n for n in may_lack - tensors.keys() if n.rpartition(".")[0] in beginnings)
    wanted = {name: value for name, value in tensors.items() if name not in unfilled}
    due = {name: value for name, value in wanted.items() if name not in may_lack}
    expected = {name: entry for name, entry in there.items() if name not in may_lack}
    _refuse_other_tensors(str(location), due, expected, group, may_hold_more)
    with convert_dcp_errors(f"{location} could not be read"):
        load(
            wanted,
            storage_reader=stored.reader(wanted),
            planner=TensorPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    return unfilled, unused


def _fits(entry: PlannedTensor | None, value: torch.Tensor) -> bool:
    return entry is not None and entry.shape == tuple(value.shape)


def _refuse_other_tensors(
    location: str,
    tensors: Tensors,
    there: Mapping[str, PlannedTensor],
    group: dist.ProcessGroup | None,
    may_hold_more: bool,
) -> None:
    parts = {name.split(".", 1)[0] for name in tensors}
    # With `may_hold_more` the names have no common first word, so pipeline stages would have different lists.
    known = [] if may_hold_more else sorted(name for name in there if name.split(".", 1)[0] in parts)
    here = {name: tensor.shape for name, tensor in tensors.items()}
    planned = {name: entry.shape for name, entry in there.items()}
    missing, _, reshaped = compare_shapes(here, planned, "checkpoint", "run")
    wanted = torch.tensor([name in tensors for name in known], dtype=torch.uint8)
    gathered: list[Any] = [[missing, reshaped]]
    if group is not None:  # with pipeline stages, each rank has some of the names
        if not may_hold_more:
            dist.all_reduce(wanted, dist.ReduceOp.MAX, group=group)
        gathered = all_gather_json([missing, reshaped], group)
    missing = sorted({name for one, _ in gathered for name in one})
    reshaped = sorted({name for _, one in gathered for name in one})
    surplus = (
        [] if may_hold_more else [name for name, is_wanted in zip(known, wanted.tolist(), strict=True) if not is_wanted]
    )
    problems = other_tensors(location, missing, surplus, reshaped)
    if problems:
        raise UserError(*problems)


def read_titan(
    location: Location, tensors: Tensors, names: TensorNames, group: dist.ProcessGroup | None, *, retries: int = 5
) -> None:
    """Fills this rank's tensors in place, plain ones or DTensors of any layout, by Quadriga's flat names (`model.NAME`,
    `optimizer.NAME.exp_avg`). Dtypes are converted.

    Call on all ranks. Raises UserError on every rank if the checkpoint is not of this model, or lacks moments;
    CheckpointError if it is damaged.
    """
    stored = open_stored(location, group, None, retries)
    parts = {name.partition(".")[0] for name in tensors}
    moments = {name.rpartition(".")[2] for name in tensors if name.startswith(OPTIMIZER)}
    refuse_other_titan_model(
        str(location), {n: one.shape for n, one in stored.plan.tensors.items()}, names, parts, moments
    )
    wanted = {titan_name(name): tensor for name, tensor in tensors.items()}
    paired = {name: names.paired_rows(parameter_name(name)) for name, tensor in wanted.items() if tensor.dim()}
    paired = {name: rows for name, rows in paired.items() if rows}  # a step count has no rows
    with convert_dcp_errors(f"{location} could not be read"):
        load(
            wanted,
            storage_reader=_Reader(str(location), files_at(location, retries), stored.plan, wanted, paired),
            planner=TensorPlanner(),
            process_group=group,
            no_dist=group is None,
        )


def interleaved_to_halves(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Reorders whole heads of `head` rows each, (rows, ...), from neighboring pairs to pairs of halves. A copy."""
    return rows.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)


def halves_to_interleaved(rows: torch.Tensor, head: int) -> torch.Tensor:
    """The reverse of `interleaved_to_halves`."""
    return rows.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)


def parameter_name(name: str) -> str:
    """The parameter of one of torchtitan's names, which can be that of a moment."""
    return name.removeprefix(STATE).rpartition(".")[0] if name.startswith(STATE) else name


class _Reader(TensorReader):
    """Reads the tensors of a checked plan. Of tensors in `paired`, it reads whole heads and reorders their rows.

    DCP gets a plan in which a paired tensor consists of blocks: ranges of whole heads that begin and end at the
    boundaries of saved chunks.
    """

    def __init__(
        self, location: str, files: Files, plan: Plan, names: Iterable[str], paired: Mapping[str, int]
    ) -> None:
        names = list(names)
        self._saved, self._paired = plan, paired
        tensors = {name: plan.tensors[name] for name in names}
        tensors |= {name: _in_blocks(plan.tensors[name], head) for name, head in paired.items()}
        super().__init__(location, files, dcp_metadata(Plan(plan.files, tensors), names))
        self._blocks = {name: tensors[name].chunks for name in paired}

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        super()._read(replace(plan, items=[i for i in plan.items if i.storage_index.fqn not in self._paired]), planner)
        by_block: dict[tuple[str, int], list[ReadItem]] = {}
        for item in plan.items:
            if item.storage_index.fqn in self._paired:
                assert item.storage_index.index is not None
                by_block.setdefault((item.storage_index.fqn, item.storage_index.index), []).append(item)
        for (name, number), items in by_block.items():
            rows = self._block(name, self._blocks[name][number])
            for item in items:
                copy_part(rows, item, planner)

    def _block(self, name: str, block: Chunk) -> torch.Tensor:
        """The rows of a block, reordered, from the saved chunks in it."""
        planned, (first, *_), (count, *_) = self._saved.tensors[name], block[0], block[1]
        rows = torch.empty(block[1], dtype=planned.dtype)
        for offsets, sizes, file, start, length, *transforms in planned.chunks:
            if not first <= offsets[0] < first + count:
                continue
            path = join(self._location, self._saved.files[file])
            try:
                if transforms:
                    raise PlanError("was saved with a transform, which is not supported: save it again without it")
                with open_file(self._files, self._location, self._saved.files[file]) as stream:
                    saved = read_chunk(Slice(stream, start, length), length, planned.dtype, sizes)
            except PlanError as error:
                raise refusal_error(f"{path} ({name} at byte {start})", error) from error
            part = rows
            for dimension, (offset, size) in enumerate(zip((offsets[0] - first, *offsets[1:]), sizes, strict=True)):
                part = part.narrow(dimension, offset, size)
            part.copy_(saved)
        return interleaved_to_halves(rows, self._paired[name])


def _in_blocks(planned: PlannedTensor, head: int) -> PlannedTensor:
    """The same tensor, divided into blocks of whole heads, such that each saved chunk is within one block."""
    rows, *rest = planned.shape
    spans = sorted((chunk[0][0], chunk[0][0] + chunk[1][0]) for chunk in planned.chunks if chunk[1][0])
    ends, reached = [0], 0
    for begin, end in spans:
        if begin == reached and begin % head == 0 and begin != ends[-1]:
            ends.append(begin)
        reached = max(reached, end)
    chunks: list[Chunk] = [
        [[begin, *[0] * len(rest)], [end - begin, *rest], 0, 0, 0]
        for begin, end in itertools.pairwise((*ends, rows))
        if end > begin
    ]
    return PlannedTensor(planned.dtype, planned.shape, chunks)
