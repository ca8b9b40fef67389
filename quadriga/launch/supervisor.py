"""The launcher: every check once at the door, then torchrun as a child, its signals, and whose error is shown last.

It exists since torchrun turns a rank's exit 2 into 1 with a traceback of its own, repeats a report once a rank, and
leaves ranks alive when it is killed. No torch here: a wrong configuration is answered in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.errors import EXIT_FAULT, EXIT_OK, Problem, UserError
from quadriga.launch.agent import LAUNCHER_PID, NOTE
from quadriga.launch.dry_run import describe
from quadriga.launch.environment import (
    Request,
    choose_backend,
    rank_environment,
    read_request,
    torch_build,
    visible_gpus,
)
from quadriga.log import logger, start_logging
from quadriga.models.registry import catalogue
from quadriga.processes import RECORDS, ExitRecord, read_records

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE_SECONDS = 300  # that ranks have after a forwarded signal to save and leave, before torchrun kills them


REHEARSE = "--rehearse"
HELP = """usage: [NGPU=4] [CONFIG_FILE=FILE] ./run_train.sh [--section.key value ...]
       python -m quadriga.launch --job.config_file FILE [--section.key value ...]

Trains on the ranks of this machine from one TOML file. Every key can be given behind it, as --section.key value,
--section.key=value, or --section.no_key for a switch; the command line wins over the environment, that over the file.

NGPU (4) ranks of this machine; CONFIG_FILE the TOML file; COMM_BACKEND nccl or gloo; LOG_RANK (0) the ranks that print
progress; DRY_RUN=1 says what the run would be and starts nothing, and with --rehearse builds it and takes a step with
tensors that hold nothing; for several machines NNODES, NODE_RANK and
RDZV_ENDPOINT (host:port of machine 0).

Exit codes: 0 done; 2 something that you can mend, told in one report; 1 a fault; 128 + n stopped by signal n.
"""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Launch what `argv` and `environ` ask for. Returns the documented exit code; 128 + n when signal n ended it."""
    if {"-h", "--help"} & set(argv):
        from quadriga.config.help import print_keys  # rich need not be loaded to start a run

        print(HELP)
        print_keys()
        return EXIT_OK
    try:
        argv, rehearsal = without_rehearse(argv)
        request, run = check_at_the_door(argv, environ)
        if request.dry_run:
            print(describe(run, what_training_lacks(request, argv, environ)), flush=True)
            return rehearse(run, arguments(argv, environ), environ) if rehearsal else EXIT_OK
        if rehearsal:
            raise UserError(Problem(REHEARSE, "a rehearsal is part of a dry run", fix="set DRY_RUN=1"))
        start_logging({**environ, "RANK": "0", "LOG_RANK": "0"})
        gpus = visible_gpus(environ)
        backend, reason = choose_backend(run.spec.backend, request.ranks, torch_build(), gpus)
    except UserError as error:
        print(error.report, file=sys.stderr)
        return error.exit_code
    ours = rank_environment(environ, request)
    logger.info("%s over %s (%s)", _ranks_in_words(request), backend, reason)
    # The choice made here is the one that every rank keeps, or fails by: none may choose anew.
    return supervise(request, arguments(argv, environ), {**environ, **ours, "COMM_BACKEND": backend})


def without_rehearse(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The command line without `--rehearse`, and whether it was there."""
    return [word for word in argv if word != REHEARSE], REHEARSE in argv


def rehearse(run: Run, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Build a rank of the run and take one step, with tensors that hold nothing, in a child process; its exit code.

    Rank 0 and, where a pipeline makes ranks differ, the last one.
    """
    ranks = (0,) if run.spec.degrees.pp == 1 else (0, run.spec.world_size - 1)
    shared = {**environ, "PYTHONPATH": _with_our_folder(environ), "WORLD_SIZE": str(run.spec.world_size)}
    print("\nRehearsal (tensors hold nothing, nothing is sent):", flush=True)
    for rank in ranks:
        command = [sys.executable, "-m", "quadriga.train.rehearse", *argv]
        code = subprocess.run(command, env={**shared, "RANK": str(rank)}, check=False).returncode
        if code != EXIT_OK:
            return code
    return EXIT_OK


def check_at_the_door(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Request, Run]:
    """The request and the run, or a UserError with everything that is wrong in the variables and the configuration."""
    request, problems = read_request(environ)
    try:
        run = read_run(request, argv, environ, training=not request.dry_run)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return request, run


def read_run(request: Request, argv: Sequence[str], environ: Mapping[str, str], training: bool) -> Run:
    """The run on all ranks of all machines. `training` asks for what a rehearsal can do without."""
    return read(
        arguments(argv, environ),
        environ,
        catalogue=catalogue(),
        backends=BACKENDS,
        world_size=request.world_size,
        training=training,
    )


def what_training_lacks(request: Request, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Problem, ...]:
    """What a dry run lets pass and training would refuse: assets that are not there, features that are not built."""
    try:
        read_run(request, argv, environ, training=True)
    except UserError as error:
        return error.problems
    return ()


def arguments(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command line behind CONFIG_FILE; a `--job.config_file` of its own comes later and wins."""
    file = environ.get("CONFIG_FILE")
    return ["--job.config_file", file, *argv] if file else [*argv]


def _ranks_in_words(request: Request) -> str:
    here = f"{request.ranks} rank{'s' * (request.ranks != 1)}"
    if request.nodes == 1:
        return here
    return f"{here} on each of {request.nodes} machines (this is number {request.node})"


def supervise(request: Request, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the ranks of this machine to their end. Returns the exit code of the run."""
    with tempfile.TemporaryDirectory(prefix="quadriga-") as folder:
        child_environ = {
            **environ,
            "PYTHONPATH": _with_our_folder(environ),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE_SECONDS)),
            LAUNCHER_PID: str(os.getpid()),
            RECORDS: folder,
        }
        command = [sys.executable, "-m", "quadriga.launch.agent", *torchrun_arguments(request), *argv]
        # A session of its own: the terminal's Ctrl-C reaches the launcher alone, which passes it on once.
        child = subprocess.Popen(command, env=child_environ, start_new_session=True)
        with forwarding(child) as received:
            code = child.wait()
        return conclude(Path(folder), request.ranks, code, received)


def torchrun_arguments(request: Request) -> list[str]:
    """Where the ranks meet, and what they run."""
    if request.nodes == 1:  # by number, as the machine's name may not resolve
        meeting = ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        meeting = ["--nnodes", str(request.nodes), "--node-rank", str(request.node), "--rdzv-backend", "static"]
        meeting += ["--rdzv-endpoint", str(request.endpoint), "--rdzv-id", "quadriga"]
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    ranks = ["--nproc-per-node", str(request.ranks), "--signals-to-handle", signals]
    return [*meeting, *ranks, "-m", "quadriga.train"]


def _with_our_folder(environ: Mapping[str, str]) -> str:
    ours = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [ours, environ.get("PYTHONPATH")]))


@contextmanager
def forwarding(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on to the child, and yield the list of those received. A second Ctrl-C ends all at once."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        impatient = received.count(signal.SIGINT) > 1
        child.send_signal(signal.SIGKILL if impatient else number)  # the ranks die with the agent

    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
    for number in map(int, FORWARDED):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
            before[number] = signal.signal(number, forward)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Death:
    """A rank that ended without a word: `exitcode` -n means killed by signal n. `time` in whole seconds."""

    rank: int
    pid: int
    exitcode: int
    time: float

    def __str__(self) -> str:
        if self.exitcode >= 0:
            return f"rank {self.rank} (process {self.pid}) left with exit code {self.exitcode} and no word"
        name = signal.Signals(-self.exitcode).name
        text = f"rank {self.rank} (process {self.pid}) was killed by {name}"
        if self.exitcode == -signal.SIGKILL:
            text += "\nThe kernel does this when the machine runs out of memory (see `dmesg`); a scheduler may, too."
        return text


def conclude(folder: Path, ranks: int, code: int, received: Sequence[int]) -> int:
    """Show the first failing rank's error last, and return the exit code of the run.

    Args:
        folder: the ranks' records and the agent's note.
        ranks: of this machine.
        code: the agent's own exit code, negative when a signal killed it.
        received: the signals that were passed on, in order.
    """
    if code == EXIT_OK:
        return EXIT_OK
    records = read_records(folder)
    failed = [record for record in records if record.code != EXIT_OK]
    if received and len(records) == ranks and not failed:
        return EXIT_OK  # every rank took the signal as a wish to save and leave, and did
    first = first_failure(failed, deaths(folder, failed))
    if received and (not isinstance(first, ExitRecord) or first.lost_peer or first.code == 128 + received[0]):
        logger.error("stopped by %s", signal.Signals(received[0]).name)
        return 128 + received[0]
    if first is None:
        logger.error("torchrun ended with code %d before any rank said why; its output is above", code)
        return EXIT_FAULT
    if isinstance(first, Death):
        logger.error("%s", first)
        return EXIT_FAULT
    logger.error("%s", first.details if first.user_error else f"rank {first.rank} failed first:\n\n{first.details}")
    return first.code


def deaths(folder: Path, records: Sequence[ExitRecord]) -> list[Death]:
    """The failed ranks that left no record, from the agent's note."""
    note = folder / NOTE
    ends = json.loads(note.read_text()) if note.exists() else {}
    spoke = {record.rank for record in records}
    return [Death(int(rank), **end) for rank, end in ends.items() if int(rank) not in spoke]


def first_failure(records: Sequence[ExitRecord], silent: Sequence[Death]) -> ExitRecord | Death | None:
    """What went wrong first. A lost peer is a consequence, and torchrun ends the survivors with SIGTERM."""

    def order(failure: ExitRecord | Death) -> tuple[bool, float, bool]:
        if isinstance(failure, Death):
            return failure.exitcode == -signal.SIGTERM, failure.time, False
        return failure.lost_peer, failure.time, True

    failures: list[ExitRecord | Death] = [*records, *silent]
    return min(failures, key=order, default=None)
