"""Converts errors from invalid values in the state of a run that a manifest keeps (`extra`) to one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from quadriga.checkpoint.folder import STATE_FILE, CheckpointInfo, join
from quadriga.errors import Problem, UserError, shortened

TO_RESUME = "start from another checkpoint (--checkpoint.load_step), or from only its weights in a new run folder"


@contextmanager
def convert_extra_errors(found: CheckpointInfo, fix: str = TO_RESUME) -> Iterator[None]:
    """Converts errors of the body, which uses `found.extra`, to a UserError that names the manifest."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"the state of the run in it cannot be used ({type(error).__name__}: {shortened(error, 200)})"
        raise UserError(Problem(join(found.path, STATE_FILE), what, fix=fix)) from error
