"""The ledger of a run (`metrics.events`) from its first line on, and the number of this start of the run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from quadriga.comm import collectives
from quadriga.config.run_spec import RunSpec
from quadriga.json_collectives import broadcast_json
from quadriga.metrics.events import Events, newest_attempt, process_start
from quadriga.metrics.jsonl import next_attempt
from quadriga.metrics.loggers import JSONL_NAME


def open_ledger(spec: RunSpec, backend: str) -> Events:
    """Number this start of the run, and tell of it. Call on all ranks when the process group stands."""
    folder = Path(spec.folders.dump)
    if collectives.rank() != 0:
        return Events(folder, collectives.rank(), broadcast_json(None))
    # The first rank decides, for it alone writes what the number is read from: a start may have ended before its first
    # figures, another one before its first event.
    attempt = max(next_attempt(folder / JSONL_NAME), newest_attempt(folder) + 1)
    events = Events(folder, 0, broadcast_json(attempt))
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"world_size": spec.world_size, "layout": asdict(spec.degrees), "backend": backend}
    events.tell("start", 0, **facts, process_start=process_start())
    return events
