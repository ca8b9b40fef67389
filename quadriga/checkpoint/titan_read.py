"""Loads weights and moments of a checkpoint of torchtitan, on any layout. See `titan` for its content.

torchtitan rotates pairs of neighboring rows of query and key matrices, Quadriga pairs of the two halves
(`TitanTensorNames.paired_rows`). The rows of moments have the same order as those of their weights. A rank reads the
heads that overlap its shard and reorders their rows before it copies them. So there is no communication, and at most
one whole tensor of the model is in memory besides the shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from quadriga.checkpoint.files import Files, Location, files_at
from quadriga.checkpoint.folder import join
from quadriga.checkpoint.plan import Chunk, Plan, PlanError, PlannedTensor
from quadriga.checkpoint.shards import Slice, read_chunk
from quadriga.checkpoint.stored import TensorPlanner, TensorReader, copy_part, open_file, open_stored, refusal_error
from quadriga.checkpoint.tensors import Tensors, convert_dcp_errors
from quadriga.checkpoint.titan import OPTIMIZER, STATE, TitanTensorNames, refuse_other_titan_model, titan_name


def read_titan(
    location: Location, tensors: Tensors, names: TitanTensorNames, group: dist.ProcessGroup | None, *, retries: int = 5
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
        super().__init__(location, files, Plan(plan.files, tensors).metadata(names))
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
