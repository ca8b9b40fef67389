"""The program that torchrun starts on every rank; without torchrun, `python -m quadriga.train` is a run of one rank."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NoReturn

from quadriga.checkpoint.folder import newest_extra
from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.errors import EXIT_OK, EXIT_USAGE, Problem, UserError
from quadriga.limits import RANKS
from quadriga.log import logger, start_logging
from quadriga.models.registry import catalogue
from quadriga.resilience import exit_reports, processes

HELP = """usage: python -m quadriga.train --job.config_file FILE [--section.key value ...]        one rank
       torchrun --nproc_per_node=N torchtitan/train.py --job.config_file FILE [...]    N ranks

./run_train.sh does the second. It checks the configuration first and hides torchrun's own output. Its --help lists the
signals that a run handles and all exit codes.
"""


def main(argv: Sequence[str]) -> int:
    """Read the configuration, lock the run folder, train. Returns the exit code of this rank."""
    environ = os.environ
    if problems := invalid_variables(environ):
        print(UserError(*problems).report, file=sys.stderr)
        return EXIT_USAGE
    processes.die_with_torchrun(environ)
    faulthandler.enable()
    if {"-h", "--help"} & set(argv):
        from quadriga.config.reference import print_keys

        print(HELP)
        print_keys()
        return EXIT_OK
    try:
        run = read_run(argv, environ)
    except UserError as error:
        return exit_reports.report_config_error(environ, error)
    try:
        first = environ.get("RANK", "0") == "0"
        with processes.lock_run_folder(run.spec.folders.dump) if first else nullcontext():
            logger.info("loading PyTorch")
            from quadriga.train.loop import run as train  # imports torch, slowly: errors above come without that delay

            ended = processes.exit_code_after_restart(environ)
            return processes.record_exit(environ, train(run, environ)) if ended is None else ended
    except KeyboardInterrupt:
        return processes.record_interrupt(environ)
    except Exception as error:  # noqa: BLE001 - the one place where errors of any kind are reported and recorded
        return exit_reports.report_failure(environ, error)


def invalid_variables(environ: Mapping[str, str]) -> list[Problem]:
    """Problems of the variables that torchrun sets; a user may have set them by hand."""
    problems = []
    bounds = {"RANK": (0, RANKS), "WORLD_SIZE": (1, RANKS), "LOCAL_RANK": (0, RANKS), "MASTER_PORT": (0, 65535)}
    for name, (least, most) in bounds.items():
        text = environ.get(name)
        if text is not None and not (re.fullmatch(r"[0-9]{1,9}", text) and least <= int(text) <= most):
            problems.append(
                Problem(name, "not a number that this variable can have", text, "environment", f"{least} to {most}")
            )
    if not problems and int(environ.get("RANK", "0")) >= int(environ.get("WORLD_SIZE", "1")):
        what = "not below WORLD_SIZE; torchrun sets both"
        problems.append(Problem("RANK", what, environ["RANK"], "environment", "0 to WORLD_SIZE - 1"))
    return problems


def read_run(argv: Sequence[str], environ: Mapping[str, str]) -> Run:
    """Start logging and read the run. Raises UserError with all problems of the configuration."""
    try:
        start_logging(environ)
    except ValueError:
        raise UserError(
            Problem("LOG_RANK", "not a list of ranks", environ["LOG_RANK"], "environment", "ranks separated by commas")
        ) from None
    run = read(
        argv,
        environ,
        catalogue=catalogue(),
        backends=BACKENDS,
        world_size=int(environ.get("WORLD_SIZE", "1")),
        training=True,
        saved=newest_extra,
    )
    if run.config.only_rehearses:
        key = "comm.mode" if run.config.comm.mode != "default" else "memory_estimation.enable"
        fix = "start it with ./run_train.sh, which needs no ranks for this; or remove the key to train"
        raise UserError(Problem(key, "this key asks for a dry run, but ranks were started", fix=fix))
    return run


def run_rank() -> NoReturn:
    """Run the process that torchrun starts, and exit with its code."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a save request must not kill the process before training begins
    exit_reports.end_process(main(sys.argv[1:]))


if __name__ == "__main__":
    run_rank()
