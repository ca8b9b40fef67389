"""Opens the event log of a run (`metrics.events`) and numbers this start of the run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from quadriga.comm import collectives
from quadriga.config.run_spec import RunSpec
from quadriga.errors import UserError
from quadriga.json_collectives import broadcast_json
from quadriga.log import logger
from quadriga.metrics.append import ensure_appendable
from quadriga.metrics.events import EVENTS_NAME, EventLog, process_start_time
from quadriga.metrics.jsonl import next_attempt
from quadriga.metrics.loggers import JSONL_NAME


def open_event_log(spec: RunSpec, backend: str) -> EventLog:
    """Number this start of the run, and log it. Call on all ranks after the process group is initialized."""
    folder = Path(spec.folders.dump)
    if collectives.rank() != 0:
        return EventLog(folder, collectives.rank(), broadcast_json(None))
    # The first rank decides, because it alone writes the two files that give the number. Both are read: a start may
    # have ended before its first metrics, another one before its first event.
    attempt = max(_next_attempt(folder / name) for name in (JSONL_NAME, EVENTS_NAME))
    events = EventLog(folder, 0, broadcast_json(attempt))
    facts = {"world_size": spec.world_size, "layout": asdict(spec.degrees), "backend": backend}
    events.log_event("start", 0, **facts, process_start=process_start_time())
    return events


def _next_attempt(path: Path) -> int:
    """The number after that of the last start in the file; 1 if the file is not readable, which is then set aside."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ensure_appendable(path)
        return next_attempt(path)
    except (OSError, UserError) as error:
        logger.warning("%s cannot be read: the starts of this run are numbered from 1 again (%s)", path, error)
        return 1
