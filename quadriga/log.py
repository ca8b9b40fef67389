"""The logger of a run. Only the logging ranks print progress, on standard error.

Ranks that are not in LOG_RANK (default: 0) still print warnings and errors, so no fault is hidden.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Mapping

from quadriga.errors import printable

logger = logging.getLogger("quadriga")


def logging_ranks(environ: Mapping[str, str] = os.environ) -> frozenset[int]:
    """The global ranks that print progress: LOG_RANK, a comma-separated list (`0,1`). Raises ValueError for others."""
    text = environ.get("LOG_RANK", "").strip() or "0"
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*", text):
        raise ValueError(f"not a list of ranks: {text}")
    return frozenset(map(int, text.split(",")))


def is_logging_rank(environ: Mapping[str, str] = os.environ) -> bool:
    return int(environ.get("RANK", "0")) in logging_ranks(environ)


class PrintableFormatter(logging.Formatter):
    """Escapes control characters, which names and values of users' files may contain. A record with
    `extra={"as_it_is": True}` is printed unchanged, because Quadriga's own colours are such characters."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if getattr(record, "as_it_is", False) else printable(text, keep="\n\t")


def escape_unknown_characters() -> None:
    """Let both streams of this process escape the characters that the locale does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def start_logging(environ: Mapping[str, str] = os.environ) -> None:
    """Attach one handler to the `quadriga` logger. Called by entry points only, never by an import."""
    escape_unknown_characters()
    rank, several = environ.get("RANK", "0"), len(logging_ranks(environ)) > 1
    prefix = f"[rank {rank}] " if several and int(environ.get("WORLD_SIZE", "1")) > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter(prefix + "%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_logging_rank(environ) else logging.WARNING)
