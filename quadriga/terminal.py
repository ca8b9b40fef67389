"""Output that cannot be written: one message and an exit code, no traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TextIO

from quadriga.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE, Problem, UserError, shortened

# Errors of system calls that are about the given path, not about the machine.
OF_THE_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
OF_THE_OUTPUT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


def report_system_error(error: OSError | UnicodeEncodeError) -> int:
    """Print the problem of a system call. Returns the exit code. Raises `error` again if it is a fault of the code."""
    if isinstance(error, BrokenPipeError):  # the reader of the output has exited: `quadriga keys | head`
        discard_output(sys.stdout, sys.stderr)
        return EXIT_OK
    problem, code = _of_the_system(error)
    print(UserError(problem).report, file=sys.stderr)
    return code


def discard_output(*streams: TextIO) -> None:
    """Let Python's exit find nothing to write: it would report the same error again."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _of_the_system(error: OSError | UnicodeEncodeError) -> tuple[Problem, int]:
    """The problem and the exit code of an error of a system call. Raises it if it is an error of the code."""
    if isinstance(error, UnicodeEncodeError):
        if error.encoding == "utf-8":
            raise error
        fix = "set LC_ALL=C.UTF-8, or another locale with UTF-8"
        what = f"names of files cannot be written in this locale ({error.encoding})"
        return Problem("LC_ALL", what, fix=fix), EXIT_USAGE
    if error.filename is not None:
        what = f"cannot be used: {error.strerror}"
        code = EXIT_USAGE if error.errno in OF_THE_PATH else EXIT_FAULT
        return Problem(shortened(str(error.filename), 400), what), code
    if error.errno in OF_THE_OUTPUT:
        discard_output(sys.stdout)
        return Problem("the output", f"cannot be written: {error.strerror}"), EXIT_FAULT
    try:
        os.getcwd()
    except OSError:
        what = "was removed, or cannot be read"
        return Problem("the current directory", what, fix="change to another directory"), EXIT_USAGE
    raise error
