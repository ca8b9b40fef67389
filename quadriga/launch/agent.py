"""torchrun without its noise: what the launcher starts as its child.

    python -m quadriga.launch.agent <torchrun's arguments>

torchrun follows the end of its ranks with a traceback of its own and a box of text; here it says nothing, dies with
the launcher, and leaves a note of which ranks ended how (`agent.json` beside the ranks' own records).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadriga.errors import EXIT_FAULT, EXIT_OK
from quadriga.processes import AGENT_PID, RECORDS, die_with_parent

LAUNCHER_PID = "QUADRIGA_LAUNCHER_PID"
NOTE = "agent.json"


def main(argv: list[str]) -> int:
    """Run torchrun and return 0, or 1 when a rank failed; 128 + n when signal n ended the run."""
    die_with_parent(int(os.environ[LAUNCHER_PID]))
    os.environ[AGENT_PID] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # the ranks speak for themselves
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        leave_note(Path(os.environ[RECORDS]), error.failures)
        return EXIT_FAULT
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return EXIT_OK


def leave_note(folder: Path, failures: Mapping[int, Any]) -> None:
    """Write {rank: {pid, exitcode, time}} of the ranks that failed; an exit code of -n means killed by signal n."""
    note = {
        rank: {"pid": failure.pid, "exitcode": failure.exitcode, "time": failure.timestamp}
        for rank, failure in failures.items()
    }
    (folder / NOTE).write_text(json.dumps(note))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
