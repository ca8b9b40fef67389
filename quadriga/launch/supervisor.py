"""The launcher: every check once at the door, then torchrun as a child, its signals, and whose error is shown last.

It exists since torchrun turns a rank's exit 2 into 1 with a traceback of its own, repeats a report once a rank, and
leaves ranks alive when it is killed. No torch here: a wrong configuration is answered in a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from quadriga.checkpoint.folder import CheckpointError, newest_extra
from quadriga.comm.backend import BACKENDS
from quadriga.comm.heap import VARIABLE as SYMMETRIC_SIZE
from quadriga.comm.heap import symmetric_size
from quadriga.comm.network import INTERFACE_VARIABLES, loopback_variables, ports_in_words
from quadriga.config import Run, read
from quadriga.errors import EXIT_OK, Problem, UserError, printable
from quadriga.launch.agent import LAUNCHER_PID, SAVE, TORCHRUNS_OWN
from quadriga.launch.dry_run import Verdict, describe
from quadriga.launch.ending import conclude
from quadriga.launch.environment import (
    LOOPBACK_RENDEZVOUS,
    Request,
    choose_backend,
    rank_environment,
    read_request,
    torch_build,
    visible_gpus,
)
from quadriga.launch.verdict import where_it_starts
from quadriga.log import logger, start_logging
from quadriga.models.registry import catalogue
from quadriga.planning.heap import heap_of
from quadriga.resilience.processes import RECORDS, adopt_orphans

LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ORPHAN_SECONDS = 5.0  # that what the ranks started has to end when they have ended

REHEARSE = "--rehearse"
HELP = """usage: [NGPU=4] [CONFIG_FILE=FILE] ./run_train.sh [--section.key value ...]
       python -m quadriga.launch --job.config_file FILE [--section.key value ...]

Trains on the ranks of this machine from one TOML file. Every key can be given behind it, as --section.key value,
--section.key=value, or --section.no_key for a switch; the command line wins over the environment, that over the file.

NGPU (4) ranks of this machine; CONFIG_FILE the TOML file; COMM_BACKEND gloo, nccl, nccl-symm or nvshmem; LOG_RANK (0)
the ranks that print progress; MAX_RESTARTS (0) how often the ranks are started again when one fails, to go on from the
newest checkpoint; DRY_RUN=1 says what the run would be and from which step it would go on, starts nothing, and leaves
with the exit code of such a start; with --rehearse it builds the run and takes a step with tensors that hold nothing;
for several machines NNODES, NODE_RANK and RDZV_ENDPOINT (host:port of machine 0); PYTHON the interpreter.

On one machine every port is opened on the loopback: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and
NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME name that interface unless you set them. Several machines need a closed network.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP: the step is finished and saved, and the run leaves with 75; a second
Ctrl-C ends it at once. SIGUSR2 saves and goes on. The files STOP and SAVE in the run folder do the same.

Exit codes:
  0    done
  1    a fault of the machine or the code
  2    something that you can mend, told in one report
  3    checkpoints are there, and every one is damaged
  4    a rank stopped, or a collective waited for too long
  5    the loss or the gradients are no numbers, or jumped, and [health] says to stop
  6    out of memory
  75   asked to leave: saved and left; the same start goes on from there, so that a scheduler may queue it again
  128 + n   ended by signal n, with nothing saved
docs/operations.md tells what to do about each.
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
        if request.dry_run or run.config.only_rehearses:
            ready, ports = verdict(request, run, argv, environ), ports_in_words(environ, request.nodes)
            print(printable(describe(run, ready, ports), keep="\n"), flush=True)
            wanted = rehearsal or run.config.only_rehearses
            return rehearse(run, arguments(argv, environ), environ) if wanted else ready.code
        if rehearsal:
            raise UserError(Problem(REHEARSE, "a rehearsal is part of a dry run", fix="set DRY_RUN=1"))
        start_logging({**environ, "RANK": "0", "LOG_RANK": "0"})
        if request.node == 0:  # whose first rank looks for checkpoints; other machines may not see them
            where_it_starts(run, look_deep=False)
        gpus = visible_gpus(environ)
        backend, reason = choose_backend(run.spec.backend, request.ranks, torch_build(), gpus)
        heap = heap_variables(run, environ)
    except UserError as error:
        print(error.report, file=sys.stderr)
        return error.exit_code
    except CheckpointError as error:
        print(printable(error, keep="\n"), file=sys.stderr)
        return error.exit_code
    ours = rank_environment(environ, request) | heap
    logger.info("%s over %s (%s)", _ranks_in_words(request), backend, reason)
    if request.nodes > 1 or len(loopback_variables(environ)) < len(INTERFACE_VARIABLES):
        logger.info("ports: %s", ports_in_words(environ, request.nodes))
    for name, size in heap.items():
        logger.info("%s=%s%s", name, size, "" if environ.get(name) else ": what this run needs")
    # The choice made here is the one that every rank keeps, or fails by: none may choose anew.
    environ = {**environ, **ours, "COMM_BACKEND": backend}
    return supervise(request, arguments(argv, environ), environ, run.config.checkpoint.timeout_seconds)


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
        command = [sys.executable, "-m", "quadriga.rehearsal.rehearse", *argv]
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
        saved=newest_extra,
    )


def verdict(request: Request, run: Run, argv: Sequence[str], environ: Mapping[str, str]) -> Verdict:
    """What a start would refuse this run for, or where it would begin; nothing of that where it only rehearses."""
    if run.config.only_rehearses:
        return Verdict()
    problems = what_training_lacks(request, argv, environ)
    try:
        return Verdict(problems, start=where_it_starts(run, look_deep=True))
    except UserError as error:
        told = {(problem.where, problem.what) for problem in problems}
        more = [problem for problem in error.problems if (problem.where, problem.what) not in told]
        return Verdict((*problems, *more))
    except CheckpointError as fault:
        return Verdict(problems, fault)


def what_training_lacks(request: Request, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Problem, ...]:
    """What a dry run lets pass and training would refuse: assets that are not there, features that are not built."""
    try:
        heap_variables(read_run(request, argv, environ, training=True), environ)
    except UserError as error:
        return error.problems
    return ()


def heap_variables(run: Run, environ: Mapping[str, str]) -> dict[str, str]:
    """The size of NVSHMEM's heap for the ranks, where the run has one; or a UserError where the user's is too small."""
    heap = heap_of(run) if run.spec.backend == "nvshmem" else None
    return {SYMMETRIC_SIZE: symmetric_size(heap, environ)} if heap else {}


def arguments(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command line behind CONFIG_FILE; a `--job.config_file` of its own comes later and wins."""
    file = environ.get("CONFIG_FILE")
    return ["--job.config_file", file, *argv] if file else [*argv]


def _ranks_in_words(request: Request) -> str:
    here = f"{request.ranks} rank{'s' * (request.ranks != 1)}"
    if request.nodes == 1:
        return here
    return f"{here} on each of {request.nodes} machines (this is number {request.node})"


def supervise(request: Request, argv: Sequence[str], environ: Mapping[str, str], patience: float) -> int:
    """Run the ranks of this machine to their end. Returns the exit code of the run.

    `patience`: the seconds that the ranks have to save and leave when a signal asks for it.
    """
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="quadriga-") as folder:
        child_environ = {
            **environ,
            "PYTHONPATH": _with_our_folder(environ),
            LAUNCHER_PID: str(os.getpid()),
            RECORDS: folder,
        }
        command = [sys.executable, "-m", "quadriga.launch.agent", *torchrun_arguments(request), *argv]
        with heeding(patience) as signals:
            # A session of its own: the terminal's Ctrl-C reaches the launcher alone, which passes it on once. An agent
            # that has only begun to start is not to die of a wish to save: it takes it up when it is ready.
            signal.pthread_sigmask(signal.SIG_BLOCK, {SAVE})
            child = subprocess.Popen(command, env=child_environ, start_new_session=True)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {SAVE})
            signals.pass_to(child)
            code = child.wait()
        collect_orphans()
        return conclude(Path(folder), request.ranks, code, signals.to_leave)


def torchrun_arguments(request: Request) -> list[str]:
    """Where the ranks meet, and what they run."""
    meeting = ["--nnodes", str(request.nodes), "--rdzv-id", "quadriga"]
    if request.nodes == 1:
        meeting += ["--rdzv-backend", LOOPBACK_RENDEZVOUS]
    else:
        meeting += ["--rdzv-backend", "static", "--rdzv-endpoint", str(request.endpoint)]
        meeting += ["--node-rank", str(request.node)]
    ranks = ["--nproc-per-node", str(request.ranks), "--max-restarts", str(request.restarts)]
    return [*meeting, *ranks, "--signals-to-handle", TORCHRUNS_OWN, "-m", "quadriga.train"]


def _with_our_folder(environ: Mapping[str, str]) -> str:
    ours = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [ours, environ.get("PYTHONPATH")]))


class Signals:
    """What the launcher was told, passed on to the agent; `to_leave` are those that ask for the end of the run.

    A second Ctrl-C ends all at once, and so does the end of `patience` seconds after the first wish to leave: the ranks
    die with the agent.
    """

    def __init__(self, patience: float) -> None:
        self.to_leave: list[int] = []
        self._patience = patience
        self._early: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None

    def pass_to(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        while self._early:
            child.send_signal(self._early.pop(0))

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGALRM:
            self._end("they were not done within %g s (checkpoint.timeout_seconds): killed", self._patience)
            return
        if number != SAVE:
            self.to_leave.append(number)
            if len(self.to_leave) == 1:
                signal.setitimer(signal.ITIMER_REAL, self._patience)
        if self.to_leave.count(signal.SIGINT) > 1:
            self._end("interrupted twice: killed")
        elif self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)

    def _end(self, why: str, *facts: object) -> None:
        if self._child is not None:
            logger.error(f"{why}; saves that were finished before are whole", *facts)
            self._child.kill()


@contextmanager
def heeding(patience: float) -> Iterator[Signals]:
    """Take signals as wishes about the run, and no longer as our own death."""
    signals = Signals(patience)
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
    for number in map(int, (*LEAVE, SAVE, signal.SIGALRM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
            before[number] = signal.signal(number, signals.receive)
    try:
        yield signals
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def collect_orphans() -> None:
    """See the last of what the agent left behind, so that neither a process nor a zombie of the run remains."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.02)
        except ChildProcessError:
            return
