"""Finds the checkpoint that a run starts from: the newest one with correct hashes, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from quadriga.checkpoint import folder as folders
from quadriga.checkpoint import messages, titan
from quadriga.checkpoint.files import Location
from quadriga.checkpoint.folder import CheckpointInfo
from quadriga.checkpoint.ranks import info_from_json, info_to_json
from quadriga.config.schema import Checkpoint
from quadriga.errors import UserError
from quadriga.json_collectives import all_gather_json
from quadriga.log import logger


class CheckpointSearch:
    """One search by all ranks together, which divide the hashing among them.

    `refused`: by step, why a published checkpoint was refused. `steps_lost`: the steps between the newest published
    checkpoint and the one that was found.
    """

    def __init__(
        self,
        section: Checkpoint,
        folder: Location,
        group: dist.ProcessGroup | None,
        on_first_rank: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self._section, self._folder, self._group = section, str(folder), group
        self._on_first_rank = on_first_rank
        self.refused: dict[int, str] = {}
        self.steps_lost = 0

    def find_own(self, remains: list[str]) -> CheckpointInfo | None:
        """The run's own newest good checkpoint, or that of `load_step`; None if there is none. Call on all ranks.

        `remains`: the names of unpublished saves. Raises UserError if `load_step` does not exist or cannot be resumed,
        and CheckpointError (exit code 3) if checkpoints exist and none is good."""
        records, damaged = self._on_first_rank(self._list)
        whole = [info_from_json(record) for record in records]
        self.refused = dict(damaged)
        asked = self._section.load_step
        if asked >= 0 and asked not in {found.step for found in whole} | self.refused.keys():
            raise UserError(messages.no_such_step(asked, self._folder, whole))
        for one in reversed(whole):
            found = self._inspected(one) if asked in (-1, one.step) else None
            if found is not None and self._is_intact(found):
                if messages.is_last_save(found):  # even if parts are excluded: it has no step
                    raise UserError(messages.no_training_state(found))
                if found.trainer:
                    logger.info(messages.titan_not_verified(found))
                self._log_lost_steps(found, whole)
                return found
        if asked >= 0 or self.refused:
            raise messages.no_valid_checkpoint(self._folder, asked, self.refused)
        if remains:
            logger.warning(messages.only_remains(self._folder, remains))
        return None

    def _list(self) -> tuple[list[Any], list[tuple[int, str]]]:
        for reason in folders.non_folders_in(self._folder):
            logger.warning(reason)
        if foreign := folders.foreign_steps_in(self._folder):
            logger.warning(messages.not_read_from_stores(self._folder, foreign))
        whole, damaged = titan.list_all(self._folder)
        return [info_to_json(found) for found in whole], damaged

    def _inspected(self, found: CheckpointInfo) -> CheckpointInfo | None:
        """The checkpoint with its contents; None if it is a candidate of torchtitan that cannot be used."""
        if not found.trainer:
            return found
        record, why = self._on_first_rank(lambda: self._inspect_titan(found.path))
        if record is None:
            self.refused[found.step] = why
        return None if record is None else info_from_json(record)

    def _inspect_titan(self, path: str) -> tuple[dict[str, Any] | None, str]:
        inspected, why = titan.inspect_candidate(path)
        return info_to_json(inspected), why

    def find_initial(self, path: str) -> CheckpointInfo:
        """The checkpoint of `initial_load_path`: of Quadriga, torchtitan, or torch.distributed.checkpoint alone.

        Call on all ranks. Raises UserError if it is not a checkpoint, CheckpointError (exit code 3) if damaged."""
        found = info_from_json(self._on_first_rank(lambda: info_to_json(self._inspect_initial(path))))
        if found.trainer:
            logger.info(messages.titan_not_verified(found))
        if found.files and not self._is_intact(found):
            raise messages.no_valid_checkpoint(path, found.step, self.refused)
        if self._section.initial_load_model_only:
            model = {"model": found.extra["model"]} if "model" in found.extra and not found.trainer else {}
            return replace(found, resume=False, extra=model)
        alone = found.contents == ("model",)  # of a last save without optimizer, or converted
        if alone and (found.resume or found.trainer):
            raise UserError(messages.missing_contents(found, ["optimizer"]))
        return found

    def _inspect_initial(self, path: str) -> CheckpointInfo:
        if found := titan.find_initial(path):
            return found
        logger.warning(messages.not_verified(path))
        return CheckpointInfo(0, path, ("model",), resume=False, location=path)

    def _is_intact(self, found: CheckpointInfo) -> bool:
        """Whether every file has the hash of the manifest. Each rank reads its share of the files."""
        ranks, rank = (1, 0) if self._group is None else (dist.get_world_size(self._group), dist.get_rank(self._group))
        wrong = folders.find_damage(found, sorted(found.files)[rank::ranks])
        if self._group is not None:
            wrong = [reason for one in all_gather_json(wrong, self._group) for reason in one]
        if wrong:
            self.refused[found.step] = "; ".join(wrong)
        return not wrong

    def _log_lost_steps(self, found: CheckpointInfo, whole: list[CheckpointInfo]) -> None:
        for _, reason in sorted(self.refused.items()):
            logger.warning(f"{reason}: this checkpoint is skipped")
        newest = max([step for step in self.refused if step > found.step], default=found.step)
        if newest > found.step:
            self.steps_lost = newest - found.step
            logger.warning(f"resuming from step {found.step}: {self.steps_lost} steps are trained again")
        if found.step < whole[-1].step and whole[-1].step not in self.refused:
            logger.warning(f"step-{whole[-1].step} is newer: a start without load_step uses that one")
