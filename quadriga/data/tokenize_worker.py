"""A process that tokenizes pieces: `python -m quadriga.data.tokenize_worker`, started by `tokenize_run`.

It reads JSON lines on standard input: the job, then pieces. It answers on standard output, one JSON object per line:
`{"ids": N}` while it works on a piece, and `{"done": ...}` at its end, or `{"problems": ...}` of the user, or
`{"fault": ...}` of something else, such as the network. It exits when standard input is closed, also in the middle of a
piece, so it does not outlive the process that started it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quadriga.config.schema import TextKeys
from quadriga.data.pieces import write_piece
from quadriga.data.sources import Source
from quadriga.data.tokenize_job import TokenizeJob, piece_path, unwritable
from quadriga.data.tokenizer import Tokenizer
from quadriga.errors import Fault, Problem, UserError
from quadriga.log import logger

REPORT_SECONDS = 0.5


def main() -> int:
    logger.setLevel(logging.ERROR)  # the starting process has opened the same data, and has given the notices
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**content: object) -> None:
        print(json.dumps(content), file=answers, flush=True)

    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    order = json.loads(lines.get())
    given = order["job"] | {"keys": TextKeys(*order["job"]["keys"])}
    job, work, dtype = TokenizeJob(**given), Path(order["work"]), order["dtype"]
    try:
        source, tokenizer = job.open()
        if (source.fingerprint, tokenizer.fingerprint) != (order["source"], order["tokenizer"]):
            raise UserError(Problem("SOURCE", "was changed while it was read", job.keys.path, fix="start again"))
    except UserError as error:
        answer(problems=[asdict(problem) for problem in error.problems])
        return error.exit_code
    except Fault as fault:
        answer(fault=str(fault))
        return fault.exit_code
    while True:
        piece = json.loads(lines.get())
        answer(**_tokenize(job, source, tokenizer, piece, work, dtype, answer))


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _tokenize(
    job: TokenizeJob,
    source: Source,
    tokenizer: Tokenizer,
    piece: dict[str, int],
    work: Path,
    dtype: str,
    answer: Callable[..., None],
) -> dict[str, Any]:
    """Writes one piece, and returns the last answer about it."""
    reported = time.monotonic()

    def report(ids: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            answer(ids=ids)

    path, shards = piece_path(work, piece["number"]), range(piece["first"], piece["after"])
    try:
        header, listed = write_piece(path, source, shards, tokenizer, dtype, skip_bad=job.skip_bad, report=report)
    except UserError as error:
        return {"problems": [asdict(problem) for problem in error.problems]}
    except OSError as error:
        return {"problems": [asdict(unwritable(work.parent, error))]}
    except Fault as fault:
        return {"fault": str(fault)}
    return {"done": header.ids, "bad": listed}


if __name__ == "__main__":
    sys.exit(main())
