"""What a manifest keeps of its run beside the tensors is used: a value that no run saves is one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from quadriga.checkpoint.folder import STATE_FILE, CheckpointInfo, join
from quadriga.errors import Problem, UserError, shortened

TO_RESUME = "start from another checkpoint (--checkpoint.load_step), or from its weights alone in a new run folder"


@contextmanager
def convert_extra_errors(found: CheckpointInfo, fix: str = TO_RESUME) -> Iterator[None]:
    """What the manifest keeps of the run is read: where it is not what a run saves, one message says so."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"what it keeps of the run cannot be used ({type(error).__name__}: {shortened(error, 200)})"
        raise UserError(Problem(join(found.path, STATE_FILE), what, fix=fix)) from error
